"""Occupancy of a step: against the loader's own micro-batches, row by row; what loses less."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ettin.config import HardwareConfig, PhaseConfig
from megatron_ettin.data.step_occupancy import (
    StepOccupancy,
    advise,
    fuller_micro_batch,
    lost_share,
    step_occupancy,
)

PHASE = PhaseConfig(name="only", train_tokens=10_000, seq_length=100, global_batch_size=44)


def occupancy(batch: int, rows: int, replicas: int, model_ranks: int = 1) -> StepOccupancy:
    return StepOccupancy(
        batch_rows=batch,
        micro_batch_rows=rows,
        data_parallel_size=replicas,
        model_ranks=model_ranks,
    )


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 90), st.integers(1, 9), st.integers(1, 12), st.integers(1, 4))
def test_counts_are_those_of_micro_batches_written_out(
    batch: int, rows: int, replicas: int, model_ranks: int
) -> None:
    """Micro-batch m of replica r takes rows (m * DP + r) * rows onward (docs/architecture.md)."""
    found = occupancy(batch, rows, replicas, model_ranks)
    begins = [
        [(m * replicas + r) * rows for r in range(replicas)] for m in range(found.micro_batches)
    ]
    filled = [[max(0, min(batch - begin, rows)) for begin in of_m] for of_m in begins]
    assert sum(map(sum, filled)) == batch, "every row has a place"
    assert any(filled[-1]), "no micro-batch is idle on all ranks"
    assert found.idle_ranks == filled[-1].count(0) * model_ranks
    assert found.lost_share == pytest.approx(1.0 - batch / (len(filled) * replicas * rows))
    for size in found.even_batches:
        assert occupancy(size, rows, replicas).lost_share == 0.0
        assert abs(size - batch) < rows * replicas


def test_words() -> None:
    assert str(occupancy(16, 4, 2)) == "2 micro-batches of 4 rows a rank, no rank idle"
    assert str(occupancy(44, 1, 256, model_ranks=2)) == (
        "1 micro-batch of 1 row a rank, 424 of 512 ranks idle: 82.8% of the time lost"
    )
    assert str(occupancy(44, 8, 2)) == (
        "3 micro-batches of 8 rows a rank, rows missing in the last: 8.3% of the time lost"
    )
    assert str(occupancy(24, 8, 2)) == (
        "2 micro-batches of 8 rows a rank, 1 of 2 ranks idle in the last: 25.0% of the time lost"
    )


def test_a_full_step_needs_no_advice() -> None:
    hardware = HardwareConfig(micro_batch_tokens=400)
    phase = dataclasses.replace(PHASE, global_batch_size=48)
    assert advise([phase], hardware, 12) == []


def test_a_smaller_micro_batch_fills_the_places() -> None:
    """36 rows on 2 ranks: in micro-batches of 8 as of 6 each rank runs 3, of which 6 fit."""
    phase = dataclasses.replace(PHASE, global_batch_size=36)
    hardware = HardwareConfig(micro_batch_tokens=850)
    assert lost_share([phase], hardware, 2) == pytest.approx(0.25)
    better = fuller_micro_batch([phase], hardware, 2)
    assert better == dataclasses.replace(hardware, micro_batch_tokens=600)
    assert advise([phase], hardware, 2) == [
        ("only", "global_batch_size 32 or 48 leaves no rank idle"),
        ("", "hardware.micro_batch_tokens 600 loses 0.0% of the run"),
    ]
    assert fuller_micro_batch([phase], better, 2) is None


@settings(derandomize=True, deadline=None)
@given(
    first=st.integers(1, 80),
    second=st.integers(1, 40),
    slots=st.integers(300, 3_000),
    ranks=st.integers(1, 40),
)
def test_advice_keeps_what_it_promises(first: int, second: int, slots: int, ranks: int) -> None:
    phases = [
        dataclasses.replace(PHASE, name="first", global_batch_size=first),
        dataclasses.replace(PHASE, name="second", seq_length=300, global_batch_size=second),
    ]
    hardware = HardwareConfig(micro_batch_tokens=slots)
    before = lost_share(phases, hardware, ranks)
    better = fuller_micro_batch(phases, hardware, ranks)
    if better is not None:
        assert 300 <= better.micro_batch_tokens < slots
        assert lost_share(phases, better, ranks) < before
    worst = max(step_occupancy(phase, hardware, ranks).lost_share for phase in phases)
    advice = dict(advise(phases, hardware, ranks))
    assert bool(advice) == (worst > 0.02)


def test_ranks_that_can_never_be_busy_are_counted() -> None:
    hardware = HardwareConfig(micro_batch_tokens=100, tensor_parallel_size=2)
    assert advise([PHASE], hardware, 512) == [
        ("only", "global_batch_size 256 leaves no rank idle"),
        ("", "88 ranks with these micro-batches take as long"),
    ]


def test_slots_that_ranks_cannot_share_are_not_suggested() -> None:
    phase = dataclasses.replace(PHASE, seq_length=3, global_batch_size=10)
    hardware = HardwareConfig(micro_batch_tokens=24, context_parallel_size=2)
    better = fuller_micro_batch([phase], hardware, 2)
    # 5 rows would lose nothing, but 15 slots are no two halves.
    assert better is not None
    assert better.micro_batch_tokens == 18
