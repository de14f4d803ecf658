"""Packing: rows equal to the reference's, and every token of every kept document once."""

import random

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_ettin import native
from tests.native import reference


def make_plan(
    lengths: list[int] | NDArray[np.int32] | NDArray[np.int64],
    seq_length: int,
    *,
    first: int = 0,
    end: int | None = None,
    specials: str = "add",
    min_doc_tokens: int = 1,
    max_segments: int | None = None,
    block: int = 65_536,
) -> native.RowPlan:
    return native.RowPlan(
        np.asarray(lengths),
        first,
        len(lengths) if end is None else end,
        seq_length,
        specials=specials,
        min_doc_tokens=min_doc_tokens,
        max_segments_per_row=max_segments or max(1, seq_length // 16),
        block_documents=block,
    )


def pieces_of(plan: native.RowPlan) -> list[list[reference.Piece]]:
    rows = []
    for row in range(plan.num_rows):
        columns = [column.tolist() for column in plan.segments(row)]
        rows.append([reference.Piece(*piece) for piece in zip(*columns, strict=True)])
    return rows


def random_lengths(chance: random.Random, seq_length: int, count: int) -> list[int]:
    edges = [0, 1, 2, seq_length - 3, seq_length - 2, seq_length - 1, seq_length, 10 * seq_length]
    kinds = [
        lambda: chance.choice(edges),
        lambda: chance.randrange(seq_length),
        lambda: int(chance.lognormvariate(2.0, 1.2)),
    ]
    return [chance.choice(kinds)() for _ in range(count)]


@pytest.mark.parametrize("specials", ["add", "present"])
@pytest.mark.parametrize("seed", range(12))
def test_rows_equal_the_reference(specials: str, seed: int) -> None:
    chance = random.Random(seed)
    seq_length = chance.choice([4, 8, 31, 64, 130])
    lengths = random_lengths(chance, seq_length, 400)
    first, end = chance.randrange(50), chance.randrange(300, 401)
    max_segments = chance.choice([1, 2, 3, 50])
    min_doc_tokens = chance.choice([0, 1, 5])
    block = chance.choice([1, 37, 100, 65_536])
    plan = make_plan(
        lengths,
        seq_length,
        first=first,
        end=end,
        specials=specials,
        min_doc_tokens=min_doc_tokens,
        max_segments=max_segments,
        block=block,
    )
    expected = reference.plan_rows(
        lengths,
        first,
        end,
        seq_length,
        specials=specials,
        min_doc_tokens=min_doc_tokens,
        max_segments=max_segments,
        block=block,
    )
    assert pieces_of(plan) == expected


@pytest.mark.parametrize("specials", ["add", "present"])
@pytest.mark.parametrize("seed", range(6))
def test_every_token_of_every_kept_document_is_in_one_row(specials: str, seed: int) -> None:
    chance = random.Random(100 + seed)
    seq_length = chance.choice([16, 100, 1024])
    lengths = random_lengths(chance, seq_length, 3000)
    plan = make_plan(lengths, seq_length, specials=specials, min_doc_tokens=3, block=1000)
    added = 2 if specials == "add" else 0
    seen = {document: np.zeros(length, int) for document, length in enumerate(lengths)}
    pieces_per_document = np.zeros(len(lengths), int)
    for row, pieces in enumerate(pieces_of(plan)):
        used = sum(piece.length + added for piece in pieces)
        assert used == plan.row_tokens[row] <= seq_length
        documents = [piece.document for piece in pieces]
        assert documents == sorted(set(documents))
        assert 1 <= len(pieces) <= max(1, seq_length // 16)
        for piece in pieces:
            assert piece.length > 0
            seen[piece.document][piece.offset : piece.offset + piece.length] += 1
            end = piece.offset + piece.length
            assert piece.ends_document == (end == lengths[piece.document])
            pieces_per_document[piece.document] += 1
    kept = [document for document, length in enumerate(lengths) if length >= 3]
    for document in range(len(lengths)):
        assert (seen[document] == (1 if lengths[document] >= 3 else 0)).all()
    assert plan.num_documents == len(kept)
    assert plan.dropped_documents == len(lengths) - len(kept)
    assert plan.dropped_tokens == sum(length for length in lengths if length < 3)
    assert plan.cut_documents == (pieces_per_document > 1).sum()
    assert plan.num_tokens == plan.row_tokens.sum(dtype=np.int64)
    assert plan.num_tokens == sum(lengths[d] for d in kept) + added * pieces_per_document.sum()


def test_document_lengths_around_the_row_length() -> None:
    pieces = {
        length: [
            (piece.offset, piece.length, piece.ends_document)
            for row in pieces_of(make_plan([length], 10))
            for piece in row
        ]
        for length in (1, 7, 8, 9, 10, 16, 17)
    }
    assert pieces == {
        1: [(0, 1, True)],
        7: [(0, 7, True)],
        8: [(0, 8, True)],
        9: [(0, 8, False), (8, 1, True)],
        10: [(0, 8, False), (8, 2, True)],
        16: [(0, 8, False), (8, 8, True)],
        17: [(0, 8, False), (8, 8, False), (16, 1, True)],
    }


def test_packing_is_tight() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.9, 1.2, 65_536), 8, 200_000).astype(np.int32)
    plan = make_plan(lengths, 1024)
    assert plan.num_tokens / (plan.num_rows * 1024) > 0.999


