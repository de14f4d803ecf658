"""Rates of a model on this machine: tokens a second, of random weights in its shape.

No GPU has run its code for GPUs yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from megatron_ettin.evaluation.model import Model

#: Texts of a batch, and tokens of a text: between short reviews and the documents of retrieval.
BATCH, LENGTH = 16, 128
#: Shortest time of a measurement.
SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Tokens a second."""

    forward: float
    """Rate of forward passes."""
    training: float
    """Rate of forward and backward passes."""


def measure_rates(model: Model, *, with_output_layer: bool) -> Rates:
    """Time passes of a model with random weights; only the folder's config.json is read."""
    config = AutoConfig.from_pretrained(model.folder)
    is_causal = model.attention == "causal"
    loader = AutoModelForCausalLM if is_causal else AutoModelForMaskedLM
    network = (loader if with_output_layer else AutoModel).from_config(config).to(model.device)
    ids = torch.randint(0, config.vocab_size, (BATCH, min(LENGTH, model.max_tokens)))
    ids = ids.to(model.device)

    def forward() -> None:
        with torch.inference_mode():
            network(input_ids=ids)

    def train() -> None:
        network(input_ids=ids)[0].square().mean().backward()

    network.eval()
    forward_rate = _rate(forward, ids)
    network.train()
    return Rates(forward=forward_rate, training=_rate(train, ids))


def _rate(step: Callable[[], None], ids: torch.Tensor) -> float:
    """Return the tokens a second of repeated steps; the first one, which warms up, is left out."""
    step()
    steps, begin = 0, time.perf_counter()
    while (elapsed := _elapsed(begin)) < SECONDS:
        step()
        steps += 1
    return steps * ids.numel() / elapsed


def _elapsed(begin: float) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin
