"""Rows left out by decisions: which ones are in force, in what order, and how they are recorded."""

import dataclasses
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ettin.order import OrderSpec, PhaseSpec
from megatron_ettin.order.interventions import (
    Intervention,
    SkippedRows,
    read_interventions,
    read_skips,
)
from megatron_ettin.order.ledger import Kind, Ledger, LedgerWriter
from megatron_ettin.order.steps import pass_skipped_rows
from megatron_ettin.queries.answer import Check
from megatron_ettin.queries.branches import Branch
from megatron_ettin.queries.verify_skips import check_skips


def phase(name: str, start_g: int, num_rows: int) -> PhaseSpec:
    return PhaseSpec(
        name=name,
        start_g=start_g,
        num_rows=num_rows,
        seq_length=64,
        max_segments_per_row=4,
        pack="bfd",
        pools=(),
    )


SPEC = OrderSpec(
    seed=1, tokenizer_sha256="0" * 64, phases=(phase("first", 0, 60), phase("second", 60, 60))
)


def decision(first: int, end: int, spec: OrderSpec = SPEC) -> Intervention:
    return Intervention(
        reason="trouble.on_nan",
        action="rewind",
        rows=(first, end),
        phase_id=spec.phase_ids()[spec.phase_index(first)],
        step=4,
        loss=None,
        gradient_norm=1.25,
        z=None,
    )


RANGES = st.lists(st.integers(0, 119), max_size=8, unique=True).map(
    lambda cuts: list(zip(sorted(cuts)[0::2], sorted(cuts)[1::2], strict=False))
)


@settings(derandomize=True, deadline=None)
@given(configured=RANGES, decided=st.lists(st.tuples(st.integers(0, 59), st.integers(1, 30))))
def test_every_row_is_left_out_for_one_reason(
    configured: list[tuple[int, int]], decided: list[tuple[int, int]]
) -> None:
    decisions = [decision(first, min(first + count, 60)) for first, count in decided]
    skipped = SkippedRows(configured, decisions, SPEC)
    expected = {g for first, end in configured for g in range(first, end)}
    expected |= {g for each in decisions for g in range(*each.rows)}
    found: set[int] = set()
    for part in SPEC.phases:
        g = part.start_g
        while g < part.end_g:
            here = skipped.find(part, g)
            after = pass_skipped_rows(part, skipped.ranges, g)
            if here is None:
                assert after == g not in expected
                g += 1
                continue
            end, by = here
            assert g < end <= after <= part.end_g
            assert by is None or by.rows[0] <= g < end <= by.rows[1]
            found |= set(range(g, end))
            g = end
    assert found == expected


def test_a_decision_about_another_order_is_void() -> None:
    amended = dataclasses.replace(SPEC, phases=(SPEC.phases[0], phase("other", 60, 60)))
    decisions = [decision(8, 12), decision(70, 74)]
    assert SkippedRows([], decisions, SPEC).ranges == [(8, 12), (70, 74)]
    assert SkippedRows([], decisions, amended).ranges == [(8, 12)]
    longer = dataclasses.replace(SPEC, phases=(SPEC.phases[0], phase("second", 60, 99)))
    assert SkippedRows([], decisions, longer).ranges == [(8, 12), (70, 74)]


def skip(writer: LedgerWriter, first: int, end: int, each: Intervention) -> None:
    writer.append(Kind.SKIP, step=0, g_begin=first, g_end=end, payload=each.payload())


def test_decisions_are_found_in_forks_even_before_the_fork_is_recorded(tmp_path: Path) -> None:
    """A run that begins again owes its FORK record until it writes START."""
    first, second = decision(0, 4), decision(4, 9)
    ledger = tmp_path / "ledger"
    assert read_interventions(ledger) == []
    with LedgerWriter.open(ledger) as writer:
        writer.append(Kind.START, step=0, g_begin=0, g_end=0, payload={})
        skip(writer, 0, 4, first)
        writer.append(Kind.SKIP, step=0, g_begin=4, g_end=5, payload={"reason": "data.skip_rows"})
    with LedgerWriter.open(ledger) as writer:
        assert read_interventions(ledger) == [first]
        writer.append(Kind.START, step=0, g_begin=0, g_end=0, payload={})
        skip(writer, 0, 4, first)
        skip(writer, 4, 9, second)
    assert read_interventions(ledger) == [first, second]
    found = [(record.fork is None, record.g_begin, record.g_end) for record in read_skips(ledger)]
    assert found == [(True, 0, 4), (True, 4, 9), (False, 0, 4), (False, 4, 5)]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"rows": [5, 9]}, r"record 1, rows \[4, 8\): its decision is about rows \[5, 9\)"),
        ({"rows": [4]}, "record 1: not the payload of an intervention"),
    ],
)
def test_rows_are_compared_with_their_decision(
    change: dict[str, object], fault: str | None, tmp_path: Path
) -> None:
    with LedgerWriter.open(tmp_path / "ledger") as writer:
        writer.append(Kind.START, step=0, g_begin=4, g_end=4, payload={})
        payload = {**decision(2, 8).payload(), **change}
        writer.append(Kind.SKIP, step=0, g_begin=4, g_end=8, payload=payload)
    check = Check(name="chain")
    check_skips([Branch(Ledger.read(tmp_path / "ledger"))], check)
    assert len(check.faults) == (fault is not None)
    for found in check.faults:
        assert re.match(str(fault), str(found))
