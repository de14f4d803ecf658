"""Anchored heads tell whether a ledger was rewritten, cut or replaced since."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ettin.data.anchor import Anchor, AnchorError
from megatron_ettin.order.ledger import Head, Kind, Ledger, LedgerWriter
from megatron_ettin.order.ledger.format import (
    BODY_BYTES,
    EVENTS_FILE,
    GENESIS,
    RECORD_BYTES,
    RECORDS_FILE,
    seal,
)
from megatron_ettin.queries.answer import Check
from megatron_ettin.queries.branches import read_branches
from megatron_ettin.queries.verify_anchor import check_anchor
from tests.conftest import TinyCorpus
from tests.runs import record_run, tiny_config
from tests.unit.ledgers import append_event, append_steps, write_run
from tools import order as order_tool

STEPS, EVERY = 12, 3


def first_record(folder: Path) -> str:
    return str(Ledger.read(folder).records["chain"][0].tobytes().hex())


def anchor_heads(folder: Path, heads: dict[int, Head], address: str) -> Anchor:
    anchor = Anchor(address)
    for head in heads.values():
        anchor.add(head, first_record(folder))
    return anchor


def compare(folder: Path, anchor: Anchor) -> Check:
    return check_anchor(anchor, read_branches(Ledger.read(folder), Check(name="chain")))


@pytest.mark.parametrize("place", ["{tmp}/anchor", "file://{tmp}/anchor", "memory://anchor-of-run"])
def test_heads_come_back_as_they_were_written_and_agree(place: str, tmp_path: Path) -> None:
    folder = tmp_path / "ledger"
    heads = write_run(folder, STEPS, EVERY)
    anchor = anchor_heads(folder, heads, place.format(tmp=tmp_path))
    found, others = anchor.heads()
    assert [entry.head for entry in found] == list(heads.values())
    assert {entry.first_record for entry in found} == {first_record(folder)} == {anchor.owner()}
    assert others == []
    check = compare(folder, anchor)
    assert (check.items, check.failures, check.notes) == (len(heads), 0, [])


def forge(folder: Path, seq: int) -> None:
    """Change one record, and chain all from it on anew: what is left is a valid ledger."""
    path = folder / RECORDS_FILE
    content = bytearray(path.read_bytes())
    begin = seq * RECORD_BYTES
    content[begin + BODY_BYTES - 1] ^= 1  # of the time of writing
    forged = content[begin:]
    seal(forged, bytes(content[begin - 32 : begin]) if seq else GENESIS)
    path.write_bytes(content[:begin] + forged)


def cut(folder: Path, seq: int) -> None:
    """Leave the records before `seq`, as if there never had been more."""
    for name, end in ((RECORDS_FILE, seq * RECORD_BYTES), (EVENTS_FILE, None)):
        content = (folder / name).read_bytes()
        if end is None:
            kept = Ledger.read(folder, verify=False)
            content = b"".join(content.splitlines(keepends=True)[: len(kept.events)])
        (folder / name).write_bytes(content[:end])


@pytest.mark.parametrize("change", [forge, cut])
def test_the_first_head_that_a_changed_ledger_lacks_is_named(
    change: Callable[[Path, int], None], tmp_path: Path
) -> None:
    """Whichever record is changed, the first head at or after it is named, and no earlier one."""
    heads = list(write_run(tmp_path / "true", STEPS, EVERY).values())
    anchor = Anchor(str(tmp_path / "anchor"))
    for head in heads:
        anchor.add(head, first_record(tmp_path / "true"))
    for seq in range(1, heads[-1].seq + 1):
        folder = shutil.copytree(tmp_path / "true", tmp_path / f"{seq}")
        change(folder, seq)
        check = compare(folder, anchor)
        lacking = [head for head in heads if head.seq >= seq]
        assert check.failures == len(lacking)
        (fault,) = check.faults
        assert f"record {lacking[0].seq} had the chain hash {lacking[0].chain}" in fault.what
        agreed = [head for head in heads if head.seq < seq]
        assert (
            f"last head that agrees is record {agreed[-1].seq}" if agreed else "no earlier"
        ) in (fault.what)
        if change is cut:
            assert f"the ledger ends with record {seq - 1}" in fault.what


def test_a_head_that_the_run_went_back_on_agrees_from_its_fork(tmp_path: Path) -> None:
    folder = tmp_path / "ledger"
    heads = write_run(folder, STEPS, EVERY)
    anchor = anchor_heads(folder, heads, str(tmp_path / "anchor"))
    with LedgerWriter.open(folder, heads[6]) as writer:
        append_event(writer, Kind.RESUME, 6, {})
        append_steps(writer, 7, 1, salt=9)
        writer.sync()
    check = compare(folder, anchor)
    assert check.failures == 0
    assert check.notes == [
        "2 anchored heads are in forks",
        "the last 3 records are newer than the last anchored head",
    ]


def test_an_anchor_without_a_head_is_no_proof(tmp_path: Path) -> None:
    write_run(tmp_path / "ledger", 3, 3)
    (tmp_path / "anchor").mkdir()
    (tmp_path / "anchor" / "notes.txt").write_text("not a head")
    (fault,) = compare(tmp_path / "ledger", Anchor(str(tmp_path / "anchor"))).faults
    assert fault.what == f"{tmp_path / 'anchor'}: holds no head"


def test_a_file_that_was_cut_off_is_noted(tmp_path: Path) -> None:
    folder = tmp_path / "ledger"
    anchor = anchor_heads(folder, write_run(folder, STEPS, EVERY), str(tmp_path / "anchor"))
    torn = sorted((tmp_path / "anchor").iterdir())[1]
    torn.write_bytes(torn.read_bytes()[:20])
    check = compare(folder, anchor)
    assert (check.items, check.failures) == (STEPS // EVERY - 1, 0)
    assert f"1 files hold no whole head, the first is {torn.name}" in check.notes[0]


def test_another_runs_heads_are_refused(tmp_path: Path) -> None:
    anchor = anchor_heads(
        tmp_path / "other", write_run(tmp_path / "other", 6, 3, salt=1), str(tmp_path / "anchor")
    )
    write_run(tmp_path / "ledger", STEPS, EVERY)
    check = compare(tmp_path / "ledger", anchor)
    assert check.failures == 2
    assert "no earlier head agrees" in check.faults[0].what


def test_a_place_that_does_not_answer_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "ledger", 3, 3)
    with pytest.raises(AnchorError, match=r"nothing-like-this://bucket/run"):
        compare(tmp_path / "ledger", Anchor("nothing-like-this://bucket/run"))
    (tmp_path / "file").write_text("")
    with pytest.raises(AnchorError, match=str(tmp_path / "file")):
        Anchor(str(tmp_path / "file" / "anchor")).add(Head(0, "0" * 64), "0" * 64)


def test_verify_compares_with_an_anchor(
    tiny_corpus: TinyCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = record_run(tiny_config(tiny_corpus, tmp_path / "run"), steps=4, save_steps=(2,))
    ledger = Ledger.read(run / "ledger")
    anchor = Anchor(str(tmp_path / "anchor"))
    anchor.add(ledger.checkpoints()[0].head, first_record(run / "ledger"))
    words = ["verify", "--run", str(run), "--chain", "--anchor", anchor.address]
    order_tool.main(words)
    assert "anchor: PASS, 1 compared" in capsys.readouterr().out
    forge(run / "ledger", 2)
    with pytest.raises(SystemExit, match="1"):
        order_tool.main(words)
    assert f"record {ledger.checkpoints()[0].head.seq} had the chain" in capsys.readouterr().out
