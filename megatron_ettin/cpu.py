"""Adapter of Megatron-Core to machines without CUDA: a table of names, and a scoped torch mode.

Megatron-Core names "cuda" in places that have nothing to do with a GPU: the device of a scalar, a
random-state getter, a type check. `adapt_megatron` redirects those names, once, when there is no
GPU; the modules, schedules and optimizers that run are Megatron-Core's own. On a GPU nothing here
is used.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer import utils as transformer_utils
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")

#: Modules that build tensors with device="cuda": their name `torch` becomes a redirecting module.
MODULES_NAMING_CUDA = (schedules, transformer_utils)
#: The factories those modules call with device="cuda".
FACTORIES = ("empty", "zeros", "ones", "tensor", "full", "arange", "triu", "tril")


class CpuRngStatesTracker(megatron_random.CudaRNGStatesTracker):  # type: ignore[misc]
    """Megatron-Core's named random states, kept for the CPU generator."""

    def add(self, name: str, seed: int) -> None:
        """Add the random state `name`; the default generator stays where it is."""
        if name in self.states_:
            raise ValueError(f"random state {name!r} exists already")
        before = torch.get_rng_state()
        torch.manual_seed(seed)
        self.states_[name] = torch.get_rng_state()
        torch.set_rng_state(before)

    @contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        """Draw from the random state `name` inside the block."""
        before = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(before)


class CudaNamesOnCpu(TorchFunctionMode):
    """Scoped redirection of device="cuda", Tensor.cuda and Tensor.type, for the optimizers.

    Megatron-Core's optimizers compare `param.type()` with "torch.cuda.FloatTensor" and the like,
    and no table of names can redirect that. Only they run under this mode, because it costs a
    Python call for every call of torch.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Redirect one torch call."""
        kwargs = dict(kwargs or {})
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.cuda:
            return args[0]
        return func(*args, **kwargs)


def optimizer_mode() -> AbstractContextManager[object]:
    """Return the mode under which Megatron-Core's optimizer code runs: a no-op with a GPU."""
    return nullcontext() if torch.cuda.is_available() else CudaNamesOnCpu()


def without_modes() -> AbstractContextManager[None]:
    """Return the block in which torch is called directly, for code that names no device.

    StableAdamW's update makes many small calls, and each would pay for the mode.
    """
    return torch._C.DisableTorchFunction()


def adapt_megatron() -> None:
    """Redirect CUDA names to the CPU; calling it again starts with fresh random states."""
    if torch.cuda.is_available():
        raise RuntimeError("adapt_megatron is for machines without a GPU")
    replacements: tuple[tuple[Any, str, Any], ...] = (
        (torch.cuda, "current_device", lambda: CPU),
        (torch.cuda, "synchronize", lambda *_: None),
        # 0.19 asks for the current stream in the optimizer and the checkpoint writer.
        (torch.cuda, "current_stream", lambda *_: _NoStream()),
        (torch.cuda, "stream", lambda *_: _NoStream()),
        (torch.Tensor, "cuda", lambda tensor, *_, **__: tensor),
        (torch.nn.Module, "cuda", lambda module, *_, **__: module),
        (megatron_random, "_CUDA_RNG_STATE_TRACKER", CpuRngStatesTracker()),
        (megatron_random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", True),
        (megatron_random, "_get_cuda_rng_state", lambda *_, **__: torch.get_rng_state()),
        (
            megatron_random,
            "_set_cuda_rng_state",
            lambda state, *_, **__: torch.set_rng_state(state),
        ),
    )
    for owner, name, value in replacements:
        setattr(owner, name, value)
    for module in MODULES_NAMING_CUDA:
        module.torch = _redirected_torch()


class _NoStream:
    """Stand-in for a CUDA stream on a machine without CUDA, where every call is synchronous."""

    def __enter__(self) -> _NoStream:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def wait_stream(self, _: object) -> None:
        """Return at once: there is nothing to wait for."""

    def synchronize(self) -> None:
        """Return at once: there is nothing to wait for."""


def _redirected_torch() -> types.ModuleType:
    """Return a module that is torch, but for factories called with device="cuda"."""
    facade = types.ModuleType("torch")
    facade.__dict__.update(torch.__dict__)
    for name in FACTORIES:
        setattr(facade, name, _on_cpu(getattr(torch, name)))
    return facade


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return call


def _names_cuda(device: Any) -> bool:
    return device is not None and str(device).startswith("cuda")
