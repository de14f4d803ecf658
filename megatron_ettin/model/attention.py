"""Core attention over a packed stream, and SDPA for it: per document, or in blocks of a window.

Context-parallel ranks each hold a share of the slots. For the attention, an all-to-all gives each
rank all slots of a share of the heads instead (DeepSpeed-Ulysses, arXiv 2309.14509). Documents and
windows may therefore lie anywhere in the stream.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import all_to_all
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch.distributed import ProcessGroup

from megatron_ettin.model.dropout import OutputDropout

LayerKind = Literal["global", "local"]
"""Kind of a layer, whose positions see their whole document, or a window of it."""
KindAndLength = tuple[LayerKind, int]
"""Kind of a layer, and the slots of the rows that it attends over."""


@dataclass
class PackedRows(PackedSeqParams):  # type: ignore[misc]
    """Layout of a micro-batch of t slots, handed unchanged to every layer.

    Megatron-Core treats the stream as one sequence of t slots ([t, 1, hidden]): `qkv_format` is not
    "thd", because the rotary table is gathered by `position_ids` and needs no per-segment work.
    """

    position_ids: torch.Tensor | None = None
    """[t / cp] int64, restarting per segment, for the slots of this context-parallel rank."""
    first_slot: int = 0
    """Place of the first of those slots in the stream; they are consecutive."""
    g: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """[m] int64 global row numbers, for the counters of the dropout."""
    dropout: OutputDropout | None = None
    """Dropout of the attention outputs; None outside training."""
    attention: Literal["bidirectional", "causal"] | None = None
    """Direction in which all segments attend; None: that of the model."""
    mixed: MixedRows | None = None
    """Rows by direction, if they do not all attend in the same one."""
    masks: dict[tuple[int, int, int], torch.Tensor] = field(default_factory=dict)
    """Block masks by (window to the left, to the right, slots): the first local layer makes a mask,
    the others of the micro-batch use it again."""

    @classmethod
    def of(
        cls,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        position_ids: torch.Tensor,
        g: torch.Tensor,
        first_slot: int = 0,
        *,
        attention: Literal["bidirectional", "causal"] | None = None,
        mixed: MixedRows | None = None,
    ) -> PackedRows:
        """Describe a stream with segment boundaries `cu_seqlens` [n + 1] int32."""
        return cls(
            qkv_format="sbhd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_kv=max_seqlen,
            position_ids=position_ids,
            g=g,
            first_slot=first_slot,
            attention=attention,
            mixed=mixed,
        )

    def lengths(self) -> list[int]:
        """Return the lengths of the segments that hold slots."""
        return [length for length in self.cu_seqlens_q.diff().tolist() if length]

    def block_mask(self, left: int, right: int, slots: int) -> torch.Tensor:
        """Return [blocks, 1, w, keys] additive mask: same segment, key in [i - left, i + right].

        A block is w = left queries; its keys are the block before, its own and, if right > 0, the
        block after. Slots past the stream form a segment of their own.
        """
        key = (left, right, slots)
        if key not in self.masks:
            lengths = self.cu_seqlens_q.diff().long()
            # Segment number of each slot [slots]; padding gets -1, which equals no segment.
            numbers = torch.arange(len(lengths), device=lengths.device)
            segment = torch.repeat_interleave(numbers, lengths)
            segment = F.pad(segment, (0, slots - len(segment)), value=-1)
            blocks = segment.view(-1, left)
            # -2 beyond both ends of the stream: it equals neither a segment nor padding.
            keys = _neighbours(blocks, with_next=right > 0, value=-2)
            # Query i and key j in one numbering, in which the block before begins at 0.
            i = torch.arange(left, device=keys.device)[:, None] + left
            j = torch.arange(keys.shape[1], device=keys.device)[None, :]
            visible = (j >= i - left) & (j <= i + right) & (blocks[:, :, None] == keys[:, None, :])
            mask = torch.zeros(visible.shape, device=keys.device)
            mask.masked_fill_(~visible, float("-inf"))
            self.masks[key] = mask[:, None]
        return self.masks[key]


@dataclass(frozen=True)
class MixedRows:
    """Rows of a stream of t slots by the direction in which they attend."""

    parts: tuple[tuple[torch.Tensor, PackedRows], ...]
    """The slots [n] int64 of each direction, and these slots as a stream of their own."""
    places: torch.Tensor
    """[t] int64 place of each slot in these streams, one after the other."""

    def split(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the slots of each part of x [t, ...]."""
        return [x.index_select(0, slots) for slots, _ in self.parts]

    def join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Return [t, ...] from the slots of each part."""
        return torch.cat(parts).index_select(0, self.places)


class CoreAttention(MegatronModule):  # type: ignore[misc]
    """Attention within segments, full or windowed by layer; subclasses compute it (`attend`)."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        *,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        """Build the attention of layer `layer_number`, counted from 1."""
        super().__init__(config=config)
        self.cp_group = pg_collection.cp
        self.is_causal = attn_mask_type == AttnMaskType.causal
        self.scale = softmax_scale
        self.window = layer_window(config, layer_number)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        packed_seq_params: PackedRows,
        **_: Any,
    ) -> torch.Tensor:
        """Attend: query, key, value [t, 1, heads, head_size] -> [t, 1, heads * head_size].

        t are the slots of this context-parallel rank.
        """
        slots = query.shape[0]
        if self.cp_group.size() == 1:
            q, k, v = (x.squeeze(1) for x in (query, key, value))
            out = self._attend_stream(q, k, v, packed_seq_params)
        else:
            together = torch.cat([query, key, value], dim=1)
            q, k, v = _slots_for_heads(together, self.cp_group).unbind(dim=1)
            attended = self._attend_stream(q, k, v, packed_seq_params)
            out = _heads_for_slots(attended, self.cp_group)
        return out.reshape(slots, 1, -1)

    def _attend_stream(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedRows
    ) -> torch.Tensor:
        """Attend over a stream whose rows may have two directions, each in a call of its own."""
        mixed = packed.mixed
        if mixed is None:
            return self.attend(query, key, value, packed)
        q, k, v = (mixed.split(x) for x in (query, key, value))
        packed_parts = [part for _, part in mixed.parts]
        return mixed.join(
            [self.attend(*of_part) for of_part in zip(q, k, v, packed_parts, strict=True)]
        )

    def sight(self, packed: PackedRows) -> tuple[bool, tuple[int, int] | None]:
        """Return whether positions see only those before them, and the layer's window."""
        is_causal = self.is_causal if packed.attention is None else packed.attention == "causal"
        if self.window is None:
            return is_causal, None
        return is_causal, (self.window[0], 0 if is_causal else self.window[0])

    @abstractmethod
    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedRows
    ) -> torch.Tensor:
        """Attend over a stream of one direction: query, key, value, result are [t, heads, size]."""


