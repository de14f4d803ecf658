"""diff: how far two runs are the same, and what is where they part."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ettin.order.ledger import Ledger, LedgerWriter, reader
from megatron_ettin.queries.diff import Diff, Skipped, compare
from megatron_ettin.queries.record import Difference
from megatron_ettin.queries.recorded_run import CHANGES_SHOWN, open_run
from tests.conftest import TinyCorpus
from tests.mutations import change_token
from tests.runs import record_run, tiny_config
from tools import order as order_tool

PHASES: list[dict[str, Any]] = [
    {"name": "short", "train_tokens": 20_000, "seq_length": 128, "global_batch_size": 16},
    {"name": "long", "train_tokens": 10_000, "seq_length": 256, "global_batch_size": 8},
]


def make(corpus: TinyCorpus, folder: Path, *, steps: int | None = None, **sections: Any) -> Path:
    config = tiny_config(corpus, folder, **{"phases": PHASES, **sections})
    return record_run(config, steps=steps, save_steps=[4])


def rows_by_hand(folder: Path) -> list[Any]:
    """Return what each row holds, told without the code under test."""
    order = open_run(folder, must_match=False).order
    pieces = order.pieces(0, order.num_rows)
    rows: list[Any] = [[] for _ in range(order.num_rows)]
    for g, source, document, offset, length in zip(
        pieces.g, pieces.source, pieces.document, pieces.offset, pieces.length, strict=True
    ):
        rows[g].append((order.source_names[source], int(document), int(offset), int(length)))
    return [
        (row, tokens.tolist()) for row, tokens in zip(rows, order.tokens(0, len(rows)), strict=True)
    ]


def assert_parts_where_the_rows_do(found: Diff, one: Path, other: Path) -> None:
    first, second = rows_by_hand(one), rows_by_hand(other)
    pairs = zip(first, second, strict=False)
    parted = next((g for g, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
    assert found.common_rows == parted
    if parted == min(len(first), len(second)):
        assert found.first_different_row is None
        assert found.row == []
        return
    assert found.first_different_row == parted
    for folder, rows in ((one, first), (other, second)):
        said = [
            (piece.source, piece.document, piece.offset, piece.length)
            for piece in found.row
            if piece.run == str(folder)
        ]
        assert said == rows[parted][0]


@pytest.fixture(scope="module")
def one(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tiny_corpus, tmp_path_factory.mktemp("diff") / "one")


def test_other_batches_are_the_same_rows(
    one: Path, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    phases = [{**PHASES[0], "global_batch_size": 24}, PHASES[1]]
    other = make(tiny_corpus, tmp_path / "other", phases=phases)
    found = compare(one, other)
    assert_parts_where_the_rows_do(found, one, other)
    assert found.first_different_row is None
    assert found.specs == []
    assert (found.same_cuts, found.first_other_cut) == (0, 1)
    assert found.first_disagreement is None
    shared = [(point.g, point.same_order, point.same_tokens) for point in found.checkpoints]
    assert shared == [(158, True, True), (198, True, True)]


@pytest.mark.parametrize("alpha", [0.5, 0.699])
def test_another_blend_in_the_second_phase(
    one: Path, tiny_corpus: TinyCorpus, tmp_path: Path, alpha: float
) -> None:
    data = tiny_corpus.data
    data["blend"] = {**data["blend"], "long": {"alpha": alpha, "beta": 1 - alpha}}
    other = make(tiny_corpus, tmp_path / "other", data=data)
    found = compare(one, other)
    assert_parts_where_the_rows_do(found, one, other)
    assert found.common_rows >= 158
    assert {(d.where, d.field) for d in found.specs} >= {("phase 1 (long), source alpha", "quota")}


def test_another_seed(one: Path, tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    other = make(tiny_corpus, tmp_path / "other", seeds={"order": 3})
    found = compare(one, other)
    assert_parts_where_the_rows_do(found, one, other)
    assert found.specs == [Difference(where="order", field="seed", first=21, second=3)]
    assert found.first_disagreement == 16
    assert [(p.same_order, p.same_tokens) for p in found.checkpoints] == [(False, False)] * 3
    assert found.same_cuts == found.steps_in_both


def test_a_longer_phase(one: Path, tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    """The ids are the same; the rows part where only one of the runs has begun another phase."""
    longer = [{**PHASES[0], "train_tokens": 24_000}, PHASES[1]]
    other = make(tiny_corpus, tmp_path / "other", phases=longer)
    found = compare(one, other)
    assert_parts_where_the_rows_do(found, one, other)
    assert found.common_rows == 158
    only = [*longer[:1]]
    alone = make(tiny_corpus, tmp_path / "alone", phases=only)
    assert_parts_where_the_rows_do(compare(other, alone), other, alone)


def test_another_token(one: Path, own_corpus: TinyCorpus, tmp_path: Path) -> None:
    pieces = open_run(one).order.pieces(70, 71)
    source = ["alpha", "beta"][pieces.source[0]]
    change_token(
        own_corpus.folder / source, document=int(pieces.document[0]), offset=int(pieces.offset[0])
    )
    other = make(own_corpus, tmp_path / "other")
    found = compare(one, other)
    assert_parts_where_the_rows_do(found, one, other)
    assert found.common_rows <= 70
    assert {d.field for d in found.specs} == {"tokens_sha256"}
    assert [(p.same_order, p.same_tokens) for p in found.checkpoints][-1] == (True, False)


def test_skipped_rows_and_forks(one: Path, tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    data = {**tiny_corpus.data, "skip_rows": [[32, 40], [100, 101]]}
    other = make(tiny_corpus, tmp_path / "other", data=data)
    before = Ledger.read(other / "ledger")
    found = compare(one, other)
    assert found.skipped == [
        Skipped(run=str(other), begin=32, end=40),
        Skipped(run=str(other), begin=100, end=101),
    ]
    assert found.common_rows == 198, "skipping does not move rows"
    assert found.first_disagreement == 158
    with LedgerWriter.open(other / "ledger", before.checkpoints()[0].head):
        pass
    found = compare(one, other)
    (fork,) = found.forks
    assert fork.run == str(other)
    assert fork.steps == len(before.steps) - 4
    assert fork.to_record == before.checkpoints()[0].head.seq
    assert found.steps_in_both == 4


def test_a_changed_corpus_is_a_note(own_corpus: TinyCorpus, tmp_path: Path) -> None:
    one, other = (make(own_corpus, tmp_path / name, steps=2) for name in ("one", "other"))
    change_token(own_corpus.folder / "alpha", document=0)
    found = compare(one, other)
    assert len(found.notes) == 4
    assert "tokens_sha256 was" in found.notes[0]


def test_the_command(one: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["diff", "--run", str(one), "--run", str(one)]
    order_tool.main(arguments)
    assert "common rows        198" in capsys.readouterr().out
    order_tool.main([*arguments, "--json"])
    assert json.loads(capsys.readouterr().out)["common_rows"] == 198


def test_runs_that_megatron_trained(one: Path, tmp_path: Path) -> None:
    from tests.unit.mcore_runs import train

    first = train(tmp_path / "first", samples=60, checkpoints=[3, 6]).folder
    second = train(tmp_path / "second", samples=60, seed=7, checkpoints=[3]).folder
    same = compare(first, first)
    assert (same.common_rows, same.first_different_row) == (60, None)
    assert [(point.g, point.same_order) for point in same.checkpoints] == [(30, None), (60, None)]
    found = compare(first, second)
    assert_parts_where_the_rows_do(found, first, second)
    assert {d.field for d in found.specs} == {"cache", "prefixes", "checkpoints"}
    assert compare(first, one).common_rows == 0


def test_what_changed_is_listed_line_by_line(tmp_path: Path, tiny_corpus: TinyCorpus) -> None:
    folder = record_run(tiny_config(tiny_corpus, tmp_path / "run"), steps=2)
    order = json.loads((folder / "order.json").read_text())
    fields = ("quota", "rows", "tokens", "documents_in_file")
    for phase in order["phases"]:
        for pool in phase["pools"]:
            pool |= {field: pool[field] + 1 for field in fields}
    (folder / "order.json").write_text(json.dumps(order))
    with pytest.raises(ValueError, match="the order is not the recorded one any more") as raised:
        open_run(folder)
    _, *lines = str(raised.value).splitlines()
    assert len(lines) == CHANGES_SHOWN + 1
    assert lines[0].startswith("  phase 0 (short), source alpha: documents_in_file was 501, is 500")
    assert lines[-1] == f"  and {4 * len(fields) - CHANGES_SHOWN} more"


def test_sums_of_steps_are_made_once_for_all_checkpoints(
    tiny_corpus: TinyCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of n checkpoints is not n times as long to compare."""
    folders = [
        record_run(
            tiny_config(tiny_corpus, tmp_path / name, phases=PHASES), save_steps=range(1, 20)
        )
        for name in ("first", "second")
    ]
    made: list[int] = []
    cumsum = np.cumsum

    def record(values: Any, *args: Any, **kwargs: Any) -> Any:
        made.append(len(values))
        return cumsum(values, *args, **kwargs)

    monkeypatch.setattr(reader.np, "cumsum", record)
    found = compare(*folders)
    assert len(found.checkpoints) >= 15
    assert all(point.same_tokens for point in found.checkpoints)
    steps = len(Ledger.read(folders[0] / "ledger").steps)
    # Three sums of each ledger that is read, not of each checkpoint.
    assert 6 <= made.count(steps) < len(found.checkpoints)
