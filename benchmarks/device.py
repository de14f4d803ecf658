"""The device that is measured.

No GPU has run its code for GPUs yet.
"""

from __future__ import annotations

import torch

from megatron_ettin import distributed


def wait_for_device() -> None:
    """Wait until the GPU has nothing to do, if there is one."""
    if distributed.device().type == "cuda":
        torch.cuda.synchronize()