class SdpaCoreAttention(CoreAttention):
    """Scaled dot-product attention on a CPU, and in fp32.

    Global layers loop over the documents. Local layers multiply blocks of `window` queries by the
    neighbouring blocks of keys: without a loop, at a cost linear in t. Where no document is longer
    than the window, the window hides nothing, and a local layer computes as a global one.
    """

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedRows
    ) -> torch.Tensor:
        """Attend over a whole stream: query, key, value and the result are [t, heads, size]."""
        is_causal, window = self.sight(packed)
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        if window is None or window[0] >= max(packed.lengths()) - 1:
            return self._within_documents(q, k, v, packed, is_causal=is_causal).transpose(0, 1)
        return self._within_windows(q, k, v, packed, window).transpose(0, 1)

    def _within_documents(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        packed: PackedRows,
        *,
        is_causal: bool,
    ) -> torch.Tensor:
        # torch.split, not slices: the gradient of each slice would be as long as the stream.
        lengths = packed.lengths()
        documents = (torch.split(x[None], lengths, dim=2) for x in (query, key, value))
        outs = [
            F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=self.scale)[0]
            for q, k, v in zip(*documents, strict=True)
        ]
        return torch.cat(outs, dim=1)

    def _within_windows(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        packed: PackedRows,
        window: tuple[int, int],
    ) -> torch.Tensor:
        left, right = window
        heads, slots, size = query.shape
        padded = -(-slots // left) * left

        def blocks(x: torch.Tensor) -> torch.Tensor:
            return F.pad(x, (0, 0, 0, padded - slots)).view(heads, -1, left, size).transpose(0, 1)

        q = blocks(query)
        k, v = (_neighbours(blocks(x), with_next=right > 0) for x in (key, value))
        mask = packed.block_mask(left, right, padded)
        if query.dtype == torch.float32:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        else:
            # In bfloat16 on a CPU these two matmuls are twice as fast as torch's kernel, whose
            # backward pass is slow.
            scale = size**-0.5 if self.scale is None else self.scale
            weights = torch.softmax(q @ k.transpose(-1, -2) * scale + mask, dim=-1)
            out = weights.to(v.dtype) @ v
        return out.transpose(0, 1).reshape(heads, padded, size)[:, :slots]


def random_projection(
    slots: int, heads: int, size: int, *, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return random q, k, v [slots, heads, size] that ask for gradients, to try a kernel with.

    They lie in memory as a layer hands them over: views of one buffer [slots, heads, 3, size], the
    output of its projection.
    """
    qkv = torch.randn(slots, heads, 3, size, dtype=dtype, device=device)
    query, key, value = (x.requires_grad_() for x in qkv.unbind(dim=2))
    return query, key, value


def layer_window(config: TransformerConfig, layer_number: int) -> tuple[int, int] | None:
    """Return how many keys (left, right) layer `layer_number`, from 1, sees; None if all."""
    is_local = is_layer_window_attention(
        config.window_size, config.window_attn_skip_freq, layer_number
    )
    return config.window_size if is_local else None


def layer_kind(config: TransformerConfig, layer_number: int) -> LayerKind:
    """Return the kind of layer `layer_number`, counted from 1."""
    return "global" if layer_window(config, layer_number) is None else "local"


def _slots_for_heads(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """Exchange [t / cp, 3, heads, size] for [t, 3, heads / cp, size] by all-to-all in `group`."""
    cp = group.size()
    slots, three, heads, size = x.shape
    # Rank r receives heads [r * heads / cp, (r + 1) * heads / cp): the receiver is the first axis.
    by_rank = x.view(slots, three, cp, heads // cp, size).permute(2, 0, 1, 3, 4)
    exchanged: torch.Tensor = all_to_all(group, by_rank.contiguous())
    return exchanged.view(cp * slots, three, heads // cp, size)


def _heads_for_slots(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """Exchange [t, heads / cp, size] for [t / cp, heads, size]: the way back."""
    cp = group.size()
    slots, heads, size = x.shape
    by_rank = x.reshape(cp, slots // cp, heads, size)
    exchanged: torch.Tensor = all_to_all(group, by_rank.contiguous())
    return exchanged.transpose(0, 1).reshape(slots // cp, cp * heads, size)


def _neighbours(blocks: torch.Tensor, *, with_next: bool, value: int = 0) -> torch.Tensor:
    """Return each block with the one before it and, if asked, the one after, along the slots.

    [blocks, w] -> [blocks, 2w or 3w]; [blocks, heads, w, size] -> [blocks, heads, 2w or 3w, size].
    """
    edge = torch.full_like(blocks[:1], value)
    parts = [torch.cat([edge, blocks[:-1]]), blocks]
    if with_next:
        parts.append(torch.cat([blocks[1:], edge]))
    return torch.cat(parts, dim=1 if blocks.dim() == 2 else 2)
