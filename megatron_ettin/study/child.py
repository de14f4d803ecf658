"""A command that ends with its parent: `-m megatron_ettin.study.child PARENT_PID COMMAND...`.

The kernel kills it however the parent ends. Setting this between fork and exec instead, as
`subprocess` can, is not safe in a process with threads.
"""

from __future__ import annotations

import os
import sys

from megatron_ettin.ending import end_with_parent


def main() -> None:
    """Become the command."""
    end_with_parent(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
