"""Checks of a run's record: its chain, the order of its rows, their tokens, files and weights.

Without a choice: the chain, the order of all rows, and the tokens of a small sample of steps.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from megatron_ettin.order.ledger import Ledger
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.queries.answer import (
    FAIL,
    PASS,
    Check,
    Fault,
    add_shared_arguments,
    as_json,
)
from megatron_ettin.queries.verify_chain import ChainCheck, check_chain
from megatron_ettin.queries.verify_checkpoints import check_weights
from megatron_ettin.queries.verify_head import SHORTEST, FoundHead, find_head

EXAMPLE = "--run runs/encoder --tokens --sample 0.01 --seed 7"
SMALL_SAMPLE = 0.001


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """How one of the checks ended."""

    check: str
    verdict: str
    compared: int
    """Records; for the chain those of forks and the checkpoints too; for the weights, files."""
    failures: int


@dataclass(frozen=True, kw_only=True)
class Verification:
    """PASS if nothing that was looked at is wrong."""

    run: str
    verdict: str
    order_id: str | None
    """The one that order.json gives; None where that is damaged."""
    chain: str | None
    """Hash of the ledger's last record: who has kept it can tell whether the ledger was rewritten.
    None where the ledger is damaged."""
    steps: int
    end_g: int
    """Rows [0, end_g) are recorded."""
    tokens: int
    head: FoundHead | None
    """The record that was asked for by its chain hash."""
    checks: list[CheckResult]
    faults: list[Fault]
    """The first of each check's failures."""
    changes: list[str]
    """In what today's files differ from order.json."""
    notes: list[str]

    @property
    def passed(self) -> bool:
        """Whether all checks passed."""
        return self.verdict == PASS


def verify(
    folder: Path,
    *,
    order: bool = True,
    tokens: bool = True,
    weights: bool = False,
    files: bool = False,
    share: float = SMALL_SAMPLE,
    seed: int = 0,
    head: str | None = None,
) -> Verification:
    """Check the chain, and on request the order of all rows and the tokens of a share of steps.

    `files` hashes the corpora anew, `weights` every file of every checkpoint; `head` asks for the
    record with a chain hash. Corpora that are not the recorded ones any more are a FAIL, even where
    no step that was looked at has drawn what changed.

    Raises:
        FileNotFoundError: no ledger here.
        ValueError, OSError: today's files give no order at all; the message names the file.
    """
    if not 0 < share <= 1:
        raise ValueError(f"--sample: {share} is no share in (0, 1]")
    chain = check_chain(folder)
    checks = [chain.check]
    found_head = None
    if head is not None:
        check, found_head = find_head(head, chain.branches)
        checks.append(check)
    if weights:
        checks.append(check_weights(folder))
    elif saved := RunFolder(folder).complete_checkpoints():
        note = f"the files of {len(saved)} checkpoints were not hashed (--weights)"
        chain.check.notes.append(note)
    if files:
        checks.append(_check_files(folder))
    changes: list[str] = []
    if chain.is_damaged:
        chain.check.notes.append("order and tokens were not checked: the ledger is damaged")
    elif order or tokens:
        of_rows, changes = _check_rows(
            folder, chain.ledger, order=order, share=share if tokens else None, seed=seed
        )
        checks += of_rows
    return _result(folder, chain, checks, changes, found_head)


def _check_rows(
    folder: Path, ledger: Ledger, *, order: bool, share: float | None, seed: int
) -> tuple[list[Check], list[str]]:
    """Return the checks of rows, tokens and corpora's tokenizers, and what changed since."""
    # The chain alone is checked without what opens configurations and corpora.
    from megatron_ettin.queries.recorded_run import open_run
    from megatron_ettin.queries.verify_files import check_tokenizers
    from megatron_ettin.queries.verify_rows import check_order, check_tokens

    run = open_run(folder, must_match=False)
    checks = [check_order(run.order, ledger)] if order else []
    if share is not None:
        checks.append(check_tokens(run.order, ledger, share=share, seed=seed))
    recorded = RunFolder(folder).read_order(check_ids=False)
    config = run.config_for("tokenizer's files")
    checks.append(check_tokenizers(config, recorded.tokenizer_sha256))
    return checks, run.changes


