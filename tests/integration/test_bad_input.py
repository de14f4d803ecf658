"""Bad input on two ranks: one clear message, a non-zero exit, no hang, nothing half-written."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import TinyCorpus
from tests.ranks import run_job
from tests.training import train_here

#: Far above what a failing start takes, far below the collectives' timeout.
SECONDS = 240


def fail(config: Path, *overrides: str) -> list[str]:
    """Run on two ranks as torchrun would, expect a failure, and return the error lines."""
    code, output = run_job(
        [f"--config={config}", *overrides], ranks=2, logs=config.parent, deadline_seconds=SECONDS
    )
    return error_lines(code, output)


def fail_under_torchrun(config: Path, *overrides: str) -> list[str]:
    """Run under torchrun itself, expect a failure, and return the error lines."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "-m", "megatron_ettin.pretrain"),
            f"--config={config}",
            *overrides,
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    return error_lines(done.returncode, done.stderr)


def error_lines(code: int, output: str) -> list[str]:
    assert code != 0
    lines = output.splitlines()
    assert not any(line.startswith("[rank") for line in lines), output
    return [line for line in lines if line.startswith("error: ")]


@pytest.fixture
def run(tiny_corpus: TinyCorpus, tmp_path: Path) -> Any:
    """Return a run's YAML sections over a copy of the corpus that a test may damage."""
    shutil.copytree(tiny_corpus.folder, tmp_path / "corpus")
    copy = TinyCorpus(tmp_path / "corpus", tiny_corpus.vocab_size)
    path = copy.write_config(
        tmp_path / "run.yaml", objective="CausalLM", run_dir=str(tmp_path / "run")
    )
    return copy, path


@pytest.mark.parametrize(
    ("start", "override", "named"),
    [
        (fail_under_torchrun, "--model.hiden_size=3", "hiden_size"),
        (fail, "--hardware.tensor_parallel_size=4", "hardware.tensor_parallel_size: 4"),
    ],
)
def test_a_configuration_error(
    run: Any, start: Callable[..., list[str]], override: str, named: str, tmp_path: Path
) -> None:
    (message,) = start(run[1], override)
    assert named in message
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_missing_corpus(run: Any, tmp_path: Path) -> None:
    corpus, config = run
    (corpus.folder / "beta.idx").unlink()
    (message,) = fail(config)
    assert "beta.idx" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_truncated_bin(run: Any, tmp_path: Path) -> None:
    corpus, config = run
    content = (corpus.folder / "alpha.bin").read_bytes()
    (corpus.folder / "alpha.bin").write_bytes(content[:-10])
    (message,) = fail(config)
    assert "alpha.bin" in message
    assert str(len(content) - 10) in message
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_corpus_of_another_tokenizer(run: Any, tmp_path: Path) -> None:
    """The id shows up only when the row that holds it is assembled, on whichever rank that is."""
    corpus, config = run
    content = bytearray((corpus.folder / "alpha.bin").read_bytes())
    for at in range(0, len(content) // 2, 100):
        content[2 * at : 2 * at + 2] = (60_000).to_bytes(2, "little")
    (corpus.folder / "alpha.bin").write_bytes(content)
    message = fail(config)[0]
    assert "alpha.bin: document" in message
    assert "60000" in message
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_a_configuration_that_differs_between_ranks(run: Any, tmp_path: Path) -> None:
    """A file is edited while a run starts; ranks would silently train different models."""
    (message,) = fail(run[1], "--optimizer.lr=0.00{RANK}1")
    assert message.startswith("error: the configuration differs between rank 0 and ranks [1]")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_world_that_does_not_fit_the_layout(run: Any) -> None:
    (message,) = fail(run[1], "--hardware.pipeline_parallel_size=3")
    assert "start a multiple of 3" in message


@pytest.mark.slow
def test_a_checkpoint_of_another_architecture(run: Any, tmp_path: Path) -> None:
    _, config = run
    phases = [{"name": "short", "train_tokens": 500, "seq_length": 128, "global_batch_size": 2}]
    first = yaml.safe_load(config.read_text()) | {"phases": phases}
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(first))
    train_here([f"--config={tmp_path / 'first.yaml'}"], tmp_path / "first")
    (saved,) = (tmp_path / "first" / "checkpoints").iterdir()
    (message,) = fail(
        config, f"--checkpoint.initialize_from={saved}", "--model.ffn_hidden_size=128"
    )
    assert str(saved) in message
    assert "ffn_hidden_size 96 (here 128)" in message
