"""verify: what lies beside a ledger is compared with it, and what is gone is said."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ettin.order.ledger import RECORD, Kind, Ledger, LedgerWriter
from megatron_ettin.order.ledger.format import GENESIS, seal
from megatron_ettin.queries.diff import compare
from megatron_ettin.queries.twins import prove_twins
from megatron_ettin.queries.verify import Verification, verify
from tests.conftest import TinyCorpus
from tests.runs import record_run, tiny_config


@pytest.fixture(scope="module")
def recorded(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded")
    record_run(tiny_config(tiny_corpus, folder / "run"), save_steps=[3])
    write_metrics(folder / "run", Ledger.read(folder / "run" / "ledger"))
    return folder / "run"


@pytest.fixture
def run(recorded: Path, tmp_path: Path) -> Path:
    """Return a copy, which the chain's check may be asked about: it opens no corpus."""
    return Path(shutil.copytree(recorded, tmp_path / "run"))


def chain(run: Path) -> Verification:
    return verify(run, order=False, tokens=False)


def the_fault(run: Path) -> str:
    (fault,) = chain(run).faults
    return str(fault)


def metrics_lines(ledger: Ledger, before: dict[str, int] | None = None) -> list[dict[str, Any]]:
    """Return what training reports of each step, summed up in plain integers."""
    sums = before or {"tokens": 0, "low": 0, "high": 0}
    lines = []
    for record in ledger.steps:
        sums["tokens"] += int(record["n_tokens"])
        for lane, name in enumerate(("low", "high")):
            sums[name] = (sums[name] + int(record["token_digest"][lane])) % 2**64
        step, g = int(record["step"]), int(record["g_end"])
        digest = f"{sums['high']:016x}{sums['low']:016x}"
        common = {"step": step, "tokens": sums["tokens"]}
        lines.append({"kind": "train", **common, "g": g, "token_digest": digest, "loss": 2.5})
        lines.append({"kind": "validation", **common, "heldout_loss": 3.5})
    return lines


def write_metrics(run: Path, ledger: Ledger) -> None:
    text = "".join(json.dumps(line) + "\n" for line in metrics_lines(ledger))
    (run / "metrics.jsonl").write_text(text)


def edit_json(path: Path, edit: Callable[[Any], None]) -> None:
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


def edit_line(run: Path, number: int, **fields: Any) -> None:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[number - 1] = json.dumps({**json.loads(lines[number - 1]), **fields})
    path.write_text("\n".join(lines) + "\n")


def rewrite_event(run: Path, kind: Kind, edit: Callable[[Any], None]) -> None:
    """Change the payload of the last event of a kind, and chain the whole ledger anew."""
    folder = run / "ledger"
    records = np.frombuffer(bytearray((folder / "records.led").read_bytes()), RECORD)
    seq = int(np.flatnonzero(records["kind"] == kind)[-1])
    place = int(np.count_nonzero(records["kind"][:seq] != Kind.STEP))
    lines = (folder / "events.jsonl").read_bytes().splitlines()
    entry = json.loads(lines[place])
    edit(entry["payload"])
    lines[place] = json.dumps(entry, separators=(",", ":")).encode()
    digest = np.frombuffer(hashlib.sha256(lines[place]).digest(), "<u8")
    records["order_digest"][seq], records["token_digest"][seq] = digest[:2], digest[2:]
    records["mask_digest"][seq] = digest[0]
    content = bytearray(records.tobytes())
    seal(content, GENESIS)
    (folder / "records.led").write_bytes(content)
    (folder / "events.jsonl").write_bytes(b"\n".join([*lines, b""]))


def test_a_whole_run_passes(run: Path) -> None:
    found = chain(run)
    assert found.passed, found.faults
    ledger = Ledger.read(run / "ledger")
    assert found.checks[0].compared == len(ledger.records) + 2 * len(ledger.steps)
    names = [point.payload["name"] for point in ledger.checkpoints()]
    gone = f"{len(names)} of {len(names)} checkpoints are gone: {', '.join(names)}"
    assert found.notes == [gone]
    for name in names:
        (run / "checkpoints" / name).mkdir(parents=True)
    assert chain(run).notes == []
    (run / "checkpoints" / names[0]).rmdir()
    assert chain(run).notes == [f"1 of {len(names)} checkpoints are gone: {names[0]}"]


def test_a_run_that_has_not_ended(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    run = record_run(tiny_config(tiny_corpus, tmp_path / "run"), steps=3)
    found = chain(run)
    assert found.passed
    assert "no END record: the run goes on, was ended by force" in found.notes[0]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda order: order.update(order_id="00" * 32),
            "order.json: was altered: order_id is 0000",
        ),
        (
            lambda order: order["phases"][0].update(num_rows=157),
            "order.json: was altered: phases[1].start_g is 158, but the phase before ends at row "
            "157 (its num_rows is 157)",
        ),
        (
            lambda order: order["phases"][1].update(num_rows=41),
            "order.json: phases[1]: end_g is 199, but the ledger says 198",
        ),
    ],
)
def test_what_order_json_says_beside_its_ids(
    run: Path, edit: Callable[[Any], None], message: str
) -> None:
    edit_json(run / "order.json", edit)
    found = chain(run)
    assert any(message in str(fault) for fault in found.faults), found.faults
    assert not found.passed


def test_the_rows_of_records_lie_in_their_phases(run: Path) -> None:
    """An order.json and payloads that agree with one another, but not with what was taken."""

    def shorter(payload: Any) -> None:
        payload.update(num_rows=30)

    edit_json(run / "order.json", lambda order: order["phases"][1].update(num_rows=30))
    rewrite_event(run, Kind.PHASE, shorter)
    rewrite_event(run, Kind.START, lambda payload: payload.update(phase_ends=[158, 188]))
    found = [str(fault) for fault in chain(run).faults]
    assert any("do not lie in phase 1 as" in fault for fault in found)
    assert any("the run ended at row 198, but" in fault for fault in found)


