"""Objectives: predictions and attention of a model, the only difference between twins."""

from megatron_ettin.objectives.base import Batch, Objective
from megatron_ettin.objectives.causal_lm import CausalLM
from megatron_ettin.objectives.masked_diffusion import MaskedDiffusion
from megatron_ettin.objectives.masked_lm import MaskedLM
from megatron_ettin.objectives.masked_next_token import MaskedNextToken

__all__ = [
    "Batch",
    "CausalLM",
    "MaskedDiffusion",
    "MaskedLM",
    "MaskedNextToken",
    "Objective",
]
