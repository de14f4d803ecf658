"""LayerNorm without bias, alone or together with the addition of a residual before it.

No GPU has run its code for GPUs yet.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ettin.model.dropout import LayerDropout


class LayerNorm(torch.nn.LayerNorm):
    """LayerNorm without bias, as Megatron-Core builds norms (its own always carry one).

    A GPU runs a kernel of ours. torch's gives every row a block of its own, however short the row,
    and sums the weight's gradient over blocks of rows only if there are more than 65,536 rows.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> None:
        """Build the norm over the last dimension [..., hidden_size]."""
        super().__init__(hidden_size, eps=eps, bias=False, dtype=config.params_dtype)
        # Under sequence parallelism Megatron-Core all-reduces gradients of parameters marked so.
        cast(Any, self.weight).sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the norm of x [..., hidden_size]."""
        if x.is_cuda:
            from megatron_ettin.model.add_norm_triton import normalise

            return normalise(x, self.weight, self.eps)
        return super().forward(x)

    def of_sum(
        self,
        residual: torch.Tensor,
        branch: torch.Tensor,
        dropout: LayerDropout | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return residual + dropout(branch) [n, 1, hidden_size], and the norm of this sum."""
        if residual.is_cuda:
            from megatron_ettin.model.add_norm_triton import add_and_normalise

            return add_and_normalise(branch, residual, self.weight, self.eps, dropout)
        total = residual + (branch if dropout is None else dropout.apply(branch))
        return total, super().forward(total)
