"""End of a run's process: together with its launcher, and with one message for equal failures."""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import socket
import sys
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

#: Option of prctl (<linux/prctl.h>): the signal that the kernel sends when the parent thread ends.
PR_SET_PDEATHSIG = 1
#: Variable that torchrun sets for its ranks, and for them alone.
LAUNCHER_VARIABLE = "TORCHELASTIC_RUN_ID"
#: Longest wait for torchrun's store; after it the message is printed without asking.
STORE_TIMEOUT = timedelta(seconds=5)


def end_with_launcher() -> None:
    """Let the kernel kill this process when torchrun ends, however that happens.

    Without torchrun it does nothing: a run that was started in a shell may outlive it (`nohup`).

    Raises:
        OSError: the kernel refuses.
    """
    if LAUNCHER_VARIABLE in os.environ:
        end_with_parent(os.getppid())
        if _is_adopted():  # torchrun ended before this process asked for its own end
            os.kill(os.getpid(), signal.SIGKILL)


def _is_adopted() -> bool:
    """Tell whether this rank's parent is the machine's first process, which adopts orphans.

    In a container the first process can be torchrun, which runs the rank's Python, or a shell with
    the rank's variables. Other adopters look like any parent.
    """
    first = Path("/proc/1")
    if os.getppid() != 1:
        return False
    try:
        if (first / "exe").readlink() == Path("/proc/self/exe").readlink():
            return False
        return f"{LAUNCHER_VARIABLE}=".encode() not in (first / "environ").read_bytes()
    except OSError:  # another user's
        return True


def end_with_parent(parent: int) -> None:
    """Let the kernel kill this process when the process `parent`, which started it, ends.

    The kernel watches the thread that started this process; torchrun's is its main thread. A
    program that this process becomes by exec is killed too.

    Raises:
        OSError: the kernel refuses.
    """
    system = ctypes.CDLL(None, use_errno=True)
    if system.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it ended before prctl, and the kernel will send nothing
        os.kill(os.getpid(), signal.SIGKILL)


def fail(text: str) -> NoReturn:
    """Print `text` once per machine, from the first rank that fails with it; exit with code 1.

    torchrun ends the other ranks as soon as this one is gone. The exit skips the interpreter's
    shutdown, which would wait for collectives that the other ranks never join.
    """
    if _is_first_to_say(text):
        print(text, file=sys.stderr, flush=True)
    os._exit(1)


def _is_first_to_say(text: str) -> bool:
    """Ask torchrun's store if this rank is the machine's first with `text`; True on no answer."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    # After a restart by torchrun the same message is printed again.
    said = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT')} {socket.gethostname()} {text}"
    try:
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=STORE_TIMEOUT,
        )
        return bool(store.add(f"said/{hashlib.sha256(said.encode()).hexdigest()}", 1) == 1)
    except (RuntimeError, ValueError):  # torch's own errors are RuntimeErrors
        return True
