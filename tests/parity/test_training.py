"""Training here against plain PyTorch on transformers' module: 50 steps, and the first gradients.

Both sides start from the same weights and see the same batches. Ours is the real loop; the other
is plain_training.py. transformers has no dropout of the attention output, so it is off here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from megatron_ettin.config import ModelConfig
from megatron_ettin.export.huggingface import from_huggingface
from megatron_ettin.model import weight_map
from tests.conftest import TinyCorpus
from tests.parity import plain_training
from tests.parity.paired_runs import Ours, Tensors, batches, make_model, run_config, train_here
from tests.parity.plain_training import PlainRun
from tests.parity.references import KINDS

OBJECTIVES = {"encoder": "MaskedLM", "decoder": "CausalLM"}
#: Relative, each step. Measured: 2e-7, which is what float32 costs transformers itself.
LOSS_TOLERANCE = 1e-6
#: Relative L2 of each tensor after 50 steps. Measured: 1e-7; float32 costs transformers 4e-7.
WEIGHT_TOLERANCE = 2e-6
#: Relative L2 of each tensor. Measured: 1e-6, which is what float32 costs transformers itself.
GRADIENT_TOLERANCE = 1e-5
STEPS = 50

pytestmark = pytest.mark.slow


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
        run_config(
            tiny_corpus,
            folder,
            name=f"{steps}-steps",
            objective=OBJECTIVES[kind],
            steps=[steps],
        )
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
