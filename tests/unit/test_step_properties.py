"""Properties of a run's steps: rows are the same for any layout, micro-batch, ramp and future."""

import dataclasses
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import strategies as st
from numpy.typing import NDArray

from megatron_ettin.config import PhaseConfig
from megatron_ettin.objectives import Batch, CausalLM, MaskedLM, MaskedNextToken, Objective
from megatron_ettin.order import SampleOrder, mask_digest, token_digest
from tests.conftest import TinyCorpus
from tests.orders import BLEND, FIRST, SECOND, make_loader, make_order
from tests.properties import cases, check_all

OBJECTIVES: dict[str, Objective] = {
    "masked": MaskedLM(),
    "causal": CausalLM(),
    "masked next": MaskedNextToken(),
}
DATA_PARALLEL_SIZES = (1, 2, 3, 8, 48)


class Row(NamedTuple):
    """Inputs of a model for one row, and the row's digests (token low, token high, mask)."""

    content: bytes
    digests: tuple[int, ...]


def contents(batch: Batch) -> list[bytes]:
    rows = batch.rows
    number, length = len(rows.g), rows.seq_length
    segments = len(rows.segment_kind) // number
    parts = []
    for r in range(number):
        slots = slice(r * length, (r + 1) * length)
        scored = batch.loss_mask[slots]
        columns = [batch.tokens[slots], batch.labels[slots] * scored, scored]
        columns += [rows.position_ids[slots], rows.segment_kind[r * segments : (r + 1) * segments]]
        columns.append(rows.cu_seqlens[r * segments : (r + 1) * segments + 1] - r * length)
        parts.append(b"".join(np.ascontiguousarray(column).tobytes() for column in columns))
    return parts


def digests(objective: Objective, batch: Batch) -> NDArray[np.uint64]:
    tokens = objective.original_tokens(batch)
    return np.concatenate([token_digest(batch.rows, tokens), mask_digest(batch)])


def rows_one_by_one(order: SampleOrder, objective: Objective) -> list[Row]:
    rows = []
    for phase in order.spec.phases:
        loader = make_loader(order, objective, micro_batch_tokens=phase.seq_length)
        for batch in loader.micro_batches(phase.start_g, phase.end_g):
            assert batch.rows.g.tolist() == [len(rows)]
            rows.append(Row(contents(batch)[0], tuple(digests(objective, batch).tolist())))
    return rows


@dataclasses.dataclass(frozen=True)
class Run:
    order: SampleOrder
    expected: dict[str, list[Row]]


@pytest.fixture(scope="module")
def run(tiny_corpus: TinyCorpus) -> Run:
    order = make_order(tiny_corpus, FIRST, SECOND)
    return Run(order, {name: rows_one_by_one(order, OBJECTIVES[name]) for name in OBJECTIVES})


def steps(begin: int, end: int, sizes: list[int]) -> list[tuple[int, int]]:
    """Cut [begin, end) into steps of the sizes given, the last size repeated."""
    borders = [begin]
    while borders[-1] < end:
        size = sizes[min(len(borders), len(sizes)) - 1]
        borders.append(min(borders[-1] + size, end))
    return list(pairwise(borders))


def check_steps(run: Run, name: str, size: int, rows: int, cuts: Any) -> None:
    """Run the steps on every rank: each row once, as expected, with the sum of its digests."""
    index, begin, sizes = cuts
    objective = OBJECTIVES[name]
    phase = run.order.spec.phases[index]
    begin = phase.start_g + begin % phase.num_rows
    parts = steps(begin, min(begin + 100, phase.end_g), sizes)
    for first, last in parts:
        total, seen = np.zeros(3, np.uint64), []
        for rank in range(size):
            slots = rows * phase.seq_length
            loader = make_loader(
                run.order, objective, micro_batch_tokens=slots, rank=rank, ranks=size
            )
            batches = list(loader.micro_batches(first, last))
            assert len(batches) == loader.num_micro_batches(first, last)
            assert len(batches) == -(-(last - first) // (size * rows))
            for batch in batches:
                total += digests(objective, batch)
                for g, content in zip(batch.rows.g.tolist(), contents(batch), strict=True):
                    if g >= 0:
                        seen.append(g)
                        assert content == run.expected[name][g].content
        assert sorted(seen) == list(range(first, last))
        expected = [row.digests for row in run.expected[name][first:last]]
        assert total.tolist() == [sum(lane) % 2**64 for lane in zip(*expected, strict=True)]


@cases(40)
def test_layouts_and_ramps_change_no_row(run: Run, count: int) -> None:
    def check(name: str, size: int, rows: int, cuts: Any) -> None:
        check_steps(run, name, size, rows, cuts)

    sizes = st.lists(st.integers(1, 100), min_size=1, max_size=5)
    cuts = st.tuples(st.integers(0, 1), st.integers(0, 10_000), sizes)
    check_all(
        check,
        count,
        st.sampled_from(sorted(OBJECTIVES)),
        st.sampled_from(DATA_PARALLEL_SIZES),
        st.integers(1, 16),
        cuts,
    )


@pytest.mark.parametrize("size", DATA_PARALLEL_SIZES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_layout_takes_a_ramped_phase(run: Run, name: str, size: int) -> None:
    check_steps(run, name, size, 2, (0, 0, [8, 16, 48]))


@cases(25)
def test_the_future_changes_no_row_of_the_past(
    tiny_corpus: TinyCorpus, run: Run, count: int
) -> None:
    past = run.order.spec.phases[0]
    rows = run.order.rows(0, np.arange(past.num_rows))
    shares = st.floats(0.01, 1.0)
    phase = st.builds(
        lambda alpha, beta, tokens, length: (
            {name: w for name, w in (("alpha", alpha), ("beta", beta)) if w},
            PhaseConfig(name="", train_tokens=tokens, seq_length=length, global_batch_size=4),
        ),
        shares,
        st.one_of(st.just(0.0), shares),
        st.integers(1, 50_000),
        st.sampled_from((128, 256)),
    )

    def check(future: list[tuple[dict[str, float], PhaseConfig]]) -> None:
        blend, pools, phases = {"first": dict(BLEND)}, {"first": (0.0, 0.6)}, [FIRST]
        for number, (weights, config) in enumerate(future):
            name = f"phase{number}"
            phases.append(dataclasses.replace(config, name=name))
            blend[name] = weights
            # The first phase's pools again where rows are as long, else the other documents.
            same = config.seq_length == FIRST.seq_length
            pools[name] = (0.0, 0.6) if same else (0.6, 1.0)
        order = make_order(tiny_corpus, *phases, blend=blend, pools=pools)
        assert order.spec.phases[0] == past
        assert order.spec.phase_ids()[0] == run.order.spec.phase_ids()[0]
        again = order.rows(0, np.arange(past.num_rows))
        for name in ("tokens", "cu_seqlens", "position_ids", "segment_kind"):
            assert np.array_equal(getattr(again, name), getattr(rows, name))

    check_all(check, count, st.lists(phase, max_size=3))