def test_a_phase_that_the_ledger_begins_elsewhere(run: Path) -> None:
    rewrite_event(run, Kind.PHASE, lambda payload: payload.update(name="other"))
    assert "phases[1]: name is long, but the ledger says other" in the_fault(run)


def test_an_altered_configuration(run: Path) -> None:
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("mask_rate: 0.3", "mask_rate: 0.4"))
    assert f"record 0: {path}: its SHA-256 is " in the_fault(run)
    path.unlink()
    assert f"record 0: {path}: is gone, but the ledger says" in the_fault(run)


def test_a_ledger_that_does_not_bind_the_configuration(run: Path) -> None:
    rewrite_event(run, Kind.START, lambda payload: payload.pop("config_sha256"))
    found = chain(run)
    assert found.passed
    assert "the ledger does not bind config.yaml: an earlier version wrote it" in found.notes


def test_a_run_that_was_killed_while_it_resumed(run: Path) -> None:
    """The record comes first, then config.yaml: between them nothing is wrong yet."""
    ledger = Ledger.read(run / "ledger")
    start, end = ledger.events[0], ledger.head
    with LedgerWriter.open(run / "ledger", end) as writer:
        where = {"step": int(ledger.records[-1]["step"]), "g_begin": 198, "g_end": 198}
        payload = {**start, "config_sha256": "00" * 32}
        writer.append(Kind.RESUME, **where, payload=payload)
    found = chain(run)
    assert found.passed, found.faults
    assert any("ended before it wrote the config.yaml of record" in note for note in found.notes)
    (run / "config.yaml").write_text("other: true\n")
    assert not chain(run).passed


def test_a_run_that_was_killed_while_it_was_amended(run: Path) -> None:
    ledger = Ledger.read(run / "ledger")
    with LedgerWriter.open(run / "ledger", ledger.head) as writer:
        where = {"step": int(ledger.records[-1]["step"]), "g_begin": 198, "g_end": 198}
        ids = [*ledger.events[0]["phase_ids"], "00" * 32]
        payload = {**ledger.events[0], "phase_ids": ids, "phase_ends": [158, 198, 210]}
        writer.append(Kind.RESUME, **where, payload=payload)
        writer.append(Kind.AMEND, **where, payload={"to": {"phase_ends": [158, 198, 210]}})
    found = chain(run)
    assert found.passed, found.faults
    assert any("ended before it wrote the order.json of record" in note for note in found.notes)
    one = np.ones(1, dtype=np.int64)
    with LedgerWriter.open(run / "ledger", Ledger.read(run / "ledger").head) as writer:
        step = int(ledger.records[-1]["step"]) + 1
        digests = {"order_digest": [[1, 1]], "token_digest": [[1, 1]], "mask_digest": one}
        writer.append_steps(
            step=one * step, phase=one, g_begin=one * 198, g_end=one * 199, n_tokens=one, **digests
        )
    assert "its phase ids are not those that the ledger names" in the_fault(run)


@pytest.mark.parametrize(
    ("number", "fields", "message"),
    [
        (1, {"token_digest": "0" * 32}, "line 1: step 1: token_digest is 000"),
        (3, {"tokens": 7}, "line 3: step 2: tokens is 7, but the ledger has"),
        (4, {"tokens": 8}, "line 4: step 2: tokens is 8, but the ledger has"),
        (5, {"g": 9}, "line 5: step 3: g is 9, but the ledger has 48"),
        (5, {"step": 400}, "line 5: reports step 400, which the ledger does not have"),
        (5, {"step": None}, "line 5: not what a run reports"),
    ],
)
def test_a_line_of_metrics(run: Path, number: int, fields: dict[str, Any], message: str) -> None:
    edit_line(run, number, **fields)
    assert message in the_fault(run)


def test_lines_of_steps_that_went_to_a_fork(run: Path) -> None:
    """They are there until the resumed run has opened its reports."""
    ledger = Ledger.read(run / "ledger")
    with LedgerWriter.open(run / "ledger", ledger.checkpoints()[0].head):
        pass
    found = chain(run)
    assert found.passed, found.faults
    undone = 2 * (len(ledger.steps) - 3)
    assert f"{undone} lines of metrics.jsonl are of steps that are in forks" in found.notes
    edit_line(run, 9, token_digest="1" * 32)
    assert "line 9: step 5: token_digest is 111" in the_fault(run)


def test_half_a_line_is_not_looked_at(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 99')
    assert chain(run).passed


def test_a_fork_that_is_gone(run: Path) -> None:
    ledger = Ledger.read(run / "ledger")
    with LedgerWriter.open(run / "ledger", ledger.checkpoints()[0].head):
        pass
    (run / "metrics.jsonl").unlink()
    (path,) = (run / "ledger" / "forks").glob("*.led")
    path.unlink()
    assert the_fault(run).endswith(
        f"fork {path.stem}: {path} is gone, but a FORK record names it; restore it"
    )


def test_a_run_whose_record_is_wrong_is_compared_with_nothing(run: Path, recorded: Path) -> None:
    assert prove_twins(recorded, run).passed
    assert compare(recorded, run).common_rows == 198
    edit_line(run, 1, token_digest="0" * 32)
    message = (
        r"run: its record is wrong, .*line 1: step 1: token_digest is .*; see `verify --chain`"
    )
    for question in (prove_twins, compare):
        with pytest.raises(ValueError, match=message):
            question(recorded, run)
        with pytest.raises(ValueError, match=message):
            question(run, recorded)
