"""The ledger's records: what was appended is read, and any change is found where it was made."""

import hashlib
import json
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_ettin.order.ledger import EMPTY, RECORD, Head, Kind, Ledger, LedgerError, LedgerWriter
from megatron_ettin.order.ledger.format import GENESIS
from tests.unit.ledgers import ROWS, START, append_event, append_steps, digests, write_run

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "ledger.md"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a ledger of 30 steps with a checkpoint every 10: 34 records, 4 of them events."""
    write_run(tmp_path / "ledger", 30, 10)
    return tmp_path / "ledger"


def verifier() -> str:
    """Return the program that the documentation shows."""
    (program,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(program.strip().splitlines()) <= 15
    assert set(re.findall(r"^(?:import|from) (.*)", program, re.MULTILINE)) == {
        "hashlib, sys",
        "pathlib import Path",
    }
    return program


def verify_as_documented(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", verifier(), str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_record_is_what_the_documentation_says() -> None:
    records = PAGE.read_text().partition("## 3.")[0]
    table = re.findall(r"^\| (\d+) \| (\d+) \| `(\w+)`", records, re.MULTILINE)
    fields = RECORD.fields
    assert fields is not None
    built = [(offset, kind.itemsize, name) for name, (kind, offset) in fields.items()]
    assert [(int(at), int(size), name) for at, size, name in table] == built
    assert RECORD.itemsize == 128
    kinds = re.findall(r"^\| (\d) \| ([A-Z]+) \|", PAGE.read_text(), re.MULTILINE)
    assert [(int(number), name) for number, name in kinds] == [(k.value, k.name) for k in Kind]


def test_documented_program_verifies(folder: Path) -> None:
    done = verify_as_documented(folder)
    assert done.returncode == 0, done.stderr
    head = Ledger.read(folder).head
    assert done.stdout.split() == ["33", head.chain]
    content = bytearray((folder / "records.led").read_bytes())
    content[12 * 128 + 50] ^= 1
    (folder / "records.led").write_bytes(content)
    assert "record 12, byte 1536" in verify_as_documented(folder).stderr


def test_round_trip(folder: Path) -> None:
    ledger = Ledger.read(folder)
    assert ledger.records["kind"].tolist()[:2] == [Kind.START, Kind.STEP]
    assert ledger.records["seq"].tolist() == list(range(34))
    assert ledger.steps["step"].tolist() == list(range(1, 31))
    assert np.array_equal(ledger.steps["order_digest"], digests(1, 30, 2))
    assert np.array_equal(ledger.steps["token_digest"], digests(1, 30, 2, 1))
    assert np.array_equal(ledger.steps["mask_digest"], digests(1, 30, 1, 2)[:, 0])
    assert ledger.steps["n_tokens"].tolist() == [3 * step for step in range(1, 31)]
    assert ledger.events[0] == START
    assert [(c.step, c.g, c.payload["name"]) for c in ledger.checkpoints()] == [
        (step, step * ROWS, f"step_{step}") for step in (10, 20, 30)
    ]
    assert ledger.checkpoints()[-1].head == ledger.head
    assert ledger.torn_bytes == ledger.torn_event_bytes == 0
    assert ledger.forks() == []


def test_chain_is_hashlib_alone(folder: Path) -> None:
    content = (folder / "records.led").read_bytes()
    chain = GENESIS
    for at in range(0, len(content), 128):
        chain = hashlib.sha256(chain + content[at : at + 96]).digest()
        assert content[at + 96 : at + 128] == chain


def test_steps_and_rows_find_each_other(tmp_path: Path) -> None:
    with LedgerWriter.open(tmp_path / "ledger") as writer:
        append_event(writer, Kind.START, 0, START)
        append_steps(writer, 1, 2)
        writer.append(
            Kind.SKIP, step=2, g_begin=2 * ROWS, g_end=3 * ROWS, payload={"reason": "loss spike"}
        )
        writer.append_steps([3], [1], [24], [30], [5], [[1, 2]], [[3, 4]], [5])
    ledger = Ledger.read(tmp_path / "ledger")
    columns = ("step", "g_begin", "g_end")
    assert [ledger.steps[name].tolist() for name in columns] == [[1, 2, 3], [0, 8, 24], [8, 16, 30]]


def test_cumulative_digests_wrap(tmp_path: Path) -> None:
    top = 2**64 - 1
    with LedgerWriter.open(tmp_path / "ledger") as writer:
        append_event(writer, Kind.START, 0, START)
        lanes = np.array([[top, 1], [2, 3]], np.uint64)
        writer.append_steps([1, 2], [0, 0], [0, 4], [4, 9], [7, 8], lanes, lanes, lanes[:, 0])
        append = writer.append
        append(Kind.CHECKPOINT, step=2, g_begin=9, g_end=9, payload={})
    ledger = Ledger.read(tmp_path / "ledger")
    assert ledger.cumulative("order_digest").tolist() == [[top, 1], [1, 4]]
    assert ledger.cumulative("mask_digest").tolist() == [top, 1]
    assert ledger.cumulative("n_tokens").tolist() == [7, 15]


def test_signed_lanes_are_taken_modulo_2_64(tmp_path: Path) -> None:
    with LedgerWriter.open(tmp_path / "ledger") as writer:
        append_event(writer, Kind.START, 0, START)
        writer.append_steps([1], [0], [0], [4], [7], np.array([[-1, 1]]), [[0, 0]], [-2])
    steps = Ledger.read(tmp_path / "ledger").steps
    assert steps["order_digest"].tolist() == [[2**64 - 1, 1]]
    assert steps["mask_digest"].tolist() == [2**64 - 2]


def test_a_run_may_start_anywhere(tmp_path: Path) -> None:
    with LedgerWriter.open(tmp_path / "ledger") as writer:
        writer.append(Kind.START, step=100, g_begin=800, g_end=800, payload=START)
        append_steps(writer, 101, 3)
    ledger = Ledger.read(tmp_path / "ledger")
    assert ledger.steps["step"].tolist() == [101, 102, 103]
    assert (int(ledger.steps["g_begin"][0]), int(ledger.steps["g_end"][0])) == (800, 808)


def test_clock_may_go_backwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LedgerWriter.open(tmp_path / "ledger") as writer:
        append_event(writer, Kind.START, 0, START)
        monkeypatch.setattr("time.time_ns", lambda: 1)
        append_steps(writer, 1, 1)
    assert Ledger.read(tmp_path / "ledger").records["unix_ns"][1] == 1


# --- damage ---------------------------------------------------------------------------------------


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_every_field_of_a_record_is_protected(folder: Path) -> None:
    records = folder / "records.led"
    chance = np.random.default_rng(0)
    for byte in range(128):
        record, bit = int(chance.integers(34)), int(chance.integers(8))
        at = (record * 128 + byte) * 8 + bit
        flip(records, at)
        with pytest.raises(
            LedgerError, match=rf"records\.led: record {record}, byte {record * 128}:"
        ):
            Ledger.read(folder)
        flip(records, at)
    Ledger.read(folder)


def test_random_flips_are_located(folder: Path) -> None:
    chance = np.random.default_rng(1)
    lines = (folder / "events.jsonl").read_bytes()
    events = np.flatnonzero(Ledger.read(folder).records["kind"] != Kind.STEP)
    for _ in range(200):
        name = "records.led" if chance.integers(2) else "events.jsonl"
        byte = int(chance.integers((folder / name).stat().st_size))
        bit = byte * 8 + int(chance.integers(8))
        flip(folder / name, bit)
        record = byte // 128 if name == "records.led" else events[lines[:byte].count(b"\n")]
        with pytest.raises(LedgerError, match=rf"{name}: record {record}, byte "):
            Ledger.read(folder)
        flip(folder / name, bit)
    Ledger.read(folder)


def remove(items: list[bytes]) -> None:
    del items[5]


def duplicate(items: list[bytes]) -> None:
    items.insert(5, items[4])


def exchange(items: list[bytes]) -> None:
    items[5], items[6] = items[6], items[5]


@pytest.mark.parametrize("change", [remove, duplicate, exchange], ids=lambda f: f.__name__)
def test_moved_records_are_found(folder: Path, change: Callable[[list[bytes]], None]) -> None:
    content = (folder / "records.led").read_bytes()
    records = [content[at : at + 128] for at in range(0, len(content), 128)]
    change(records)
    (folder / "records.led").write_bytes(b"".join(records))
    with pytest.raises(LedgerError, match=r"records\.led: record 5, byte 640: its chain"):
        Ledger.read(folder)


def test_moved_lines_are_found(folder: Path) -> None:
    path = folder / "events.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    first, second = len(lines[0]), len(lines[0]) + len(lines[1])
    for changed, record, byte in (
        ([lines[0], lines[2], lines[1], lines[3]], 11, first),
        ([lines[0], lines[1], lines[3]], 22, second),
        ([lines[0], lines[1], lines[1], *lines[2:]], 22, second),
        (lines[:3], 33, sum(map(len, lines[:3]))),
    ):
        path.write_bytes(b"".join(changed))
        with pytest.raises(LedgerError, match=rf"events\.jsonl: record {record}, byte {byte}:"):
            Ledger.read(folder)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kind", 0, "its kind is 0"),
        ("kind", 10, "its kind is 10"),
        ("kind", Kind.START, "its kind is 1: record 0, only, is START"),
        ("version", 2, "its version is 2, this program reads 1"),
        ("flags", 1, "its flags are 1"),
        ("seq", 8, "its seq is 8"),
        ("step", 9, "its step is 9"),
        ("g_begin", 47, "its g_begin is 47"),
        ("g_end", 48, r"its rows are \[48, 48\)"),
        ("g_end", 40, r"its rows are \[48, 40\)"),
    ],
)
def test_a_rechained_forgery_breaks_a_rule(
    folder: Path, field: str, value: int, message: str
) -> None:
    """Someone who changes a record and chains all after it anew must still count right."""
    path = folder / "records.led"
    records = np.frombuffer(path.read_bytes(), RECORD).copy()
    records[7][field] = value
    chain = GENESIS
    for record in records:
        chain = hashlib.sha256(chain + record.tobytes()[:96]).digest()
        record["chain"] = np.frombuffer(chain, np.uint8)
    path.write_bytes(records.tobytes())
    with pytest.raises(LedgerError, match=rf"record 7, byte 896: {message}"):
        Ledger.read(folder)


@pytest.mark.parametrize("left", range(1, 128))
def test_a_torn_end_is_no_fault_of_a_reader(folder: Path, left: int) -> None:
    content = (folder / "records.led").read_bytes()
    (folder / "records.led").write_bytes(content[: 20 * 128 + left])
    ledger = Ledger.read(folder)
    assert (len(ledger.records), ledger.torn_bytes) == (20, left)
    assert ledger.torn_event_bytes > 0  # the lines of the records that are gone


def test_a_line_without_its_record_is_no_fault_of_a_reader(folder: Path) -> None:
    with (folder / "events.jsonl").open("ab") as file:
        file.write(b'{"seq":34')
    ledger = Ledger.read(folder)
    assert (len(ledger.records), ledger.torn_bytes, ledger.torn_event_bytes) == (34, 0, 9)


def test_unverified_reading_hashes_nothing(folder: Path) -> None:
    expected = Ledger.read(folder)
    flip(folder / "records.led", (128 + 60) * 8)
    ledger = Ledger.read(folder, verify=False)
    assert ledger.events == expected.events
    assert ledger.steps["step"].tolist() == expected.steps["step"].tolist()


def test_no_ledger(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"records\.led"):
        Ledger.read(tmp_path)


def test_an_empty_ledger(tmp_path: Path) -> None:
    LedgerWriter.open(tmp_path / "ledger").close()
    ledger = Ledger.read(tmp_path / "ledger")
    assert (ledger.head, len(ledger.records), ledger.checkpoints()) == (EMPTY, 0, [])
    assert not ledger.holds(Head(0, GENESIS.hex()))
    assert len(ledger.steps) == 0


# --- what a writer refuses ------------------------------------------------------------------------


def test_appends_that_do_not_follow_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "ledger"
    with LedgerWriter.open(folder) as writer:
        with pytest.raises(LedgerError, match="record 0, only, is START"):
            append_event(writer, Kind.CHECKPOINT, 0, {})
        with pytest.raises(LedgerError, match="record 0, only, is START"):
            append_steps(writer, 1, 1)
        append_event(writer, Kind.START, 0, START)
        append_steps(writer, 1, 3)
        before = (folder / "records.led").read_bytes(), (folder / "events.jsonl").read_bytes()
        none = np.zeros((1, 2), np.uint64)
        with pytest.raises(LedgerError, match=r"steps \[5\] do not follow step 3"):
            append_steps(writer, 5, 1)
        with pytest.raises(LedgerError, match="step 3"):
            append_event(writer, Kind.CHECKPOINT, 2, {})
        with pytest.raises(LedgerError, match=r"begin at \[25\].* ended at row 24"):
            writer.append_steps([4], [0], [25], [32], [1], none, none, [0])
        with pytest.raises(LedgerError, match=r"rows are \[24, 24\)"):
            writer.append_steps([4], [0], [24], [24], [1], none, none, [0])
        with pytest.raises(LedgerError, match=r"rows are \[24, 23\)"):
            writer.append(Kind.SKIP, step=3, g_begin=24, g_end=23, payload={})
        with pytest.raises(LedgerError, match=r"rows are \[24, 25\)"):
            writer.append(Kind.RESUME, step=3, g_begin=24, g_end=25, payload={})
        with pytest.raises(LedgerError, match="n_tokens is float64"):
            writer.append_steps([4], [0], [24], [32], [1.5], none, none, [0])
        with pytest.raises(LedgerError, match=r"order_digest is uint64 \[1\]"):
            writer.append_steps([4], [0], [24], [32], [1], none[0, :1], none, [0])
        with pytest.raises(LedgerError, match="record 4 is START"):
            append_event(writer, Kind.START, 3, START)
        with pytest.raises(LedgerError, match="FORK records are not appended"):
            append_event(writer, Kind.FORK, 3, {})
        for payload in ({"loss": float("nan")}, {"path": tmp_path}):
            with pytest.raises(LedgerError, match="payload of a RESUME record is no JSON"):
                append_event(writer, Kind.RESUME, 3, payload)
        assert before == (
            (folder / "records.led").read_bytes(),
            (folder / "events.jsonl").read_bytes(),
        )
        append_steps(writer, 4, 0)
        append_steps(writer, 4, 1)
    with pytest.raises(LedgerError, match="this writer is closed"):
        append_steps(writer, 5, 1)
    assert len(Ledger.read(folder).records) == 5


def test_payloads_are_lines_of_json(tmp_path: Path) -> None:
    payload = {"text": "é\n\u2028", "nested": {"b": [1, None], "a": 0.5}}
    with LedgerWriter.open(tmp_path / "ledger") as writer:
        append_event(writer, Kind.START, 0, payload)
        append_event(writer, Kind.END, 0, {})
    lines = (tmp_path / "ledger" / "events.jsonl").read_bytes().split(b"\n")
    assert json.loads(lines[0]) == {"seq": 0, "kind": "START", "payload": payload}
    assert (len(lines), lines[2]) == (3, b"")
    assert Ledger.read(tmp_path / "ledger").events == {0: payload, 1: {}}


def test_a_full_disk_leaves_the_ledger_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "ledger"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with LedgerWriter.open(folder) as writer:
        append_event(writer, Kind.START, 0, START)
        append_steps(writer, 1, 10)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
            with pytest.raises(OSError, match=r"File too large: '.*records\.led'"):
                append_steps(writer, 11, 10)
            with pytest.raises(OSError, match=r"File too large: '.*events\.jsonl'"):
                append_event(writer, Kind.RESUME, 10, {"text": "x" * 2000})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert len(Ledger.read(folder).records) == 11
        append_steps(writer, 11, 1)
    assert Ledger.read(folder).torn_bytes == 0
    assert len(Ledger.read(folder).records) == 12
