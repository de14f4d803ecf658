"""The corpus writer as a context manager, the reader as a sequence."""

from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType

from megatron_ettin.indexed import IndexedReader, IndexedWriter, optimal_dtype


@pytest.mark.parametrize("vocab_size", [1, 8192, 50_368, 65_499, 65_500, 65_536, 128_256])
def test_optimal_dtype_is_megatron_cores(vocab_size: int) -> None:
    assert optimal_dtype(vocab_size) == DType.optimal_dtype(vocab_size).__name__


def test_block_end_publishes(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "c", "uint16") as writer:
        writer.add(np.array([1, 2, 3]))
        writer.add_many(np.array([4, 5]), np.array([0, 2]))
        assert (writer.num_documents, writer.num_tokens) == (3, 5)
    reader = IndexedReader(tmp_path / "c")
    assert len(reader) == 3
    assert [tokens.tolist() for tokens in reader] == [[1, 2, 3], [], [4, 5]]
    assert reader[2].tolist() == [4, 5]
    with pytest.raises(IndexError, match="document 3 of 3"):
        reader[3]


def write_then_fail(folder: Path, error: type[BaseException]) -> None:
    with IndexedWriter(folder / "c", "uint16") as writer:
        writer.add(np.array([1]))
        assert len(list(folder.iterdir())) == 2
        raise error


def write_all(folder: Path, documents: list[list[int]]) -> None:
    with IndexedWriter(folder / "c", "uint16") as writer:
        for document in documents:
            writer.add(np.array(document))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        write_then_fail(tmp_path, error)
    assert list(tmp_path.iterdir()) == []


def test_token_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="document 1, position 0: token id 70000"):
        write_all(tmp_path, [[1], [70_000]])
    assert list(tmp_path.iterdir()) == []


def test_failed_commit_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "c.bin").mkdir()
    with pytest.raises(IsADirectoryError):
        write_all(tmp_path, [[1]])
    assert [path.name for path in tmp_path.iterdir()] == ["c.bin"]
