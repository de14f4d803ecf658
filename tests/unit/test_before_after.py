"""Held-out losses token by token against transformers, and the page before and after training."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from megatron_ettin.data.loader import Loader
from megatron_ettin.data.orders import open_held_out_order
from megatron_ettin.evaluation.before_after import as_text
from megatron_ettin.evaluation.before_after import measure as measure_change
from megatron_ettin.evaluation.held_out import TokenLosses, token_losses
from megatron_ettin.export.huggingface import from_huggingface
from megatron_ettin.order.run_folder import RunFolder
from tests.conftest import TinyCorpus
from tests.models import Kind, write_random_model
from tests.runs import tiny_config
from tests.training import train_here
from tools.before_after import main

CLASSES = {
    "encoder": ("MaskedLM", AutoModelForMaskedLM),
    "decoder": ("CausalLM", AutoModelForCausalLM),
}


def test_ranges_and_errors_are_those_of_a_loop() -> None:
    chance = np.random.default_rng(3)
    losses = TokenLosses(
        rows=np.sort(chance.integers(0, 5, 400)),
        positions=chance.integers(0, 300, 400),
        losses=chance.random(400),
    )
    assert list(losses.ranges()) == [(0, 64), (64, 128), (128, 256), (256, 512)]
    part = losses.between(64, 128)
    pairs = zip(losses.positions, losses.losses, strict=True)
    assert part.mean().loss == pytest.approx(np.mean([x for p, x in pairs if 64 <= p < 128]))
    shifted = TokenLosses(rows=losses.rows, positions=losses.positions, losses=losses.losses - 0.25)
    change = shifted.minus(losses)
    assert change.loss == pytest.approx(-0.25)
    assert change.standard_error == pytest.approx(0.0, abs=1e-12), "rows are paired"
    assert losses.mean().standard_error > 0.01


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_losses_are_those_of_transformers(
    kind: Kind, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    objective, loader_class = CLASSES[kind]
    start = write_random_model(tmp_path / "hf", kind, tiny_corpus.folder / "tokenizer")
    from_huggingface(start, tmp_path / "start")
    config = tiny_config(tiny_corpus, tmp_path / "run", objective=objective)
    corpus = config.data.validation[0]
    found = token_losses(tmp_path / "start", config, corpus, num_rows=8, seq_length=128)
    model = loader_class.from_pretrained(start, attn_implementation="eager").eval()
    expected = []
    # The run's own held-out rows are the same 8 rows of 128 slots.
    for batch in Loader.of_run(config, open_held_out_order(config)).micro_batches(0, 8):
        ends = np.unique(batch.rows.cu_seqlens).tolist()
        for begin, end in pairwise(ends):
            with torch.inference_mode():
                logits = model(torch.from_numpy(batch.tokens[begin:end])[None]).logits[0]
            for place in np.flatnonzero(batch.loss_mask[begin:end]):
                probabilities = logits[place].double().log_softmax(-1)
                label = batch.labels[begin + place]
                expected.append((begin // 128, place, -float(probabilities[label])))
    rows, positions, losses = zip(*expected, strict=True)
    assert len(rows) > 50
    assert found.positions.tolist() == list(positions)
    np.testing.assert_allclose(found.losses, losses, rtol=0, atol=1e-4)


def test_the_page_has_the_losses_of_the_run(
    tiny_corpus: TinyCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = write_random_model(tmp_path / "hf", "encoder", tiny_corpus.folder / "tokenizer")
    from_huggingface(start, tmp_path / "start")
    phase = {"train_tokens": 4000, "seq_length": 128, "global_batch_size": 8}
    path = tiny_corpus.write_config(
        tmp_path / "run.yaml", objective="MaskedLM", phases=[{"name": "short", **phase}]
    )
    sections = (tmp_path / "start/config.yaml").read_text()
    model = tmp_path / "model.yaml"
    model.write_text("model:" + sections.partition("model:")[2].partition("hardware:")[0])
    train_here(
        [
            *("--config", str(path), "--config", str(model)),
            f"--checkpoint.initialize_from={tmp_path / 'start'}",
            # The ids are the same, but a conversion writes tokenizer.json anew.
            "--data.allow_other_tokenizers=true",
        ],
        tmp_path / "run",
    )
    lines = RunFolder(tmp_path / "run").read_metrics()
    last = [line["heldout_loss"] for line in lines if line["kind"] == "validation"][-1]
    main(["--run", str(tmp_path / "run"), "--output", str(tmp_path / "page")])
    found = json.loads((tmp_path / "page/before_after.json").read_text())["held_out"]
    assert found[0]["corpus"] == "held_out"
    assert found[0]["after"] == pytest.approx(last, abs=1e-5)
    assert found[0]["after"] < found[0]["before"] - 0.5
    assert [line["begin"] for line in found[1:]] == [0, 64]
    assert sum(line["tokens"] for line in found[1:]) == found[0]["tokens"]
    page = (tmp_path / "page/before_after.html").read_text()
    assert f"{found[0]['after']:.3f}" in page
    assert f"{found[0]['after']:.3f}" in capsys.readouterr().out
    assert "<svg" not in page, "figures are data URLs, so that the page is one file"
    same = measure_change(
        tmp_path / "run", before=next((tmp_path / "run/checkpoints").glob("step_*"))
    )
    assert "+0.000 ± 0.000" in as_text(same)


def test_a_run_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no checkpoint; give the run_dir"):
        main(["--run", str(tmp_path), "--output", str(tmp_path / "page")])
