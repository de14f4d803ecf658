"""Going back to a checkpoint: what is cut is kept and recorded, whatever interrupts it."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ettin.order.ledger import EMPTY, Fork, Head, Kind, Ledger, LedgerError, LedgerWriter
from megatron_ettin.order.ledger.format import GENESIS
from tests.unit.ledgers import START, append_event, append_steps, write_run

ROOT = Path(__file__).parents[2]
RECORDS, EVENTS = "records.led", "events.jsonl"


def contents(folder: Path) -> tuple[bytes, bytes]:
    return (folder / RECORDS).read_bytes(), (folder / EVENTS).read_bytes()


def fork_contents(folder: Path, fork: Fork) -> tuple[bytes, bytes]:
    path = folder / "forks" / fork.file
    return path.with_suffix(".led").read_bytes(), path.with_suffix(".jsonl").read_bytes()


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here takes the power away, and hundreds of forks would each wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(os, "fdatasync", lambda _: None)


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, dict[int, Head]]:
    """Return a ledger of 25 steps, and its heads at the checkpoints of steps 10 and 20."""
    heads = write_run(tmp_path / "ledger", 25, 10)
    return tmp_path / "ledger", heads


def test_going_back_keeps_what_it_cuts(
    run: tuple[Path, dict[int, Head]], caplog: pytest.LogCaptureFixture
) -> None:
    folder, heads = run
    records, events = contents(folder)
    before = Ledger.read(folder)
    with caplog.at_level(logging.WARNING), LedgerWriter.open(folder, heads[10]) as writer:
        append_steps(writer, 11, 5, salt=9)
    assert "moving 16 records and 0 torn bytes after record 11" in caplog.text
    ledger = Ledger.read(folder)
    (fork,) = ledger.forks()
    assert fork[2:-1] == (11, heads[10].chain, 16, 15, 0, 0)
    assert ledger.steps["step"].tolist() == list(range(1, 16))
    moved = fork_contents(folder, fork)
    assert contents(folder)[0][: 12 * 128] + moved[0] == records
    assert contents(folder)[1].startswith(events[: -len(moved[1])])
    assert events.endswith(moved[1])
    again = ledger.read_fork(fork)
    assert again.steps["step"].tolist() == list(range(11, 26))
    assert again.head == before.head
    assert [c.payload["name"] for c in again.checkpoints()] == ["step_20"]
    assert again.holds(heads[20])
    assert not again.holds(heads[10])
    assert ledger.holds(heads[10])
    assert not ledger.holds(heads[20])


def test_two_forks_from_one_checkpoint(run: tuple[Path, dict[int, Head]]) -> None:
    folder, heads = run
    with LedgerWriter.open(folder, heads[10]) as writer:
        append_steps(writer, 11, 5, salt=1)
    with LedgerWriter.open(folder, heads[10]) as writer:
        append_steps(writer, 11, 2, salt=2)
    ledger = Ledger.read(folder)
    (last,) = ledger.forks()
    assert (last.records, last.steps) == (6, 5)  # the first FORK record is cut with its steps
    (first,) = ledger.read_fork(last).forks()
    assert (first.records, first.steps, first.parent_seq) == (16, 15, 11)
    assert ledger.read_fork(first).steps["step"].tolist() == list(range(11, 26))


def test_nothing_after_the_checkpoint_is_no_fork(run: tuple[Path, dict[int, Head]]) -> None:
    folder, heads = run
    LedgerWriter.open(folder, heads[20]).close()
    assert len(Ledger.read(folder).forks()) == 1
    before = contents(folder)
    for _ in range(3):  # only the FORK record follows the checkpoint
        LedgerWriter.open(folder, heads[20]).close()
    LedgerWriter.open(folder, Ledger.read(folder).head).close()
    assert contents(folder) == before
    assert len(list((folder / "forks").iterdir())) == 2


@pytest.mark.parametrize("beginning", [None, EMPTY])
def test_beginning_again(run: tuple[Path, dict[int, Head]], beginning: Head | None) -> None:
    folder, _ = run
    before = contents(folder)
    LedgerWriter.open(folder, beginning).close()  # ended before START: the fork is still owed
    with LedgerWriter.open(folder, beginning) as writer:
        with pytest.raises(LedgerError, match="record 0, only, is START"):
            append_steps(writer, 1, 1)
        append_event(writer, Kind.START, 0, {"again": True})
        append_steps(writer, 1, 3)
    ledger = Ledger.read(folder)
    assert ledger.records["kind"].tolist() == [Kind.START, Kind.FORK, *[Kind.STEP] * 3]
    (fork,) = ledger.forks()
    assert (fork.parent_seq, fork.parent_chain, fork.steps) == (-1, GENESIS.hex(), 25)
    assert fork_contents(folder, fork) == before
    assert ledger.read_fork(fork).events[0] == START


@pytest.mark.parametrize("left", range(1, 128))
def test_torn_records_are_cut_and_kept(
    run: tuple[Path, dict[int, Head]], left: int, caplog: pytest.LogCaptureFixture
) -> None:
    folder, heads = run
    torn = (folder / RECORDS).read_bytes()[: 25 * 128 + left]
    (folder / RECORDS).write_bytes(torn)
    with LedgerWriter.open(folder, heads[20]) as writer:
        append_steps(writer, 21, 1)
    (fork,) = Ledger.read(folder).forks()
    assert (fork.records, fork.steps, fork.torn_bytes) == (2, 2, left)
    assert f"and {left} torn bytes" in caplog.text
    assert fork_contents(folder, fork)[0] == torn[23 * 128 :]
    assert Ledger.read(folder).read_fork(fork).torn_bytes == left


def test_torn_lines_are_cut_and_kept(run: tuple[Path, dict[int, Head]]) -> None:
    """At every byte of a CHECKPOINT's line, with its record absent or (power lost) present."""
    folder, heads = run
    records, events = contents(folder)
    begin = events.index(b'{"seq":22')
    for size in (22, 23):
        for end in range(begin, len(events) + (size == 22)):
            (folder / RECORDS).write_bytes(records[: size * 128])
            (folder / EVENTS).write_bytes(events[:end])
            LedgerWriter.open(folder, heads[10]).close()
            ledger = Ledger.read(folder)
            (fork,) = ledger.forks()
            assert (fork.records, fork.torn_event_bytes) == (10, end - begin)
            assert fork.torn_bytes == (size - 22) * 128
            assert len(ledger.read_fork(fork).records) == 10


