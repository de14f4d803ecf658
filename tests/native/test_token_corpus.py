"""A corpus cut into shards gives the plans, rows and digests of the pair that it was cut from."""

from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from megatron_ettin import native
from tests.native.corpora import piece_columns

L = 16
IDS = {"cls_id": 60_001, "sep_id": 60_002, "pad_id": 60_003}

documents_of_corpora = st.lists(st.integers(0, 3 * L), min_size=1, max_size=60)


def write(prefix: Path, documents: list[NDArray[np.int64]], dtype: str) -> native.TokenFile:
    builder = native.TokenFileBuilder(prefix, dtype)
    for document in documents:
        builder.add(document)
    builder.commit()
    return native.TokenFile(prefix, check=False)


def make_documents(lengths: list[int]) -> list[NDArray[np.int64]]:
    ends = np.cumsum(lengths)
    return [np.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)]


def write_shards(
    folder: Path, documents: list[NDArray[np.int64]], cuts: list[int], dtypes: list[str]
) -> native.TokenCorpus:
    edges = [0, *sorted(min(cut, len(documents)) for cut in cuts), len(documents)]
    return native.TokenCorpus(
        [
            write(folder / f"{n:05d}", documents[begin:end], dtypes[n % len(dtypes)])
            for n, (begin, end) in enumerate(pairwise(edges))
        ]
    )


@settings(max_examples=60, deadline=None)
@given(
    lengths=documents_of_corpora,
    cuts=st.lists(st.integers(0, 60), max_size=6),
    dtypes=st.lists(st.sampled_from(["uint16", "int32"]), min_size=1, max_size=3),
    pack=st.sampled_from(["bfd", "concat", "none"]),
    specials=st.sampled_from(["add", "present"]),
    bodies=st.booleans(),
    block=st.sampled_from([1, 7, 65_536]),
    first=st.integers(0, 5),
)
def test_shards_are_read_as_one_pair(
    lengths: list[int],
    cuts: list[int],
    dtypes: list[str],
    pack: str,
    specials: str,
    bodies: bool,
    block: int,
    first: int,
) -> None:
    documents = make_documents(lengths)
    with TemporaryDirectory() as name:
        folder = Path(name)
        whole = write(folder / "whole", documents, "int32")
        shards = write_shards(folder, documents, cuts, dtypes)
        rules = {
            "first_document": min(first, len(lengths)),
            "end_document": len(lengths),
            "seq_length": L,
            "pack": pack,
            "specials": specials,
            "min_doc_tokens": 1,
            "max_segments_per_row": 3 if pack == "bfd" else 1,
            "block_documents": block,
            "bodies": bodies,
        }
        plans = []
        for corpus, path in ((whole, folder / "whole.plan"), (shards, folder / "shards.plan")):
            native.build_row_plan(corpus, path, **rules)
            plans.append(native.RowPlan(path, corpus))
        assert (folder / "whole.plan").read_bytes() == (folder / "shards.plan").read_bytes()
    one, other = plans
    assert (shards.num_documents, shards.num_tokens) == (whole.num_documents, whole.num_tokens)
    assert shards.read_lengths(0, len(lengths)).tolist() == lengths
    for number, document in enumerate(documents):
        assert shards.length(number) == len(document)
        assert shards.tokens(number).tolist() == document.tolist()
    rows = np.arange(one.num_rows)
    listed = [piece_columns(plan.pieces(rows)) for plan in plans]
    for columns in zip(*listed, strict=True):
        np.testing.assert_array_equal(*columns)
    np.testing.assert_array_equal(one.row_tokens(rows), other.row_tokens(rows))
    for document in range(one.first_document, one.end_document):
        assert one.find(document).tolist() == other.find(document).tolist()
    if not len(rows):
        return
    streams = [stream(plan) for plan in plans]
    for field in ("tokens", "position_ids", "cu_seqlens", "segment_kind", "num_tokens"):
        np.testing.assert_array_equal(*(getattr(packed, field) for packed in streams))
    np.testing.assert_array_equal(*(digests(plan) for plan in plans))


