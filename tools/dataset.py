"""Look into a tokenised corpus: verify it, describe it, show a document (docs/data.md)."""

import json
import os
import sys
from collections.abc import Sequence

from megatron_ettin.data.inspection.command_line import parse


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, look, print; draw the figure if one is asked for."""
    command, args = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        answer = command.answer(args)
        if args.figure is not None:
            from megatron_ettin.evaluation.lengths_figure import write_figure

            write_figure(answer.histograms, args.figure)
        if args.json:
            print(json.dumps(answer.to_json(), ensure_ascii=False))
        else:
            for line in answer.lines():
                print(line)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, such as `head`, has enough; Python would complain of it once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    if not answer.passed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
