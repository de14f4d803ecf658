"""Learning rate as a function of the tokens consumed (not of steps)."""

from __future__ import annotations

import math

from megatron_ettin.config import OptimizerConfig, PhaseConfig


def learning_rate(
    optimizer: OptimizerConfig, phase: PhaseConfig, *, run_tokens: int, phase_tokens: int
) -> float:
    """Return the rate of the step that starts after `phase_tokens` of the phase.

    `run_tokens` counts from the first token this optimizer saw and drives the warm-up. Within a
    phase the rate stays at lr_start and goes to lr_end over the last lr_decay_tokens. With
    "one_minus_sqrt" that is end + (start - end) * (1 - sqrt(progress)), as in ModernBERT's
    `src/scheduler.py`; the paper calls it an inverse square root.
    """
    share = phase.lr_start + (phase.lr_end - phase.lr_start) * _progress(phase, phase_tokens)
    if run_tokens < optimizer.warmup_tokens:
        share *= run_tokens / optimizer.warmup_tokens
    return optimizer.lr * share


def _progress(phase: PhaseConfig, phase_tokens: int) -> float:
    """Return how much of the way from lr_start to lr_end is behind, 0 to 1."""
    length = phase.lr_decay_tokens or phase.train_tokens
    done = phase_tokens - (phase.train_tokens - length)
    linear = min(max(done / length, 0.0), 1.0)
    return math.sqrt(linear) if phase.lr_decay == "one_minus_sqrt" else linear
