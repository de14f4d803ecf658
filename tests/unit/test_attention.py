"""Attention over a packed stream against dense attention with the mask written out, in float64."""

import math
from collections.abc import Callable
from functools import partial
from itertools import chain
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_ettin.model import attention_gpu
from megatron_ettin.model.attention import (
    CoreAttention,
    MixedRows,
    PackedRows,
    SdpaCoreAttention,
    random_projection,
)
from megatron_ettin.model.attention_gpu import (
    TransformerEngineCoreAttention,
    VarlenCoreAttention,
)
from tests.ranks import lone_rank

HEADS, SIZE = 2, 8
#: Lengths around the window of 16 and its blocks; zeros are the empty segments of a row's tail.
LENGTHS = [1, 15, 16, 17, 0, 33, 50, 0, 5]


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, left: int | None, right: int | None
) -> torch.Tensor:
    """Attend slot by slot: [t, 1, heads, size] -> [t, 1, heads * size]."""
    segment = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    i, j = torch.arange(len(segment))[:, None], torch.arange(len(segment))[None, :]
    visible = segment[:, None] == segment[None, :]
    if left is not None:
        visible &= j >= i - left
    if right is not None:
        visible &= j <= i + right
    scores = torch.einsum("ibhd,jbhd->hij", q, k) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return torch.einsum("hij,jbhd->ibhd", weights, v).reshape(len(segment), 1, -1)


def core_attention(
    mask_type: AttnMaskType,
    window: tuple[int, int] | None,
    kind: Callable[..., CoreAttention] = SdpaCoreAttention,
    size: int = SIZE,
) -> CoreAttention:
    config: Any = SimpleNamespace(
        window_size=window,
        window_attn_skip_freq=None,
        num_attention_heads=HEADS,
        kv_channels=size,
        tensor_model_parallel_size=1,
        context_parallel_size=1,
    )
    return kind(config, 1, mask_type, "self", pg_collection=lone_rank())


MASKS = pytest.mark.parametrize(
    ("mask_type", "window", "left", "right"),
    [
        (AttnMaskType.padding, None, None, None),
        (AttnMaskType.causal, None, None, 0),
        (AttnMaskType.padding, (16, 16), 16, 16),
        (AttnMaskType.causal, (16, 0), 16, 0),
        # The longest document has 50 slots: the last window that hides a key, and two that do not.
        (AttnMaskType.padding, (48, 48), 48, 48),
        (AttnMaskType.causal, (48, 0), 48, 0),
        (AttnMaskType.padding, (49, 49), 49, 49),
        (AttnMaskType.causal, (49, 0), 49, 0),
        (AttnMaskType.padding, (400, 400), 400, 400),
    ],
)


@MASKS
def test_output_and_gradients_equal_dense_attention(
    mask_type: AttnMaskType, window: tuple[int, int] | None, left: int | None, right: int | None
) -> None:
    torch.manual_seed(0)
    t = sum(LENGTHS)
    borders = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    packed = PackedRows.of(borders, max(LENGTHS), torch.zeros(t), torch.zeros(1))
    inputs = [torch.randn(t, 1, HEADS, SIZE, dtype=torch.float64) for _ in range(3)]
    ours = [x.clone().requires_grad_() for x in inputs]
    reference = [x.clone().requires_grad_() for x in inputs]
    out = core_attention(mask_type, window)(*ours, None, packed_seq_params=packed)
    expected = dense(*reference, left, right)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    direction = torch.randn_like(out)
    out.backward(direction)
    expected.backward(direction)
    for mine, theirs in zip(ours, reference, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [None, (16, 16)])
@pytest.mark.parametrize("built_as", [AttnMaskType.padding, AttnMaskType.causal])
def test_rows_of_both_directions_attend_as_if_alone(
    built_as: AttnMaskType, window: tuple[int, int] | None
) -> None:
    """Whatever direction the model was built for: rows 0 and 2 are causal, row 1 is not."""
    torch.manual_seed(0)
    seq_length, lengths = 40, ([40], [7, 33], [25, 15])
    borders = torch.tensor([0, *chain(*lengths)]).cumsum(0).int()
    is_causal = (True, False, True)

    def part(kind: bool, name: Literal["causal", "bidirectional"]) -> Any:
        rows = [row for row, causal in enumerate(is_causal) if causal == kind]
        slots = torch.cat([torch.arange(seq_length) + seq_length * row for row in rows])
        ends = torch.tensor([0, *chain(*(lengths[row] for row in rows))]).cumsum(0).int()
        none = torch.zeros(1)
        return slots, PackedRows.of(ends, seq_length, none, none, attention=name)

    parts = (part(True, "causal"), part(False, "bidirectional"))
    places = torch.cat([slots for slots, _ in parts]).argsort()
    t = 3 * seq_length
    packed = PackedRows.of(
        borders, seq_length, torch.zeros(t), torch.zeros(3), mixed=MixedRows(parts, places)
    )
    inputs = [torch.randn(t, 1, HEADS, SIZE, dtype=torch.float64) for _ in range(3)]
    ours = [x.clone().requires_grad_() for x in inputs]
    alone = [x.clone().requires_grad_() for x in inputs]
    out = core_attention(built_as, window)(*ours, None, packed_seq_params=packed)
    expected = []
    for row, causal in enumerate(is_causal):
        mask_type = AttnMaskType.causal if causal else AttnMaskType.padding
        own = [x[seq_length * row : seq_length * (row + 1)] for x in alone]
        ends = torch.tensor([0, *lengths[row]]).cumsum(0).int()
        seen = window and (window[0], 0 if causal else window[1])
        one = PackedRows.of(ends, seq_length, torch.zeros(1), torch.zeros(1))
        expected.append(core_attention(mask_type, seen)(*own, None, packed_seq_params=one))
    torch.testing.assert_close(out, torch.cat(expected), rtol=0, atol=1e-12)
    direction = torch.randn_like(out)
    out.backward(direction)
    torch.cat(expected).backward(direction)
    for mine, theirs in zip(ours, alone, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-12)