def _check_files(folder: Path) -> Check:
    from megatron_ettin.queries.verify_files import check_files

    run = RunFolder(folder)
    return check_files(run.read_order(check_ids=False), run.read_config())


def _result(
    folder: Path,
    chain: ChainCheck,
    checks: list[Check],
    changes: list[str],
    head: FoundHead | None,
) -> Verification:
    steps = chain.ledger.steps
    return Verification(
        run=str(folder),
        verdict=FAIL if changes or any(check.failures for check in checks) else PASS,
        order_id=_recorded_order_id(folder),
        chain=None if chain.is_damaged else chain.ledger.head.chain,
        steps=len(steps),
        end_g=int(steps["g_end"][-1]) if len(steps) else 0,
        tokens=int(steps["n_tokens"].sum()),
        head=head,
        checks=[
            CheckResult(
                check=check.name,
                verdict=FAIL if check.failures else PASS,
                compared=check.items,
                failures=check.failures,
            )
            for check in checks
        ],
        faults=[fault for check in checks for fault in check.faults],
        changes=changes,
        notes=[note for check in checks for note in check.notes],
    )


def _recorded_order_id(folder: Path) -> str | None:
    try:
        return RunFolder(folder).read_order().order_id
    except (ValueError, OSError):  # a fault of the chain's check
        return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_shared_arguments(parser, f"verify {EXAMPLE}")
    add = parser.add_argument
    add("--chain", action="store_true", help="only the record itself, forks and checkpoints")
    add("--order", action="store_true", help="the pieces of every row; reads no tokens")
    add("--tokens", action="store_true", help="the tokens and masks of every step")
    add("--weights", action="store_true", help="every file of every checkpoint, by its SHA-256")
    add("--files", action="store_true", help="all corpora, hashed anew whatever their time stamps")
    sample = f"with --tokens: share of the steps; without any choice it is {SMALL_SAMPLE}"
    add("--sample", type=float, metavar="SHARE", help=sample)
    add("--seed", type=int, default=0, metavar="N", help="chooses the steps; default: 0")
    head = (
        f"the chain hash of a record, as it was published, or its first {SHORTEST} digits or more: "
        f"where is it, and what has happened since? Asked besides any choice"
    )
    add("--head", metavar="HEX", help=head)


def print_answer(args: argparse.Namespace) -> int:
    """Print the verification; return 1 if it is a FAIL, else 0."""
    everything = not (args.chain or args.order or args.tokens or args.weights or args.files)
    answer = verify(
        args.run,
        order=everything or args.order,
        tokens=everything or args.tokens,
        weights=args.weights,
        files=args.files,
        share=args.sample or (SMALL_SAMPLE if everything else 1.0),
        seed=args.seed,
        head=args.head,
    )
    print(as_json(answer) if args.json else _text(answer))
    return 0 if answer.passed else 1


def _text(answer: Verification) -> str:
    lines = [
        answer.verdict,
        f"{answer.run}: {answer.steps} steps, rows [0, {answer.end_g}), {answer.tokens} tokens",
        f"  order id    {answer.order_id or 'damaged'}",
        f"  chain head  {answer.chain or 'damaged'}",
        *(answer.head.lines() if answer.head is not None else []),
    ]
    for check in answer.checks:
        failures = f", {check.failures} wrong" if check.failures else ""
        lines.append(f"{check.check}: {check.verdict}, {check.compared} compared{failures}")
    lines += [f"wrong: {fault}" for fault in answer.faults]
    more = sum(check.failures for check in answer.checks) - len(answer.faults)
    lines += [f"wrong: {more} more"] if more else []
    lines += [f"changed: {change}" for change in answer.changes]
    return "\n".join([*lines, *(f"note: {note}" for note in answer.notes)])
