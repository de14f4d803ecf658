"""The file of row losses: what is written is read, damage is named, a return keeps what was cut."""

import os
from pathlib import Path

import numpy as np
import pytest

from megatron_ettin.order.ledger import Kind, Ledger, LedgerWriter
from megatron_ettin.order.row_loss_writer import RowLossWriter
from megatron_ettin.order.row_losses import (
    ENTRY,
    HEADER_BYTES,
    TOKENS_END,
    RowLossError,
    RowLossReader,
    RowState,
    fork_losses,
    trained_entries,
)
from tests.unit.ledgers import ROWS, append_event, append_steps, write_run


def losses_of(first: int, count: int, salt: float = 0.0) -> np.ndarray:
    """Return entries of rows from `first` on: the sum of row g is g + 1.5 + salt, its tokens g."""
    g = np.arange(first, first + count)
    return trained_entries(g + 1.5 * (g > 0) + salt * (g > 0), g.astype(np.float64))


def opened(ledger: Path, g: int = 0, fork: str | None = None) -> RowLossWriter:
    writer = RowLossWriter.open(ledger, g, fork=fork, is_on=True)
    assert writer is not None
    return writer


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    (tmp_path / "forks").mkdir()
    return tmp_path


def test_an_entry_is_8_bytes_at_its_row(ledger: Path) -> None:
    writer = opened(ledger)
    writer.write(0, losses_of(0, 3))
    writer.leave_out(3, 5)
    writer.write(7, losses_of(7, 1))
    content = writer.path.read_bytes()
    assert content[:HEADER_BYTES] == b"rowloss1" + bytes(8)
    # The format again, in its own words: float32, then 2 bits of state above 30 bits of tokens.
    entries = np.frombuffer(content[HEADER_BYTES:], "<u4").reshape(-1, 2)
    trained, left_out = 1 << 30, 2 << 30
    expected = [trained, trained + 1, trained + 2, left_out, left_out, 0, 0, trained + 7]
    assert entries[:, 1].tolist() == expected
    sums = entries[:, 0].copy().view("<f4")
    assert sums[[0, 1, 2, 5, 6, 7]].tolist() == [0.0, 2.5, 3.5, 0.0, 0.0, 8.5]
    assert np.isnan(sums[3:5]).all()
    read = RowLossReader.open(writer.path).read(0, 10)
    assert read.states.tolist() == [
        *[RowState.TRAINED] * 3,
        *[RowState.LEFT_OUT] * 2,
        *[RowState.UNKNOWN] * 2,
        RowState.TRAINED,
        *[RowState.UNKNOWN] * 2,
    ]
    assert read.tokens.tolist() == [0, 1, 2, 0, 0, 0, 0, 7, 0, 0]
    # A row without scored positions was trained on, but has no mean.
    assert np.isnan(read.means[[0, 3, 5, 8]]).all()
    assert read.means[[1, 2, 7]].tolist() == [2.5, 1.75, np.float32(8.5) / 7]
    writer.close()


def test_a_read_knows_whether_all_its_rows_have_tokens(ledger: Path) -> None:
    writer = opened(ledger)
    writer.write(0, losses_of(0, 6))
    writer.leave_out(6, 7)
    reader = RowLossReader.open(writer.path)
    # Row 0 has no tokens, row 6 was left out, and row 7 is not there.
    assert [reader.read(g, g + 1).all_scored for g in range(8)] == [
        False,
        *[True] * 5,
        *[False] * 2,
    ]
    assert reader.read(1, 6).all_scored
    for rows in ((0, 6), (1, 7), (3, 3)):
        assert not reader.read(*rows).all_scored
    writer.close()


def test_rows_with_more_tokens_than_an_entry_holds_are_refused() -> None:
    with pytest.raises(ValueError, match=f"a row of {TOKENS_END}"):
        trained_entries(np.zeros(1), np.array([float(TOKENS_END)]))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("state", [0.0, 3 << 30]),
        ("sum of a trained row", [np.inf, (1 << 30) + 4]),
        ("tokens of a row that was left out", [np.nan, (2 << 30) + 4]),
        ("sum of a row that was left out", [1.0, 2 << 30]),
        ("sum of a row without scored positions", [1.0, 1 << 30]),
        ("tokens of a hole", [0.0, 4]),
        ("sum of a hole", [1.0, 0]),
    ],
)
def test_damage_is_named(entry: str, words: list[float], ledger: Path) -> None:
    writer = opened(ledger)
    writer.write(0, losses_of(0, 6))
    damaged = np.zeros(1, dtype=ENTRY)
    damaged["loss_sum"], damaged["word"] = words[0], int(words[1])
    writer.write(4, damaged)
    reader = RowLossReader.open(writer.path)
    assert reader.read(0, 4).tokens.tolist() == [0, 1, 2, 3]
    with pytest.raises(RowLossError, match=f"{writer.path}: byte 48, row 4: not what a run writes"):
        reader.read(1, 6)
    writer.close()