class LargestTensor(TorchDispatchMode):
    """Notes the elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *(x.numel() for x in tensors)])
        return out


@pytest.mark.parametrize("mask_type", [AttnMaskType.padding, AttnMaskType.causal])
def test_a_window_beyond_every_document_costs_what_global_attention_does(
    mask_type: AttnMaskType,
) -> None:
    t = sum(LENGTHS)
    borders = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    inputs = [torch.randn(t, 1, HEADS, SIZE, requires_grad=True) for _ in range(3)]
    outs, largest = [], []
    right = 0 if mask_type == AttnMaskType.causal else 4000
    for window in (None, (4000, right)):
        packed = PackedRows.of(borders, 8192, torch.zeros(t), torch.zeros(1))
        with LargestTensor() as seen:
            out = core_attention(mask_type, window)(*inputs, None, packed_seq_params=packed)
            out.sum().backward()
        assert not packed.masks
        outs.append(out)
        largest.append(seen.elements)
    assert torch.equal(outs[0], outs[1])
    assert largest[0] == largest[1]


class FlashInPython(TorchDispatchMode):
    """Computes torch's two kernels in Python, from their arguments alone; checks what is fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.queries: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        match func.overloadpacket.__name__:
            case "_flash_attention_forward":
                q, k, v, begins, *rest, is_mask_returned = args
                assert not is_mask_returned
                self.queries.append(q.data_ptr())
                weights = self.weights(q, k, begins, rest, kwargs)
                self.out = torch.einsum("hij,jhd->ihd", weights, v)
                # Numbers that only the second kernel reads.
                self.kept = [torch.full([], float(i)) for i in range(3)]
                return (self.out, *self.kept, torch.empty(0))
            case "_flash_attention_backward":
                gradient, q, k, v, out, logsumexp, begins, *rest, seed, offset = args
                assert out.data_ptr() == self.out.data_ptr()
                assert [logsumexp, seed, offset] == self.kept
                weights = self.weights(q, k, begins, rest, kwargs)
                of_weights = torch.einsum("ihd,jhd->hij", gradient, v)
                of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True))
                of_scores /= math.sqrt(SIZE)
                return (
                    torch.einsum("hij,jhd->ihd", of_scores, k),
                    torch.einsum("hij,ihd->jhd", of_scores, q),
                    torch.einsum("hij,ihd->jhd", weights, gradient),
                )
        return func(*args, **(kwargs or {}))

    def weights(
        self, q: torch.Tensor, k: torch.Tensor, begins: torch.Tensor, rest: Any, kwargs: Any
    ) -> torch.Tensor:
        """Return the softmax [heads, t, t] over the keys in the window of each query's segment."""
        keys_begin, longest, longest_keys, dropout, is_causal = rest
        assert torch.equal(begins, keys_begin)
        assert (longest, longest_keys, dropout) == (max(LENGTHS), max(LENGTHS), 0.0)
        left, right = kwargs["window_size_left"], kwargs["window_size_right"]
        assert is_causal == ((left, right) == (-1, 0))
        assert "scale" not in kwargs  # None: 1 / sqrt(SIZE)
        segment = torch.bucketize(torch.arange(len(q)), begins[1:], right=True)
        distance = torch.arange(len(q))[None, :] - torch.arange(len(q))[:, None]
        visible = segment[:, None] == segment[None, :]
        visible &= (distance >= -left) | (left < 0)
        visible &= (distance <= right) | (right < 0)
        scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(SIZE)
        return scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)


