"""A GPU that is not there: torch derives the shapes of its tensors, and nothing is computed.

Tensors are on torch's device "meta" and say that they are on a GPU, so the code takes the paths of
a GPU, forward and backward. What would be launched is noted. An operation whose result the host
needs, and so would wait for, raises. (torch's FakeTensorMode has tensors of the device "cuda", but
autograd asks for that device, which a build of torch without CUDA does not know.)
"""

from __future__ import annotations

import functools
import importlib
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda:0")
#: How torch names the reading of two attributes.
IS_CUDA, DEVICE = (vars(torch._C.TensorBase)[name].__get__ for name in ("is_cuda", "device"))
#: Passes over the first tensor of the kernels that write where they read.
PASSES = {"rotate_rows": 4 / 3, "row_gradient": 2.0}
#: Matmuls, and the place of the left factor among their arguments.
MATMULS = {"mm": 0, "addmm": 1}
#: Operations for each channel of a query and each key that it sees: two matmuls, and five.
ATTENTION_FLOPS = {"_flash_attention_forward": 4, "_flash_attention_backward": 10}
#: Operations that only make or describe a tensor.
WITHOUT_LAUNCH = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("detach", "alias", "_unsafe_view", "_reshape_alias", "lift_fresh", "set_"),
}
#: Operations by which a host reads what a device computes, or sends it what a Python list holds.
WAITS = {
    *("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "unique_dim", "_unique2"),
    *("unique_consecutive", "equal", "allclose", "bincount"),
}


@dataclass(frozen=True)
class Launch:
    """Work that a host gives to the device in one call."""

    name: str
    num_bytes: int
    """Bytes of memory that are read and written, each tensor once."""
    flops: int = 0
    """Floating-point operations of a matmul, or of an attention for each key that a query sees."""
    window: tuple[int, int] | None = None
    """Keys to the left and to the right that a query of an attention sees; -1: its document."""


class Launches(TorchDispatchMode):
    """Notes what is launched while it is entered; raises where a host would wait."""

    def __init__(self) -> None:
        """Start with nothing noted."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.noted: list[Launch] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation of torch on fake tensors, and note it.

        Raises:
            RuntimeError: the host would wait for its result.
        """
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if host_waits(name, args, kwargs):
            raise RuntimeError(f"{func}: a host would wait here for its device")
        out = func(*args, **kwargs)
        if not (func.is_view or name in WITHOUT_LAUNCH):
            num_bytes = _num_bytes(tree_leaves((args, kwargs))) + _num_bytes(tree_leaves(out))
            flops, window = 0, None
            if name in MATMULS:
                flops = 2 * out.numel() * args[MATMULS[name]].shape[1]
            elif name in ATTENTION_FLOPS:
                flops = ATTENTION_FLOPS[name] * args[0].numel()
                window = (kwargs["window_size_left"], kwargs["window_size_right"])
            self.noted.append(Launch(name, num_bytes, flops, window))
        return out

    def note_kernel(self, name: str, arguments: Sequence[Any]) -> None:
        """Note a kernel of Triton's; each tensor counts once, or as often as PASSES says."""
        unique = {id(x.untyped_storage()): x for x in arguments if isinstance(x, torch.Tensor)}
        first, *rest = unique.values()
        num_bytes = round(PASSES.get(name, 1.0) * _num_bytes([first])) + _num_bytes(rest)
        self.noted.append(Launch(name, num_bytes))


def host_waits(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether a host waits for an operation: for its result, or for the size of it."""
    match name:
        case "repeat_interleave":
            return kwargs.get("output_size") is None
        case "index":
            return any(i is not None and i.dtype == torch.bool for i in args[1])
    return name in WAITS


def _num_bytes(leaves: Sequence[Any]) -> int:
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    # An expanded tensor has more elements than memory.
    return sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in tensors)


@contextmanager
def fake_gpu() -> Iterator[Launches]:
    """Make the machine one with a GPU, on which new tensors are; yield what is launched there.

    Process groups must exist already.
    """
    launches = Launches()
    with ExitStack() as stack:
        for module in _kernel_modules(launches):
            stack.enter_context(module)
        stack.enter_context(mock.patch("torch.cuda.is_available", return_value=True))
        stack.enter_context(mock.patch("torch.cuda.current_device", return_value=GPU))
        stack.enter_context(torch.device("meta"))
        stack.enter_context(_SaysGpu())
        stack.enter_context(launches)
        yield launches


class _SaysGpu(TorchFunctionMode):
    """Calls the device "meta", whose tensors have no memory, a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == IS_CUDA:
            return args[0].is_meta
        if func == DEVICE:
            return GPU if args[0].is_meta else args[0].device
        args, kwargs = tree_map(_on_meta, (args, kwargs or {}))
        return func(*args, **kwargs)


def _on_meta(argument: Any) -> Any:
    """Return the argument, or the device "meta" in place of the GPU."""
    return (
        torch.device("meta") if isinstance(argument, torch.device) and argument == GPU else argument
    )


def _kernel_modules(launches: Launches) -> Iterator[Any]:
    """Yield patches by which the modules of kernels have some that are noted and do nothing.

    Triton may be absent, and cannot launch what has no memory.
    """
    triton = types.ModuleType("triton")
    language: Any = types.ModuleType("triton.language")
    language.constexpr = _Constant
    triton.__dict__.update(
        language=language,
        jit=functools.partial(_jit, launches),
        cdiv=lambda a, b: -(-a // b),
        next_power_of_2=lambda n: 1 << max(n - 1, 0).bit_length(),
    )
    package = importlib.import_module("megatron_ettin.model")
    (folder,) = package.__path__
    names = [f"megatron_ettin.model.{file.stem}" for file in Path(folder).glob("*_triton.py")]
    with mock.patch.dict(sys.modules, {"triton": triton, "triton.language": language}):
        for name in names:
            sys.modules.pop(name, None)
        # An import also binds a module's name in its package, where it would outlive the patch.
        with mock.patch.dict(vars(package)):
            ours = {name: importlib.import_module(name) for name in names}
    yield mock.patch.dict(sys.modules, ours)
    for name, module in ours.items():
        yield mock.patch.object(package, name.rpartition(".")[2], module, create=True)


class _Constant:
    """Stand-in for what `tl.constexpr` makes outside of kernels."""

    def __init__(self, value: int) -> None:
        self.value = value


def _jit(launches: Launches, function: Any = None, **_: Any) -> Any:
    """Return a kernel, or with options only a decorator for one."""
    if function is None:
        return functools.partial(_jit, launches)
    return _Kernel(launches, function.__name__)


class _Kernel:
    """A kernel that is noted when it is launched."""

    def __init__(self, launches: Launches, name: str) -> None:
        self.launches, self.name = launches, name

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        if not all(0 < size < 2**31 for size in grid):
            raise ValueError(f"{self.name}: a grid of {grid} programs")

        def launch(*arguments: Any, **_: Any) -> None:
            self.launches.note_kernel(self.name, arguments)

        return launch
