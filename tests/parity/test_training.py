"""Training here against plain PyTorch on transformers' module: 50 steps, and the first gradients.

Both sides start from the same weights and see the same batches. Ours is the real loop; the other
is plain_training.py. transformers has no dropout of the attention output, so it is off here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ettin import distributed
from megatron_ettin.config import ModelConfig, RunConfig, parse_args
from megatron_ettin.data.loader import Loader
from megatron_ettin.data.orders import open_order
from megatron_ettin.evaluation.layouts import read_curve
from megatron_ettin.export.huggingface import from_huggingface
from megatron_ettin.model import weight_map
from megatron_ettin.model.provider import logical_parameters
from megatron_ettin.objectives import Batch
from megatron_ettin.training import set_up
from megatron_ettin.training.loop import train
from tests.conftest import TinyCorpus
from tests.parity import plain_training
from tests.parity.plain_training import PlainRun
from tests.parity.references import KINDS, make_reference

OBJECTIVES = {"encoder": "MaskedLM", "decoder": "CausalLM"}
#: Relative, each step. Measured: 2e-7, which is what float32 costs transformers itself.
LOSS_TOLERANCE = 1e-6
#: Relative L2 of each tensor after 50 steps. Measured: 1e-7; float32 costs transformers 4e-7.
WEIGHT_TOLERANCE = 2e-6
#: Relative L2 of each tensor. Measured: 1e-6, which is what float32 costs transformers itself.
GRADIENT_TOLERANCE = 1e-5
STEPS, ROWS, ROW_LENGTH = 50, 8, 128
LOCAL_ATTENTION = {"encoder": 32, "decoder": 34}

pytestmark = pytest.mark.slow
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Ours:
    """State of a run here after its last step, by Megatron-Core's names."""

    model: ModelConfig
    losses: list[float]
    weights: Tensors
    gradients: Tensors
    """Of the last step, as the optimizer was given them."""


@dataclass(frozen=True)
class Both:
    """The two sides of one kind, and the other side once more in float64."""

    kind: str
    first_step: Ours
    ours: Ours
    theirs: PlainRun
    their_weights: Tensors
    exact: PlainRun
    exact_weights: Tensors


@pytest.fixture(scope="module", params=KINDS)
def both(
    request: pytest.FixtureRequest,
    tiny_corpus: TinyCorpus,
    tmp_path_factory: pytest.TempPathFactory,
) -> Both:
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    model = make_model(kind, tiny_corpus.vocab_size)
    model.save_pretrained(folder / "hf")
    from_huggingface(folder / "hf", folder / "start")
    configs = [
        run_config(kind, tiny_corpus, folder, name=f"{steps}-steps", steps=steps)
        for steps in (1, STEPS)
    ]
    exact_model = make_model(kind, tiny_corpus.vocab_size).double()
    return Both(
        kind,
        *[train_here(config) for config in configs],
        theirs=plain_training.train(model, batches(configs[1])),
        their_weights=dict(model.named_parameters()),
        exact=plain_training.train(exact_model, batches(configs[1])),
        exact_weights=dict(exact_model.named_parameters()),
    )


def make_model(kind: str, vocab_size: int) -> Any:
    shape = {
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 2,
        "vocab_size": vocab_size,
    }
    model = make_reference(kind, shape, local_attention=LOCAL_ATTENTION[kind]).train()
    # With a padding id, transformers gives its row no gradient from the input, and a mask's random
    # token may be it.
    model.get_input_embeddings().padding_idx = None
    return model


def run_config(kind: str, corpus: TinyCorpus, folder: Path, *, name: str, steps: int) -> RunConfig:
    phase = {
        "name": "short",
        "train_tokens": plain_training.TRAIN_TOKENS,
        "train_rows": steps * ROWS,
        "seq_length": ROW_LENGTH,
        "global_batch_size": ROWS,
        "lr_end": plain_training.LR_END,
        "rotary_base_global": 160_000.0,
    }
    data = {**corpus.data, "validation": []}
    data |= {field: {"short": data[field]["short"]} for field in ("blend", "pools")}
    path = corpus.write_config(
        folder / f"{name}.yaml",
        objective=OBJECTIVES[kind],
        model={
            "num_layers": 4,
            "hidden_size": 64,
            "ffn_hidden_size": 96,
            "num_attention_heads": 2,
            "vocab_size": corpus.vocab_size,
            "sliding_window": 16,
            "attention_output_dropout": 0.0,
        },
        optimizer={
            "lr": plain_training.PEAK,
            "weight_decay": plain_training.WEIGHT_DECAY,
            "warmup_tokens": plain_training.WARMUP_TOKENS,
        },
        phases=[phase],
        data=data,
        checkpoint={"initialize_from": str(folder / "start")},
    )
    return parse_args(["--config", str(path), "--run_dir", str(folder / name)])