def test_garbage_after_the_checkpoint_is_moved_as_it_is(
    run: tuple[Path, dict[int, Head]],
) -> None:
    folder, heads = run
    content = bytearray((folder / RECORDS).read_bytes())
    content[24 * 128 + 3] ^= 4  # the second record after the checkpoint of step 20
    (folder / RECORDS).write_bytes(content)
    with pytest.raises(LedgerError, match="record 24"):
        Ledger.read(folder)
    LedgerWriter.open(folder, heads[20]).close()
    (fork,) = Ledger.read(folder).forks()
    assert (fork.records, fork.torn_bytes) == (1, 4 * 128)
    assert fork_contents(folder, fork)[0] == content[23 * 128 :]


@pytest.mark.parametrize("record", [0, 1, 11, 22])
def test_damage_up_to_the_checkpoint_is_refused(
    run: tuple[Path, dict[int, Head]], record: int
) -> None:
    folder, heads = run
    content = bytearray((folder / RECORDS).read_bytes())
    content[record * 128 + 17] ^= 1
    (folder / RECORDS).write_bytes(content)
    before = contents(folder)
    match = rf"records\.led: record {record}, byte {record * 128}: .* this is damage"
    with pytest.raises(LedgerError, match=match):
        LedgerWriter.open(folder, heads[20])
    assert contents(folder) == before


def test_damaged_line_up_to_the_checkpoint_is_refused(run: tuple[Path, dict[int, Head]]) -> None:
    folder, heads = run
    path = folder / EVENTS
    path.write_bytes(path.read_bytes().replace(b"step_10", b"step_11"))
    with pytest.raises(LedgerError, match=r"events\.jsonl: record 11, byte \d+: .* this is damage"):
        LedgerWriter.open(folder, heads[20])


