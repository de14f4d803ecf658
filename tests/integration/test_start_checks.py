"""A run that could not be carried through is refused at its start, and leaves nothing behind."""

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ettin.config import RunConfig, parse_args
from megatron_ettin.pretrain import pretrain
from megatron_ettin.training import start_checks
from megatron_ettin.training.start_checks import StartError
from tests.conftest import TinyCorpus
from tests.runs import tiny_config

Prepare = Callable[[Path], Any]


def make_file(name: str) -> Prepare:
    def prepare(run_dir: Path) -> None:
        (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / name).write_text("")

    return prepare


def make_folder(name: str) -> Prepare:
    return lambda run_dir: (run_dir / name).mkdir(parents=True)


OBSTACLES: list[tuple[Prepare, str]] = [
    (make_folder("checkpoints/step_00000007"), r"step_00000007: is no finished checkpoint"),
    (make_file("checkpoints/step_00000007"), r"step_00000007: is no finished checkpoint"),
    (make_file("checkpoints/step_00000007.unfinished"), r"unfinished: is a file, but"),
    (make_file("checkpoints"), r"run/checkpoints: is a file, but the run needs a folder"),
    (make_file("ledger"), r"run/ledger: is a file, but the run needs a folder"),
    (lambda run_dir: run_dir.write_text(""), r"run: is a file, but the run needs a folder"),
    (make_folder("metrics.jsonl"), r"metrics\.jsonl: cannot be written \(Is a directory\)"),
    (make_folder("ledger/lock"), r"ledger/lock: cannot be written"),
]


@pytest.mark.parametrize(
    ("prepare", "named"), OBSTACLES, ids=lambda x: x if isinstance(x, str) else ""
)
def test_what_is_in_the_way_is_named(
    prepare: Prepare, named: str, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    config = tiny_config(tiny_corpus, tmp_path / "run")
    start_checks.check_outputs(config)
    assert not (tmp_path / "run").exists(), "a check leaves nothing behind"
    prepare(tmp_path / "run")
    with pytest.raises(StartError, match=named):
        start_checks.check_outputs(config)


def test_what_is_not_in_the_way_is_left_alone(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    """A checkpoint to go on from, an older folder that is none, a save that was cut off."""
    run_dir = tmp_path / "run"
    for name in ("step_00000003", "step_00000004", "step_00000005.unfinished", "step_notes"):
        (run_dir / "checkpoints" / name).mkdir(parents=True)
    (run_dir / "checkpoints" / "step_00000004" / "state.json").write_text("{}")
    start_checks.check_outputs(tiny_config(tiny_corpus, run_dir))


def test_a_folder_that_cannot_be_written_is_named(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    # Nobody can make a file in /proc, not even root.
    config = dataclasses.replace(tiny_config(tiny_corpus, tmp_path / "run"), run_dir="/proc/a/run")
    with pytest.raises(StartError, match=r"/proc: cannot be written to"):
        start_checks.check_outputs(config)


def test_a_missing_wandb_is_named(
    tiny_corpus: TinyCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tiny_corpus, tmp_path / "run", logging={"wandb": True})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(StartError, match=r"logging\.wandb: the package wandb is not installed"):
        start_checks.check_outputs(config)


@pytest.fixture
def copied(tiny_corpus: TinyCorpus, tmp_path: Path) -> Callable[..., RunConfig]:
    shutil.copytree(tiny_corpus.folder, tmp_path / "corpus")
    corpus = TinyCorpus(tmp_path / "corpus", tiny_corpus.vocab_size)
    return lambda **sections: tiny_config(corpus, tmp_path / "run", **sections)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda corpus: os.unlink(corpus / "held_out.idx"), r"held_out\.idx"),
        (lambda corpus: shutil.rmtree(corpus / "tokenizer"), r"tokenizer: no tokenizer folder"),
        (lambda corpus: (corpus / "plans").write_text(""), r"(?=.*data\.plan_dir).*corpus/plans"),
    ],
    ids=["validation", "tokenizer", "plan_dir"],
)
def test_what_is_read_is_opened_before_anything_is_written(
    damage: Prepare, named: str, copied: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = copied()
    damage(tmp_path / "corpus")
    if (tmp_path / "corpus" / "plans").exists():
        arguments = ["--config", str(tmp_path / "run.yaml"), "--run_dir", str(tmp_path / "run")]
        config = parse_args([*arguments, "--data.plan_dir", str(tmp_path / "corpus" / "plans")])
    with pytest.raises((ValueError, OSError), match=named):
        pretrain(config)
    assert not (tmp_path / "run").exists()
