"""Models here as training runs them: a checkpoint's stage on this rank, and the logits of all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

from megatron_ettin import checkpoint, distributed
from megatron_ettin.config import HardwareConfig, SeedConfig
from megatron_ettin.model.attention import PackedRows
from megatron_ettin.model.provider import build_stage
from tests.parity.references import DOCUMENTS, Packed


def load_stage(folder: Path, hardware: HardwareConfig) -> Any:
    """Return this rank's stage of the model in a checkpoint; needs process groups."""
    saved = checkpoint.read_model(folder)
    stage = build_stage(saved.model, saved.attention, hardware, SeedConfig()).eval()
    checkpoint.load(folder, stage, None, saved.model)
    stage.set_rotary_bases(saved.rotary_base_global, saved.rotary_base_local)
    return stage


def stage_logits(stage: Any, packed: Packed) -> torch.Tensor | None:
    """Return [t, vocab] of the packed stream on the last stage's ranks, through the schedule."""
    layout = PackedRows.of(
        packed.cu_seqlens, max(DOCUMENTS), packed.position_ids, g=torch.tensor([0])
    )

    def forward_step(batches: Iterator[torch.Tensor], model: Any) -> tuple[torch.Tensor, Any]:
        return model(next(batches), layout), lambda logits, **_: logits

    with torch.no_grad():
        outputs: list[torch.Tensor] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter([packed.tokens]),
            model=stage,
            num_microbatches=1,
            seq_length=len(packed.tokens),
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return outputs[0] if outputs else None


def checkpoint_logits(folder: Path, packed: Packed) -> torch.Tensor:
    """Return [t, vocab] of the model in a checkpoint, in this process alone."""
    with distributed.process_groups(HardwareConfig()):
        logits = stage_logits(load_stage(folder, HardwareConfig()), packed)
        assert logits is not None
        return logits
