"""Import of Megatron-Core without torch's compiler, which takes a fifth of a short run on a CPU."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch


def import_megatron_core() -> None:
    """Import Megatron-Core, if nothing has, without importing the compiler."""
    with compiling_at_first_call():
        importlib.import_module("megatron.core")


@contextmanager
def compiling_at_first_call() -> Iterator[None]:
    """Let functions that `torch.compile` decorates inside the block be compiled when first called.

    `torch.compile` imports the compiler at once (torch 2.13: 1.4 CPU seconds), and Megatron-Core
    decorates activations and routers at its import. A run here calls few of them or none.
    """
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

    with mock.patch.object(torch, "compile", compile_later):
        yield
