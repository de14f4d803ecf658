"""A micro-batch equals the batch that it is made from, in shapes that are constant on a GPU."""

import math

import numpy as np
import pytest
import torch

from megatron_ettin.data.loader import Loader
from megatron_ettin.model.attention import PackedRows
from megatron_ettin.model.linear_cross_entropy import SummedLoss
from megatron_ettin.objectives import (
    Batch,
    CausalLM,
    MaskedDiffusion,
    MaskedLM,
    MaskedNextToken,
    Mixture,
    Objective,
)
from megatron_ettin.training.micro_batch import (
    NO_LABEL,
    MicroBatch,
    forward_step,
    make_micro_batch,
    padded_positions,
    scored_capacity,
    segment_boundaries,
)
from megatron_ettin.training.preparation import micro_batches
from tests.conftest import TinyCorpus
from tests.orders import FIRST, make_loader, make_order

MIXTURE = Mixture(objectives=[MaskedNextToken(), CausalLM(), MaskedDiffusion()], shares=[2, 3, 1])
OBJECTIVES = [MaskedLM(), CausalLM(), MaskedNextToken(), MaskedDiffusion(), MIXTURE]
#: The last micro-batch of these rows has an idle row, and of 2 ranks the second has two.
BEGIN, END, ROWS = 3, 10, 2


def loader_of(corpus: TinyCorpus, objective: Objective, rank: int = 0, ranks: int = 1) -> Loader:
    """Return a loader whose micro-batches have ROWS rows."""
    slots = ROWS * FIRST.seq_length
    order = make_order(corpus, FIRST)
    return make_loader(order, objective, micro_batch_tokens=slots, rank=rank, ranks=ranks)


