"""Import of torch and Megatron-Core in less than half of its time."""

from __future__ import annotations

import functools
import gc
import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def import_megatron_core() -> None:
    """Import Megatron-Core, if nothing has, without importing torch's compiler.

    What is imported stays to the end, so the garbage collector does not look at it: neither now
    (0.4 CPU seconds) nor in the run.
    """
    if "megatron.core" in sys.modules:
        return
    gc.disable()
    # Megatron-Core 0.19 imports torch's builder of extensions, which warns on a machine without a
    # GPU. Nothing is built.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with compiling_at_first_call():
        importlib.import_module("megatron.core")
    gc.freeze()
    gc.enable()


@contextmanager
def compiling_at_first_call() -> Iterator[None]:
    """Let functions that `torch.compile` decorates inside the block be compiled when first called.

    `torch.compile` imports the compiler at once (torch 2.13: 1.4 CPU seconds), and Megatron-Core
    decorates activations and routers at its import. A run here calls few of them or none.
    """
    import torch

    compile_now = torch.compile

    def compile_later(function: Callable[..., Any] | None = None, **options: Any) -> Any:
        if function is None:
            return functools.partial(compile_later, **options)

        @functools.cache
        def compiled() -> Callable[..., Any]:
            return compile_now(function, **options)

        @functools.wraps(function)
        def call(*args: Any, **named: Any) -> Any:
            return compiled()(*args, **named)

        return call

    torch.compile = compile_later  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_now
