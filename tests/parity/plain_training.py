"""The independent side of test_training.py: transformers' module, an obvious loop and optimizer.

Nothing here uses the model, the loss, the optimizer or the schedule of this project.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
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


def train(
    model: Any,
    steps: Iterable[list[Batch]],
    rate: Callable[[int], float] | None = None,
    window: int = 0,
) -> PlainRun:
    """Train `model` in place on the batches of each step.

    `rate` is the learning rate after so many tokens, `decaying_rate` by default. `window` is what
    local layers see where batches name their directions.
    """
    rate = rate or decaying_rate
    run, tokens = PlainRun(), 0
    optimizer = StableAdamW(logical_tensors(model))
    for batches in steps:
        model.zero_grad()
        loss = mean_loss(model, batches, window)
        loss.backward()
        run.losses.append(loss.item())
        if not run.gradients:
            run.gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step(rate(tokens))
        tokens += sum(map(count_tokens, batches))
    return run


def mean_loss(model: Any, batches: list[Batch], window: int) -> torch.Tensor:
    """Return the weighted loss of a step per token; every segment is a sequence of its own."""
    tokens, labels, weights, directions = [], [], [], []
    for batch in batches:
        rows = batch.rows
        targets = np.where(batch.loss_mask, batch.labels, IGNORED)
        factors = np.ones(len(targets)) if batch.weights is None else batch.weights
        borders = rows.cu_seqlens[1:-1]
        by_slot = None
        if batch.is_causal is not None:
            by_slot = np.broadcast_to(batch.is_causal, len(rows.g)).repeat(rows.seq_length)
        arrays = (np.split(array, borders) for array in (batch.tokens, targets, factors))
        for begin, segment, wanted, factor in zip(rows.cu_seqlens, *arrays, strict=False):
            if (wanted != IGNORED).any():
                tokens.append(torch.from_numpy(segment))
                labels.append(torch.from_numpy(wanted))
                weights.append(torch.from_numpy(factor).float())
                directions.append(None if by_slot is None else bool(by_slot[begin]))
    lengths = torch.tensor([len(segment) for segment in tokens])
    padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    mask: Any = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
    if directions[0] is not None:
        mask = masks_by_direction(mask.bool(), torch.tensor(directions), window)
    logits = model(input_ids=padded, attention_mask=mask).logits
    wanted = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED)
    factors = torch.nn.utils.rnn.pad_sequence(weights, batch_first=True)
    losses = F.cross_entropy(
        logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return (losses * factors.flatten()).sum() / sum(int(b.averaged.sum()) for b in batches)


def masks_by_direction(
    is_token: torch.Tensor, is_causal: torch.Tensor, window: int
) -> dict[str, torch.Tensor]:
    """Return the masks [n, 1, t, t] that an encoder of transformers takes for each kind of layer.

    So one module attends in both directions, sequence by sequence [n].
    """
    places = torch.arange(is_token.shape[1])
    ahead = places[None, :] - places[:, None]
    visible = is_token[:, None, :] & ~(is_causal[:, None, None] & (ahead > 0))
    # A query of padding sees itself: the softmax over nothing is not a number.
    visible |= ahead == 0
    near = visible & (ahead.abs() <= window)
    return {"full_attention": visible[:, None], "sliding_attention": near[:, None]}


def count_tokens(batch: Batch) -> int:
    """Return the tokens of a batch, special tokens counted, padding not."""
    return int(np.diff(batch.rows.cu_seqlens)[batch.rows.segment_kind != PADDING].sum())


def constant_rate(tokens: int) -> float:
    """Return the rate after `tokens`: linear warm-up, then the peak."""
    return PEAK * min(1.0, tokens / WARMUP_TOKENS)


def decaying_rate(tokens: int) -> float:
    """Return the rate after `tokens`: linear warm-up times one-minus-sqrt decay to LR_END."""
    decay = 1.0 - (1.0 - LR_END) * (tokens / TRAIN_TOKENS) ** 0.5
    return constant_rate(tokens) * decay


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
