"""`tools/dataset.py describe` gives the numbers that a direct computation gives, and draws them."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from megatron_ettin.data.inspection import length_histogram
from megatron_ettin.data.inspection.length_histogram import LengthHistogram
from megatron_ettin.evaluation.lengths_figure import bin_edges, shares_per_doubling
from megatron_ettin.indexed import IndexedWriter
from megatron_ettin.order.corpus_identity import identify_corpus
from tests.unit.dataset_corpora import MadeCorpus, make_corpus, make_folder
from tools.dataset import main

PERCENTS = (1, 5, 25, 50, 75, 95, 99, 99.9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> MadeCorpus:
    """Return a folder of shards; the single corpus of the same files is beside it."""
    root = tmp_path_factory.mktemp("described")
    make_corpus(root)
    return make_folder(root)


def describe(capsys: pytest.CaptureFixture[str], *words: object) -> list[dict[str, object]]:
    main(["describe", *map(str, words), "--json"])
    corpora = json.loads(capsys.readouterr().out)["corpora"]
    assert isinstance(corpora, list)
    return corpora


def test_numbers_are_those_of_the_texts(
    folder: MadeCorpus, capsys: pytest.CaptureFixture[str]
) -> None:
    single = folder.prefix.with_name("small_text_document")
    lengths = np.array([len(ids) for ids in folder.ids()])
    by_file: dict[Path, list[int]] = {path: [] for path in folder.raw}
    for (path, *_), length in zip(folder.stored, lengths.tolist(), strict=True):
        by_file[path].append(length)
    raw_bytes = sum(path.stat().st_size for path in folder.raw)
    empty = sum(texts.count("") for texts in folder.texts)
    of_single, of_folder = describe(capsys, single, folder.prefix)
    dropped = {"duplicate": 0, "empty": empty, "too_short": 0, "too_long": 0, "bad": 0}
    assert (of_single["dropped"], of_folder["dropped"]) == (dropped, dropped)
    assert (of_single["shards"], of_folder["shards"]) == (1, 2)
    for corpus in (of_single, of_folder):
        assert (corpus["documents"], corpus["tokens"]) == (len(lengths), lengths.sum())
        assert corpus["bin_bytes"] == 2 * lengths.sum()
        assert corpus["raw_bytes_per_token"] == pytest.approx(raw_bytes / lengths.sum())
        assert corpus["mean_length"] == pytest.approx(lengths.mean())
        percentiles = np.percentile(lengths, PERCENTS, method="inverted_cdf").tolist()
        names = [*(f"{percent:g}" for percent in PERCENTS), "max"]
        expected = dict(zip(names, [*percentiles, lengths.max()], strict=True))
        assert corpus["length_percentiles"] == expected
        assert corpus["sources"] == [
            {
                "path": str(path),
                "documents": len(found),
                "tokens": sum(found),
                "bytes": path.stat().st_size,
            }
            for path, found in by_file.items()
        ]


def test_validation_documents_count_as_tokens_of_the_raw_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_corpus(tmp_path, validation_share=0.3)
    held_out = made.prefix.with_name("small_text_validation")
    raw_bytes, tokens = sum(p.stat().st_size for p in made.raw), sum(map(len, made.ids()))
    both = describe(capsys, made.prefix, held_out)
    for corpus in both:
        assert corpus["raw_bytes_per_token"] == pytest.approx(raw_bytes / tokens)
    assert sum(int(str(corpus["tokens"])) for corpus in both) == tokens
    made.raw[0].unlink()
    (without,) = describe(capsys, made.prefix)
    assert without["raw_bytes_per_token"] is None


def test_a_corpus_of_another_program_has_its_lengths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with IndexedWriter(tmp_path / "other", "int32") as writer:
        for length in (1, 2, 2, 9):
            writer.add(np.arange(length, dtype=np.int32))
    (corpus,) = describe(capsys, tmp_path / "other")
    assert (corpus["documents"], corpus["tokens"], corpus["bin_bytes"]) == (4, 14, 56)
    assert (corpus["dropped"], corpus["tokenizer_sha256"], corpus["sources"]) == (None, None, [])
    main(["describe", str(tmp_path / "other")])
    text = capsys.readouterr().out
    assert "dropped                       unknown" in text
    assert "3.5   1   1    1    2    2    9    9      9    9" in text


def test_chunks_give_the_same_histogram(
    folder: MadeCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = [f"{folder.prefix}/{n:05d}" for n in (0, 1)]
    monkeypatch.setattr(length_histogram, "CHUNK_DOCUMENTS", 7)
    histogram = LengthHistogram.of_corpus(shards)
    lengths, counts = np.unique([len(ids) for ids in folder.ids()], return_counts=True)
    assert histogram.lengths.tolist() == lengths.tolist()
    assert histogram.documents.tolist() == counts.tolist()
    tokens = [identify_corpus(shard).tokens for shard in shards]
    assert histogram.tokens.sum() == sum(tokens)


@pytest.mark.parametrize("count", [1, 2, 10, 100, 1000])
def test_percentiles_are_exact(count: int) -> None:
    random = np.random.default_rng(count)
    lengths, documents = np.unique(random.integers(1, 500, size=count), return_counts=True)
    histogram = LengthHistogram(lengths=lengths, documents=documents)
    every = np.repeat(lengths, documents)
    for percent in (*PERCENTS, 100):
        expected = np.percentile(every, percent, method="inverted_cdf")
        assert histogram.percentile(percent) == expected


@pytest.mark.parametrize("longest", [1, 2, 60, 100_000])
def test_bins_hold_every_document_once(longest: int) -> None:
    edges = bin_edges(longest)
    assert edges[0] == 0.5
    assert longest < edges[-1] < longest + 1
    random = np.random.default_rng(longest)
    lengths, documents = np.unique(random.integers(1, longest + 1, 1000), return_counts=True)
    histogram = LengthHistogram(lengths=lengths, documents=documents)
    for weights in (histogram.documents, histogram.tokens):
        shares = shares_per_doubling(histogram, weights, edges)
        assert (shares * np.diff(np.log2(edges))).sum() == pytest.approx(1.0)
        one = weights[lengths == 1].sum() / weights.sum() / np.log2(1.5 / 0.5)
        assert shares[0] == pytest.approx(one)


def test_figure_is_drawn_and_the_same_twice(
    folder: MadeCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    single = folder.prefix.with_name("small_text_document")
    for name in ("a.png", "b.png"):
        main(["describe", str(folder.prefix), str(single), "--figure", str(tmp_path / name)])
    content = (tmp_path / "a.png").read_bytes()
    assert content == (tmp_path / "b.png").read_bytes()
    assert struct.unpack(">II", content[16:24]) == (1440, 896)
    lines = capsys.readouterr().out.splitlines()
    assert f"corpus                        {folder.prefix}" in lines
    assert f"source of {single}  documents  tokens   bytes" in lines
