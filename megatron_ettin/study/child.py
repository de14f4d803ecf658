"""Beginnings of a study's child processes; the kernel ends each with its parent.

`-m megatron_ettin.study.child PARENT_PID COMMAND...` is a command that ends so. Setting this
between fork and exec instead, as `subprocess` can, is not safe in a process with threads.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from megatron_ettin.ending import end_with_parent


def begin_worker(parent_pid: int, environment: Mapping[str, str]) -> None:
    """Begin a process that runs stages, before it imports a library that reads the variables."""
    end_with_parent(parent_pid)
    os.environ.update(environment)


def main() -> None:
    """Become the command."""
    end_with_parent(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
