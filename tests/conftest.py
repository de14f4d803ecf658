"""Rules for every test (no network, skips where a mark cannot be honoured) and a tiny corpus."""

import dataclasses
import gc
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

# Set before the libraries that read them are imported; processes started by a test inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
# Idle OpenMP threads sleep instead of spinning: tests run several processes on each core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

DEVICES_NEEDED = {"gpu": 1, "multi_gpu": 2}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option of tests/integration/test_golden.py."""
    parser.addoption("--update-golden", action="store_true", help="write the golden curves anew")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests that need more CUDA devices than there are; torch is imported only for them.

    Long ones run only where `-m` asks for them. Files with slow ones come first: workers that take
    a file at a time would otherwise end with one of them waiting for another's slow file.
    """
    if "long" not in config.option.markexpr:
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    for mark, needed in DEVICES_NEEDED.items():
        marked = [item for item in items if item.get_closest_marker(mark)]
        if marked and count_devices() < needed:
            skip = pytest.mark.skip(reason=f"{mark}: needs CUDA devices: {needed}")
            for item in marked:
                item.add_marker(skip)


def pytest_collection_finish() -> None:
    """Spare later garbage collections the modules that the tests have imported."""
    gc.freeze()


def count_devices() -> int:
    import torch

    return torch.cuda.device_count()


@dataclass(frozen=True)
class TinyCorpus:
    """Two made-up corpora, a held-out one, their tokenizer, and the YAML sections that use them."""

    folder: Path
    vocab_size: int

    @property
    def data(self) -> dict[str, Any]:
        """The `data` section for phases named "short" and "long"."""
        blend = {"alpha": 0.7, "beta": 0.3}
        return {
            "tokenizer": str(self.folder / "tokenizer"),
            "sources": {name: {"prefix": str(self.folder / name)} for name in ("alpha", "beta")},
            "blend": {"short": blend, "long": blend},
            "pools": {"short": [0.0, 0.6], "long": [0.6, 1.0]},
            "validation": [str(self.folder / "held_out")],
        }

    def copy_to(self, folder: Path) -> "TinyCorpus":
        """Copy the corpora, without plans, to a new folder; make its parents too."""
        shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns("*.plans"))
        return dataclasses.replace(self, folder=folder)

    def write_config(self, path: Path, **sections: Any) -> Path:
        """Write a run of two short phases over the corpora; `sections` replace or add some."""
        config = {
            "model": {
                "num_layers": 4,
                "hidden_size": 64,
                "ffn_hidden_size": 96,
                "num_attention_heads": 2,
                "vocab_size": self.vocab_size,
                "sliding_window": 16,
            },
            "optimizer": {"lr": 3.0e-3, "weight_decay": 1.0e-3, "warmup_tokens": 4000},
            "phases": [
                {
                    "name": "short",
                    "train_tokens": 20_000,
                    "seq_length": 128,
                    "global_batch_size": 16,
                },
                {
                    "name": "long",
                    "train_tokens": 10_000,
                    "seq_length": 256,
                    "global_batch_size": 8,
                    "lr_end": 0.1,
                    "rotary_base_global": 160_000.0,
                },
            ],
            "data": self.data,
            "hardware": {"micro_batch_tokens": 512, "threads_per_rank": 1},
            "logging": {"log_every_steps": 1},
            "validation": {"num_rows": 8, "seq_length": 128},
            **sections,
        }
        path.write_text(yaml.safe_dump(config))
        return path


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> TinyCorpus:
    """Make the tiny corpus once for all tests of a process."""
    return make_tiny_corpus(tmp_path_factory.mktemp("corpus"))


def make_tiny_corpus(folder: Path) -> TinyCorpus:
    """Write documents of 1 to 600 made-up words with a Zipf-like vocabulary to a folder."""
    from megatron_ettin.data.tokenize import load_tokenizer, train_tokenizer, write_tokenizer
    from megatron_ettin.native import TokenFileBuilder

    rng = np.random.default_rng(7)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, rng.integers(1, 9))) for _ in range(400)]
    shares = 1.0 / np.arange(1, 401)
    shares /= shares.sum()

    def documents(count: int, longest: int) -> list[str]:
        lengths = np.minimum(1 + rng.lognormal(3.6, 1.1, count).astype(int), longest)
        return [" ".join(rng.choice(words, length, p=shares)) for length in lengths]

    texts = {
        "alpha": documents(500, 600),
        "beta": documents(200, 90),
        "held_out": documents(60, 300),
    }
    write_tokenizer(train_tokenizer(texts["alpha"], 512), folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    for name, batch in texts.items():
        builder = TokenFileBuilder(str(folder / name), "uint16")
        for ids in tokenizer.encode_batch(batch):
            builder.add(ids)
        builder.commit()
    return TinyCorpus(folder=folder, vocab_size=tokenizer.ids.vocab_size)


@pytest.fixture
def one_process() -> Iterator[None]:
    """Give a test the process groups of a single rank."""
    from megatron_ettin import distributed
    from megatron_ettin.config import HardwareConfig

    with distributed.process_groups(HardwareConfig()):
        yield


@pytest.fixture(scope="module")
def megatron_rank() -> Iterator[None]:
    """Give Megatron the process group that its BlendedDataset asks for its rank."""
    import torch

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()
