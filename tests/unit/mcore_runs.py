"""Runs that the real megatron.core trains, as far as their data goes; needs its process group."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import yaml
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from megatron_ettin.indexed import IndexedWriter

EMPTY, LONG = 7, 11  # documents without tokens, and of many rows
SEQ_LENGTH = 32


@dataclass(frozen=True)
class Trained:
    """A run's description, and the dataset that Megatron itself draws from."""

    folder: Path
    dataset: Any

    def __getitem__(self, g: int) -> np.ndarray:
        """Return the tokens and the last label of row g."""
        sample = self.dataset[g]
        extra = sample["labels"][-1:] if self.parts[0].config.add_extra_token_to_sequence else []
        return np.concatenate([sample["tokens"], extra]).astype(np.int64)

    @property
    def parts(self) -> list[GPTDataset]:
        return getattr(self.dataset, "datasets", [self.dataset])

    def documents(self, g: int) -> list[int]:
        part, number = self.parts[0], g
        if hasattr(self.dataset, "datasets"):
            part = self.parts[self.dataset.dataset_index[g]]
            number = int(self.dataset.dataset_sample_index[g])
        return part._query_document_sample_shuffle_indices(number)[1].tolist()


def write_corpora(folder: Path) -> dict[str, str]:
    rng = np.random.default_rng(5)
    prefixes = {}
    for name, count in {"web": 90, "books": 40}.items():
        prefixes[name] = str(folder / name)
        with IndexedWriter(prefixes[name], "uint16") as writer:
            for document in range(count):
                length = {EMPTY: 0, LONG: 500}.get(document, int(rng.integers(1, 60)))
                writer.add(rng.integers(5, 60_000, length))
    return prefixes


def train(
    folder: Path,
    *,
    prefixes: dict[str, str] | None = None,
    weights: list[float] | None = None,
    samples: int = 300,
    split: str = "100,0,0",
    seed: int = 1234,
    extra: bool = True,
    **config: Any,
) -> Trained:
    """Let Megatron build the datasets of a run in `folder` and describe that run."""
    folder.mkdir(exist_ok=True)
    if prefixes is None:
        # As on Megatron's command line: one corpus, or several with their weights.
        written = write_corpora(folder)
        prefixes = {name: written[name] for name in list(written)[: len(weights or [1.0])]}
    # 60,000 is in no corpus, so no token is taken for the end of a document or for padding.
    tokenizer = SimpleNamespace(
        vocab_size=60_001, eod=60_000, pad=-1, unique_identifiers={"class": "none"}
    )
    settings = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=SEQ_LENGTH,
        blend=(list(prefixes.values()), weights),
        split=split,
        path_to_cache=str(folder / "cache"),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        add_extra_token_to_sequence=extra,
        mid_level_dataset_surplus=0.05,
    )
    sizes = [samples, 8, 0]
    dataset = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, settings).build()[0]
    described = {
        "order": "mcore",
        "cache": "cache",
        "prefixes": prefixes,
        "seq_length": SEQ_LENGTH,
        "global_batch_size": 10,
        "train_steps": samples // 10,
        "add_extra_token": extra,
        **config,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(described, sort_keys=False))
    return Trained(folder, dataset)


def amend(run: Trained, **values: Any) -> Path:
    path = run.folder / "config.yaml"
    described = {**yaml.safe_load(path.read_text()), **values}
    path.write_text(
        yaml.safe_dump({k: v for k, v in described.items() if v is not None}, sort_keys=False)
    )
    return run.folder
