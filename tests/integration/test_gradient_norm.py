"""The norm of gradients in metrics.jsonl: Megatron-Core's own, under every kind of layout."""

import json
from pathlib import Path

import pytest

from megatron_ettin.evaluation.layouts import LAYOUTS
from tests.conftest import TinyCorpus
from tests.ranks import run_layouts
from tests.training import train_here


def norms(run_dir: Path) -> list[float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["grad_norm"] for line in lines if line["kind"] == "train"]


@pytest.mark.slow
def test_the_norm_is_that_of_clipping_and_of_every_layout(
    tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    phase = {"name": "short", "train_tokens": 6_000, "seq_length": 128, "global_batch_size": 16}
    data = {**tiny_corpus.data, "validation": []}
    config = tiny_corpus.write_config(
        tmp_path / "run.yaml", objective="MaskedLM", phases=[phase], data=data
    )
    train_here([f"--config={config}"], tmp_path / "plain")
    expected = norms(tmp_path / "plain")
    assert len(expected) >= 3
    assert all(norm > 0.0 for norm in expected)
    # A limit that clips nothing: Megatron-Core takes the norm before each update.
    train_here([f"--config={config}", "--optimizer.clip_grad=1e9"], tmp_path / "unclipped")
    assert norms(tmp_path / "unclipped") == expected
    # One that clips: the first norm is that before clipping.
    train_here([f"--config={config}", "--optimizer.clip_grad=1e-3"], tmp_path / "clipped")
    assert norms(tmp_path / "clipped")[0] == expected[0]
    layouts = ("tp2", "pp2", "dp2_unsharded", "cp2")
    arguments = [f"--config={config}", "--logging.log_every_steps=1"]
    jobs = [(LAYOUTS[name], [*arguments, f"--run_dir={tmp_path / name}"]) for name in layouts]
    run_layouts(jobs, ranks=2, folder=tmp_path)
    for name in layouts:
        assert norms(tmp_path / name) == pytest.approx(expected, rel=1e-4), name