@pytest.mark.parametrize("left", [0, 1, 11 * 128, 22 * 128, 23 * 128 - 1])
def test_a_ledger_behind_its_checkpoint_is_refused(
    run: tuple[Path, dict[int, Head]], left: int
) -> None:
    folder, heads = run
    path = folder / RECORDS
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(
        LedgerError,
        match=rf"behind the checkpoint: it ends before record {left // 128}, .* record 22",
    ):
        LedgerWriter.open(folder, heads[20])


def test_a_head_of_another_run_is_refused(run: tuple[Path, dict[int, Head]]) -> None:
    folder, heads = run
    with pytest.raises(LedgerError, match=r"record 11 has chain .* it is of another run"):
        LedgerWriter.open(folder, Head(11, heads[20].chain))


def test_a_head_in_a_fork_is_refused(run: tuple[Path, dict[int, Head]]) -> None:
    folder, heads = run
    with LedgerWriter.open(folder, heads[10]) as writer:
        append_steps(writer, 11, 15)
    name = Ledger.read(folder).forks()[0].file
    with pytest.raises(LedgerError, match=rf"record 22 has .* it was cut to forks/{name}"):
        LedgerWriter.open(folder, heads[20])


def test_a_damaged_fork_is_found(run: tuple[Path, dict[int, Head]]) -> None:
    folder, heads = run
    LedgerWriter.open(folder, heads[10]).close()
    ledger = Ledger.read(folder)
    (fork,) = ledger.forks()
    path = folder / "forks" / f"{fork.file}.led"
    content = bytearray(path.read_bytes())
    content[5 * 128] ^= 1
    path.write_bytes(content)
    with pytest.raises(LedgerError, match=rf"{fork.file}: .*record 17, byte 640.* FORK record 12"):
        ledger.read_fork(fork)


def test_changed_torn_bytes_of_a_fork_are_found(run: tuple[Path, dict[int, Head]]) -> None:
    folder, heads = run
    with (folder / RECORDS).open("ab") as file:
        file.write(b"torn")
    LedgerWriter.open(folder, heads[10]).close()
    ledger = Ledger.read(folder)
    (fork,) = ledger.forks()
    assert ledger.read_fork(fork).torn_bytes == 4
    path = folder / "forks" / f"{fork.file}.led"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(LedgerError, match=rf"{fork.file}: the torn bytes after record 27 are not"):
        ledger.read_fork(fork)


