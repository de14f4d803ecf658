"""Import everything and print, as one line of JSON, what this machine is and has."""

from __future__ import annotations

import importlib
import json
import platform
from importlib import metadata

import torch

from megatron_ettin.model.backend import transformer_engine_lack
from megatron_ettin.versions import package_versions

#: All that a run imports, the compiled extension with it.
MODULES = ("native", "pretrain", "training.loop", "training.precision", "training.set_up")


def main() -> None:
    """Fail where a module cannot be imported, or torch can compute nothing on a GPU."""
    for module in MODULES:
        importlib.import_module(f"megatron_ettin.{module}")
    ones = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
    assert (ones @ ones).float().mean().item() == 64.0
    gpu = torch.cuda.get_device_properties(0)
    found = {
        "gpus": torch.cuda.device_count(),
        "gpu": gpu.name,
        "compute_capability": f"{gpu.major}.{gpu.minor}",
        "memory_bytes": gpu.total_memory,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "triton": metadata.version("triton"),
        "transformer_engine_lacks": transformer_engine_lack(),
        **package_versions(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
