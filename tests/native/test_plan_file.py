"""Plan files: the same bytes however they are built, and damage found before it can do harm."""

import random
import struct
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_ettin import native
from tests.native.corpora import (
    assert_equal_pieces,
    build_plan,
    piece_columns,
    pieces_of,
    write_hole,
    write_lengths,
)

HEADER, ENTRY, FOOTER = 144, 56, 16
PACKS = ["bfd", "concat", "none"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> native.TokenFile:
    rng = np.random.default_rng(3)
    lengths = np.clip(rng.lognormal(4, 1.5, 20_000), 0, 9_000).astype(np.int64)
    lengths[::17] = 0
    return write_lengths(tmp_path_factory.mktemp("corpus") / "c", lengths)


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("bodies", [True, False])
def test_threads_do_not_change_a_byte(
    tmp_path: Path, file: native.TokenFile, pack: str, bodies: bool
) -> None:
    contents = set()
    for threads in range(17):
        path = tmp_path / str(threads)
        build_plan(file, path, 128, pack=pack, block=300, threads=threads, bodies=bodies)
        contents.add(path.read_bytes())
    assert len(contents) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(map(str, range(17)))


@pytest.mark.parametrize("pack", PACKS)
def test_computed_blocks_equal_stored_ones(
    tmp_path: Path, file: native.TokenFile, pack: str
) -> None:
    # 100 blocks: more than are kept.
    stored = build_plan(file, tmp_path / "stored", 128, pack=pack, block=200)
    computed = build_plan(file, tmp_path / "table", 128, pack=pack, block=200, bodies=False)
    assert (tmp_path / "table").stat().st_size == HEADER + 100 * ENTRY + FOOTER
    rows = np.random.default_rng(0).integers(0, stored.num_rows, 5000)
    assert_equal_pieces(computed.pieces(rows), stored.pieces(rows))
    for document in range(0, file.num_documents, 37):
        np.testing.assert_array_equal(computed.find(document), stored.find(document))


def test_properties_tell_what_was_built(tmp_path: Path, file: native.TokenFile) -> None:
    plan = build_plan(
        file,
        tmp_path / "plan",
        64,
        first=10,
        end=1000,
        specials="present",
        min_doc_tokens=7,
        max_segments=3,
        block=99,
    )
    assert (plan.first_document, plan.end_document, plan.seq_length) == (10, 1000, 64)
    assert (plan.pack, plan.specials, plan.min_doc_tokens) == ("bfd", "present", 7)
    assert (plan.max_segments_per_row, plan.block_documents) == (3, 99)
    assert plan.num_documents + plan.dropped_documents == 990


@pytest.mark.parametrize("bodies", [True, False])
def test_threads_share_a_plan(tmp_path: Path, file: native.TokenFile, bodies: bool) -> None:
    plan = build_plan(file, tmp_path / "plan", 128, block=200, bodies=bodies)
    rows = np.random.default_rng(0).integers(0, plan.num_rows, 3000)
    expected = plan.pieces(rows)
    plan = native.RowPlan(tmp_path / "plan", file)  # nothing touched yet
    found = []

    def read() -> None:
        found.append(plan.pieces(rows))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    for pieces in found:
        assert_equal_pieces(pieces, expected)


# Damage


@pytest.fixture
def plan_path(tmp_path: Path, file: native.TokenFile) -> Path:
    path = tmp_path / "c.plan"
    build_plan(file, path, 128, end=600, block=200)
    return path


def test_every_flipped_bit_is_refused(plan_path: Path, file: native.TokenFile) -> None:
    data = plan_path.read_bytes()
    table = struct.unpack_from("<q", data, HEADER - 8)[0]
    assert len(data) == table + 3 * ENTRY + FOOTER
    chance = random.Random(1)
    outside_bodies = [*range(HEADER), *range(table, len(data))]
    for byte in outside_bodies:
        damaged = bytearray(data)
        damaged[byte] ^= 1 << chance.randrange(8)
        plan_path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"c\.plan: byte \d+: .*; remove the file, it is"):
            native.RowPlan(plan_path, file)
    begins = [struct.unpack_from("<q", data, table + i * ENTRY + 8)[0] for i in range(3)]
    for byte in chance.sample(range(HEADER, table), 200):
        damaged = bytearray(data)
        damaged[byte] ^= 1 << chance.randrange(8)
        plan_path.write_bytes(damaged)
        plan = native.RowPlan(plan_path, file)  # in O(1): the blocks are not read
        block = sum(begin <= byte for begin in begins) - 1
        message = (
            rf"c\.plan: byte {begins[block]}: the rows of documents \[{200 * block}, "
            rf"{200 * block + 200}\) are damaged.*; remove the file, it is rebuilt"
        )
        with pytest.raises(ValueError, match=message):
            plan.pieces(np.arange(plan.num_rows))


