"""The files of a run's folder are named in one place, and read as training leaves them."""

import ast
import json
from pathlib import Path

import pytest

from megatron_ettin.order.run_folder import STATE_FILE, RunFolder, step_of

PACKAGE = Path(__file__).parents[2] / "megatron_ettin"
NAMES = {"config.yaml", "ledger", "metrics.jsonl", "order.json", "state.json"}


def names_in(source: str) -> list[str]:
    """Return the names of a run folder's files that a module spells as a string of their own."""
    strings = [
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    return sorted(name for name in strings if name.split("/")[0] in NAMES)


def test_each_file_of_a_run_is_named_once() -> None:
    named = [
        (name, path.relative_to(PACKAGE).as_posix())
        for path in sorted(PACKAGE.rglob("*.py"))
        for name in names_in(path.read_text())
    ]
    # A folder that `datasets` saved has a file of that name too.
    named.remove(("state.json", "data/raw_inputs.py"))
    # An attestation has a field of that name.
    for _ in range(2):
        named.remove(("ledger", "queries/attest.py"))
    assert sorted(named) == [(name, "order/run_folder.py") for name in sorted(NAMES)]


def test_a_name_in_a_program_is_found() -> None:
    assert names_in('path = run / "ledger"\nother = "ledger/forks"\n') == ["ledger", "ledger/forks"]
    assert names_in('raise ValueError("order.json is damaged")') == []


def test_checkpoints_are_complete_once_their_state_is_there(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.complete_checkpoints() == []
    assert run.newest_checkpoint() is None
    for name in ("step_00000010", "step_00000009", "step_00000020.unfinished", "copy"):
        (run.checkpoints / name).mkdir(parents=True)
        (run.checkpoints / name / STATE_FILE).touch()
    run.checkpoint(30).mkdir()
    names = [path.name for path in run.complete_checkpoints()]
    assert names == ["copy", "step_00000009", "step_00000010"]
    assert run.newest_checkpoint() == run.checkpoint(10)
    assert [step_of(run.checkpoints / name) for name in names] == [None, 9, 10]


def test_the_newest_checkpoint_is_that_of_most_steps(tmp_path: Path) -> None:
    """Names of more than eight digits sort otherwise than their steps."""
    run = RunFolder(tmp_path)
    for step in (99_999_999, 100_000_000):
        run.checkpoint(step).mkdir(parents=True)
        (run.checkpoint(step) / STATE_FILE).touch()
    assert run.newest_checkpoint() == run.checkpoint(100_000_000)


def test_half_a_line_of_metrics(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.metrics_lines() == []
    run.metrics.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [json.loads(line) for line in run.metrics_lines()] == [{"step": 1}, {"step": 2}]
    with pytest.raises(ValueError, match=r"metrics\.jsonl:3: not JSON"):
        run.read_metrics()


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert not run.has_ledger()
    with pytest.raises(FileNotFoundError, match=r"order\.json: no such file; --run takes"):
        run.read_order()
    with pytest.raises(FileNotFoundError, match=r"ledger: no such folder; only runs of this"):
        run.read_ledger()
    run.order.write_text("{")
    with pytest.raises(ValueError, match=r"order\.json: not the order of a run"):
        run.read_order()
