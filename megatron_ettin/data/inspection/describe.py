"""Describe corpora: sources, documents, tokens, lengths of documents, and what was dropped."""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_ettin.data.corpus_tokenizer import recorded_tokenizer
from megatron_ettin.data.inspection.length_histogram import LengthHistogram
from megatron_ettin.data.inspection.raw_text import find_raw_file
from megatron_ettin.data.inspection.shards import (
    ShardSummary,
    corpus_shards,
    read_dataset,
    read_shard_summary,
)
from megatron_ettin.data.provenance import GROUP_DOCUMENTS, Provenance, sidecar_path
from megatron_ettin.native import TokenFile
from megatron_ettin.text_table import text_facts, text_table

EXAMPLE = "describe corpora/small_text_document --figure lengths.png"
PERCENTS = (1, 5, 25, 50, 75, 95, 99, 99.9)
#: Sources of a corpus in the table, the largest; JSON has all.
SOURCES_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class RawSource:
    """Raw file of a corpus and what it gave."""

    path: str
    documents: int | None
    """Documents in this corpus; None without a sidecar."""
    tokens: int | None
    bytes: int | None
    """Size of the file; None if it is gone."""


@dataclass(frozen=True, kw_only=True)
class CorpusDescription:
    """Facts about a corpus."""

    prefix: str
    shards: int
    documents: int
    tokens: int
    bin_bytes: int
    """Bytes of all .bin."""
    raw_bytes_per_token: float | None
    """Bytes of the raw files, as they are on disk, for each token that they gave, validation
    documents included; None if not all of them are known and there."""
    tokenizer_sha256: str | None
    dropped: dict[str, int] | None
    """Documents that were not stored, by reason; None if unrecorded."""
    mean_length: float
    length_percentiles: dict[str, int]
    """Length in tokens by percent; `max` is the longest."""
    sources: list[RawSource]


def describe(prefix: str, histogram: LengthHistogram, root: Path | None) -> CorpusDescription:
    """Return the facts about a corpus; `root` is where its raw files are today.

    Raises:
        FileNotFoundError: there is no corpus.
        ValueError: a file of it is damaged.
    """
    shards = corpus_shards(prefix)
    summaries = [read_shard_summary(shard) for shard in shards]
    known = [summary for summary in summaries if summary is not None]
    files = [TokenFile(shard, check=False) for shard in shards]
    sources = _sources(shards, known, root)
    percentiles = {f"{percent:g}": histogram.percentile(percent) for percent in PERCENTS}
    return CorpusDescription(
        prefix=prefix,
        shards=len(shards),
        documents=sum(file.num_documents for file in files),
        tokens=sum(file.num_tokens for file in files),
        bin_bytes=sum(Path(f"{shard}.bin").stat().st_size for shard in shards),
        raw_bytes_per_token=_raw_bytes_per_token(summaries, sources),
        tokenizer_sha256=recorded_tokenizer(shards[0])
        or next((summary.tokenizer_sha256 for summary in known), None),
        dropped=_dropped(prefix, known),
        mean_length=histogram.mean,
        length_percentiles={**percentiles, "max": histogram.percentile(100)},
        sources=sources,
    )


def _sources(
    shards: Sequence[str], summaries: Sequence[ShardSummary], root: Path | None
) -> list[RawSource]:
    """Return the raw files in the order of the documents; then those that gave none."""
    documents: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    with_sidecar = [shard for shard in shards if sidecar_path(shard).is_file()]
    for shard in tqdm(
        with_sidecar, desc="reading sidecars", unit=" shards", leave=False, disable=None
    ):
        with Provenance.open(shard) as provenance:
            _count_sources(provenance, documents, tokens)
    paths = [*documents, *(file.path for summary in summaries for file in summary.inputs)]
    found = {path: find_raw_file(path, root) for path in dict.fromkeys(paths)}
    is_counted = len(with_sidecar) == len(shards)
    return [
        RawSource(
            path=path,
            documents=documents[path] if is_counted else None,
            tokens=tokens[path] if is_counted else None,
            bytes=None if file is None else file.stat().st_size,
        )
        for path, file in found.items()
    ]


def _count_sources(provenance: Provenance, documents: Counter[str], tokens: Counter[str]) -> None:
    for begin in range(0, provenance.num_documents, GROUP_DOCUMENTS):
        ordinals = np.arange(begin, min(begin + GROUP_DOCUMENTS, provenance.num_documents))
        rows = provenance.documents(ordinals, ["shard", "n_tokens"])
        groups = rows.group_by("shard", use_threads=False).aggregate(
            [("n_tokens", "count"), ("n_tokens", "sum")]
        )
        for row in groups.to_pylist():
            documents[row["shard"]] += row["n_tokens_count"]
            tokens[row["shard"]] += row["n_tokens_sum"]


