"""Program of one of several ranks: the same runs in many layouts, one after the other.

Arguments: a JSON list of cases {"processes", "port", "arguments"}, in a file. A case is a run of
pretrain over the first `processes` ranks, which meet at `port`. One start for all of them, because
a rank's imports take longer than its work.
"""

import json
import os
import sys
from pathlib import Path

from megatron_ettin.config import parse_args
from megatron_ettin.pretrain import pretrain


def main() -> None:
    rank = int(os.environ["RANK"])
    for case in json.loads(Path(sys.argv[1]).read_text()):
        if rank < case["processes"]:
            os.environ["WORLD_SIZE"] = str(case["processes"])
            os.environ["MASTER_PORT"] = str(case["port"])
            pretrain(parse_args(case["arguments"]))


if __name__ == "__main__":
    main()