def test_a_file_that_became_shorter_or_is_another_is_named(ledger: Path) -> None:
    writer = opened(ledger)
    writer.write(0, losses_of(0, 6))
    reader = RowLossReader.open(writer.path)
    os.truncate(writer.path, HEADER_BYTES + 3 * 8)
    with pytest.raises(RowLossError, match=r"ends at byte 40, within the rows \[2, 6\)"):
        reader.read(2, 6)
    writer.path.write_bytes(b"rowloss0" + bytes(40))
    for do in (lambda: RowLossReader.open(writer.path), lambda: opened(ledger)):
        with pytest.raises(RowLossError, match=f"{writer.path}: byte 0: not a file of row losses"):
            do()
    writer.close()


def test_going_back_moves_the_losses_to_the_fork(tmp_path: Path) -> None:
    """Twice: the second return is to an earlier checkpoint, and its fork holds the first one's."""
    folder = tmp_path / "ledger"
    heads = write_run(folder, steps=9, every=3)
    writer = opened(folder)
    writer.write(0, losses_of(0, 9 * ROWS))
    writer.close()
    forks = []
    for step, salt in ((6, 1.0), (3, 2.0)):
        with LedgerWriter.open(folder, at=heads[step]) as records:
            assert records.fork is not None
            forks.append(records.fork)
            writer = opened(folder, step * ROWS, records.fork)
            append_event(records, Kind.RESUME, step, {})
            writer.write(step * ROWS, losses_of(step * ROWS, ROWS, salt))
            append_steps(records, step + 1, 1, salt=int(salt))
            records.sync()
            writer.close()
    found = RowLossReader.open(folder / "row_losses.bin")
    assert found.end_g == 4 * ROWS
    expected = [losses_of(0, 3 * ROWS), losses_of(3 * ROWS, ROWS, 2.0)]
    assert found.entries(0, found.end_g).tolist() == np.concatenate(expected).tolist()
    first, second = (RowLossReader.open(fork_losses(folder, fork)) for fork in forks)
    assert (first.first_g, first.end_g) == (6 * ROWS, 9 * ROWS)
    assert first.entries(6 * ROWS, 9 * ROWS).tolist() == losses_of(6 * ROWS, 3 * ROWS).tolist()
    assert (second.first_g, second.end_g) == (3 * ROWS, 7 * ROWS)
    parts = [losses_of(3 * ROWS, 3 * ROWS), losses_of(6 * ROWS, ROWS, 1.0)]
    assert second.entries(3 * ROWS, 7 * ROWS).tolist() == np.concatenate(parts).tolist()
    assert {fork.file for fork in Ledger.read(folder).forks()} == {forks[1]}


def test_a_kill_between_the_cuts_loses_nothing(tmp_path: Path) -> None:
    """The ledger was cut, its losses were not: the next start does that, once."""
    folder = tmp_path / "ledger"
    heads = write_run(folder, steps=6, every=3)
    writer = opened(folder)
    writer.write(0, losses_of(0, 6 * ROWS))
    writer.close()
    LedgerWriter.open(folder, at=heads[3]).close()
    with LedgerWriter.open(folder, at=heads[3]) as records:
        fork = records.fork
        writer = opened(folder, 3 * ROWS, fork)
    assert fork is not None
    path = fork_losses(folder, fork)
    assert RowLossReader.open(path).entries(24, 48).tolist() == losses_of(24, 24).tolist()
    # Losses that came before their records, which a kill prevented: no fork tells of them.
    writer.write(3 * ROWS, losses_of(3 * ROWS, ROWS, 5.0))
    writer.close()
    kept = path.read_bytes()
    with LedgerWriter.open(folder, at=heads[3]) as records:
        assert records.fork == fork
        opened(folder, 3 * ROWS, fork).close()
    assert path.read_bytes() == kept
    assert RowLossReader.open(folder / "row_losses.bin").end_g == 3 * ROWS


def test_a_session_that_keeps_none_leaves_no_losses_of_undone_rows(ledger: Path) -> None:
    assert RowLossWriter.open(ledger, 0, fork=None, is_on=False) is None
    assert list(ledger.iterdir()) == [ledger / "forks"]
    writer = opened(ledger)
    writer.write(0, losses_of(0, 8))
    writer.close()
    assert RowLossWriter.open(ledger, 5, fork="fork_1_a", is_on=False) is None
    assert RowLossReader.open(ledger / "row_losses.bin").end_g == 5
    assert RowLossReader.open(fork_losses(ledger, "fork_1_a")).end_g == 8
    # Rows that a later session adds come after a hole.
    writer = opened(ledger, 7)
    writer.write(7, losses_of(7, 1))
    read = RowLossReader.open(ledger / "row_losses.bin").read(4, 8)
    assert read.states.tolist() == [RowState.TRAINED, *[RowState.UNKNOWN] * 2, RowState.TRAINED]
    writer.close()
