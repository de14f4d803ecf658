"""Process groups of torch.distributed and Megatron-Core; the only user of `parallel_state`.

NCCL where there is a GPU, gloo on CPU, chosen by what is there.

No GPU has run its code for GPUs yet.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TypeVar, cast

import torch
from megatron.core import parallel_state, tensor_parallel
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.utils import deterministic

from megatron_ettin import cpu
from megatron_ettin.config import HardwareConfig

T = TypeVar("T")
logger = logging.getLogger(__name__)

#: Long enough for a checkpoint of a large model, short enough that a dead rank is noticed.
TIMEOUT = timedelta(minutes=30)
#: Matmuls whose code a CPU keeps: more than a step repeats. With 64 of them steps got slower.
KERNELS_KEPT = "128"


def device() -> torch.device:
    """Return the device of this rank."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@contextmanager
def process_groups(hardware: HardwareConfig) -> Iterator[None]:
    """Run the body inside initialised process groups and destroy them afterwards.

    Under torchrun the world comes from its environment; without it the world is this process.

    Raises:
        ValueError: the world size is not a multiple of the ranks of one replica, or CUDA graphs
            are asked for without a GPU.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size % hardware.model_ranks:
        raise ValueError(
            f"{world_size} processes cannot be laid out as tensor_parallel_size "
            f"{hardware.tensor_parallel_size} x pipeline_parallel_size "
            f"{hardware.pipeline_parallel_size} x context_parallel_size "
            f"{hardware.context_parallel_size}: start a multiple of {hardware.model_ranks} with "
            f"torchrun"
        )
    if hardware.cuda_graphs and device().type == "cpu":
        raise ValueError("hardware.cuda_graphs: needs a GPU, but there is none: give false")
    if hardware.threads_per_rank is not None:
        torch.set_num_threads(hardware.threads_per_rank)
    # A matmul over many slots may be split into parts; their sums would be rounded to bfloat16.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if device().type == "cuda":
        torch.cuda.set_device(device())
    else:
        _bound_kernel_caches()
        cpu.adapt_megatron()
    with _algorithms(is_deterministic=hardware.deterministic), _stream(hardware):
        _init_process_group(world_size)
        try:
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=hardware.tensor_parallel_size,
                pipeline_model_parallel_size=hardware.pipeline_parallel_size,
                context_parallel_size=hardware.context_parallel_size,
            )
            # Megatron-Core forks this generator for randomness that differs between tensor-parallel
            # ranks. Our code draws from counters only, but its modules need the generator to exist.
            tensor_parallel.model_parallel_cuda_manual_seed(1)
            yield
        finally:
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()


@contextmanager
def _algorithms(*, is_deterministic: bool) -> Iterator[None]:
    """Inside the block, take only algorithms that give the same bits each time, if asked to.

    cuBLAS, NCCL and Transformer Engine read these variables at their first use, so the block must
    begin before that.
    """
    if not is_deterministic:
        yield
        return
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # All collectives have the ring, so NCCL's tuning cannot choose another order of summation.
    os.environ.setdefault("NCCL_ALGO", "Ring")
    # Torch would also fill every new tensor with NaN: a pass over memory that only debugging needs.
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]


def _bound_kernel_caches() -> None:
    """Bound the number of 16-bit matmuls whose code a CPU keeps, unless the environment does.

    oneDNN and torch's layer over it keep the code of 1,024 matmuls each, one per shape. Documents
    have new lengths in each step, so memory would grow for sixty steps, to twice what a run needs.
    The variables are read at the first matmul.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, KERNELS_KEPT)


def _stream(hardware: HardwareConfig) -> AbstractContextManager[object]:
    """Return the block in which a rank's GPU works on a stream that graphs can capture.

    The default stream cannot be captured. The whole run uses the other stream, because autograd
    accumulates gradients on the stream that created the weights.
    """
    if not hardware.cuda_graphs:
        return nullcontext()
    return torch.cuda.stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]


def _init_process_group(world_size: int) -> None:
    backend = "nccl" if device().type == "cuda" else "gloo"
    is_launched = "RANK" in os.environ
    torch.distributed.init_process_group(
        backend,
        store=_store_of_this_start() if is_launched else HashStore(),
        rank=int(os.environ.get("RANK", "0")),
        world_size=world_size,
        timeout=TIMEOUT,
    )


def _store_of_this_start() -> Store:
    """Return the store at MASTER_ADDR, without what earlier starts of these ranks left there.

    torchrun (2.13) keeps its store when it starts ranks again. They would find the addresses of the
    ranks before them, and fail, or wait for each other until their time is out.
    """
    store, _, _ = next(rendezvous("env://", timeout=TIMEOUT))
    store.set_timeout(TIMEOUT)
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        # Each host's torchrun counts for itself, so only a store that it makes anew is empty.
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            logger.warning(
                "ranks that torchrun starts again may wait for each other for %s: set "
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every host before torchrun",
                TIMEOUT,
            )
        return store
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"start_{start}", store)


def rank() -> int:
    """Return the global rank."""
    return torch.distributed.get_rank()


def world_size() -> int:
    """Return the number of ranks."""
    return torch.distributed.get_world_size()


