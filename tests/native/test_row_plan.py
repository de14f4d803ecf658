"""Packing: rows equal to the reference's, every token of every kept document once, and back."""

import random
from pathlib import Path

import numpy as np
import pytest

from megatron_ettin import native
from tests.native import reference
from tests.native.corpora import build_plan, pieces_of, plan_lengths, write_lengths

PACKS = ["bfd", "concat", "none"]


def random_lengths(chance: random.Random, seq_length: int, count: int) -> list[int]:
    edges = [0, 1, 2, seq_length - 3, seq_length - 2, seq_length - 1, seq_length, 10 * seq_length]
    kinds = [
        lambda: chance.choice(edges),
        lambda: chance.randrange(seq_length),
        lambda: int(chance.lognormvariate(2.0, 1.2)),
    ]
    return [chance.choice(kinds)() for _ in range(count)]


def check_against_reference(folder: Path, pack: str, specials: str, chance: random.Random) -> None:
    seq_length = chance.choice([4, 8, 31, 64, 130])
    lengths = random_lengths(chance, seq_length, 400)
    first, end = chance.randrange(50), chance.randrange(300, 401)
    max_segments = chance.choice([1, 2, 3, 50]) if pack == "bfd" else 1
    min_doc_tokens = chance.choice([0, 1, 5])
    block = chance.choice([1, 37, 100, 65_536])
    plan = plan_lengths(
        folder,
        lengths,
        seq_length,
        first=first,
        end=end,
        pack=pack,
        specials=specials,
        min_doc_tokens=min_doc_tokens,
        max_segments=max_segments,
        block=block,
        bodies=chance.random() < 0.5,
    )
    expected = reference.plan_rows(
        lengths,
        first,
        end,
        seq_length,
        pack=pack,
        specials=specials,
        min_doc_tokens=min_doc_tokens,
        max_segments=max_segments,
        block=block,
    )
    assert pieces_of(plan) == expected
    used = [sum(piece.slots for piece in row) for row in expected]
    assert plan.row_tokens(np.arange(plan.num_rows)).tolist() == used
    rows_of: dict[int, list[int]] = {document: [] for document in range(first, end)}
    for row, pieces in enumerate(expected):
        for piece in pieces:
            rows_of[piece.document].append(row)
    assert {document: plan.find(document).tolist() for document in rows_of} == rows_of
    assert plan.cut_documents == sum(len(rows) > 1 for rows in rows_of.values())


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("specials", ["add", "present"])
def test_rows_and_their_inverse_equal_the_reference(
    tmp_path: Path, pack: str, specials: str
) -> None:
    for seed in range(12):
        check_against_reference(tmp_path, pack, specials, random.Random(seed))