def train_here(config: RunConfig) -> Ours:
    with warnings.catch_warnings(), distributed.process_groups(config.hardware):
        # Megatron-Core and torch warn of each other.
        warnings.simplefilter("ignore")
        order = open_order(config)
        state = set_up.starting_state(config, order)
        run = set_up.build_training(config, order, state)
        state = set_up.restore(run, state)
        with run.reporter:
            train(run, state)
        named: list[tuple[str, Any]] = logical_parameters(run.stage)
        return Ours(
            model=config.model,
            losses=read_curve(Path(config.run_dir)).losses,
            weights={name: p.detach().clone() for name, p in named},
            gradients={name: p.main_grad.clone() for name, p in named},
        )


def batches(config: RunConfig) -> Iterator[list[Batch]]:
    """Yield the micro-batches of each step."""
    order = open_order(config)
    loader = Loader.of_run(config, order)
    for step in range(STEPS):
        yield list(loader.micro_batches(step * ROWS, (step + 1) * ROWS))


def in_transformers_names(tensors: Tensors, model: ModelConfig, kind: str) -> Tensors:
    found = {}
    for name, tensor in tensors.items():
        entry = weight_map.entries(model.num_layers)[name]
        names = weight_map.huggingface_names(entry, kind)  # type: ignore[arg-type]
        whole = weight_map.to_huggingface(entry, tensor, model)
        found.update(zip(names, whole.chunk(len(names)), strict=True))
    return found


def largest_distance(found: Tensors, expected: Tensors) -> tuple[float, str]:
    """Return the largest relative L2 distance of a tensor, and its name."""
    assert found.keys() == expected.keys()
    return max((distance(found[name], expected[name]), name) for name in expected)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def largest_loss_difference(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / b for a, b in zip(found, expected, strict=True))


def test_losses_and_weights_of_50_steps(
    both: Both, record_property: Callable[[str, object], None]
) -> None:
    assert len(both.theirs.losses) == STEPS
    loss = largest_loss_difference(both.ours.losses, both.theirs.losses)
    weights = in_transformers_names(both.ours.weights, both.ours.model, both.kind)
    weight, name = largest_distance(weights, both.their_weights)
    loss_noise = largest_loss_difference(both.theirs.losses, both.exact.losses)
    weight_noise, noisy = largest_distance(both.their_weights, both.exact_weights)
    record_property("losses", f"{both.ours.losses[0]:.3f} ... {both.ours.losses[-1]:.3f}")
    record_property("losses apart", f"{loss:.1e}")
    record_property("losses, transformers float32 to float64", f"{loss_noise:.1e}")
    record_property("weights apart", f"{weight:.1e} in {name}")
    record_property("weights, transformers float32 to float64", f"{weight_noise:.1e} in {noisy}")
    assert loss <= LOSS_TOLERANCE
    assert weight <= WEIGHT_TOLERANCE
    # The weights have moved further than that.
    start = dict(make_model(both.kind, both.ours.model.vocab_size).named_parameters())
    assert largest_distance(start, both.their_weights)[0] > 1e4 * WEIGHT_TOLERANCE


def test_gradients_of_the_first_step(
    both: Both, record_property: Callable[[str, object], None]
) -> None:
    gradients = in_transformers_names(both.first_step.gradients, both.ours.model, both.kind)
    found, name = largest_distance(gradients, both.theirs.gradients)
    noise, noisy = largest_distance(both.theirs.gradients, both.exact.gradients)
    record_property("gradients apart", f"{found:.1e} in {name}")
    record_property("gradients, transformers float32 to float64", f"{noise:.1e} in {noisy}")
    assert found <= GRADIENT_TOLERANCE


def test_gradients_of_q_k_and_v_by_head(both: Both) -> None:
    """Without the name map: head n of q, k, v is rows (3 n + 0, 1, 2) * head size here."""
    model = both.ours.model
    size = model.head_size
    for layer in range(model.num_layers):
        ours = both.first_step.gradients[f"decoder.layers.{layer}.self_attention.linear_qkv.weight"]
        for part, x in enumerate("qkv"):
            if both.kind == "encoder":
                rows = both.theirs.gradients[f"model.layers.{layer}.attn.Wqkv.weight"]
                rows = rows[part * model.hidden_size : (part + 1) * model.hidden_size]
            else:
                rows = both.theirs.gradients[f"model.layers.{layer}.attn.{x}_proj.weight"]
            for head in range(model.num_attention_heads):
                first = (3 * head + part) * size
                found, expected = ours[first : first + size], rows[head * size : (head + 1) * size]
                assert distance(found, expected) <= GRADIENT_TOLERANCE
