"""A whole study of tiny models: killed, gone on with, complete; then with a fault in one stage."""

import hashlib
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

import pytest
import yaml

from tests.conftest import TinyCorpus
from tests.models import write_random_model

ROOT = Path(__file__).parents[2]
#: In the environment of all processes of a study, so that they are found whatever they are called.
MARK = "STUDY_OF_THIS_TEST"
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

    def start(self, *options: str, mark: str = "") -> subprocess.Popen[str]:
        command = [sys.executable, "tools/study.py", f"--config={self.folder / 'study.yaml'}"]
        return subprocess.Popen(
            [*command, *options],
            cwd=ROOT,
            env={**os.environ, MARK: mark, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *options: str) -> tuple[int, str]:
        process = self.start(*options)
        printed, _ = process.communicate()
        return process.returncode, printed

    def weights(self, output: Path, model: str) -> str:
        content = (output / "models" / model / "model.safetensors").read_bytes()
        return hashlib.sha256(content).hexdigest()


@pytest.fixture
def study(tiny_corpus: TinyCorpus, tmp_path: Path) -> WrittenStudy:
    """Write three arms, a published model, a task that suits all and one that does not."""
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

    tasks = {"pairs": task("auto"), "fills": task("pseudo_log_likelihood")}
    (tmp_path / "evaluation.yaml").write_text(yaml.safe_dump({"tasks": tasks}))
    document = {
        "output": str(tmp_path / "study"),
        "sizes": {
            "tiny": {"run": [str(tmp_path / "run.yaml")], "cross": [str(tmp_path / "cross.yaml")]}
        },
        "arms": {
            "encoder": {"objective": "examples/objective/mlm.yaml"},
            "decoder": {"objective": "examples/objective/clm.yaml"},
            "crossed": {"objective": "examples/objective/mntp.yaml", "starts_from": "decoder"},
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


def kill_in_training(study: WrittenStudy) -> None:
    mark = uuid.uuid4().hex
    process = study.start(mark=mark)
    deadline = time.monotonic() + START_SECONDS
    try:
        while not list(study.output.glob("runs/tiny/encoder/seed_0/checkpoints/step_*/state.json")):
            assert process.poll() is None, "the study ended before its first checkpoint"
            assert time.monotonic() < deadline, "the training never saved"
            time.sleep(0.05)
    finally:
        process.kill()
        process.communicate()
    time.sleep(1.0)
    assert alive(mark) == []


@pytest.mark.slow
def test_whole_path(study: WrittenStudy) -> None:
    kill_in_training(study)
    code, printed = study.run()
    assert code == 0, printed
    assert "evaluate/tiny-decoder-seed_0/fills/seed_0: refused" in printed
    check_content(study)
    other = study.folder / "other"
    only = ("train/tiny/encoder/*", "export/tiny-encoder-*")
    code, printed = study.run(f"--output={other}", "--only", *only)
    assert code == 0, printed
    assert study.weights(study.output, "tiny-encoder-seed_0") == study.weights(
        other, "tiny-encoder-seed_0"
    ), "a run that was killed and went on has other weights"
    check_fault_in_one_stage(study)


def check_content(study: WrittenStudy) -> None:
    groups = json.loads((study.output / "proof.json").read_text())["groups"]
    assert [(group["stage"], group["verdict"]) for group in groups] == [
        ("cross", "PASS"),
        ("train", "PASS"),
    ]
    assert len(groups[1]["proofs"]) == 1
    assert groups[1]["proofs"][0]["runs"][0]["tokens"] > 24_000 * 0.9
    models = ("tiny-encoder-seed_0", "tiny-decoder-seed_0", "tiny-crossed-seed_0", "tiny-published")
    for model in models:
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


def check_fault_in_one_stage(study: WrittenStudy) -> None:
    """Damage the decoder's last checkpoint and remove its export: the others stay done."""
    (checkpoints,) = study.output.glob("runs/tiny/decoder/seed_0/checkpoints")
    newest = sorted(checkpoints.glob("step_*"))[-1]
    shard = next(newest.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    for path in (study.output / "models" / "tiny-decoder-seed_0").iterdir():
        path.unlink()
    (study.output / "models" / "tiny-decoder-seed_0").rmdir()
    code, printed = study.run()
    assert code == 1
    lines = printed.splitlines()
    failed = [line for line in lines if line.startswith("failed: ")]
    assert len(failed) == 1
    assert failed[0].startswith(f"failed: export/tiny-decoder-seed_0: {shard}: ")
    skipped = [line.split(": ")[1] for line in lines if line.startswith("skipped: ")]
    assert skipped == [f"evaluate/tiny-decoder-seed_0/{task}/seed_0" for task in ("fills", "pairs")]


@pytest.mark.slow
def test_missing_data_is_named_before_anything_runs(study: WrittenStudy) -> None:
    (study.folder / "pairs" / "order.jsonl").write_text('{"sentence_good": "a"}\n')
    code, printed = study.run()
    assert code == 1
    assert "error: task fills: " in printed
    assert "order.jsonl:1: " in printed
    assert not study.output.exists()


@pytest.mark.slow
def test_a_published_model_without_tokenizer_is_named(study: WrittenStudy) -> None:
    (study.folder / "random" / "tokenizer.json").unlink()
    code, printed = study.run("--plan")
    assert code == 1
    assert f"{study.folder / 'random'}: no tokenizer" in printed
