"""Report which items of a benchmark share sequences of words with what a run was trained on."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from megatron_ettin.queries.answer import add_shared_arguments, show
from megatron_ettin.queries.benchmark_items import read_items
from megatron_ettin.queries.contamination import begin_contamination, find_contamination
from megatron_ettin.queries.contamination_files import publish_report, writing_documents
from megatron_ettin.queries.corpus_scan import CorpusScan, add_scan_arguments
from megatron_ettin.queries.documents import Sidecars, select_sources
from megatron_ettin.queries.overlap import CheckpointOverlap, measure_overlap
from megatron_ettin.queries.recorded_run import RecordedRun, open_run

#: GPT-3's length of a sequence, in words.
WORDS = 13


@dataclass(frozen=True, kw_only=True)
class Contaminated:
    """Overlap of a benchmark with a run's documents."""

    summary: str
    run: str
    benchmark: str
    fields: str
    ngram: int
    """Words of a sequence."""
    items: int
    too_short: int
    """Items without a sequence, which cannot be compared."""
    sequences: int
    """Different sequences of the items."""
    documents: int
    """Documents that have one of them."""
    steps_done: int
    output: str | None
    overlap: list[CheckpointOverlap]
    """The documents of the corpora, read or not; then each checkpoint, and the last step."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add_shared_arguments(
        parser,
        "contaminated --run runs/encoder --benchmark test.jsonl --fields question answer",
    )
    add("--benchmark", type=Path, required=True, metavar="FILE", help="JSON Lines, an item a line")
    fields = "fields of an item that hold its text: strings, or lists of strings"
    add("--fields", nargs="+", required=True, metavar="FIELD", help=fields)
    ngram = f"words of a sequence (default {WORDS}, as GPT-3); items with fewer are not compared"
    add("--ngram", type=int, default=WORDS, metavar="N", help=ngram)
    output = "folder for report.html, items.parquet, checkpoints.parquet and documents.parquet"
    add("--output", type=Path, metavar="FOLDER", help=output)
    add_scan_arguments(parser)


def print_answer(args: argparse.Namespace) -> int:
    """Print the answer; return 0."""
    run = open_run(args.run)
    scan = CorpusScan(run, select_sources(run, args.source), args.tokenizer)
    return show(compare_benchmark(run, scan, args), args)


def compare_benchmark(run: RecordedRun, scan: CorpusScan, args: argparse.Namespace) -> Contaminated:
    """Compare the items with all documents, and write the report if a folder is given.

    Raises:
        ValueError: a line of the benchmark, the length of a sequence, or a corpus is not right.
        OSError: the benchmark cannot be read, or the report not written.
    """
    items = read_items(args.benchmark, args.fields)
    found = begin_contamination(scan, items, args.ngram)
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
    with writing_documents(args.output, found, Sidecars(run)) as write:
        for shared in find_contamination(run, scan, found):
            write(shared)
    overlaps = measure_overlap(run, found)
    answer = Contaminated(
        summary=overlaps.summary,
        run=str(run.folder),
        benchmark=str(args.benchmark),
        fields=" ".join(args.fields),
        ngram=args.ngram,
        items=len(items),
        too_short=overlaps.too_short,
        sequences=found.finder.num_grams,
        documents=found.any_documents,
        steps_done=run.steps_done,
        output=None if args.output is None else str(args.output),
        overlap=overlaps.checkpoints(),
    )
    if args.output is not None:
        publish_report(args.output, run, found, overlaps, answer)
    return answer
