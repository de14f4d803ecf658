"""Rotary positions (RoFormer, arXiv 2104.09864): their tables, and the rotation in a layer.

No GPU has run its code for GPUs yet.
"""

from __future__ import annotations

import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ettin.model.attention import PackedRows


class RotaryTables:
    """Tables of a phase: one for the global layers and one for the local ones."""

    def __init__(self, config: TransformerConfig, base_global: float, base_local: float) -> None:
        """Start without tables; they are made for the first rows."""
        self._embeddings = [
            RotaryEmbedding(
                kv_channels=config.kv_channels,
                rotary_percent=1.0,
                rotary_base=base,
                use_cpu_initialization=not torch.cuda.is_available(),
            )
            for base in (base_global, base_local)
        ]
        self._by_length: dict[int, torch.Tensor] = {}

    def of(self, packed: PackedRows) -> torch.Tensor:
        """Return what layers take as `rotary_pos_emb` [2 (global, local), ...].

        A CPU gets angles by slot [2, t, 1, 1, size] float32, picked by the slots' positions. A GPU
        gets cosines and sines by position [2, length, 2, size / 2] float32, from which its kernel
        picks: they stay in its cache, and are made once for all rows of a length.
        """
        length = packed.max_seqlen_q
        assert packed.position_ids is not None
        if not packed.position_ids.is_cuda:
            return torch.stack([angles[packed.position_ids] for angles in self._angles(length)])
        if length not in self._by_length:
            # Both halves of a head have the same angles.
            halves = torch.stack(self._angles(length)).squeeze(3).chunk(2, dim=-1)[0]
            self._by_length[length] = torch.cat([halves.cos(), halves.sin()], dim=2).contiguous()
        return self._by_length[length]

    def _angles(self, length: int) -> list[torch.Tensor]:
        """Return angles [length, 1, 1, size] of the global and of the local layers."""
        # packed_seq=True returns the whole table under context parallelism too: rows are picked by
        # position_ids, because positions restart in each segment.
        return [embedding(length, packed_seq=True) for embedding in self._embeddings]


def rotated(
    qkv: torch.Tensor, table: torch.Tensor, packed: PackedRows, config: TransformerConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q, k, v [t, 1, heads, size], the first two rotated; on a GPU in place.

    Args:
        qkv: [t, 1, heads, 3, size] the projection's output, which nothing else may need.
        table: that of the layer's kind, from `RotaryTables.of`.
        packed: whose `position_ids` [t] are the slots' positions.
        config: that of the model.
    """
    if qkv.is_cuda:
        from megatron_ettin.model.rotation_triton import rotate_

        assert packed.position_ids is not None
        q, k, v = rotate_(qkv.squeeze(1), packed.position_ids, table)
        return q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
    query, key, value = qkv.unbind(dim=3)
    q, k = (apply_rotary_pos_emb(x, table, config=config) for x in (query, key))
    return q, k, value
