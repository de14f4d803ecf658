"""Prove, from their ledgers alone, that an encoder, its decoder and other siblings saw the same.

Digests are sums over rows, so batch sizes, ramps and layouts do not matter: at every row where a
step of two runs ends, their sums must be equal. Of several runs, each is compared with the longest.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ettin.order import OrderSpec
from megatron_ettin.order.ledger import Ledger, find_description
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.queries.answer import FAIL, PASS, add_two_runs, as_json, several_runs
from megatron_ettin.queries.record import (
    SharedBoundaries,
    digests_at,
    shared_boundaries,
    skipped_rows,
    spec_differences,
    step_record,
)
from megatron_ettin.queries.verify_chain import require_sound

EXAMPLE = "--run runs/encoder --run runs/decoder"


@dataclass(frozen=True, kw_only=True)
class TwinRun:
    """One of the two runs, from its ledger."""

    run: str
    objective: str
    order_id: str
    steps: int
    end_g: int
    """Rows [0, end_g) were consumed or skipped."""
    tokens: int
    forks: int
    seq: int
    """Number of the last record of the ledger."""
    chain: str
    """Chain hash of that record."""
    compared_tokens: int
    """Tokens of rows [0, last_shared_g)."""
    order_digest: str
    """Sum of the order digests of those rows."""
    token_digest: str
    """Sum of their token digests."""


@dataclass(frozen=True, kw_only=True)
class Disagreement:
    """Step of one run that ends at the first shared row where the sums differ."""

    run: str
    seq: int
    """Number of the step's record in its ledger."""
    step: int
    g_begin: int
    g_end: int
    agree_up_to: int
    """End of the rows that agree: the difference lies in rows [agree_up_to, g_end)."""


@dataclass(frozen=True, kw_only=True)
class TwinsProof:
    """Verdict on two runs or more, and the evidence for it."""

    verdict: str
    phase_id: str | None
    """Chained id of the last phase of which all consumed rows; it covers all earlier phases too.
    None if the orders differ."""
    shared_boundaries: int
    """Number of rows at which a step ends in every run."""
    last_shared_g: int
    """Last such row: rows [0, last_shared_g) of all runs were compared."""
    reasons: list[str]
    """Reasons of a FAIL; empty on PASS."""
    disagreement: list[Disagreement]
    """First disagreement, with one entry per run; empty if the sums agree."""
    runs: list[TwinRun]
    notes: list[str]

    @property
    def passed(self) -> bool:
        """True if the verdict is PASS."""
        return self.verdict == PASS


@dataclass(frozen=True, kw_only=True)
class _Run:
    folder: Path
    spec: OrderSpec
    ledger: Ledger

    @property
    def end_g(self) -> int:
        steps = self.ledger.steps
        return int(steps["g_end"][-1]) if len(steps) else 0

    def phase_ids(self, end: int) -> list[str]:
        begun = sum(phase.start_g < end for phase in self.spec.phases)
        return self.spec.phase_ids()[:begun]

    @property
    def objective(self) -> str:
        return str(find_description(self.ledger.events).get("objective", {}).get("name", "unknown"))


def prove_twins(*folders: Path) -> TwinsProof:
    """Compare the ledgers of two runs or more at every row where a step of two of them ends.

    Raises:
        FileNotFoundError: a folder has no ledger.
        ValueError: the chain check of a run fails; the message names the first fault.
    """
    runs = [
        _Run(folder=folder, ledger=require_sound(folder), spec=RunFolder(folder).read_order())
        for folder in folders
    ]
    reasons: list[str] = []
    disagreement: list[Disagreement] = []
    for one, other in _pairs(runs):
        found, differing = _compare(one, other)
        between = f"{one.folder} and {other.folder}: " if len(runs) > 2 else ""
        reasons += [f"{between}{reason}" for reason in found]
        disagreement = disagreement or differing
    ends = [run.ledger.steps["g_end"].astype(np.int64) for run in runs]
    shared = functools.reduce(np.intersect1d, ends)
    last = int(shared[-1]) if len(shared) else 0
    ids = [run.phase_ids(min(run.end_g for run in runs)) for run in runs]
    return TwinsProof(
        verdict=FAIL if reasons else PASS,
        reasons=reasons,
        notes=_notes(runs),
        runs=[_twin(run, last) for run in runs],
        phase_id=ids[0][-1] if ids[0] and all(each == ids[0] for each in ids) else None,
        shared_boundaries=len(shared),
        last_shared_g=last,
        disagreement=disagreement,
    )


def _pairs(runs: list[_Run]) -> list[tuple[_Run, _Run]]:
    """Return the runs to compare: two as they are given, of more each with the longest.

    So every row that two runs have was compared, over the longest run, which has it too.
    """
    if len(runs) == 2:
        return [(runs[0], runs[1])]
    longest = max(runs, key=lambda run: run.end_g)
    return [(longest, run) for run in runs if run is not longest]


def _compare(one: _Run, other: _Run) -> tuple[list[str], list[Disagreement]]:
    """Return why two runs are no twins, and where they disagree first."""
    shared = shared_boundaries(one.ledger, other.ledger)
    end = min(one.end_g, other.end_g)
    reasons = [*_order_reasons(one, other, end), *_coverage_reasons(one, other, shared, end)]
    disagreement = _first_disagreement(one, other, shared)
    if disagreement:
        reasons.append(_explain(disagreement, shared))
    return reasons, disagreement


