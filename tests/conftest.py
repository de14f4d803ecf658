"""Rules for every test: no network, and a mark that the machine cannot honour is a skip."""

import os
from collections.abc import Sequence

import pytest

# Set before the libraries that read them are imported; processes started by a test inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

DEVICES_NEEDED = {"gpu": 1, "multi_gpu": 2}


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Skip tests that need more CUDA devices than there are; torch is imported only for them."""
    for mark, needed in DEVICES_NEEDED.items():
        marked = [item for item in items if item.get_closest_marker(mark)]
        if marked and count_devices() < needed:
            skip = pytest.mark.skip(reason=f"{mark}: needs CUDA devices: {needed}")
            for item in marked:
                item.add_marker(skip)


def count_devices() -> int:
    import torch

    return torch.cuda.device_count()