def test_every_truncation_is_refused(plan_path: Path, file: native.TokenFile) -> None:
    data = plan_path.read_bytes()
    chance = random.Random(2)
    for size in [
        0,
        1,
        HEADER,
        HEADER + FOOTER,
        len(data) - 1,
        *chance.sample(range(len(data)), 50),
    ]:
        plan_path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"c\.plan: byte \d+: .*truncated.*; remove the file"):
            native.RowPlan(plan_path, file)
    plan_path.write_bytes(data + b"\0" * 48)
    with pytest.raises(ValueError, match=r"c\.plan: byte \d+: .*too long; remove the file"):
        native.RowPlan(plan_path, file)


def edit(form: str, at: int, value: object) -> Callable[[bytearray], None]:
    return lambda data: struct.pack_into("<" + form, data, at, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit("8s", 0, b"MEPLAN2\0"), "byte 0: not a row plan"),
        (edit("I", 8, 2), "byte 8: version 2, expected 1"),
        (edit("q", 128, 2**61), "byte 128: 2305843009213693952 blocks"),
        (edit("q", 136, -8), "byte 128: 3 blocks with a table at byte -8"),
    ],
)
def test_foreign_headers_are_named(
    plan_path: Path, file: native.TokenFile, change: Callable[[bytearray], None], message: str
) -> None:
    data = bytearray(plan_path.read_bytes())
    change(data)
    plan_path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"c\.plan: {message}.*; remove the file, it is rebuilt"):
        native.RowPlan(plan_path, file)


def test_plan_of_another_corpus_is_refused(tmp_path: Path) -> None:
    file = write_lengths(tmp_path / "a", [5, 6, 7])
    build_plan(file, tmp_path / "plan", 16)
    for lengths in ([5, 6, 7, 0], [5, 6, 8]):
        other = write_lengths(tmp_path / "b", lengths)
        message = r"plan: byte \d+: .* a corpus of 3 documents and 18 tokens, but .*b has "
        with pytest.raises(
            ValueError, match=message + f"{len(lengths)} and {sum(lengths)}; remove"
        ):
            native.RowPlan(tmp_path / "plan", other)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        native.RowPlan(tmp_path / "nowhere", file)


def tokens_or_refusal(plan: native.RowPlan, row: int) -> int | str:
    try:
        pieces = plan.pieces(np.array([row]))
    except ValueError as error:
        return str(error)
    return int(pieces.length.sum() + pieces.cls.sum() + pieces.sep.sum())


@pytest.mark.parametrize("pack", PACKS)
def test_other_lengths_of_the_same_sum_are_never_followed_out_of_a_row(
    tmp_path: Path, pack: str
) -> None:
    """Whoever opens a plan has checked the corpus; if not, the rows still stay inside."""
    lengths = [30, 1, 1, 1, 14, 2, 40, 3]
    build_plan(write_lengths(tmp_path / "a", lengths), tmp_path / "stored", 16, pack=pack)
    file = native.TokenFile(tmp_path / "a")
    build_plan(file, tmp_path / "table", 16, pack=pack, bodies=False)
    chance = random.Random(0)
    for turn in range(30):
        chance.shuffle(lengths)
        other = write_lengths(tmp_path / f"b{turn}", lengths)
        plan = native.RowPlan(tmp_path / "stored", other)
        for row in range(plan.num_rows):
            found = tokens_or_refusal(plan, row)
            if isinstance(found, str):
                assert "other document lengths" in found
            else:
                assert found <= 16
    with pytest.raises(ValueError, match=r"other document lengths than those of .*b29\.idx"):
        native.RowPlan(tmp_path / "table", other).pieces(np.array([0]))


# Size


def write_far_documents(prefix: Path, empty: int, lengths: list[int]) -> native.TokenFile:
    """Write `empty` documents without a sequence, then some of one each: the file is a hole."""
    count = len(lengths)
    with Path(f"{prefix}.idx").open("wb") as file:
        file.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, count, empty + count + 1))
        file.write(np.array(lengths, "<i4").tobytes())
        file.write((2 * (np.cumsum(lengths) - lengths)).astype("<i8").tobytes())
        file.seek(8 * (empty + 1), 1)  # boundary 0 of the empty ones and of the first other
        file.write(np.arange(1, count + 1, dtype="<i8").tobytes())
    write_hole(Path(f"{prefix}.bin"), 2 * sum(lengths))
    return native.TokenFile(prefix, check=False)


@pytest.mark.parametrize("pack", PACKS)
def test_documents_beyond_2_to_the_31(tmp_path: Path, pack: str) -> None:
    empty = 2**31 + 12_345
    lengths = [100, 3, 250, 7, 7]
    file = write_far_documents(tmp_path / "far", empty, lengths)
    near = write_lengths(tmp_path / "near", lengths)
    assert file.num_documents == empty + 5
    plan = build_plan(file, tmp_path / "plan", 32, pack=pack, first=2**31 - 70_000)
    expected = build_plan(near, tmp_path / "near.plan", 32, pack=pack)
    assert plan.dropped_documents == 82_345
    rows, near_rows = pieces_of(plan), pieces_of(expected)
    assert rows == [[replace(p, document=p.document + empty) for p in row] for row in near_rows]
    for i in range(5):
        np.testing.assert_array_equal(plan.find(empty + i), expected.find(i))


