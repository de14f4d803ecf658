"""Objectives: predictions and attention of a model, the only difference between twins."""

from megatron_ettin.objectives.base import (
    Attention,
    Batch,
    Objective,
    RowShare,
    all_measure_text,
    attentions,
)
from megatron_ettin.objectives.by_phase import ByPhase
from megatron_ettin.objectives.causal_lm import CausalLM
from megatron_ettin.objectives.description import Face, as_class, describe, read_description
from megatron_ettin.objectives.masked_diffusion import MaskedDiffusion
from megatron_ettin.objectives.masked_lm import MaskedLM
from megatron_ettin.objectives.masked_next_token import MaskedNextToken
from megatron_ettin.objectives.mixture import Mixture

__all__ = [
    "Attention",
    "Batch",
    "ByPhase",
    "CausalLM",
    "Face",
    "MaskedDiffusion",
    "MaskedLM",
    "MaskedNextToken",
    "Mixture",
    "Objective",
    "RowShare",
    "all_measure_text",
    "as_class",
    "attentions",
    "describe",
    "read_description",
]
