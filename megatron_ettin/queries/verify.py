"""Verify a run's record: its chain, the order of its rows, their tokens, its files and weights.

By default, check the chain, the order of all rows, and the tokens of a small sample of steps.
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
from megatron_ettin.queries.branches import Branch
from megatron_ettin.queries.verify_chain import ChainCheck, check_chain
from megatron_ettin.queries.verify_checkpoints import check_weights
from megatron_ettin.queries.verify_head import SHORTEST, FoundHead, find_head
from megatron_ettin.queries.verify_row_losses import check_row_losses

EXAMPLE = "--run runs/encoder --tokens --sample 0.01 --seed 7"
SMALL_SAMPLE = 0.001


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """Result of one check."""

    check: str
    verdict: str
    compared: int
    """Records compared. `chain` also counts forks' records, lines of metrics and checkpoints;
    `weights` counts files, `row losses` the stretches that records bind."""
    failures: int


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Verdict on a run, and the results of the checks that were made."""

    run: str
    verdict: str
    order_id: str | None
    """Order id in order.json; None if the file is damaged."""
    chain: str | None
    """Chain hash of the last record; a kept copy of it reveals whether the ledger was rewritten.
    None if the ledger is damaged."""
    steps: int
    end_g: int
    """First row after those that the ledger records."""
    tokens: int
    head: FoundHead | None
    """Record with the chain hash given by --head."""
    checks: list[CheckResult]
    faults: list[Fault]
    """First failures of each check."""
    changes: list[str]
    """Differences between order.json and the order of today's files."""
    notes: list[str]

    @property
    def passed(self) -> bool:
        """True if the verdict is PASS."""
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
    anchor: str | None = None,
) -> Verification:
    """Check the chain; on request also the order of all rows and the tokens of a share of steps.

    `files` hashes the corpora anew, and `weights` every file of every checkpoint. `head` looks for
    the record with this chain hash, `anchor` (a folder or URL) has heads that the ledger must have.
    A corpus that has changed since the run is a FAIL, even if no checked step drew a changed
    document.

    Raises:
        FileNotFoundError: the folder has no ledger.
        ValueError, OSError: today's files give no order at all; the message names the file.
    """
    if not 0 < share <= 1:
        raise ValueError(f"--sample: {share} is no share in (0, 1]")
    chain = check_chain(folder)
    checks = [chain.check]
    losses = check_row_losses(RunFolder(folder), chain.branches)
    checks += [] if losses is None else [losses]
    found_head = None
    if head is not None:
        check, found_head = find_head(head, chain.branches)
        checks.append(check)
    if anchor is not None:
        checks.append(_check_anchor(anchor, chain.branches))
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
    """Return the checks of rows, tokens and tokenizers, and the changes of the order since."""
    # Imported here so that `verify --chain` starts fast: these open configurations and corpora.
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


def _check_anchor(address: str, branches: list[Branch]) -> Check:
    # Imported here: it needs fsspec.
    from megatron_ettin.data.anchor import Anchor
    from megatron_ettin.queries.verify_anchor import check_anchor

    return check_anchor(Anchor(address), branches)


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
    except (ValueError, OSError):  # reported by the chain check
        return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_shared_arguments(parser, f"verify {EXAMPLE}")
    add = parser.add_argument
    add(
        "--chain",
        action="store_true",
        help="check the ledger, its forks and the files of the run folder only",
    )
    add("--order", action="store_true", help="check the pieces of every row, without tokens")
    add("--tokens", action="store_true", help="check the tokens and masks of every step")
    add("--weights", action="store_true", help="check every file of every checkpoint by SHA-256")
    add(
        "--files",
        action="store_true",
        help="hash all corpora anew, even if their time stamps are unchanged",
    )
    sample = (
        f"share of steps that --tokens checks; default: 1 ({SMALL_SAMPLE} if no check is named)"
    )
    add("--sample", type=float, metavar="SHARE", help=sample)
    add("--seed", type=int, default=0, metavar="N", help="seed that chooses the steps; default: 0")
    head = (
        f"find the record with this published chain hash ({SHORTEST} digits or more), and count "
        f"what happened since"
    )
    add("--head", metavar="HEX", help=head)
    anchor = "compare with the heads in this folder or URL, the run's `logging.anchor`"
    add("--anchor", metavar="PLACE", help=anchor)


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
        anchor=args.anchor,
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