def local_rank() -> tuple[int, int]:
    """Return (rank, size) among this machine's ranks; (0, 1) without torchrun."""
    if "LOCAL_WORLD_SIZE" not in os.environ:
        return 0, 1
    return int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])


def is_main_rank() -> bool:
    """Tell whether this rank logs and writes."""
    return rank() == 0


def data_parallel() -> tuple[int, int]:
    """Return (rank, size) along the data-parallel axis."""
    return (
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )


def data_parallel_group() -> torch.distributed.ProcessGroup:
    """Return the group of ranks that hold the same weights."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def data_parallel_group_gloo() -> torch.distributed.ProcessGroup:
    """Return the gloo twin of `data_parallel_group`."""
    return parallel_state.get_data_parallel_group_gloo(with_context_parallel=True)


def world_group() -> torch.distributed.ProcessGroup:
    """Return the group of all ranks."""
    group = torch.distributed.group.WORLD
    assert group is not None, "process groups are not initialised"
    return group


def stage_group() -> torch.distributed.ProcessGroup:
    """Return the ranks of one pipeline stage: they hold the shards of the same tensors."""
    return parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)


def model_parallel_rank() -> int:
    """Return this rank's index within the model-parallel (tensor x pipeline) group."""
    return torch.distributed.get_rank(parallel_state.get_model_parallel_group())


def tensor_parallel_rank() -> int:
    """Return this rank's index along the tensor-parallel axis."""
    return parallel_state.get_tensor_model_parallel_rank()


def tensor_parallel_size() -> int:
    """Return the number of ranks that share each layer."""
    return parallel_state.get_tensor_model_parallel_world_size()


def tensor_parallel_group() -> torch.distributed.ProcessGroup:
    """Return the ranks that share each layer."""
    return parallel_state.get_tensor_model_parallel_group()


def pipeline_parallel_rank() -> int:
    """Return this rank's stage."""
    return parallel_state.get_pipeline_model_parallel_rank()


def is_first_stage() -> bool:
    """Tell whether this rank holds the embedding."""
    return parallel_state.is_pipeline_first_stage()


def is_last_stage() -> bool:
    """Tell whether this rank holds the head and computes the loss."""
    return parallel_state.is_pipeline_last_stage()


def context_parallel() -> tuple[int, int]:
    """Return (rank, size) along the context-parallel axis."""
    return (
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_context_parallel_world_size(),
    )


def counts_losses() -> bool:
    """Tell whether this rank's losses count: for each scored slot exactly one rank's do."""
    return is_last_stage() and tensor_parallel_rank() == 0


def counts_rows() -> bool:
    """Tell whether this rank counts in sums over rows: exactly one rank of a replica does."""
    return counts_losses() and context_parallel()[0] == 0


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of `values` over all ranks (int64 sums wrap modulo 2^64)."""
    total = values.to(device(), copy=True)
    torch.distributed.all_reduce(total)
    return total


def cpu_group() -> torch.distributed.ProcessGroup:
    """Return a group of all ranks that works on the CPU. All ranks call this."""
    if device().type == "cpu":
        return world_group()
    group: torch.distributed.ProcessGroup = torch.distributed.new_group(
        backend="gloo", timeout=TIMEOUT
    )
    return group


def largest(value: int, group: torch.distributed.ProcessGroup) -> int:
    """Return the largest `value` of any rank of a `cpu_group`; no rank waits for its GPU."""
    if group.size() == 1:
        return value
    values = torch.tensor([value])
    torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX, group=group)
    return int(values)


def broadcast_values(values: torch.Tensor) -> torch.Tensor:
    """Return rank 0's `values` on all ranks; they are on this rank's device."""
    torch.distributed.broadcast(values, src=0)
    return values


def broadcast(value: T) -> T:
    """Return rank 0's value on all ranks; it is pickled."""
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def all_gather(value: T) -> list[T]:
    """Return the values of all ranks, by rank; they are pickled. Without groups, return [value]."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[T] = [value] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def gather(value: T) -> list[T]:
    """Return the values of all ranks, by rank, on the main rank, [] elsewhere; they are pickled."""
    values: list[T] = [value] * world_size() if is_main_rank() else []
    torch.distributed.gather_object(value, values if is_main_rank() else None, dst=0)
    return values


def from_main_rank(compute: Callable[[], T]) -> T:
    """Return on all ranks what `compute` returns on the main rank; the others do not call it.

    Raises:
        OSError, ValueError: `compute` raised it; all ranks raise it alike.
    """
    outcome: T | OSError | ValueError | None = None
    if is_main_rank():
        try:
            outcome = compute()
        except (OSError, ValueError) as error:
            outcome = error
    told = broadcast(outcome)
    if isinstance(told, OSError | ValueError):
        raise told
    return cast(T, told)


def require_equal(what: str, text: str) -> None:
    """Raise ValueError on all ranks unless all of them were given the same `text`."""
    digests = all_gather(hashlib.sha256(text.encode()).hexdigest())
    if differing := [other for other, digest in enumerate(digests) if digest != digests[0]]:
        raise ValueError(
            f"{what} differs between rank 0 and ranks {differing}: was a file changed while the "
            f"run started, or does another machine have another copy?"
        )


def barrier() -> None:
    """Wait for all ranks."""
    torch.distributed.barrier()