@pytest.mark.long  # reads 17 GB of holes
def test_a_plan_of_more_than_2_to_the_31_documents(tmp_path: Path) -> None:
    empty = 2**31 + 12_345
    file = write_far_documents(tmp_path / "far", empty, [100, 3, 250])
    plan = build_plan(file, tmp_path / "plan", 32, threads=2, bodies=False)
    assert plan.dropped_documents == empty
    assert plan.find(empty + 2).size == 9
    assert plan.pieces(np.array([0])).document.tolist() == [empty]


@pytest.mark.parametrize("pack", PACKS)
def test_rows_and_tokens_beyond_2_to_the_32(tmp_path: Path, pack: str) -> None:
    # One document of seven sequences, between two small ones.
    longest = 2**31 - 1
    sequences = [3, *[longest] * 7, 2]
    with (tmp_path / "c.idx").open("wb") as index:
        index.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 9, 4))
        index.write(np.array(sequences, "<i4").tobytes())
        index.write((2 * (np.cumsum(sequences) - sequences)).astype("<i8").tobytes())
        index.write(np.array([0, 1, 8, 9], "<i8").tobytes())
    write_hole(tmp_path / "c.bin", 2 * sum(sequences))
    file = native.TokenFile(tmp_path / "c")
    total = 7 * longest
    assert file.lengths.tolist() == [3, total, 2]
    plan = build_plan(file, tmp_path / "plan", 3, specials="present", pack=pack)
    assert plan.num_tokens == total + 5
    # total = 3 n + 1: n rows and a tail, beside one row of 3 and one of 2; concat fills them all.
    assert plan.num_rows == total // 3 + (2 if pack == "concat" else 3)
    row = 2**32 + 7
    pieces = plan.pieces(np.array([row]))
    assert [column.tolist() for column in piece_columns(pieces)[:3]] == [[1], [3 * (row - 1)], [3]]
    # The longer tail is packed first.
    last_row = plan.num_rows - (2 if pack == "bfd" else 1)
    assert plan.find(2).tolist() == [last_row]
    assert plan.pieces(np.array([last_row])).document.tolist()[-1] == 2


# Corpora that are not checked when opened


def test_unchecked_file_reads_the_same(tmp_path: Path) -> None:
    write_lengths(tmp_path / "c", [5, 0, 9])
    checked, unchecked = (native.TokenFile(tmp_path / "c", check=check) for check in (True, False))
    np.testing.assert_array_equal(checked.lengths, unchecked.lengths)
    assert checked.num_tokens == unchecked.num_tokens == 14
    assert unchecked.tokens(2).tolist() == [0] * 9
    plans = [build_plan(f, tmp_path / f.prefix[-1], 8) for f in (checked, unchecked)]
    assert pieces_of(plans[0]) == pieces_of(plans[1])


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel for resident memory")
def test_unchecked_file_opens_without_reading_the_index(tmp_path: Path) -> None:
    file = write_far_documents(tmp_path / "far", 2**31, [1])
    status = Path("/proc/self/smaps").read_text()
    section = status[status.index("far.idx") :]
    resident = int(section[section.index("Rss:") :].split()[1])
    assert file.num_documents == 2**31 + 1
    assert resident <= 256  # kB, of 17 GB


def test_unchecked_file_is_refused_where_it_cannot_be_right(tmp_path: Path) -> None:
    write_lengths(tmp_path / "c", [5, 6, 9])
    data = (tmp_path / "c.idx").read_bytes()
    assert len(data) == 34 + 12 + 24 + 32

    def with_value(at: int, value: int) -> native.TokenFile:
        changed = bytearray(data)
        struct.pack_into("<q", changed, at, value)
        (tmp_path / "c.idx").write_bytes(changed)
        return native.TokenFile(tmp_path / "c", check=False)

    with pytest.raises(ValueError, match=r"c\.bin: 40 bytes, but its \.idx describes 118"):
        with_value(46 + 16, 100)
    with pytest.raises(ValueError, match=r"c\.idx: byte 94: document boundary 3 is 2, expected 3"):
        with_value(94, 2)
    # An empty document and one of two sequences have the counts of two of one each.
    file = with_value(78, 0)
    with pytest.raises(ValueError, match=r"c\.idx: byte 78: document boundary 1 is 0, expected 1"):
        build_plan(file, tmp_path / "plan", 8)
    with pytest.raises(ValueError, match=r"c\.idx: byte 78: document boundary 1 is 0, expected 1"):
        file.tokens(1)
    file = with_value(46 + 8, 10**15)
    with pytest.raises(ValueError, match=r"c\.idx: describes tokens .* but the \.bin has 20"):
        file.tokens(1)
    assert not (tmp_path / "plan").exists()
