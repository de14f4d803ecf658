"""Fixtures of the tests on a GPU: a run of twenty steps, and processes that see no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TinyCorpus
from tests.ranks import ROOT

BACKENDS = ("local", "transformer_engine")
#: 2,048 slots a step, in two micro-batches.
PHASE = {"name": "short", "train_tokens": 40_000, "seq_length": 128, "global_batch_size": 16}


@pytest.fixture(scope="session")
def twenty_steps(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the configuration of a run of twenty steps with a checkpoint after about ten."""
    return tiny_corpus.write_config(
        tmp_path_factory.mktemp("twenty") / "run.yaml",
        phases=[PHASE],
        hardware={"micro_batch_tokens": 1024, "threads_per_rank": 1},
        checkpoint={"save_every_tokens": 22_000},
    )


def run_without_gpu(module: str, *arguments: str) -> None:
    """Run a module to its end in a process that sees no GPU: there our code takes the CPU."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def skip_without(backend: str) -> None:
    """Skip the test where a backend is not installed."""
    if backend == "transformer_engine":
        pytest.importorskip("transformer_engine.pytorch")
