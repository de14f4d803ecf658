"""Token files: byte-equal to Megatron-Core's, readable both ways, and every damage named."""

import random
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_ettin import native
from tests.native import reference

LARGEST = {"uint16": 65_535, "int32": 2**31 - 1}


def random_documents(seed: int, dtype: str, count: int = 300) -> list[list[int]]:
    chance = random.Random(seed)
    sizes = [chance.choice([0, 1, 2, 7, 500, chance.randrange(3000)]) for _ in range(count)]
    documents = [[chance.randrange(LARGEST[dtype] + 1) for _ in range(size)] for size in sizes]
    return [*documents, [0, LARGEST[dtype]], []]


def write(prefix: Path, documents: list[list[int]], dtype: str) -> None:
    builder = native.TokenFileBuilder(prefix, dtype)
    for document in documents:
        builder.add(np.array(document, np.int64))
    builder.commit()


def write_megatron(prefix: Path, documents: list[list[list[int]]], dtype: str) -> None:
    """Write documents of several sequences each with Megatron-Core's own builder."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.dtype(dtype).type)
    for sequences in documents:
        tokens = np.array([token for sequence in sequences for token in sequence], np.int64)
        builder.add_document(tokens, [len(sequence) for sequence in sequences])
    builder.finalize(f"{prefix}.idx")


def contents(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
@pytest.mark.parametrize("count", [0, 1, 300])
def test_bytes_equal_megatron_cores(tmp_path: Path, dtype: str, count: int) -> None:
    documents = random_documents(1, dtype)[: count or None] if count else []
    write(tmp_path / "ours", documents, dtype)
    write_megatron(tmp_path / "theirs", [[document] for document in documents], dtype)
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")
    code, item_size = {"uint16": (8, 2), "int32": (4, 4)}[dtype]
    lengths = [len(document) for document in documents]
    assert contents(tmp_path / "ours")[1] == reference.index_bytes(lengths, code, item_size)


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_both_readers_read_both_writers(tmp_path: Path, dtype: str) -> None:
    documents = random_documents(2, dtype)
    write(tmp_path / "ours", documents, dtype)
    write_megatron(tmp_path / "theirs", [[document] for document in documents], dtype)
    theirs = IndexedDataset(str(tmp_path / "ours"))
    assert [theirs[i].tolist() for i in range(len(theirs))] == documents
    ours = native.TokenFile(tmp_path / "theirs")
    assert (ours.dtype, ours.prefix) == (dtype, str(tmp_path / "theirs"))
    assert ours.num_documents == len(documents)
    assert ours.num_tokens == sum(map(len, documents))
    assert ours.lengths.dtype == np.int32
    assert ours.lengths.tolist() == [len(document) for document in documents]
    assert [ours.tokens(i).tolist() for i in range(len(documents))] == documents


def test_several_sequences_make_one_document(tmp_path: Path) -> None:
    documents: list[list[list[int]]] = [[[1, 2], [3]], [[]], [[4]], [[5], [], [6, 7]], [[], []]]
    write_megatron(tmp_path / "c", documents, "uint16")
    file = native.TokenFile(tmp_path / "c")
    joined = [[token for sequence in document for token in sequence] for document in documents]
    assert file.lengths.dtype == np.int64
    assert file.lengths.tolist() == [3, 0, 1, 3, 0]
    assert [file.tokens(i).tolist() for i in range(5)] == joined
    with pytest.raises(ValueError, match="byte 10, document 3, position 1: token id 6 "):
        file.check_tokens(6)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.uint32, np.int64])
def test_add_takes_these_dtypes(tmp_path: Path, dtype: type[np.integer]) -> None:
    builder = native.TokenFileBuilder(tmp_path / "c", "uint16")
    builder.add(np.array([1, 2, 65_535]).astype(dtype))
    builder.add(np.arange(10).astype(dtype)[::2])
    builder.commit()
    file = native.TokenFile(tmp_path / "c")
    assert [file.tokens(i).tolist() for i in (0, 1)] == [[1, 2, 65_535], [0, 2, 4, 6, 8]]


@pytest.mark.parametrize("dtype", [np.float32, np.uint64, np.bool_])
def test_add_refuses_other_dtypes(tmp_path: Path, dtype: type[np.generic]) -> None:
    builder = native.TokenFileBuilder(tmp_path / "c", "uint16")
    with pytest.raises(TypeError, match="tokens must be uint16, int32, uint32 or int64"):
        builder.add(np.array([1]).astype(dtype))


def test_add_many_equals_add(tmp_path: Path) -> None:
    documents = random_documents(3, "uint16")
    write(tmp_path / "one", documents, "uint16")
    builder = native.TokenFileBuilder(tmp_path / "many", "uint16")
    for begin in range(0, len(documents), 50):
        part = documents[begin : begin + 50]
        tokens = np.array([token for document in part for token in document], np.int32)
        builder.add_many(tokens, np.array([len(document) for document in part]))
    assert builder.num_documents == len(documents)
    assert builder.num_tokens == sum(map(len, documents))
    builder.commit()
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_documents_larger_than_every_buffer(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 50_000, 3_000_000)
    write(tmp_path / "c", [[1], tokens.tolist(), [2]], "int32")
    file = native.TokenFile(tmp_path / "c")
    np.testing.assert_array_equal(file.tokens(1), tokens)
    assert file.tokens(1, 2_999_999).tolist() == [tokens[-1]]


def test_more_documents_than_a_chunk_of_the_index(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(0, 3, 200_000)
    builder = native.TokenFileBuilder(tmp_path / "c", "uint16")
    builder.add_many(np.zeros(lengths.sum(), np.int64), lengths)
    builder.commit()
    np.testing.assert_array_equal(native.TokenFile(tmp_path / "c").lengths, lengths)


@pytest.mark.parametrize(
    ("dtype", "token"), [("uint16", 65_536), ("uint16", -1), ("int32", 2**31), ("int32", -7)]
)
def test_token_that_does_not_fit_is_named_and_nothing_added(
    tmp_path: Path, dtype: str, token: int
) -> None:
    builder = native.TokenFileBuilder(tmp_path / "c", dtype)
    builder.add(np.array([1, 2]))
    message = f"document 3, position 1: token id {token} does not fit {dtype}"
    with pytest.raises(ValueError, match=message):
        builder.add_many(np.array([5, 6, 7, token]), np.array([2, 0, 2]))
    assert (builder.num_documents, builder.num_tokens) == (1, 2)
    builder.commit()
    assert native.TokenFile(tmp_path / "c").lengths.tolist() == [2]


@pytest.mark.parametrize(
    ("lengths", "message"),
    [([1], "do not sum to the 3"), ([4], "do not sum"), ([4, -1], "document 1: length -1")],
)
def test_lengths_must_describe_the_tokens(tmp_path: Path, lengths: list[int], message: str) -> None:
    builder = native.TokenFileBuilder(tmp_path / "c", "uint16")
    tokens = np.zeros(5 if sum(lengths) == 3 and len(lengths) == 2 else 3, np.int64)
    with pytest.raises(ValueError, match=message):
        builder.add_many(tokens, np.array(lengths))


def test_reading_outside_a_document_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "c", [[1, 2, 3]], "uint16")
    file = native.TokenFile(tmp_path / "c")
    assert file.tokens(0, 1, 2).tolist() == [2, 3]
    assert file.tokens(0, 3).tolist() == []
    for arguments in [(1,), (-1,), (0, 4), (0, -1), (0, 1, 3), (0, 0, -1), (0, 2**62, 2**62)]:
        with pytest.raises(IndexError, match="document"):
            file.tokens(*arguments)


def test_lengths_outlive_the_file_object_and_are_read_only(tmp_path: Path) -> None:
    write(tmp_path / "c", [[1, 2, 3], [4]], "uint16")
    lengths = native.TokenFile(tmp_path / "c").lengths
    assert lengths.tolist() == [3, 1]
    with pytest.raises(ValueError, match="read-only"):
        lengths[0] = 5


def test_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype is 'int64'"):
        native.TokenFileBuilder(tmp_path / "c", "int64")
    assert names(tmp_path) == []


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_token_outside_the_vocabulary_is_named(tmp_path: Path, dtype: str) -> None:
    documents = [[1] * 100_000, [], [5, 9, 5], [9]]
    write(tmp_path / "c", documents, dtype)
    file = native.TokenFile(tmp_path / "c")
    file.check_tokens(10)
    byte = 100_001 * np.dtype(dtype).itemsize
    message = rf"c\.bin: byte {byte}, document 2, position 1: token id 9 .* vocabulary of 9;"
    with pytest.raises(ValueError, match=message):
        file.check_tokens(9)
    # The first token of a document that begins where an empty one does.
    with pytest.raises(ValueError, match="document 2, position 0: token id 5 "):
        file.check_tokens(5)
    with pytest.raises(ValueError, match="vocab_size is 0"):
        file.check_tokens(0)


# Damage. The .idx of three documents: header 34 bytes, lengths at 34, offsets at 46, boundaries
# at 70, end at 102.

DOCUMENTS = [[1, 2], [3], [4, 5, 6]]


def patch(position: int, form: str, value: int) -> Callable[[bytes], bytes]:
    def apply(data: bytes) -> bytes:
        new = struct.pack("<" + form, value)
        return data[:position] + new + data[position + len(new) :]

    return apply


DAMAGED_INDEX: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "byte 0: the file ends inside its header"),
    "header cut": (lambda data: data[:33], "byte 33: the file ends inside its header"),
    "magic": (patch(0, "B", 0), "byte 0: .* magic MMIDIDX"),
    "version": (patch(9, "Q", 2), "byte 9: version 2, expected 1"),
    "dtype": (patch(17, "B", 6), "byte 17: dtype code 6"),
    "truncated": (lambda data: data[:-1], "byte 18: .* need 102 bytes, but the file has 101"),
    "longer": (lambda data: data + b"\0", "need 102 bytes, but the file has 103"),
    "sequences": (patch(18, "Q", 4), "need 114 bytes, but the file has 102"),
    "absurd sequences": (patch(18, "Q", 2**62 + 3), "need 55340232221128654950 bytes"),
    "boundaries": (patch(26, "Q", 5), "byte 18: 3 sequences and 5 document boundaries"),
    "length": (patch(38, "i", -1), "byte 38: sequence 1 has length -1"),
    "other length": (patch(38, "i", 2), "byte 62: sequence 2 .* byte 6 .* sum to byte 8"),
    "offset": (patch(54, "q", 6), "byte 54: sequence 1 .* begin at byte 6 .* sum to byte 4"),
    "first offset": (patch(46, "q", 2), "byte 46: sequence 0 .* begin at byte 2"),
    "first boundary": (patch(70, "q", 1), "byte 70: document boundary 0 is 1, expected 0"),
    "order": (patch(86, "q", 0), "byte 86: document boundary 2 is 0 after 1"),
    "beyond": (patch(78, "q", 4), "byte 78: document boundary 1 is 4"),
    "last boundary": (patch(94, "q", 2), "byte 94: document boundary 3 is 2, expected 3"),
}


@pytest.mark.parametrize("damage", DAMAGED_INDEX)
def test_damaged_index_is_refused(tmp_path: Path, damage: str) -> None:
    apply, message = DAMAGED_INDEX[damage]
    write(tmp_path / "c", DOCUMENTS, "uint16")
    index = tmp_path / "c.idx"
    assert len(index.read_bytes()) == 102
    index.write_bytes(apply(index.read_bytes()))
    with pytest.raises(ValueError, match=rf"c\.idx: .*{message}.*preprocess_data.py again"):
        native.TokenFile(tmp_path / "c")


@pytest.mark.parametrize(
    ("size", "message"), [(0, "truncated"), (11, "truncated"), (13, "longer than its index")]
)
def test_bin_of_another_size_is_refused(tmp_path: Path, size: int, message: str) -> None:
    write(tmp_path / "c", DOCUMENTS, "uint16")
    data = (tmp_path / "c.bin").read_bytes()
    (tmp_path / "c.bin").write_bytes((data + b"\0")[:size])
    with pytest.raises(ValueError, match=rf"c\.bin: {size} bytes, .* describes 12: .*{message}"):
        native.TokenFile(tmp_path / "c")


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"c\.idx"):
        native.TokenFile(tmp_path / "c")
    write(tmp_path / "c", DOCUMENTS, "uint16")
    (tmp_path / "c.idx").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"did not finish; .*preprocess_data.py.*c\.idx"):
        native.TokenFile(tmp_path / "c")
    (tmp_path / "moved").rename(tmp_path / "c.idx")
    (tmp_path / "c.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"c\.bin"):
        native.TokenFile(tmp_path / "c")
    (tmp_path / "c.bin").mkdir()
    with pytest.raises(OSError, match="not a regular file"):
        native.TokenFile(tmp_path / "c")


def test_lengths_are_copied_by_ranges(tmp_path: Path) -> None:
    lengths = [3, 0, 5, 1]
    write(tmp_path / "c", [[7] * length for length in lengths], "int32")
    for check in (True, False):
        file = native.TokenFile(tmp_path / "c", check=check)
        for first in range(5):
            for end in range(first, 5):
                assert file.read_lengths(first, end).tolist() == lengths[first:end]
        for first, end in ((-1, 2), (3, 2), (0, 5)):
            with pytest.raises(IndexError, match=rf"documents \[{first}, {end}\) of 4"):
                file.read_lengths(first, end)
