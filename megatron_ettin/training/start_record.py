"""The payload of a START or RESUME record: what a run is, and the machine that computes it."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from pathlib import Path
from typing import Any

from megatron_ettin import config as configuration
from megatron_ettin.checkpoint import RunState
from megatron_ettin.config import RunConfig
from megatron_ettin.objectives import describe
from megatron_ettin.order import OrderSpec
from megatron_ettin.order.run_folder import RunFolder, step_of
from megatron_ettin.rows import TokenIds
from megatron_ettin.versions import package_versions, source_revision


def describe_run(
    config: RunConfig,
    spec: OrderSpec,
    state: RunState,
    ids: TokenIds,
    *,
    data_parallel_size: int,
) -> dict[str, Any]:
    """Describe the origin of masks, dropout and weights, and the machine that computes.

    The description is the payload of a START or RESUME record (docs/ledger.md).
    """
    return {
        "order_id": spec.order_id,
        "phase_ids": spec.phase_ids(),
        "phase_ends": spec.phase_ends(),
        "config_sha256": hashlib.sha256(configuration.to_yaml(config).encode()).hexdigest(),
        "objective": describe(config.objective),
        "seeds": dataclasses.asdict(config.seeds),
        "model": dataclasses.asdict(config.model),
        "token_ids": dataclasses.asdict(ids),
        "layout": {**dataclasses.asdict(config.hardware), "data_parallel_size": data_parallel_size},
        "versions": package_versions(),
        "revision": source_revision(),
        "host": platform.node(),
        "from_checkpoint": RunFolder(Path()).checkpoint(state.step).name if state.step else None,
        "initialized_from": state.initialized_from,
        "set_aside": _set_aside(config, state),
    }


def _set_aside(config: RunConfig, state: RunState) -> list[str]:
    """Return the damaged checkpoints, by their new names, that this start has passed over.

    Those of earlier steps than the one that it goes on from were passed over by earlier starts.
    """
    named = RunFolder(Path(config.run_dir)).set_aside_checkpoints()
    return [path.name for path in named if (step_of(path.with_suffix("")) or 0) >= state.step]
