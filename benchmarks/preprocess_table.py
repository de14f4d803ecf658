"""Figures of the measurement of preprocessing, as a table and as the fields of a JSON object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from benchmarks.preprocess_rounds import CONTENDERS, OURS, SLOW, ContenderRun
from megatron_ettin.text_table import text_table

Figures = dict[str, float | bool | None]

MEASURES: dict[str, Callable[[ContenderRun], float]] = {
    "mb_s": lambda outcome: outcome.mb_s,
    "process_mb_s": lambda outcome: outcome.process_mb_s,
    "peak_mb": lambda outcome: outcome.peak_bytes / 1e6,
    "private_mb": lambda outcome: outcome.peak_private_bytes / 1e6,
}


def figures(outcomes: Sequence[ContenderRun], same: dict[str, bool]) -> Figures:
    """Return the fields of the JSON object; null for a contender that did not run.

    Rates and memory are medians over the rounds. `ours_over_NAME` is the median of the ratios of
    each round. `peak_mb` is ours.
    """
    found: Figures = {}
    for name in CONTENDERS:
        for key, measure in MEASURES.items():
            values = [measure(each) for each in outcomes if each.contender == name]
            found[f"{name}_{key}"] = round(median(values), 3) if values else None
    for name in CONTENDERS:
        if name != OURS:
            found[f"ours_over_{name}"] = ratio(outcomes, name, "mb_s")
            found[f"ours_over_{name}_process"] = ratio(outcomes, name, "process_mb_s")
    largest = max(outcomes, key=lambda each: each.num_bytes)
    return {
        **found,
        "peak_mb": found[f"{OURS}_peak_mb"],
        "documents": largest.encoded.documents,
        "tokens": largest.encoded.tokens,
        "mb": round(largest.num_bytes / 1e6, 3),
        "part_mb": round(min(each.num_bytes for each in outcomes) / 1e6, 3),
        "rounds": max(sum(each.contender == name for each in outcomes) for name in CONTENDERS),
        "same_as_mcore": None,
        "same_as_fast": None,
        **same,
    }


def ratio(outcomes: Sequence[ContenderRun], name: str, key: str) -> float | None:
    """Return our rate over another's: the median over the rounds."""
    measure = MEASURES[key]
    ours = [measure(each) for each in outcomes if each.contender == OURS]
    theirs = [measure(each) for each in outcomes if each.contender == name]
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=False)]
    return round(median(ratios), 3) if ratios else None


def as_line(outcome: ContenderRun) -> str:
    """Return a line on one run."""
    return (
        f"{outcome.contender}: {outcome.mb_s:.2f} MB/s, {outcome.process_mb_s:.2f} with start-up,"
        f" {outcome.peak_bytes / 1e6:.0f} MB at its peak"
    )


def as_text(measured: Figures, missing: Sequence[str]) -> str:
    """Return the table, and what else there is to know."""
    columns = ("", "MB/s", "with start-up", "ours is", "peak MB", "private MB", "text MB")
    rows = []
    for name in CONTENDERS:
        if measured[f"{name}_mb_s"] is None:
            continue
        times = measured.get(f"ours_over_{name}")
        cells = [f"{measured[f'{name}_{key}']:,.1f}" for key in MEASURES]
        size = measured["part_mb" if name in SLOW else "mb"]
        text = "" if times is None else f"{times:.2f} x"
        rows.append((name, *cells[:2], text, *cells[2:], f"{size:,.1f}"))
    lines = [*text_table(columns, rows, numbers=columns[1:])]
    lines.append(
        f"""
MB/s of raw text, medians of {measured["rounds"]} rounds, one process after the other; "ours is" is
the median of the ratios in each round, without the start of interpreters and imports. Peaks are of
the resident memory of all processes, sampled; private is what is no page of a mapped file.
gigatoken alone reads and encodes, and writes nothing."""
    )
    for key, what in (
        ("same_as_mcore", "megatron-core's builder, from the same ids"),
        ("same_as_fast", "megatron_fast"),
    ):
        if measured[key] is not None:
            verdict = "are the bytes" if measured[key] else "ARE NOT THE BYTES"
            lines.append(f"Our .bin and .idx {verdict} of {what}.")
    lines += [f"{name}: left out, {CONTENDERS[name]} is not installed" for name in missing]
    return "\n".join(lines)
