"""Work in a process of its own, so that whoever waits for it sees how it ended.

A pool of processes waits for ever for a task whose process was killed, for instance because memory
ran out: datatrove's local executor does, and so do the tasks of its Ray executor. Here, the process
that is large is not the pool's, and its end by a signal is an error like any other. It ends with
the process that waits for it too, so that no shard is written twice at a time.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

#: Largest part of a process's last words that is repeated.
ERROR_CHARACTERS = 4000


def run_in_own_process(
    work: Callable[..., object], arguments: Sequence[Any], *, threads: int | None = None
) -> None:
    """Call `work(*arguments)` in a new interpreter and wait for it.

    Args:
        work: a function of a module, which the interpreter imports.
        arguments: what pickle can write.
        threads: of gigatoken and tokenizers; None: one per core.

    Raises:
        RuntimeError: the work failed or was killed; the message has its last words.
    """
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    if threads is not None:
        environment["RAYON_NUM_THREADS"] = str(threads)
    command = [sys.executable, "-m", "megatron_ettin.data.own_process"]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stderr=errors, env=environment
        ) as process:
            assert process.stdin is not None
            try:
                process.stdin.write(pickle.dumps((work, tuple(arguments))))
                process.stdin.flush()
            except BrokenPipeError:
                pass  # it has ended already: its exit status says why
            # Open until the work has ended: the other process takes its end for ours.
            returncode = process.wait()
        errors.seek(0)
        last_words = errors.read()[-ERROR_CHARACTERS:].strip()
    if returncode:
        raise RuntimeError(f"{_ending(returncode)}{': ' * bool(last_words)}{last_words}")


def _ending(returncode: int) -> str:
    if returncode > 0:
        return f"ended with status {returncode}"
    name = signal.Signals(-returncode).name
    return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def main() -> None:
    """Read a function and its arguments from standard input, and call it."""
    work, arguments = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        work(*arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    # Not through the interpreter's end, which waits for the thread's lock on standard input.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _end_with_parent() -> None:
    """End this process when the other end of its standard input closes."""
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    main()
