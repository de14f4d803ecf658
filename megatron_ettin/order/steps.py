"""Cutting a phase's rows into optimizer steps; no other module of the order knows batch sizes.

Another batch size moves the cuts between steps, never the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

from megatron_ettin.order.order import Order
from megatron_ettin.order.spec import PhaseSpec

if TYPE_CHECKING:  # questions to a ledger read no configuration
    from megatron_ettin.config import PhaseConfig


def pass_skipped_rows(phase: PhaseSpec, skip_rows: Sequence[tuple[int, int]], g: int) -> int:
    """Return the first row at or after `g` that is not skipped; the phase's end if there is none.

    `skip_rows` are ranges [first, end) in ascending order.
    """
    for first, end in skip_rows:
        if first <= g < end:
            g = end
    return min(g, phase.end_g)


def find_step_end(
    phase: PhaseSpec,
    settings: PhaseConfig,
    skip_rows: Sequence[tuple[int, int]],
    *,
    g: int,
    phase_tokens: int,
) -> int:
    """Return the end of the step that begins at row `g`, `phase_tokens` tokens into the phase.

    A step never crosses the end of a phase or a skipped range; there it is cut short.
    """
    end = min(g + settings.batch_rows(phase_tokens), phase.end_g)
    return min([end, *(first for first, _ in skip_rows if g < first)])


def plan_steps(
    order: Order,
    phases: Sequence[PhaseConfig],
    skip_rows: Sequence[tuple[int, int]],
    *,
    g: int,
    phase_tokens: int,
) -> Iterator[tuple[int, int]]:
    """Yield the rows [begin, end) of every step from row `g` to the end of the run.

    `phase_tokens` are the tokens that the phase of row `g` has trained on before it.
    """
    for phase, settings in zip(order.spec.phases, phases, strict=True):
        if phase.end_g <= g:
            continue
        if phase.start_g >= g:
            phase_tokens = 0
        g = pass_skipped_rows(phase, skip_rows, g)
        while g < phase.end_g:
            end = find_step_end(phase, settings, skip_rows, g=g, phase_tokens=phase_tokens)
            yield g, end
            # Only a ramp depends on tokens; beyond it no plan has to be asked for counts.
            if settings.batch_ramp_tokens is not None and phase_tokens < settings.batch_ramp_tokens:
                phase_tokens += int(order.row_tokens(g, end).sum())
            g = pass_skipped_rows(phase, skip_rows, end)


def count_steps(
    order: Order, phases: Sequence[PhaseConfig], skip_rows: Sequence[tuple[int, int]]
) -> list[int]:
    """Count the steps of each phase as `plan_steps` cuts them.

    Only a phase whose batch grows is walked through: its steps depend on its rows' tokens.
    """
    counts = []
    for phase, settings in zip(order.spec.phases, phases, strict=True):
        if settings.batch_ramp_tokens is None:
            lengths = _stretches(phase, skip_rows)
            counts.append(sum(-(-length // settings.global_batch_size) for length in lengths))
        else:
            planned = plan_steps(order, phases, skip_rows, g=phase.start_g, phase_tokens=0)
            begins = (begin for begin, _ in planned)
            counts.append(sum(1 for _ in takewhile(phase.end_g.__gt__, begins)))
    return counts


def _stretches(phase: PhaseSpec, skip_rows: Sequence[tuple[int, int]]) -> Iterator[int]:
    """Yield the lengths of the phase's stretches of rows between those that are skipped."""
    begin = phase.start_g
    for first, end in (*skip_rows, (phase.end_g, phase.end_g)):
        yield max(min(first, phase.end_g) - begin, 0)
        begin = max(begin, end)
