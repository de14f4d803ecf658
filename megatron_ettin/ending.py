"""The end of a run's process: with its launcher, and with one message for all that fail alike."""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import socket
import sys
from datetime import timedelta
from typing import NoReturn

#: Option of prctl (<linux/prctl.h>): a signal that the kernel sends when the parent's thread ends.
PR_SET_PDEATHSIG = 1
#: How long torchrun's store is waited for before a message is printed without asking it.
STORE_TIMEOUT = timedelta(seconds=5)


def end_with_launcher() -> None:
    """Have the kernel kill this process when torchrun ends, however that happens.

    Without torchrun nothing is done: a run that was started in a shell may outlive it (`nohup`).
    torchrun starts its ranks from its main thread, whose end is the process's.

    Raises:
        OSError: the kernel refuses.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid()
    system = ctypes.CDLL(None, use_errno=True)
    if system.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != launcher:  # it ended before the kernel was asked
        os.kill(os.getpid(), signal.SIGKILL)


def fail(text: str) -> NoReturn:
    """Print `text` once per machine, whichever of its ranks comes first, and exit with code 1.

    torchrun ends the other ranks as soon as this one is gone. The interpreter's shutdown is left
    out: it would wait for collectives that the others never join.
    """
    if _is_first_to_say(text):
        print(text, file=sys.stderr, flush=True)
    os._exit(1)


def _is_first_to_say(text: str) -> bool:
    """Ask the store that torchrun keeps for its ranks; without an answer, True."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

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
