"""verify --head: a published chain hash is found wherever the run has gone since."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ettin.order.ledger import Head, Kind, Ledger, LedgerWriter
from megatron_ettin.queries.answer import Check
from megatron_ettin.queries.branches import read_branches
from megatron_ettin.queries.verify import verify
from megatron_ettin.queries.verify_head import FoundHead, find_head
from tests.conftest import TinyCorpus
from tests.runs import record_run, tiny_config
from tests.unit.ledgers import ROWS, append_event, append_steps, write_run
from tools import order as order_tool


def find(folder: Path, digits: str) -> FoundHead | None:
    ledger = Ledger.read(folder)
    check, found = find_head(digits, read_branches(ledger, Check(name="chain")))
    assert (check.failures == 0) == (found is not None)
    return found


def chains(ledger: Ledger) -> dict[int, str]:
    return {int(r["seq"]): r["chain"].tobytes().hex() for r in ledger.records}


def test_every_record_of_a_ledger_is_found_with_what_follows_it(tmp_path: Path) -> None:
    write_run(tmp_path / "ledger", 6, 3)
    ledger = Ledger.read(tmp_path / "ledger")
    for seq, chain in chains(ledger).items():
        found = find(tmp_path / "ledger", chain)
        assert found is not None
        assert (found.seq, found.chain, found.fork, found.undone) == (seq, chain, None, None)
        after = ledger.records[seq + 1 :]
        steps = after[after["kind"] == Kind.STEP]
        assert (found.since.records, found.since.steps) == (len(after), len(steps))
        assert found.since.rows == ROWS * len(steps)


def test_a_run_that_went_on_after_its_end_keeps_its_end_in_the_ledger(tmp_path: Path) -> None:
    folder = tmp_path / "ledger"
    at = write_run(folder, 6, 3)[6]
    with LedgerWriter.open(folder, at) as writer:
        append_event(writer, Kind.END, 6, {})
        end = writer.sync()
    # Twice: the first process was killed after the second phase's first step.
    for steps in (1, 2):
        with LedgerWriter.open(folder, at) as writer:
            append_event(writer, Kind.RESUME, 6, {})
            append_event(writer, Kind.AMEND, 6, {"to": {"phase_ends": [48, 64]}})
            append_steps(writer, 7, steps)
            writer.append(Kind.SKIP, step=6 + steps, g_begin=48 + 8 * steps, g_end=70, payload={})
            append_end(writer, 6 + steps, 70)
    ledger = Ledger.read(folder)
    assert ledger.holds(end), "what a run printed at its end is in the chain of its future"
    found = find(folder, end.chain)
    assert found is not None
    assert (found.kind, found.step, found.g) == ("END", 6, 48)
    assert found.since.went_back == 1
    assert (found.since.steps, found.since.skipped_rows) == (2, 6)
    assert (found.since.resumed, found.since.amended, found.since.ended) == (1, 1, True)
    (fork,) = ledger.forks()
    assert fork.parent_chain == end.chain
    undone = find(folder, ledger.read_fork(fork).head.chain)
    assert undone is not None
    assert undone.fork == fork.file


def append_end(writer: LedgerWriter, step: int, g: int) -> None:
    writer.append(Kind.END, step=step, g_begin=g, g_end=g, payload={})


def test_a_head_in_a_fork_of_a_fork(tmp_path: Path) -> None:
    """An END that an earlier version moved to a fork is found in the same way."""
    folder = tmp_path / "ledger"
    heads = write_run(folder, 9, 3)
    first = chains(Ledger.read(folder))
    with LedgerWriter.open(folder, heads[6]) as writer:
        append_steps(writer, 7, 1, salt=4)
    with LedgerWriter.open(folder, heads[3]) as writer:
        append_steps(writer, 4, 4, salt=5)
        append_end(writer, 7, 56)
        end = writer.sync()
    last = max(first)
    found = find(folder, first[last])
    assert found is not None
    assert found.fork is not None
    (outer,) = Ledger.read(folder).forks()
    (inner,) = Ledger.read(folder).read_fork(outer).forks()
    assert (found.fork, inner.parent_seq) == (inner.file, heads[6].seq)
    assert found.parted_seq == heads[3].seq + 1, "the ledger parts where it went back furthest"
    present = Ledger.read(folder)
    common = [seq for seq, chain in chains(present).items() if first.get(seq) == chain]
    assert max(common) + 1 == found.parted_seq
    assert found.since.records == len(present.records) - found.parted_seq
    assert found.since.ended
    assert found.undone is not None
    assert found.undone.records == 0
    step_8 = find(folder, first[last - 2])
    assert step_8 is not None
    assert step_8.undone is not None
    assert (step_8.step, step_8.undone.steps, step_8.undone.checkpoints) == (8, 1, 1)
    assert find(folder, end.chain) is not None


def test_a_beginning_is_enough_if_one_record_has_it(tmp_path: Path) -> None:
    head = write_run(tmp_path / "ledger", 3, 3)[3]
    for digits in (12, 13, 63, 64):
        found = find(tmp_path / "ledger", head.chain[:digits].upper())
        assert found is not None
        assert found.chain == head.chain
    other = f"{int(head.chain[12], 16) ^ 1:x}"
    assert find(tmp_path / "ledger", head.chain[:12] + other) is None
    assert find(tmp_path / "ledger", "0" * 64) is None
    for wrong in (head.chain[:11], head.chain + "0", "g" * 64):
        with pytest.raises(ValueError, match="give the chain hash of a record, 64 hexadecimal"):
            find(tmp_path / "ledger", wrong)


@pytest.fixture
def run(tiny_corpus: TinyCorpus, tmp_path: Path) -> Path:
    return record_run(tiny_config(tiny_corpus, tmp_path / "run"), save_steps=[3])


def ask(run: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    try:
        order_tool.main(["verify", "--run", str(run), "--chain", "--json", *options])
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert status == (answer["verdict"] == "FAIL")
    return answer


def test_the_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = Ledger.read(run / "ledger")
    end = ledger.head
    assert ask(run, capsys, "--head", end.chain)["head"]["since"]["records"] == 0
    with LedgerWriter.open(run / "ledger", ledger.checkpoints()[0].head):
        pass
    answer = ask(run, capsys, "--head", end.chain)
    assert answer["verdict"] == "PASS"
    parted = ledger.checkpoints()[0].head.seq + 1
    assert answer["head"]["parted_seq"] == parted
    order_tool.main(["verify", "--run", str(run), "--chain", "--head", end.chain])
    told = capsys.readouterr().out
    assert f"head: record {end.seq}, END, after step" in told
    assert f"the ledger has other records from {parted} on: records 1, went back 1" in told
    missing = ask(run, capsys, "--head", "ab" * 32)
    assert missing["verdict"] == "FAIL"
    assert missing["head"] is None
    assert "has the chain hash abab" in missing["faults"][0]["what"]


def test_nothing_is_found_in_what_was_rewritten(run: Path, tiny_corpus: TinyCorpus) -> None:
    """The one thing that an anchor proves and a chain alone does not."""
    published = Ledger.read(run / "ledger").head
    config = tiny_config(tiny_corpus, run.with_name("other"), seeds={"order": 5})
    other = record_run(config)
    assert verify(other, tokens=False).passed
    found = verify(other, tokens=False, head=published.chain)
    assert not found.passed
    assert [check.check for check in found.checks if check.failures] == ["head"]


def test_a_damaged_ledger_has_no_heads(run: Path) -> None:
    path = run / "ledger" / "records.led"
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(content)
    found = verify(run, head=Head(0, "0" * 64).chain)
    assert {check.check: check.failures for check in found.checks} == {"chain": 1, "head": 1}