@pytest.mark.long
@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("specials", ["add", "present"])
def test_many_rows_and_their_inverse_equal_the_reference(
    tmp_path: Path, pack: str, specials: str
) -> None:
    for seed in range(1000, 2700):
        folder = tmp_path / str(seed)
        folder.mkdir()
        check_against_reference(folder, pack, specials, random.Random(seed))
        for path in folder.iterdir():
            path.unlink()


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("specials", ["add", "present"])
@pytest.mark.parametrize("seed", range(4))
def test_every_token_of_every_kept_document_is_in_one_row(
    tmp_path: Path, pack: str, specials: str, seed: int
) -> None:
    chance = random.Random(100 + seed)
    seq_length = chance.choice([16, 100, 1024])
    lengths = random_lengths(chance, seq_length, 3000)
    plan = plan_lengths(
        tmp_path, lengths, seq_length, pack=pack, specials=specials, min_doc_tokens=3, block=1000
    )
    seen = {document: np.zeros(length, int) for document, length in enumerate(lengths)}
    specials_of = np.zeros((len(lengths), 2), int)
    pieces_per_document = np.zeros(len(lengths), int)
    tokens = plan.row_tokens(np.arange(plan.num_rows))
    for row, pieces in enumerate(pieces_of(plan)):
        assert sum(piece.slots for piece in pieces) == tokens[row] <= seq_length
        documents = [piece.document for piece in pieces]
        assert documents == sorted(set(documents))
        assert len(pieces) >= 1
        assert pack == "concat" or len(pieces) <= max(1, seq_length // 16)
        for piece in pieces:
            assert piece.slots > 0
            seen[piece.document][piece.offset : piece.offset + piece.length] += 1
            specials_of[piece.document] += (piece.cls, piece.sep)
            pieces_per_document[piece.document] += 1
    kept = np.array(lengths) >= 3
    for document in range(len(lengths)):
        assert (seen[document] == (1 if kept[document] else 0)).all()
    pairs = pieces_per_document if pack != "concat" else kept
    assert (specials_of == (pairs if specials == "add" else 0 * pairs)[:, None]).all()
    assert plan.num_documents == kept.sum()
    assert plan.dropped_documents == len(lengths) - kept.sum()
    assert plan.dropped_tokens == sum(length for length in lengths if length < 3)
    assert plan.cut_documents == (pieces_per_document > 1).sum()
    assert plan.num_tokens == tokens.sum(dtype=np.int64)
    assert plan.num_tokens == np.array(lengths)[kept].sum() + specials_of.sum()


def test_document_lengths_around_the_row_length(tmp_path: Path) -> None:
    pieces = {
        length: [
            (piece.offset, piece.length, piece.ends_document)
            for row in pieces_of(plan_lengths(tmp_path, [length], 10))
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


def test_a_concat_row_may_begin_or_end_with_a_special_token_alone(tmp_path: Path) -> None:
    # Slots: c 0 1 2 | 3 s c 0 | 1 2 s c | 0 s
    rows = pieces_of(plan_lengths(tmp_path, [4, 3, 1], 4, pack="concat"))
    assert rows == [
        [reference.Piece(0, 0, 3, True, False, False)],
        [reference.Piece(0, 3, 1, False, True, True), reference.Piece(1, 0, 1, True, False, False)],
        [reference.Piece(1, 1, 2, False, True, True), reference.Piece(2, 0, 0, True, False, False)],
        [reference.Piece(2, 0, 1, False, True, True)],
    ]
    # Slots: c 0 1 | s c 0 | s
    rows = pieces_of(plan_lengths(tmp_path, [2, 1], 3, pack="concat"))
    assert rows[1][0] == reference.Piece(0, 2, 0, False, True, True)
    assert rows[2] == [reference.Piece(1, 1, 0, False, True, True)]


def test_packing_is_tight_and_the_file_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.9, 1.2, 131_072), 8, 200_000).astype(np.int64)
    file = write_lengths(tmp_path / "c", lengths)
    plan = build_plan(file, tmp_path / "c.plan", 1024)
    assert plan.num_tokens / (plan.num_rows * 1024) > 0.999
    assert (tmp_path / "c.plan").stat().st_size <= 6 * plan.num_rows
    for pack in ("concat", "none"):
        plan = build_plan(file, tmp_path / pack, 1024, pack=pack)
        assert (tmp_path / pack).stat().st_size <= 0.25 * plan.num_rows


def test_a_row_takes_no_more_than_its_pieces(tmp_path: Path) -> None:
    plan = plan_lengths(tmp_path, [1] * 100, 64, max_segments=5)
    assert plan.num_rows == 20
    assert set(plan.row_tokens(np.arange(20)).tolist()) == {15}


def test_wide_rows_use_the_whole_bitmap(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 300_000, 300).tolist()
    plan = plan_lengths(tmp_path, lengths, 300_002, max_segments=20)
    expected = reference.plan_rows(
        lengths, 0, 300, 300_002, pack="bfd", specials="add", min_doc_tokens=1, max_segments=20
    )
    assert pieces_of(plan) == expected


@pytest.mark.parametrize("pack", PACKS)
def test_rows_of_a_block_do_not_depend_on_other_blocks(tmp_path: Path, pack: str) -> None:
    lengths = random_lengths(random.Random(4), 64, 300)
    whole = pieces_of(plan_lengths(tmp_path, lengths, 64, pack=pack, block=100))
    parts = [
        pieces_of(plan_lengths(tmp_path, lengths, 64, pack=pack, first=f, end=f + 100))
        for f in (0, 100, 200)
    ]
    assert whole == parts[0] + parts[1] + parts[2]


def test_full_blocks_use_every_16_bit_number(tmp_path: Path) -> None:
    # 65,536 tails in one row each, and 65,536 in one row: the largest document and start numbers.
    plan = plan_lengths(tmp_path, [5] * 65_536, 8)
    assert plan.num_rows == 65_536
    assert plan.pieces(np.array([65_535])).document.tolist() == [65_535]
    assert plan.find(65_535).tolist() == [65_535]
    plan = plan_lengths(tmp_path, [1] * 65_536, 3 * 65_536, max_segments=65_536)
    assert plan.num_rows == 1
    assert plan.pieces(np.array([0])).document.tolist() == list(range(65_536))
    assert plan.find(65_535).tolist() == [0]


def test_plan_keeps_its_file_alive(tmp_path: Path) -> None:
    plan = plan_lengths(tmp_path, np.full(1000, 40), 32)
    assert plan.pieces(np.arange(plan.num_rows)).length.sum() == 40_000


@pytest.mark.parametrize("pack", PACKS)
def test_nothing_to_pack(tmp_path: Path, pack: str) -> None:
    for lengths in ([], [0, 0], [2, 1]):
        plan = plan_lengths(tmp_path, lengths, 16, pack=pack, min_doc_tokens=3)
        assert (plan.num_rows, plan.num_tokens, plan.num_documents) == (0, 0, 0)
        assert plan.dropped_documents == len(lengths)
        assert [plan.find(document).tolist() for document in range(len(lengths))] == [
            [] for _ in lengths
        ]
        for call in (plan.pieces, plan.row_tokens):
            with pytest.raises(IndexError, match="row 0 of a plan of 0 rows"):
                call(np.array([0]))


def test_what_is_not_in_the_plan_is_an_index_error(tmp_path: Path) -> None:
    plan = plan_lengths(tmp_path, [5] * 10, 16, first=2, end=8)
    for row in (-1, plan.num_rows):
        with pytest.raises(IndexError, match=f"row {row} of a plan of {plan.num_rows} rows"):
            plan.pieces(np.array([0, row]))
    for document in (-1, 1, 8):
        with pytest.raises(IndexError, match=rf"document {document} of .* documents \[2, 8\)"):
            plan.find(document)


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
        ({"pack": "all"}, "pack is 'all'"),
        ({"pack": "concat", "max_segments": 2}, "max_segments_per_row is 2; .* pack is 'concat'"),
        ({"pack": "none", "max_segments": 2}, "max_segments_per_row is 2; .* pack is 'none'"),
        ({"threads": -1}, "threads is -1"),
    ],
)
def test_bad_rule_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    arguments = {"seq_length": 16, **change}
    with pytest.raises(ValueError, match=message):
        plan_lengths(tmp_path, [1, 2, 3], **arguments)  # type: ignore[arg-type]
    assert not list(tmp_path.glob("*.plan*"))


def test_bad_length_is_named(tmp_path: Path) -> None:
    write_lengths(tmp_path / "c", [3, 5, 4])
    index = tmp_path / "c.idx"
    data = bytearray(index.read_bytes())
    data[38:42] = np.int32(-5).tobytes()
    index.write_bytes(data)
    file = native.TokenFile(tmp_path / "c", check=False)
    with pytest.raises(ValueError, match=r"c\.idx: byte 38: document 1 has length -5"):
        build_plan(file, tmp_path / "c.plan", 16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.bin", "c.idx"]