def assert_equal(prepared: MicroBatch, batch: Batch, slots: slice) -> None:
    """Check every tensor against the arrays of the batch, slot by slot."""
    rows = batch.rows
    scored = [p for p in range(slots.start, slots.stop) if batch.loss_mask[p]]
    n = len(scored)
    assert prepared.tokens.tolist() == batch.tokens[slots].tolist()
    packed = prepared.packed
    assert packed.position_ids is not None
    assert packed.position_ids.tolist() == rows.position_ids[slots].tolist()
    # A segment begins where positions begin anew; what follows the last one is empty segments.
    begins = np.flatnonzero(rows.position_ids == 0).tolist()
    boundaries = packed.cu_seqlens_q.tolist()
    assert boundaries[: len(begins)] == begins
    assert set(boundaries[len(begins) :]) == {len(batch.tokens)}
    assert packed.cu_seqlens_q.dtype == torch.int32
    assert (packed.g.tolist(), packed.first_slot) == (rows.g.tolist(), slots.start)
    assert packed.max_seqlen_q == rows.seq_length
    assert (prepared.scored[:n] + slots.start).tolist() == scored
    assert prepared.labels[:n].tolist() == [batch.labels[p] for p in scored]
    in_row = [sum(p // rows.seq_length == row for p in scored) for row in range(len(rows.g))]
    assert prepared.counts.tolist() == in_row
    if batch.weights is None:
        assert prepared.weights is None
    else:
        assert prepared.weights is not None
        assert prepared.weights[:n].tolist() == [batch.weights[p] for p in scored]
    averaged = [p for p in range(slots.start, slots.stop) if batch.averaged[p]]
    in_row = [sum(p // rows.seq_length == row for p in averaged) for row in range(len(rows.g))]
    assert prepared.averaged.tolist() == in_row
    assert_directions_equal(packed, batch)
    assert prepared.total.tolist() == len(averaged)
    assert prepared.total.dtype == torch.int32


def assert_directions_equal(packed: PackedRows, batch: Batch) -> None:
    """Check which rows attend how, and their segments as streams of their own."""
    rows, is_causal = batch.rows, batch.is_causal
    if packed.mixed is None:
        expected = None
        if is_causal is not None:
            expected = "causal" if np.all(is_causal) else "bidirectional"
            assert np.unique(is_causal).size == 1
        assert packed.attention == expected
        return
    assert isinstance(is_causal, np.ndarray)
    found = []
    for slots, part in packed.mixed.parts:
        chosen = np.flatnonzero(is_causal == (part.attention == "causal"))
        assert part.g.tolist() == rows.g[chosen].tolist()
        own = [slice(r * rows.seq_length, (r + 1) * rows.seq_length) for r in chosen.tolist()]
        assert slots.tolist() == [p for row in own for p in range(row.start, row.stop)]
        begins = np.flatnonzero(np.concatenate([rows.position_ids[row] for row in own]) == 0)
        assert part.cu_seqlens_q[: len(begins)].tolist() == begins.tolist()
        assert set(part.cu_seqlens_q[len(begins) :].tolist()) == {len(slots)}
        found.append(slots)
    assert torch.cat(found)[packed.mixed.places].tolist() == list(range(len(rows.tokens)))


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (1, 2)])
def test_prepared_is_what_was_loaded(
    tiny_corpus: TinyCorpus, objective: Objective, rank: int, ranks: int
) -> None:
    loader = loader_of(tiny_corpus, objective, rank, ranks)
    batches = list(loader.micro_batches(BEGIN, END))
    prepared = list(micro_batches(loader, BEGIN, END))
    assert len(prepared) == len(batches)
    assert (batches[-1].rows.g < 0).any()
    for one, batch in zip(prepared, batches, strict=True):
        assert_equal(one, batch, slice(0, len(batch.tokens)))
        assert len(one.scored) == len(one.labels) == batch.loss_mask.sum()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("capacity", [1, 128])
def test_ranks_that_share_slots_hold_all_of_them(
    tiny_corpus: TinyCorpus, objective: Objective, capacity: int
) -> None:
    batch = next(loader_of(tiny_corpus, objective).micro_batches(BEGIN, END))
    slots = len(batch.tokens)
    shares = [slice(i * slots // 4, (i + 1) * slots // 4) for i in range(4)]
    prepared = [make_micro_batch(batch, slots=s, capacity=capacity, stream=None) for s in shares]
    for one, share in zip(prepared, shares, strict=True):
        assert_equal(one, batch, share)
    assert sum(one.total.item() for one in prepared) == batch.averaged.sum()


def test_what_fills_up_points_nowhere_and_overflow_takes_another_capacity(
    tiny_corpus: TinyCorpus,
) -> None:
    batch = next(loader_of(tiny_corpus, CausalLM()).micro_batches(BEGIN, END))
    slots = slice(0, len(batch.tokens))
    n = int(batch.loss_mask.sum())
    assert 128 < n < 256
    for capacity, expected in ((256, 256), (128, 256), (64, 64 * math.ceil(n / 64))):
        one = make_micro_batch(batch, slots=slots, capacity=capacity, stream=None)
        assert_equal(one, batch, slots)
        assert len(one.scored) == len(one.labels) == expected
        assert len(set(one.scored[n:].tolist())) == expected - n
        assert set(one.scored[n:].tolist()) <= set(range(len(batch.tokens)))
        assert set(one.labels[n:].tolist()) == {NO_LABEL}


@pytest.mark.parametrize("count", [1, 7, 15, 16, 17, 33, 385, 1000])
def test_boundaries_are_those_of_segments_that_hold_slots(count: int) -> None:
    lengths = np.random.default_rng(count).integers(1, 50, count)
    with_empty_ones = np.insert(lengths, np.arange(0, count, 3), 0)
    cu_seqlens = np.concatenate([[0], np.cumsum(with_empty_ones), [lengths.sum()] * 5])
    boundaries = segment_boundaries(cu_seqlens.astype(np.int32))
    assert boundaries.dtype == np.int32
    assert boundaries[: count + 1].tolist() == [0, *np.cumsum(lengths)]
    assert set(boundaries[count + 1 :].tolist()) <= {lengths.sum()}
    assert count <= len(boundaries) - 1 <= count + count // 8


def test_few_counts_of_boundaries_come_up() -> None:
    counts = range(360, 410)  # in micro-batches of about 385 documents
    streams = [np.arange(count + 1, dtype=np.int32) for count in counts]
    assert len({len(segment_boundaries(cu_seqlens)) for cu_seqlens in streams}) <= 3


def test_graphs_see_two_counts_of_boundaries() -> None:
    # What 200 micro-batches of 65,536 slots of the quickstart's text had.
    streams = [np.arange(count + 1, dtype=np.int32) for count in range(225, 482)]
    found = [segment_boundaries(cu_seqlens, powers_of_two=True) for cu_seqlens in streams]
    assert {len(boundaries) - 1 for boundaries in found} == {256, 512}
    for boundaries, cu_seqlens in zip(found, streams, strict=True):
        assert boundaries[: len(cu_seqlens)].tolist() == cu_seqlens.tolist()
        assert set(boundaries[len(cu_seqlens) :].tolist()) <= {cu_seqlens[-1]}


@pytest.mark.parametrize("objective", [CausalLM(), MaskedDiffusion(), MIXTURE])
def test_a_clone_takes_the_values_of_another(tiny_corpus: TinyCorpus, objective: Objective) -> None:
    loader = loader_of(tiny_corpus, objective)
    batches = list(loader.micro_batches(0, 40))
    slots = slice(0, len(batches[0].tokens))
    prepared = [
        make_micro_batch(batch, slots=slots, capacity=512, stream=None) for batch in batches
    ]
    own = prepared[0].clone()
    same_shapes = [n for n, one in enumerate(prepared) if one.shapes == own.shapes]
    assert len(same_shapes) > 1
    for n in same_shapes:
        own.copy_values(prepared[n])
        assert_equal(own, batches[n], slots)
        assert own.memory.data_ptr() != prepared[n].memory.data_ptr()
    assert_equal(prepared[0], batches[0], slots)


def test_positions_are_whole_capacities() -> None:
    padded = {0: 128, 1: 128, 128: 128, 129: 256, 256: 256, 257: 384}
    assert {n: padded_positions(n, 128) for n in padded} == padded
    assert [padded_positions(n, 1) for n in (0, 1, 129)] == [0, 1, 129], "a CPU gets no padding"


@pytest.mark.parametrize("slots", [512, 8192, 65536])
@pytest.mark.parametrize("share", [0.15, 0.3, 1.0])
def test_capacity_is_what_draws_almost_never_exceed(slots: int, share: float) -> None:
    found = scored_capacity("cuda", slots, share)
    draws = np.random.default_rng(0).binomial(slots, share, size=100_000)
    assert found % 128 == 0
    assert draws.max() <= found <= slots
    assert found <= slots * share + 7 * math.sqrt(slots * share) + 128
    assert scored_capacity("cpu", slots, share) == 1


def test_the_capacity_of_few_slots_holds_them_all() -> None:
    assert [scored_capacity("cuda", slots, 1.0) for slots in (1, 128, 130)] == [128, 128, 256]


class Losses(torch.nn.Module):
    """A model whose loss is the root of the label, and zero where there is none."""

    def forward(self, **given: torch.Tensor) -> SummedLoss:
        losses = given["labels"].float().sqrt().where(given["labels"] >= 0, 0.0)
        return SummedLoss(losses.sum(), losses)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_are_reported_by_row(tiny_corpus: TinyCorpus, objective: Objective) -> None:
    loader = loader_of(tiny_corpus, objective)
    for batch in loader.micro_batches(BEGIN, END):
        slots = slice(0, len(batch.tokens))
        for capacity in (1, 128):
            prepared = make_micro_batch(batch, slots=slots, capacity=capacity, stream=None)
            output, loss_of = forward_step(iter([prepared]), Losses())
            assert isinstance(output, SummedLoss)
            _, total, report = loss_of(output)
            # Losses one by one into the row that they lie in; on a CPU the order is fixed.
            scored = np.flatnonzero(batch.loss_mask)
            row_of = torch.from_numpy(scored // batch.rows.seq_length)
            expected = torch.zeros(ROWS, dtype=torch.float64)
            expected.index_add_(0, row_of, output.by_position[: len(scored)].double())
            assert torch.equal(report["loss_sums"], expected)
            averaged = batch.averaged.reshape(ROWS, -1).sum(axis=1)
            assert report["counts"].tolist() == averaged.tolist()
            assert torch.equal(report["g"], torch.from_numpy(batch.rows.g))
            assert total == averaged.sum()