def test_a_row_takes_no_more_than_its_segments() -> None:
    plan = make_plan([1] * 100, 64, max_segments=5)
    assert plan.num_rows == 20
    assert set(plan.row_tokens.tolist()) == {15}


def test_wide_rows_use_the_whole_bitmap() -> None:
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 300_000, 300).tolist()
    plan = make_plan(lengths, 300_002, max_segments=20)
    expected = reference.plan_rows(
        lengths, 0, 300, 300_002, specials="add", min_doc_tokens=1, max_segments=20
    )
    assert pieces_of(plan) == expected


def test_rows_of_a_block_do_not_depend_on_other_blocks() -> None:
    lengths = random_lengths(random.Random(4), 64, 300)
    whole = pieces_of(make_plan(lengths, 64, block=100))
    parts = [pieces_of(make_plan(lengths, 64, first=f, end=f + 100)) for f in (0, 100, 200)]
    assert whole == parts[0] + parts[1] + parts[2]


def test_lengths_may_be_int32_int64_or_strided() -> None:
    lengths = np.array([5, 9, 100, 3, 64, 0, 8])
    expected = pieces_of(make_plan(lengths, 32))
    assert pieces_of(make_plan(lengths.astype(np.int32), 32)) == expected
    assert pieces_of(make_plan(np.repeat(lengths, 2)[::2], 32)) == expected
    assert pieces_of(make_plan(lengths.astype(np.uint16), 32)) == expected  # type: ignore[arg-type]


def test_plan_keeps_its_lengths_alive() -> None:
    plan = make_plan(np.full(1000, 40, np.int32), 32)
    tokens = plan.row_tokens
    expected = tokens.copy()
    del plan
    np.testing.assert_array_equal(tokens, expected)


def test_nothing_to_pack() -> None:
    for lengths in ([], [0, 0], [2, 1]):
        plan = make_plan(np.array(lengths, np.int64), 16, min_doc_tokens=3)
        assert (plan.num_rows, plan.num_tokens, plan.row_tokens.size) == (0, 0, 0)
    with pytest.raises(IndexError, match="row 0 of a plan of 0 rows"):
        plan.segments(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_length": 2}, "seq_length is 2"),
        ({"max_segments": -1}, "max_segments_per_row is -1"),
        ({"min_doc_tokens": -1}, "min_doc_tokens is -1"),
        ({"block": 65_537}, "block_documents is 65537"),
        ({"block": 0}, "block_documents is 0"),
        ({"end": 4}, "end_document is 4"),
        ({"first": 3, "end": 2}, "first_document is 3"),
        ({"specials": "none"}, "specials is 'none'"),
    ],
)
def test_bad_rule_is_named(change: dict[str, object], message: str) -> None:
    arguments = {"seq_length": 16, **change}
    with pytest.raises(ValueError, match=message):
        make_plan([1, 2, 3], **arguments)  # type: ignore[arg-type]


def test_bad_length_is_named() -> None:
    with pytest.raises(ValueError, match="document 1 has length -5"):
        make_plan([3, -5], 16)
    with pytest.raises(TypeError, match="signed integers"):
        make_plan(np.array([3.0]), 16)