def _order_reasons(one: _Run, other: _Run, end: int) -> list[str]:
    reasons = []
    if one.phase_ids(end) != other.phase_ids(end):
        differences = spec_differences(one.spec.to_dict(), other.spec.to_dict())
        shown = [f"{d.where}: {d.field} {d.first} and {d.second}" for d in differences[:3]]
        more = [f"{len(differences) - 3} more (see `diff`)"] if len(differences) > 3 else []
        reasons.append("the orders differ: " + "; ".join(shown + more))
    skipped = [skipped_rows(run.ledger, end) for run in (one, other)]
    if skipped[0] != skipped[1]:
        only = sorted(set(skipped[0]) ^ set(skipped[1]))[0]
        run = one if only in skipped[0] else other
        reasons.append(f"rows [{only[0]}, {only[1]}) were skipped in {run.folder} only")
    return reasons


def _coverage_reasons(one: _Run, other: _Run, shared: SharedBoundaries, end: int) -> list[str]:
    for run in (one, other):
        if not len(run.ledger.steps):
            return [f"{run.folder} has recorded no step"]
    last = int(shared.g[-1]) if len(shared.g) else 0
    if last == end:
        return []
    if last == 0:
        return [
            f"no step of both ends at the same row up to {end}, so there is nothing to compare; "
            f"the last of a phase always does"
        ]
    shorter = one if one.end_g == end else other
    return [
        f"rows [{last}, {end}) of {shorter.folder} are not covered: no step of the other run ends "
        f"at {end}"
    ]


def _first_disagreement(one: _Run, other: _Run, shared: SharedBoundaries) -> list[Disagreement]:
    if shared.agree.all():
        return []
    index = int((~shared.agree).argmax())
    agree_up_to = int(shared.g[index - 1]) if index else 0
    return [
        Disagreement(
            run=str(run.folder),
            agree_up_to=agree_up_to,
            **dataclasses.asdict(step_record(run.ledger, int(steps[index]))),
        )
        for run, steps in ((one, shared.first), (other, shared.second))
    ]


def _explain(at: list[Disagreement], shared: SharedBoundaries) -> str:
    index = int((~shared.agree).argmax())
    if not shared.same_order[index]:
        what = "were fed other rows or documents (order digests differ)"
    elif not shared.same_tokens[index]:
        what = "counted other numbers of tokens"
    else:
        what = "found other tokens in the same documents (token digests differ)"
    one, other = at
    return (
        f"within rows [{one.agree_up_to}, {one.g_end}), which end with step {one.step} (record "
        f"{one.seq}) of the first run and step {other.step} (record {other.seq}) of the second, "
        f"they {what}"
    )


def _notes(runs: list[_Run]) -> list[str]:
    notes = []
    if len({run.objective for run in runs}) == 1:
        notes.append(
            f"{'both' if len(runs) == 2 else 'all'} runs have the objective {runs[0].objective}: "
            f"the same data, but no encoder and decoder"
        )
    for run in runs:
        forks = run.ledger.forks()
        if forks:
            steps = sum(fork.steps for fork in forks)
            notes.append(
                f"{run.folder} went back {len(forks)} times and took {steps} steps again; compared "
                f"are those that its weights come from"
            )
    return notes


def _twin(run: _Run, last: int) -> TwinRun:
    sums = digests_at(run.ledger, last)
    return TwinRun(
        run=str(run.folder),
        objective=run.objective,
        order_id=run.spec.order_id,
        steps=len(run.ledger.steps),
        end_g=run.end_g,
        tokens=int(run.ledger.steps["n_tokens"].sum()),
        forks=len(run.ledger.forks()),
        seq=run.ledger.head.seq,
        chain=run.ledger.head.chain,
        compared_tokens=sums.pop("tokens"),
        **sums,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_two_runs(parser, f"twins {EXAMPLE}", times="give it twice or more")


def print_answer(args: argparse.Namespace) -> int:
    """Print the proof; return 1 if the verdict is FAIL, else 0."""
    proof = prove_twins(*several_runs(args))
    print(as_json(proof) if args.json else _text(proof))
    return 0 if proof.passed else 1


def _text(proof: TwinsProof) -> str:
    lines = [proof.verdict, *(f"  {reason}" for reason in proof.reasons)]
    for twin in proof.runs:
        lines += [
            f"{twin.run}: {twin.objective}, {twin.steps} steps, rows [0, {twin.end_g}), "
            f"{twin.tokens} tokens",
            f"  order id      {twin.order_id}",
            f"  chain head    {twin.chain} (record {twin.seq})",
            f"  order digest  {twin.order_digest} at row {proof.last_shared_g}",
            f"  token digest  {twin.token_digest}, {twin.compared_tokens} tokens",
        ]
    both = "both" if len(proof.runs) == 2 else "all"
    lines.append(f"rows at which a step ends in {both}: {proof.shared_boundaries}")
    lines.append(f"id of the phases that {both} have begun: {proof.phase_id or 'differs'}")
    return "\n".join([*lines, *(f"note: {note}" for note in proof.notes)])