def stream(plan: native.RowPlan) -> native.PackedRows:
    rows = np.arange(plan.num_rows)
    return native.assemble_rows(
        [plan],
        np.zeros(len(rows), np.int32),
        rows,
        seq_length=L,
        max_segments_per_row=3,
        **IDS,
    )


def digests(plan: native.RowPlan) -> NDArray[np.uint64]:
    rows = np.arange(plan.num_rows)
    return native.order_digests(
        [plan],
        rows,
        np.array([5], np.uint64),
        np.zeros(len(rows), np.int32),
        np.zeros(len(rows), np.int64),
        rows,
    )


@pytest.mark.parametrize("check", [True, False])
def test_a_pair_without_documents_is_written_and_read(tmp_path: Path, check: bool) -> None:
    write(tmp_path / "empty", [], "uint16")
    assert (tmp_path / "empty.bin").stat().st_size == 0
    file = native.TokenFile(tmp_path / "empty", check=check)
    assert (file.num_documents, file.num_tokens, len(file.lengths)) == (0, 0, 0)
    assert file.read_lengths(0, 0).tolist() == []
    file.check_tokens(10)
    corpus = native.TokenCorpus([file, file])
    assert (corpus.num_documents, corpus.num_tokens) == (0, 0)
    with pytest.raises(IndexError, match=r"empty to .*empty \(2 shards\): document 0 of 0"):
        corpus.tokens(0)


def test_the_widest_dtype_counts(tmp_path: Path) -> None:
    narrow = write(tmp_path / "narrow", [np.array([1])], "uint16")
    wide = write(tmp_path / "wide", [np.array([70_000])], "int32")
    assert native.TokenCorpus([narrow]).dtype == "uint16"
    corpus = native.TokenCorpus([narrow, wide])
    assert corpus.dtype == "int32"
    assert corpus.tokens(1).tolist() == [70_000]
    assert [shard.prefix for shard in corpus.shards] == [narrow.prefix, wide.prefix]


def test_outside_of_the_corpus(tmp_path: Path) -> None:
    shards = [write(tmp_path / str(n), make_documents([2, 3]), "uint16") for n in range(2)]
    corpus = native.TokenCorpus(shards)
    for document in (-1, 4):
        with pytest.raises(IndexError, match=rf"\(2 shards\): document {document} of 4"):
            corpus.tokens(document)
        with pytest.raises(IndexError, match=f"document {document} of 4"):
            corpus.length(document)
    with pytest.raises(IndexError, match=r"documents \[3, 5\) of 4"):
        corpus.read_lengths(3, 5)
    with pytest.raises(IndexError, match="document 1 has 3 tokens; there are no 2 at offset 2"):
        corpus.tokens(3, 2, 2)
    with pytest.raises(ValueError, match="at least one shard"):
        native.TokenCorpus([])
    for nothing in ([None], [shards[0], None]):
        with pytest.raises(TypeError):
            native.TokenCorpus(nothing)  # type: ignore[list-item]
    with pytest.raises(TypeError):
        native.RowPlan(tmp_path / "plan", None)  # type: ignore[arg-type]


def test_a_plan_keeps_its_shards(tmp_path: Path) -> None:
    def make_plan() -> native.RowPlan:
        shards = [write(tmp_path / str(n), make_documents([2, 3]), "uint16") for n in range(2)]
        corpus = native.TokenCorpus(shards)
        native.build_row_plan(
            corpus,
            tmp_path / "plan",
            first_document=0,
            end_document=4,
            seq_length=L,
            pack="none",
            specials="present",
            min_doc_tokens=1,
            max_segments_per_row=1,
        )
        return native.RowPlan(tmp_path / "plan", corpus)

    plan = make_plan()
    packed = stream(plan).tokens.reshape(-1, L)
    assert packed[:, :3].tolist() == [[0, 1, IDS["pad_id"]], [2, 3, 4]] * 2
