"""The measurement of preprocessing from beginning to end: its text, its tokenizer, its rounds."""

from __future__ import annotations

import json
import os
import shutil
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks import preprocess_rounds as rounds
from benchmarks.preprocess_rounds import BenchSetting, BenchText
from benchmarks.preprocess_table import Figures, as_line, figures
from benchmarks.real_text import WrittenText, read_code, read_prose, write_text

Say = Callable[[str], object]


def measure(args: Namespace, folder: Path, *, say: Say) -> tuple[Figures, list[str]]:
    """Return the figures, and the contenders that are not installed.

    Args:
        args: options of tools/bench_preprocess.py.
        folder: gets what is made on the way.
        say: is told of each step.

    Raises:
        ContenderError, OSError, ValueError: of a contender, the package index or an input.
    """
    names, missing = rounds.available(args.contenders)
    whole = given_text(args.input) if args.input else made_text(args, folder, say)
    tokenizer = args.tokenizer
    if not (tokenizer / "tokenizer.json").is_file():
        tokenizer = folder / "tokenizer"
        say(f"{args.tokenizer}: no tokenizer there; one is trained")
        rounds.train_tokenizer(cut_of(whole, 40, folder / "training").files, tokenizer)
    outputs = folder / "outputs"
    outputs.mkdir()
    setting = BenchSetting(
        whole=whole,
        part=cut_of(whole, args.part_mb, folder / "part"),
        tokenizer=tokenizer.resolve(),
        folder=outputs,
        processes=args.processes,
    )
    say(f"{whole.num_bytes / 1e6:,.1f} MB in {len(whole.files)} files, {os.cpu_count()} cores")
    same = rounds.check_bytes(setting, names) if rounds.OURS in names else {}
    outcomes = []
    for outcome in rounds.run_rounds(setting, names, args.rounds):
        outcomes.append(outcome)
        say(as_line(outcome))
    return figures(outcomes, same), missing


def cut_of(text: BenchText, mb: float, folder: Path) -> BenchText:
    """Return the beginnings of all files, `mb` in all."""
    return rounds.cut(text, int(mb * 1e6), folder)


def given_text(files: Sequence[Path]) -> BenchText:
    """Return the text of files that the user names."""
    paths = tuple(path.resolve() for path in files)
    return BenchText(files=paths, num_bytes=sum(path.stat().st_size for path in paths))


def made_text(args: Namespace, folder: Path, say: Say) -> BenchText:
    """Return the real text of that size: the one that was kept, or a new one."""
    kept = (args.keep or folder) / f"text-{args.mb:g}-mb-{args.files}-files"
    note = kept / "made.json"
    if not note.is_file():
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir()
        written = write_text(
            kept,
            prose=read_prose(args.text),
            code=read_code(),
            num_bytes=int(args.mb * 1e6),
            num_files=args.files,
        )
        note.write_text(json.dumps(asdict(written)))
    made = WrittenText(**json.loads(note.read_text()))
    share = made.recombined_bytes / made.num_bytes
    say(
        f"{made.documents:,} documents of real text, one quarter Python;"
        f" {share:.0%} of the bytes in documents recombined from pieces of the others"
    )
    return given_text(sorted(kept.glob("*.jsonl")))
