"""Runs whose objective changes by phase or by row: the switch, a resume, what is saved."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ettin import checkpoint
from megatron_ettin.evaluation.layouts import final_weights
from megatron_ettin.order.ledger import Ledger
from tests.conftest import TinyCorpus
from tests.independent.program import rebuild
from tests.training import RESUME, cut_off, train_here

ENCODER, DECODER, DIFFUSION, SHIFTED = (
    {"class_path": name} for name in ("MaskedLM", "CausalLM", "MaskedDiffusion", "MaskedNextToken")
)
DETOUR = {
    "class_path": "ByPhase",
    "init_args": {"objective": ENCODER, "by_phase": {"short": DECODER}},
}
MIXTURE = {
    "class_path": "Mixture",
    "init_args": {"objectives": [SHIFTED, DECODER, DIFFUSION], "shares": [0.4, 0.4, 0.2]},
}

pytestmark = pytest.mark.slow


def arguments(corpus: TinyCorpus, folder: Path, name: str, objective: Any) -> list[str]:
    sections = {"objective": objective, "checkpoint": {"save_every_tokens": 6_000}}
    return [f"--config={corpus.write_config(folder / f'{name}.yaml', **sections)}"]


@pytest.fixture(scope="module")
def runs(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a detour, a mixture and the decoder whose first phase the detour shares."""
    folder = tmp_path_factory.mktemp("runs")
    for name, objective in (("detour", DETOUR), ("mixture", MIXTURE), ("decoder", DECODER)):
        train_here(arguments(tiny_corpus, folder, name, objective), folder / name)
    return folder


def metrics(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_a_detour_begins_as_the_other_kind_and_ends_as_its_own(runs: Path) -> None:
    ours, decoder = (metrics(runs / name, "train") for name in ("detour", "decoder"))
    first = [line for line in ours if line["phase"] == "short"]
    assert [line["loss"] for line in first] == [line["loss"] for line in decoder[: len(first)]]
    assert ours[-1]["loss"] != decoder[-1]["loss"]
    saved = {
        path.name: checkpoint.read_model(path)
        for path in sorted((runs / "detour" / "checkpoints").iterdir())
    }
    phases = [checkpoint.read_state(runs / "detour" / "checkpoints" / n).phase for n in saved]
    kinds = {"short": "causal", "long": "bidirectional"}
    assert set(phases) == set(kinds)
    assert [model.attention for model in saved.values()] == [kinds[phase] for phase in phases]


@pytest.mark.parametrize("name", ["detour", "mixture"])
@pytest.mark.parametrize("kept", [2, 3])
def test_a_resumed_run_is_bitwise_equal(
    runs: Path, tiny_corpus: TinyCorpus, tmp_path: Path, name: str, kept: int
) -> None:
    """From a checkpoint inside the first phase, or at its end."""
    cut = cut_off(runs / name, tmp_path / name, kept)
    objective = {"detour": DETOUR, "mixture": MIXTURE}[name]
    train_here([*arguments(tiny_corpus, tmp_path, "config", objective), RESUME], cut)
    whole, resumed = (final_weights(folder) for folder in (runs / name, cut))
    assert whole.keys() == resumed.keys()
    for tensor, values in whole.items():
        assert torch.equal(torch.as_tensor(values), torch.as_tensor(resumed[tensor])), tensor
    held_out = [metrics(folder, "validation")[-1]["heldout_loss"] for folder in (runs / name, cut)]
    assert held_out[0] == held_out[1]


@pytest.mark.parametrize("name", ["detour", "mixture"])
def test_the_record_is_rebuilt_and_the_tokens_are_the_decoders(runs: Path, name: str) -> None:
    assert rebuild(runs / name).startswith("PASS")
    ours, decoder = (Ledger.read(runs / run / "ledger").steps for run in (name, "decoder"))
    for field in ("order_digest", "token_digest"):
        assert np.array_equal(ours[field], decoder[field])
    assert not np.array_equal(ours["mask_digest"], decoder["mask_digest"])