@MASKS
def test_varlen_hands_torchs_kernels_what_they_need(
    mask_type: AttnMaskType, window: tuple[int, int] | None, left: int | None, right: int | None
) -> None:
    """The kernels are computed in Python; on a GPU the test below runs them."""
    torch.manual_seed(0)
    t = sum(LENGTHS)
    borders = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    packed = PackedRows.of(borders, max(LENGTHS), torch.zeros(t), torch.zeros(1))
    # Views of one buffer, as the projection writes it.
    ours = torch.randn(t, 1, HEADS, 3, SIZE, dtype=torch.float64, requires_grad=True)
    reference = ours.detach().clone().requires_grad_()
    with FlashInPython() as kernels:
        out = core_attention(mask_type, window, VarlenCoreAttention)(
            *ours.unbind(dim=3), None, packed_seq_params=packed
        )
        direction = torch.randn_like(out)
        out.backward(direction)
    assert kernels.queries == [ours.data_ptr()]
    expected = dense(*reference.unbind(dim=3), left, right)
    expected.backward(direction)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.grad, reference.grad, rtol=0, atol=1e-12)


class Engine(torch.nn.Module):
    """Stand-in for Transformer Engine's attention: what it is handed, attended densely."""

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.inputs: tuple[torch.Tensor, ...] = ()

    def forward(self, *inputs: torch.Tensor, **lengths: Any) -> torch.Tensor:
        self.inputs = inputs
        assert lengths["max_seqlen_q"] == lengths["max_seqlen_kv"] == max(LENGTHS)
        return dense(*(x.unsqueeze(1) for x in inputs), None, None).squeeze(1)


def test_transformer_engine_gets_tensors_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views of one buffer are a layout that it would have to guess from addresses."""
    kernel = Engine()
    monkeypatch.setattr(attention_gpu, "packed_kernel", lambda *_, **__: kernel)
    t = sum(LENGTHS)
    borders = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    packed = PackedRows.of(borders, max(LENGTHS), torch.zeros(t), torch.zeros(1))
    core = core_attention(AttnMaskType.padding, None, TransformerEngineCoreAttention)
    inputs = random_projection(t, HEADS, SIZE, dtype=torch.float64, device=torch.device("cpu"))
    assert [x.storage_offset() for x in inputs] == [0, SIZE, 2 * SIZE]
    out = core(*(x.unsqueeze(1) for x in inputs), None, packed_seq_params=packed)
    for mine, theirs in zip(inputs, kernel.inputs, strict=True):
        assert torch.equal(mine, theirs)
        assert theirs.is_contiguous()
        assert theirs.untyped_storage().nbytes() == theirs.nbytes
    copies = [x.detach().clone().requires_grad_() for x in inputs]
    expected = dense(*(x.unsqueeze(1) for x in copies), None, None)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    direction = torch.randn_like(out)
    found = torch.autograd.grad(out, inputs, direction)
    for mine, theirs in zip(found, torch.autograd.grad(expected, copies, direction), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(("length", "by_engine"), [(max(LENGTHS), True), (1024, False)])
def test_rows_of_a_length_that_was_not_measured_get_torchs_kernel(
    length: int, by_engine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, calls = Engine(), []

    def varlen(query: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        calls.append("torch")
        return query

    monkeypatch.setattr(attention_gpu, "packed_kernel", lambda *_, **__: kernel)
    monkeypatch.setattr(attention_gpu, "varlen", varlen)
    builder = partial(TransformerEngineCoreAttention, row_lengths=frozenset({length}))
    core: Any = core_attention(AttnMaskType.padding, None, builder)
    t = sum(LENGTHS)
    borders = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    packed = PackedRows.of(borders, max(LENGTHS), torch.zeros(t), torch.zeros(1))
    qkv = random_projection(t, HEADS, SIZE, dtype=torch.float64, device=torch.device("cpu"))
    core.attend(*qkv, packed)
    assert calls == ([] if by_engine else ["torch"])
    assert bool(kernel.inputs) == by_engine


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [VarlenCoreAttention, TransformerEngineCoreAttention])
@MASKS
def test_kernels_for_gpus_equal_dense_attention(
    mask_type: AttnMaskType,
    window: tuple[int, int] | None,
    left: int | None,
    right: int | None,
    kind: type[CoreAttention],
) -> None:
    if kind is TransformerEngineCoreAttention:
        pytest.importorskip("transformer_engine.pytorch")
    torch.manual_seed(0)
    t, size = sum(LENGTHS), 64
    borders = torch.tensor([0, *LENGTHS]).cumsum(0).int().cuda()
    packed = PackedRows.of(borders, max(LENGTHS), torch.zeros(t), torch.zeros(1))
    # Views of one buffer, as a layer hands them over.
    rounded = torch.randn(t, 1, HEADS, 3, size).bfloat16()
    ours = rounded.cuda().requires_grad_()
    reference = rounded.double().requires_grad_()
    out = core_attention(mask_type, window, kind, size).cuda()(
        *ours.unbind(dim=3), None, packed_seq_params=packed
    )
    expected = dense(*reference.unbind(dim=3), left, right)
    direction = torch.randn_like(expected).bfloat16()
    out.backward(direction.cuda())
    expected.backward(direction.double())
    # Products of bf16, sums of float32: a few roundings of 2^-8 at values of up to 4.
    torch.testing.assert_close(out.cpu().double(), expected, rtol=0.02, atol=0.02)
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad.cpu().double(), reference.grad, rtol=0.03, atol=0.05)
