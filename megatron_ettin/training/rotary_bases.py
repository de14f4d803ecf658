"""RoPE bases of phases: a phase that names none keeps those of the weights that it starts from."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from megatron_ettin import checkpoint
from megatron_ettin.checkpoint import RunState
from megatron_ettin.config import FIRST_ROTARY_BASES, RotaryBases, RunConfig, with_rotary_bases
from megatron_ettin.order import OrderSpec
from megatron_ettin.order.run_folder import RunFolder

logger = logging.getLogger(__name__)


def resolve(config: RunConfig, spec: OrderSpec, state: RunState) -> RunConfig:
    """Return the run with RoPE bases in every phase; log a line for each phase that changes them.

    For a phase that names none, a resumed run takes the bases in its checkpoint's config.yaml.

    Raises:
        CheckpointError: the weights that the run starts from do not say what theirs are.
    """
    recorded: dict[str, RotaryBases] = {}
    trained: RotaryBases | None = None
    if state.step:
        folder = RunFolder(Path(config.run_dir)).checkpoint(state.step)
        recorded = {p.name: p.rotary_bases for p in checkpoint.read_config(folder).phases}
        trained = _bases_of(folder)
    elif config.checkpoint.initialize_from is not None:
        trained = _bases_of(Path(config.checkpoint.initialize_from))
    phases = with_rotary_bases(config.phases, trained or FIRST_ROTARY_BASES, recorded)
    for phase in phases[spec.phase_index(state.g) :]:
        if trained is not None and phase.rotary_bases != trained:
            logger.info("phase %s: RoPE bases %s -> %s", phase.name, trained, phase.rotary_bases)
        trained = phase.rotary_bases
    return dataclasses.replace(config, phases=phases)


def _bases_of(folder: Path) -> RotaryBases:
    saved = checkpoint.read_model(folder)
    return RotaryBases(saved.rotary_base_global, saved.rotary_base_local)
