"""Rows cut into steps: ramps, phases and skipped rows move the cuts and lose nothing."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ettin.config import PhaseConfig
from megatron_ettin.order import PhaseSpec
from megatron_ettin.order.steps import (
    count_steps,
    find_step_end,
    pass_skipped_rows,
    plan_steps,
)
from tests.conftest import TinyCorpus
from tests.orders import FIRST, SECOND, make_order

PHASE = PhaseConfig(name="only", train_tokens=10_000, seq_length=64, global_batch_size=12)


def spec(start_g: int, num_rows: int) -> PhaseSpec:
    return PhaseSpec(
        name="only",
        start_g=start_g,
        num_rows=num_rows,
        seq_length=64,
        max_segments_per_row=4,
        pack="bfd",
        pools=(),
    )


def test_a_ramp_grows_linearly_with_tokens() -> None:
    ramp = dataclasses.replace(PHASE, batch_ramp_start=4, batch_ramp_tokens=800)
    assert [ramp.batch_rows(tokens) for tokens in (0, 99, 100, 400, 799, 800, 10**9)] == [
        *(4, 4, 5, 8, 11, 12, 12)
    ]


@pytest.mark.parametrize(
    "settings", [{"batch_ramp_start": 4}, {"batch_ramp_start": 13, "batch_ramp_tokens": 9}]
)
def test_half_a_ramp_or_one_downwards_is_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="batch_ramp_start"):
        dataclasses.replace(PHASE, **settings)


@settings(derandomize=True, deadline=None)
@given(
    start=st.integers(0, 50),
    num_rows=st.integers(1, 120),
    cuts=st.lists(st.integers(0, 200), max_size=8, unique=True),
    ramp=st.integers(1, 12),
)
def test_every_row_is_in_one_step_or_skipped(
    start: int, num_rows: int, cuts: list[int], ramp: int
) -> None:
    cuts = sorted(cuts)
    skip = list(zip(cuts[0::2], cuts[1::2], strict=False))
    phase = spec(start, num_rows)
    ramping = dataclasses.replace(PHASE, batch_ramp_start=ramp, batch_ramp_tokens=3_000)
    left_out = {g for first, end in skip for g in range(first, end)}
    trained: list[int] = []
    g = pass_skipped_rows(phase, skip, start)
    while g < phase.end_g:
        end = find_step_end(phase, ramping, skip, g=g, phase_tokens=64 * len(trained))
        assert g < end <= g + 12
        trained += range(g, end)
        g = pass_skipped_rows(phase, skip, end)
    assert trained == [g for g in range(start, phase.end_g) if g not in left_out]


@pytest.mark.parametrize("ramp", [{}, {"batch_ramp_start": 2, "batch_ramp_tokens": 12_000}])
@pytest.mark.parametrize("skip", [[], [(0, 5), (40, 41), (100, 400)], [(50, 10_000)]])
def test_steps_are_counted_as_they_are_planned(
    ramp: dict[str, int], skip: list[tuple[int, int]], tiny_corpus: TinyCorpus
) -> None:
    phases = [dataclasses.replace(FIRST, **ramp), SECOND]
    order = make_order(tiny_corpus, *phases)
    planned = [begin for begin, _ in plan_steps(order, phases, skip, g=0, phase_tokens=0)]
    of_phase = [
        sum(phase.start_g <= begin < phase.end_g for begin in planned)
        for phase in order.spec.phases
    ]
    assert count_steps(order, phases, skip) == of_phase
