"""A whole study of tiny models: killed twice, gone on with, complete; then with a fault."""

import json
import os
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_ettin.evaluation.model import open_model
from megatron_ettin.evaluation.results import ResultStore, result_key
from megatron_ettin.evaluation.task_file import read_tasks
from megatron_ettin.export.huggingface import to_huggingface
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.study.command_line import ENVIRONMENT, parse, study_command
from tests.conftest import TinyCorpus
from tests.labelled_texts import write_reviews
from tests.models import write_random_model
from tests.ranks import run_job

ROOT = Path(__file__).parents[2]
#: In the environment of all processes of a study, so that they are found whatever they are called.
MARK = "STUDY_OF_THIS_TEST"
#: Tasks of the study, in order.
TASKS = ("fills", "pairs", "reviews")
#: Far above what a start takes here, even on a busy machine.
START_SECONDS = 600
CROSSING = {
    "name": "long",
    "train_tokens": 6_000,
    "seq_length": 256,
    "global_batch_size": 8,
    "lr_end": 0.02,
    "rotary_base_global": 160_000.0,
}


@dataclass(frozen=True)
class WrittenStudy:
    folder: Path

    @property
    def output(self) -> Path:
        return self.folder / "study"

    @property
    def argument(self) -> str:
        return f"--config={self.folder / 'study.yaml'}"

    def launch_without_torchrun(self) -> None:
        """Have trainings start as single processes from now on: torchrun imports for seconds."""
        path = self.folder / "study.yaml"
        document = {**yaml.safe_load(path.read_text()), "launch": [sys.executable]}
        path.write_text(yaml.safe_dump(document, sort_keys=False))

    def start(self, *options: str, mark: str) -> subprocess.Popen[str]:
        """Start the study as a user does."""
        return subprocess.Popen(
            [sys.executable, "tools/study.py", self.argument, *options],
            cwd=ROOT,
            env={**os.environ, MARK: mark, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
        """Run the study's own process here, where all is imported; return code and output."""
        capfd.readouterr()
        code = study_command(parse([self.argument]))
        return code, capfd.readouterr().out


@pytest.fixture
def study(tiny_corpus: TinyCorpus, tmp_path: Path) -> WrittenStudy:
    """Write four arms, a published model, tasks that suit all and one that does not."""
    corpus = tiny_corpus.copy_to(tmp_path / "corpus")
    validation = {"num_rows": 8, "seq_length": 128, "every_tokens": 10_000}
    corpus.write_config(tmp_path / "run.yaml", validation=validation)
    corpus.write_config(tmp_path / "cross.yaml", validation=validation, phases=[CROSSING])
    write_random_model(tmp_path / "random", "encoder", corpus.folder / "tokenizer")
    (tmp_path / "pairs").mkdir()
    pairs = [{"sentence_good": f"ab cd {n}", "sentence_bad": f"cd {n} ab"} for n in range(6)]
    (tmp_path / "pairs" / "order.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n")

    def task(rule: str) -> dict[str, Any]:
        init = {"folder": str(tmp_path / "pairs"), "rule": rule}
        name = "megatron_ettin.evaluation.tasks.minimal_pairs.MinimalPairs"
        return {"class_path": name, "init_args": init}

    write_reviews(tmp_path / "reviews", {"train": 64, "validation": 32})
    reviews = {
        "class_path": "FineTuning",
        "init_args": {
            "data": {"path": str(tmp_path / "reviews")},
            "learning_rates": [1e-4, 1e-3],
            "weight_decays": [1e-5],
            "num_epochs": [1],
        },
    }
    tasks = {"fills": task("pseudo_log_likelihood"), "pairs": task("auto"), "reviews": reviews}
    (tmp_path / "evaluation.yaml").write_text(yaml.safe_dump({"tasks": tasks}))
    encoder, decoder = {"class_path": "MaskedLM"}, {"class_path": "CausalLM"}
    parts = {"objective": encoder, "by_phase": {"short": decoder}}
    detour = {"objective": {"class_path": "ByPhase", "init_args": parts}}
    (tmp_path / "detour.yaml").write_text(yaml.safe_dump(detour))
    document = {
        "output": str(tmp_path / "study"),
        "sizes": {
            "tiny": {"run": [str(tmp_path / "run.yaml")], "cross": [str(tmp_path / "cross.yaml")]}
        },
        "arms": {
            "detour": {"objective": str(tmp_path / "detour.yaml")},
            "decoder": {"objective": "examples/objective/clm.yaml"},
            "crossed": {"objective": "examples/objective/mntp.yaml", "starts_from": "decoder"},
            "diffusion": {"objective": "examples/objective/diffusion.yaml"},
            "published": {"published": {"tiny": str(tmp_path / "random")}},
        },
        "train_tokens": 24_000,
        "checkpoints": 3,
        "evaluation": str(tmp_path / "evaluation.yaml"),
        "series": ["pairs"],
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    return WrittenStudy(tmp_path)


def alive(mark: str) -> list[str]:
    """Return the command lines of the processes with a mark."""
    found = []
    for folder in Path("/proc").iterdir():
        with suppress(OSError):
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


def kill_when(study: WrittenStudy, appears: str, *stages: str) -> None:
    """Start stages of the study, and kill it once a file is there; no process may be left."""
    mark = uuid.uuid4().hex
    process = study.start("--only", *stages, mark=mark)
    deadline = time.monotonic() + START_SECONDS
    try:
        while not list(study.output.glob(appears)):
            assert process.poll() is None, f"the study ended without {appears}"
            assert time.monotonic() < deadline, f"{appears} never came"
            time.sleep(0.05)
    finally:
        process.kill()
        process.communicate()
    time.sleep(1.0)
    assert alive(mark) == []


@pytest.mark.slow
def test_whole_path(
    study: WrittenStudy, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A study sets the first two for the processes that it starts.
    for name, value in {**ENVIRONMENT, "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    # The stages that these two do not choose would only be planned, which times their models.
    training, evaluation = "train/tiny/detour/*", "evaluate/tiny-detour-*/reviews/*"
    kill_when(study, "runs/tiny/detour/seed_0/checkpoints/step_*/state.json", training)
    study.launch_without_torchrun()
    trial = "results/tiny-detour-seed_0/reviews/*/trial_0.json"
    kill_when(study, trial, training, "export/tiny-detour-*", evaluation)
    code, printed = study.run(capfd)
    assert code == 0, printed
    assert "evaluate/tiny-decoder-seed_0/fills/seed_0: refused" in printed
    check_content(study)
    check_killed_training(study)
    check_killed_evaluation(study)
    check_fault_in_one_stage(study, capfd)


def check_killed_training(study: WrittenStudy) -> None:
    """Compare the weights with those of the same run in one piece."""
    killed = RunFolder(study.output / "runs" / "tiny" / "detour" / "seed_0")
    whole = RunFolder(study.folder / "whole")
    arguments = [
        f"--config={killed.config}",
        f"--run_dir={whole.path}",
        "--checkpoint.resume=false",
    ]
    code, printed = run_job(arguments, ranks=1, logs=study.folder, deadline_seconds=300.0)
    assert code == 0, printed
    newest = whole.newest_checkpoint()
    assert newest is not None
    to_huggingface(newest, study.folder / "exported")
    found = study.output / "models" / "tiny-detour-seed_0" / "model.safetensors"
    expected = study.folder / "exported" / "model.safetensors"
    assert found.read_bytes() == expected.read_bytes()


def check_killed_evaluation(study: WrittenStudy) -> None:
    """Compare the result with that of a measurement in one piece."""
    model = open_model(str(study.output / "models" / "tiny-detour-seed_0"))
    task = read_tasks(study.folder / "evaluation.yaml")["reviews"]
    expected = task.measure(model, seed=0, scratch=study.folder)
    store = ResultStore(study.output / "results")
    found = store.read(model.name, "reviews", 0, result_key(model, task, 0))
    assert found is not None
    assert found.notes["trials"] == expected.notes["trials"]
    for name, score in expected.scores.items():
        np.testing.assert_array_equal(found.scores[name].predictions, score.predictions)


def check_content(study: WrittenStudy) -> None:
    groups = json.loads((study.output / "proof.json").read_text())["groups"]
    assert [(group["stage"], group["verdict"]) for group in groups] == [
        ("cross", "PASS"),
        ("train", "PASS"),
    ]
    assert len(groups[1]["proofs"]) == 2
    assert groups[1]["proofs"][0]["runs"][0]["tokens"] > 24_000 * 0.9
    trained = [f"tiny-{arm}-seed_0" for arm in ("detour", "decoder", "crossed", "diffusion")]
    for model in (*trained, "tiny-published"):
        result = json.loads(
            (study.output / "results" / model / "pairs" / "seed_0.json").read_text()
        )
        assert result["model"] == model
    series = json.loads((study.output / "series" / "tiny-decoder-seed_0.json").read_text())
    assert [entry["tokens"] for entry in series] == sorted(entry["tokens"] for entry in series)
    assert len(series) >= 3
    for entry in series:
        path = study.output / "series" / entry["model"] / "pairs" / "seed_0.json"
        assert json.loads(path.read_text())["model"] == entry["model"]
    assert not list(study.output.glob("series/*.exported"))


def check_fault_in_one_stage(study: WrittenStudy, capfd: pytest.CaptureFixture[str]) -> None:
    """Damage the decoder's last checkpoint and remove its export: the others stay done."""
    (checkpoints,) = study.output.glob("runs/tiny/decoder/seed_0/checkpoints")
    newest = sorted(checkpoints.glob("step_*"))[-1]
    shard = next(newest.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    for path in (study.output / "models" / "tiny-decoder-seed_0").iterdir():
        path.unlink()
    (study.output / "models" / "tiny-decoder-seed_0").rmdir()
    code, printed = study.run(capfd)
    assert code == 1
    lines = printed.splitlines()
    failed = [line for line in lines if line.startswith("failed: ")]
    assert len(failed) == 1
    assert failed[0].startswith(f"failed: export/tiny-decoder-seed_0: {shard}: ")
    skipped = [line.split(": ")[1] for line in lines if line.startswith("skipped: ")]
    assert skipped == [f"evaluate/tiny-decoder-seed_0/{task}/seed_0" for task in TASKS]


def test_missing_data_is_named_before_anything_runs(study: WrittenStudy) -> None:
    (study.folder / "pairs" / "order.jsonl").write_text('{"sentence_good": "a"}\n')
    with pytest.raises(ValueError, match=r"task fills: .*order\.jsonl:1: "):
        study_command(parse([study.argument]))
    assert not study.output.exists()


def test_a_published_model_without_tokenizer_is_named(study: WrittenStudy) -> None:
    (study.folder / "random" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=f"{study.folder / 'random'}: no tokenizer"):
        study_command(parse([study.argument, "--plan"]))
