"""The independent side of test_training.py: transformers' module, an obvious loop and optimizer.

Nothing here uses the model, the loss, the optimizer or the schedule of this project.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from megatron_ettin.objectives import Batch

PEAK, WARMUP_TOKENS, TRAIN_TOKENS, LR_END = 3e-3, 8_000, 50_000, 0.1
BETA1, BETA2, EPSILON, WEIGHT_DECAY = 0.9, 0.98, 1e-6, 1e-2
PADDING = 0
IGNORED = -100


@dataclass
class PlainRun:
    """State of a run after its last step."""

    losses: list[float] = field(default_factory=list)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    """Of the first step, by parameter."""


def train(model: Any, steps: Iterable[list[Batch]]) -> PlainRun:
    """Train `model` in place on the batches of each step."""
    run, tokens = PlainRun(), 0
    optimizer = StableAdamW(logical_tensors(model))
    for batches in steps:
        model.zero_grad()
        loss = mean_loss(model, batches)
        loss.backward()
        run.losses.append(loss.item())
        if not run.gradients:
            run.gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step(learning_rate(tokens))
        tokens += sum(map(count_tokens, batches))
    return run


def mean_loss(model: Any, batches: list[Batch]) -> torch.Tensor:
    """Return the mean loss of a step's scored tokens; every segment is a sequence of its own."""
    tokens, labels = [], []
    for batch in batches:
        targets = np.where(batch.loss_mask, batch.labels, IGNORED)
        borders = batch.rows.cu_seqlens[1:-1]
        for segment, wanted in zip(
            np.split(batch.tokens, borders), np.split(targets, borders), strict=True
        ):
            if (wanted != IGNORED).any():
                tokens.append(torch.from_numpy(segment))
                labels.append(torch.from_numpy(wanted))
    lengths = torch.tensor([len(segment) for segment in tokens])
    padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
    logits = model(input_ids=padded, attention_mask=mask).logits
    wanted = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED)
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED)


def count_tokens(batch: Batch) -> int:
    """Return the tokens of a batch, special tokens counted, padding not."""
    return int(np.diff(batch.rows.cu_seqlens)[batch.rows.segment_kind != PADDING].sum())


def learning_rate(tokens: int) -> float:
    """Return the rate after `tokens`: linear warm-up times one-minus-sqrt decay to LR_END."""
    decay = 1.0 - (1.0 - LR_END) * (tokens / TRAIN_TOKENS) ** 0.5
    return PEAK * min(1.0, tokens / WARMUP_TOKENS) * decay


def logical_tensors(model: Any) -> list[list[torch.nn.Parameter]]:
    """Return the parameters, with q, k and v of a decoder's layer as the one tensor they are."""
    tensors: dict[str, list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        tensors.setdefault(re.sub("[qkv]_proj", "qkv_proj", name), []).append(parameter)
    return list(tensors.values())


class StableAdamW:
    """The formula of ModernBERT's optimizer, a tensor at a time."""

    def __init__(self, tensors: list[list[torch.nn.Parameter]]) -> None:
        self.tensors = tensors
        self.firsts = [torch.zeros_like(_flat(tensor)) for tensor in tensors]
        self.seconds = [torch.zeros_like(_flat(tensor)) for tensor in tensors]
        self.steps = 0

    @torch.no_grad()
    def step(self, lr: float) -> None:
        self.steps += 1
        beta1 = (BETA1**self.steps - BETA1) / (BETA1**self.steps - 1)
        beta2 = (BETA2**self.steps - BETA2) / (BETA2**self.steps - 1)
        for i, tensor in enumerate(self.tensors):
            gradient = torch.cat([part.grad.flatten() for part in tensor])
            self.firsts[i] = beta1 * self.firsts[i] + (1 - beta1) * gradient
            self.seconds[i] = beta2 * self.seconds[i] + (1 - beta2) * gradient**2
            ratio = gradient**2 / self.seconds[i].clamp(min=EPSILON**2)
            rate = lr / max(1.0, ratio.mean().sqrt().item())
            weights = _flat(tensor)
            if tensor[0].dim() > 1:
                weights = weights * (1 - rate / PEAK * WEIGHT_DECAY)
            weights = weights - rate * self.firsts[i] / (self.seconds[i].sqrt() + EPSILON)
            sizes = [part.numel() for part in tensor]
            for part, values in zip(tensor, weights.split(sizes), strict=True):
                part.copy_(values.view_as(part))


def _flat(tensor: list[torch.nn.Parameter]) -> torch.Tensor:
    return torch.cat([part.detach().flatten() for part in tensor])