def test_a_second_writer_is_refused(run: tuple[Path, dict[int, Head]]) -> None:
    folder, heads = run
    before = contents(folder)
    with LedgerWriter.open(folder, Ledger.read(folder).head) as first:
        script = (
            "import sys\nfrom pathlib import Path\n"
            "from megatron_ettin.order.ledger import LedgerWriter\n"
            "LedgerWriter.open(Path(sys.argv[1]))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, str(folder)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert "is writing this ledger; wait for its end" in done.stderr
        with pytest.raises(LedgerError, match=r"lock: process \d+ on \S+ is writing this ledger"):
            LedgerWriter.open(folder, heads[10])
        assert contents(folder) == before
        append_steps(first, 26, 1)
    LedgerWriter.open(folder, heads[20]).close()


FORK_A_WORKER = """
import os, sys, time
from pathlib import Path
from megatron_ettin.order.ledger import Head, LedgerWriter
writer = LedgerWriter.open(Path(sys.argv[1]), Head(int(sys.argv[2]), sys.argv[3]))
worker = os.fork()
if worker == 0:
    time.sleep(60)
    os._exit(0)
print(worker, flush=True)
time.sleep(60)
"""


def test_a_workers_life_does_not_hold_the_lock(run: tuple[Path, dict[int, Head]]) -> None:
    folder, heads = run
    arguments = [str(folder), str(heads[20].seq), heads[20].chain]
    with subprocess.Popen(
        [sys.executable, "-c", FORK_A_WORKER, *arguments], cwd=ROOT, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        worker = int(writer.stdout.readline())
        try:
            with pytest.raises(LedgerError, match=f"process {writer.pid} on"):
                LedgerWriter.open(folder, heads[20])
            time.sleep(0.2)  # the worker lets go as it starts
            writer.kill()
            writer.wait()
            assert Path(f"/proc/{worker}").exists()
            LedgerWriter.open(folder, heads[20]).close()
        finally:
            writer.kill()
            os.kill(worker, signal.SIGKILL)


@pytest.mark.slow
def test_every_interrupted_fork_is_finished(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.ledger_crashes", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    crashes = [int(line) for line in done.stdout.split()]
    assert len(crashes) == 4
    assert min(crashes) >= 15, "fewer places to crash than the move has steps"


def test_lost_fork_files_are_named(run: tuple[Path, dict[int, Head]], tmp_path: Path) -> None:
    folder, heads = run
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "forks" / "pending.json").write_text("{")
    with pytest.raises(LedgerError, match=r"pending\.json: not what a ledger writes"):
        LedgerWriter.open(copy, heads[10])
    pending = (
        '{"payload": {"file": "fork_12_abc"}, "record_bytes": 0, "event_bytes": 0, "unix_ns": 0}'
    )
    (copy / "forks" / "pending.json").write_text(pending)
    with pytest.raises(LedgerError, match=r"fork_12_abc\.led: missing"):
        LedgerWriter.open(copy, heads[10])
    assert contents(copy) == contents(folder)


# --- any sequence of appends and returns ----------------------------------------------------------


def split_records(content: bytes) -> list[bytes]:
    return [content[at : at + 128] for at in range(0, len(content), 128)]


def go_back(folder: Path, keep: int) -> LedgerWriter:
    """Reopen after the first `keep` records, and compare with what going back must do."""
    live, lines = contents(folder)
    records = split_records(live)
    head = Head(keep - 1, records[keep - 1][96:].hex()) if keep else None
    forks = Ledger.read(folder).forks()
    alone = len(records) == keep + 1 and [fork.parent_seq for fork in forks[-1:]] == [keep - 1]
    writer = LedgerWriter.open(folder, head)
    if keep == 0:
        append_event(writer, Kind.START, 0, START)
    now, now_lines = contents(folder)
    if keep == len(records) or alone:
        assert now[: len(live)] == live
        return writer
    fork = Ledger.read(folder).forks()[-1]
    cut, cut_lines = fork_contents(folder, fork)
    assert cut == b"".join(records[keep:])
    assert lines.endswith(cut_lines)
    if keep:
        assert now[: keep * 128] == live[: keep * 128]
        assert now_lines.startswith(lines[: len(lines) - len(cut_lines)])
    assert len(now) == max(keep + 1, 2) * 128
    return writer


def read_all(folder: Path, ledger: Ledger) -> int:
    """Verify the forks of a ledger and theirs; return how many there are."""
    return sum(1 + read_all(folder, ledger.read_fork(fork)) for fork in ledger.forks())


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("steps"), st.integers(1, 4)),
        st.tuples(st.just("event"), st.sampled_from([Kind.CHECKPOINT, Kind.RESUME])),
        st.tuples(st.just("back"), st.floats(0, 1)),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(operations=OPERATIONS)
def test_any_history_stays_valid(operations: list[tuple[str, float]]) -> None:
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "ledger"
        writer = LedgerWriter.open(folder)
        append_event(writer, Kind.START, 0, START)
        for salt, (operation, value) in enumerate(operations):
            step = int(Ledger.read(folder).records["step"][-1])
            if operation == "steps":
                append_steps(writer, step + 1, int(value), salt)
            elif operation == "event":
                append_event(writer, Kind(int(value)), step, {"salt": salt})
            else:
                writer.close()
                count = len(Ledger.read(folder).records)
                writer = go_back(folder, round(value * count))
        writer.close()
        ledger = Ledger.read(folder)
        files = {path.stem for path in (folder / "forks").iterdir()}
        assert read_all(folder, ledger) == len(files)
