"""The chunked loss against the plain one: torch's cross-entropy over whole logits in float64."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_ettin.model.linear_cross_entropy import linear_cross_entropy

#: Logits reach 400, where float32 is exact to 3e-5: their exponentials are as far off, relatively.
TOLERANCE = 1e-5
POSITIONS, HIDDEN, VOCAB, PADDED = 37, 24, 101, 128


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return hidden states, weight, bias (all leaves) and labels, large enough to overflow exp."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(POSITIONS, HIDDEN, generator=generator) * 6
    weight = torch.randn(PADDED, HIDDEN, generator=generator) * 4
    bias = torch.randn(PADDED, generator=generator)
    labels = torch.randint(0, VOCAB, (POSITIONS,), generator=generator)
    labels[:2] = torch.tensor([0, VOCAB - 1])
    return *(x.to(dtype).requires_grad_() for x in (hidden, weight, bias)), labels


def some_weights(positions: int) -> torch.Tensor:
    """Return weights from 1 / 8 to 1000, as noise levels give."""
    return torch.logspace(-3, 10, positions, base=2.0)


def plain(
    dtype: torch.dtype, scale: float, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """Return losses, weighted if asked, and the gradients of their scaled sum, in float64."""
    *leaves, labels = inputs(dtype)
    hidden, weight, bias = (x.detach().double().requires_grad_() for x in leaves)
    logits = hidden @ weight[:VOCAB].t() + bias[:VOCAB]
    losses = F.cross_entropy(logits, labels, reduction="none")
    if weights is not None:
        losses = losses * weights
    (losses.sum() * scale).backward()
    return losses.detach(), hidden.grad, weight.grad, bias.grad  # type: ignore[return-value]


def relative_distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def alone() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    yield dist.group.WORLD  # type: ignore[misc]
    dist.destroy_process_group()


@pytest.mark.parametrize("weights", [None, some_weights(POSITIONS)], ids=["equal", "weighted"])
@pytest.mark.parametrize("chunk", [1, 8, 36, 37, 1000, None])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, TOLERANCE), (torch.bfloat16, 1e-2)], ids=str
)
def test_losses_and_gradients(
    alone: dist.ProcessGroup,
    chunk: int | None,
    dtype: torch.dtype,
    tolerance: float,
    weights: torch.Tensor | None,
) -> None:
    hidden, weight, bias, labels = inputs(dtype)
    loss = linear_cross_entropy(
        hidden,
        weight,
        bias,
        labels,
        vocab_size=VOCAB,
        group=alone,
        weights=weights,
        chunk_positions=chunk,
    )
    (loss.total * 0.5).backward()
    found = (loss.by_position, hidden.grad, weight.grad, bias.grad)
    for ours, expected in zip(found, plain(dtype, 0.5, weights), strict=True):
        assert ours is not None
        assert relative_distance(ours, expected) <= tolerance
    assert float(loss.total.detach()) == pytest.approx(float(loss.by_position.sum()), rel=1e-6)
    assert weight.grad is not None
    assert not weight.grad[VOCAB:].any(), "columns of padding learn nothing"


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [8, None])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, TOLERANCE), (torch.bfloat16, 1e-2)], ids=str
)
def test_losses_and_gradients_on_a_gpu(
    alone: dist.ProcessGroup, chunk: int | None, dtype: torch.dtype, tolerance: float
) -> None:
    *leaves, labels = inputs(dtype)
    hidden, weight, bias = (x.detach().cuda().requires_grad_() for x in leaves)
    # Positions that only fill up a shape, with the states of others.
    filler = torch.full((5,), -1)
    loss = linear_cross_entropy(
        torch.cat([hidden[:5], hidden]),
        weight,
        bias,
        torch.cat([filler, labels]).cuda(),
        vocab_size=VOCAB,
        group=alone,
        chunk_positions=chunk,
    )
    (loss.total * 0.5).backward()
    assert not loss.by_position[:5].any()
    found = (loss.by_position[5:], hidden.grad, weight.grad, bias.grad)
    for ours, expected in zip(found, plain(dtype, 0.5), strict=True):
        assert ours is not None
        assert relative_distance(ours.cpu(), expected) <= tolerance
    assert weight.grad is not None
    assert not weight.grad[VOCAB:].any(), "columns of padding learn nothing"


@pytest.mark.parametrize("chunk", [1, 8, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_positions_without_a_label_change_nothing(
    alone: dist.ProcessGroup, chunk: int | None, dtype: torch.dtype
) -> None:
    hidden, weight, bias, labels = inputs(dtype)
    # In the middle and at the end, as many as fill chunks of their own.
    place = torch.cat([torch.arange(10), torch.arange(30, 30 + POSITIONS - 10)])
    padded = torch.full((80, HIDDEN), 3.0, dtype=dtype)
    padded[place] = hidden.detach()
    padded.requires_grad_()
    padded_labels = torch.full((80,), -1)
    padded_labels[place] = labels
    padded_weight, padded_bias = (x.detach().clone().requires_grad_() for x in (weight, bias))
    filler = torch.ones(80, dtype=torch.bool).index_fill_(0, place, value=False)

    expected = linear_cross_entropy(hidden, weight, bias, labels, vocab_size=VOCAB, group=alone)
    expected.total.backward()
    loss = linear_cross_entropy(
        padded,
        padded_weight,
        padded_bias,
        padded_labels,
        vocab_size=VOCAB,
        group=alone,
        chunk_positions=chunk,
    )
    loss.total.backward()
    assert padded.grad is not None
    assert not loss.by_position[filler].any()
    assert not padded.grad[filler].any()
    # Sums over other chunks: float32 rounds differently, and bfloat16 rounds each chunk's product.
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    found = (loss.by_position[place], padded.grad[place], padded_weight.grad, padded_bias.grad)
    wanted = (expected.by_position, hidden.grad, weight.grad, bias.grad)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours is not None
        assert theirs is not None
        assert relative_distance(ours, theirs.double()) <= tolerance


def test_nothing_scored_costs_nothing(alone: dist.ProcessGroup) -> None:
    hidden, weight, bias, _ = inputs(torch.float32)
    none = hidden[:0].detach().requires_grad_()
    loss = linear_cross_entropy(
        none, weight, bias, torch.empty(0, dtype=torch.long), vocab_size=VOCAB, group=alone
    )
    loss.total.backward()
    assert float(loss.total.detach()) == 0.0
    assert weight.grad is not None
    assert not weight.grad.any()


def test_no_gradients_are_made_where_none_are_wanted(alone: dist.ProcessGroup) -> None:
    *leaves, labels = inputs(torch.float32)
    with torch.no_grad():
        loss = linear_cross_entropy(*leaves, labels, vocab_size=VOCAB, group=alone)
    assert not loss.total.requires_grad
    assert relative_distance(loss.by_position, plain(torch.float32, 1.0)[0]) <= TOLERANCE


def test_columns_divided_over_ranks(tmp_path: Path) -> None:
    """Four ranks: the last has padding only, and labels lie in the others' columns or are none."""
    torch.multiprocessing.spawn(_divided, args=(4, tmp_path), nprocs=4)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(4)]
    *leaves, labels = _divided_inputs()
    hidden, weight, bias = (x.detach().double().requires_grad_() for x in leaves)
    logits = hidden @ weight[:96].t() + bias[:96]
    losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=-1)
    losses = losses * some_weights(POSITIONS)
    losses.sum().backward()
    for found in ranks:
        assert relative_distance(found["losses"], losses.detach()) <= TOLERANCE
        assert relative_distance(found["hidden"], hidden.grad) <= TOLERANCE
    for name, expected in (("weight", weight.grad), ("bias", bias.grad)):
        together = torch.cat([found[name] for found in ranks])
        assert torch.allclose(together.double(), expected, rtol=1e-5, atol=1e-2)
        assert relative_distance(together, expected) <= TOLERANCE


def _divided_inputs() -> tuple[torch.Tensor, ...]:
    *leaves, labels = inputs(torch.float32)
    labels = labels.clamp(max=95)
    labels[[5, 36]] = -1
    return *leaves, labels


def _divided(rank: int, size: int, folder: Path) -> None:
    """Write this rank's losses and gradients."""
    store = folder / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    *leaves, labels = _divided_inputs()
    mine = slice(rank * PADDED // size, (rank + 1) * PADDED // size)
    hidden = leaves[0]
    weight, bias = (x.detach()[mine].clone().requires_grad_() for x in leaves[1:])
    loss = linear_cross_entropy(
        hidden,
        weight,
        bias,
        labels,
        vocab_size=96,
        group=dist.group.WORLD,
        weights=some_weights(POSITIONS),
        chunk_positions=10,
    )
    loss.total.backward()
    found = {"hidden": hidden.grad, "weight": weight.grad, "bias": bias.grad}
    torch.save({"losses": loss.by_position, **found}, folder / f"{rank}.pt")
    dist.destroy_process_group()