def _raw_bytes_per_token(
    summaries: Sequence[ShardSummary | None], sources: Sequence[RawSource]
) -> float | None:
    sizes = [source.bytes for source in sources if source.bytes is not None]
    made = [s.made_tokens for s in summaries if s is not None and s.made_tokens is not None]
    if not sizes or len(sizes) < len(sources) or len(made) < len(summaries) or not sum(made):
        return None
    return sum(sizes) / sum(made)


def _dropped(prefix: str, summaries: Sequence[ShardSummary]) -> dict[str, int] | None:
    dataset = read_dataset(prefix)
    if dataset is not None and isinstance(dataset.get("dropped"), dict):
        return dict(dataset["dropped"])
    if not summaries:
        return None
    total: Counter[str] = Counter()
    for summary in summaries:
        total.update(summary.dropped)
    return dict(total)


@dataclass(frozen=True, kw_only=True)
class CorporaDescription:
    """Facts about several corpora, and their lengths for a figure."""

    corpora: list[CorpusDescription]
    histograms: dict[str, LengthHistogram]
    """By prefix."""

    @property
    def passed(self) -> bool:
        """True: a description has no verdict."""
        return True

    def lines(self) -> Iterator[str]:
        """Yield facts of each corpus, the table of lengths, and the tables of sources."""
        for corpus in self.corpora:
            yield from text_facts(_facts(corpus))
            yield ""
        columns = ["mean", *(f"p{name}" for name in PERCENTS), "max"]
        rows = [
            [c.prefix, f"{c.mean_length:,.1f}", *(f"{n:,}" for n in c.length_percentiles.values())]
            for c in self.corpora
        ]
        yield "length of documents in tokens"
        yield from text_table(["corpus", *columns], rows, numbers=columns)
        for corpus in self.corpora:
            yield ""
            yield from _source_lines(corpus)

    def to_json(self) -> dict[str, Any]:
        """Return the same as values of JSON."""
        return {"corpora": [dataclasses.asdict(corpus) for corpus in self.corpora]}


def _facts(corpus: CorpusDescription) -> list[tuple[str, str]]:
    per_token = corpus.raw_bytes_per_token
    dropped = corpus.dropped
    counted = [f"{reason}: {count:,}" for reason, count in (dropped or {}).items() if count]
    return [
        ("corpus", corpus.prefix),
        ("shards", f"{corpus.shards:,}"),
        ("documents", f"{corpus.documents:,}"),
        ("tokens", f"{corpus.tokens:,}"),
        ("bytes of .bin per token", f"{corpus.bin_bytes / max(1, corpus.tokens):g}"),
        ("bytes of raw files per token", "unknown" if per_token is None else f"{per_token:.3f}"),
        ("dropped", "unknown" if dropped is None else ", ".join(counted) or "none"),
        ("tokenizer", corpus.tokenizer_sha256 or "unknown"),
    ]


def _source_lines(corpus: CorpusDescription) -> Iterator[str]:
    columns = ["documents", "tokens", "bytes"]
    largest = sorted(corpus.sources, key=lambda source: -(source.tokens or 0))[:SOURCES_SHOWN]
    rows = [
        [s.path, *("-" if n is None else f"{n:,}" for n in (s.documents, s.tokens, s.bytes))]
        for s in largest
    ]
    yield from text_table([f"source of {corpus.prefix}", *columns], rows, numbers=columns)
    if len(largest) < len(corpus.sources):
        yield f"and {len(corpus.sources) - len(largest)} smaller ones (--json has all)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add("prefixes", nargs="+", metavar="PREFIX", help="corpus, without a suffix; or its folder")
    add("--sources", type=Path, metavar="ROOT", help="folder of the raw files, if they were moved")
    figure = "draw the lengths of documents, by documents and by tokens"
    add("--figure", type=Path, metavar="FILE.png", help=figure)


def answer(args: argparse.Namespace) -> CorporaDescription:
    """Return what the command prints, and what its figure shows."""
    prefixes = list(dict.fromkeys(args.prefixes))
    histograms = {prefix: LengthHistogram.of_corpus(corpus_shards(prefix)) for prefix in prefixes}
    corpora = [describe(prefix, histograms[prefix], args.sources) for prefix in prefixes]
    return CorporaDescription(corpora=corpora, histograms=histograms)
