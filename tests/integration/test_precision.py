"""A run under precision auto, and what it leaves behind."""

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import TinyCorpus
from tests.training import train_here


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="compares with what a CPU takes")
def test_a_run_names_the_precision_that_auto_stood_for(
    tiny_corpus: TinyCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_ettin.training import precision

    monkeypatch.setattr(precision, "CPU_INFO", tmp_path / "absent")
    config = tiny_corpus.write_config(tmp_path / "run.yaml", objective="MaskedLM")
    by_name = train_here([f"--config={config}", "--hardware.precision=fp32"], tmp_path / "fp32")
    chosen = [
        f"--config={config}",
        "--hardware.precision=auto",
        "--hardware.deterministic=true",
        "--model.backend=local",
    ]
    assert train_here(chosen, tmp_path / "auto") == by_name
    assert "precision: fp32" in (tmp_path / "auto" / "config.yaml").read_text()
    # Weights are what they are, whoever trained them: on another machine another backend may.
    (folder, *_) = (tmp_path / "auto" / "checkpoints").iterdir()
    assert json.loads((folder / "model.json").read_text())["model"]["backend"] == "auto"
