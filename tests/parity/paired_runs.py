"""Runs here beside plain PyTorch on transformers' module: the same weights, the same batches."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ettin import distributed
from megatron_ettin.config import ModelConfig, RunConfig, parse_args
from megatron_ettin.data.loader import Loader
from megatron_ettin.data.orders import open_order
from megatron_ettin.evaluation.layouts import read_curve
from megatron_ettin.model.provider import logical_parameters
from megatron_ettin.objectives import Batch
from megatron_ettin.training import set_up
from megatron_ettin.training.loop import train
from tests.conftest import TinyCorpus
from tests.parity import plain_training
from tests.parity.references import make_reference

ROWS, ROW_LENGTH, WINDOW = 8, 128, 16
LOCAL_ATTENTION = {"encoder": 32, "decoder": 34}
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Ours:
    """State of a run here after its last step, by Megatron-Core's names."""

    model: ModelConfig
    losses: list[float]
    weights: Tensors
    gradients: Tensors
    """Of the last step, as the optimizer was given them."""


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


def run_config(
    corpus: TinyCorpus, folder: Path, *, name: str, objective: Any, steps: Sequence[int]
) -> RunConfig:
    """Return a run from the weights in folder/start: phases of so many steps.

    One phase has the rates of `plain_training.decaying_rate`, several of `constant_rate`.
    """
    names = ("short", "long")[: len(steps)]
    phases = [
        {
            "name": phase,
            "train_tokens": plain_training.TRAIN_TOKENS,
            "train_rows": count * ROWS,
            "seq_length": ROW_LENGTH,
            "global_batch_size": ROWS,
            "lr_end": plain_training.LR_END if len(steps) == 1 else 1.0,
            "rotary_base_global": 160_000.0,
        }
        for phase, count in zip(names, steps, strict=True)
    ]
    data = {**corpus.data, "validation": []}
    data |= {field: {phase: data[field][phase] for phase in names} for field in ("blend", "pools")}
    path = corpus.write_config(
        folder / f"{name}.yaml",
        objective=objective,
        model={
            "num_layers": 4,
            "hidden_size": 64,
            "ffn_hidden_size": 96,
            "num_attention_heads": 2,
            "vocab_size": corpus.vocab_size,
            "sliding_window": WINDOW,
            "attention_output_dropout": 0.0,
        },
        optimizer={
            "lr": plain_training.PEAK,
            "weight_decay": plain_training.WEIGHT_DECAY,
            "warmup_tokens": plain_training.WARMUP_TOKENS,
        },
        phases=phases,
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
    for step in range(order.num_rows // ROWS):
        yield list(loader.micro_batches(step * ROWS, (step + 1) * ROWS))
