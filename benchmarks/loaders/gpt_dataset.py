"""Megatron-Core's GPTDataset, with the sampler of Megatron-LM's training program.

The wheel of megatron-core has the datasets, and not `MegatronPretrainingSampler` of Megatron-LM's
megatron/training/datasets/data_samplers.py: `_MegatronSteps` follows its rule. A checkpoint holds
`consumed_samples`, and a restart takes the samples from that number on, rank by rank.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset

from benchmarks.loaders.cases import RunSetting
from benchmarks.loaders.indexed_format import IndexedRival
from benchmarks.loaders.outcomes import DrawnSample
from benchmarks.loaders.rival import (
    PACKED_ROWS,
    PACKED_TOKENS,
    ROW_TOKENS,
    TEXT_VOCAB_SIZE,
    VOCAB_SIZE,
    RivalStream,
    RunPlan,
    identify,
)


class MegatronCore(IndexedRival):
    """`GPTDataset`, blended where there are several sources, and `consumed_samples`."""

    def packed_batches(self, path: Path) -> Iterator[Any]:
        """Yield batches of one epoch, cut from the stream of shuffled documents."""
        corpus = IndexedDataset(str(path))  # kept, for its arrays lie in files that it closes
        tokens = corpus.sequence_lengths.sum(dtype=np.int64)
        dataset = build_dataset(
            [path],
            [1.0],
            samples=int(tokens - 1) // PACKED_TOKENS,
            seed=1,
            row_tokens=PACKED_TOKENS,
            vocab_size=TEXT_VOCAB_SIZE,
            cache=path.parent / "cache",
        )
        for begin in range(0, len(dataset) - PACKED_ROWS + 1, PACKED_ROWS):
            rows = [dataset[number] for number in range(begin, begin + PACKED_ROWS)]
            yield torch.utils.data.default_collate(rows)["tokens"]

    def open(self, plan: RunPlan, state: Any | None) -> RivalStream:
        """Build the indices for the present horizon and go on at `consumed_samples`."""
        present = plan.present
        dataset = build_dataset(
            self.corpora(plan.sizes),
            [float(weight) for weight in present.weights],
            samples=present.horizon,  # as --train-samples, which no batch size changes
            seed=plan.seed,
            row_tokens=ROW_TOKENS,
            vocab_size=VOCAB_SIZE,
            # Without the last label, a sample of the stream is exactly one document here.
            add_extra_token_to_sequence=False,
        )
        return _MegatronSteps(dataset, present, state or 0)

    @staticmethod
    def versions() -> dict[str, str]:
        """Return the version of megatron-core."""
        return {"megatron-core": version("megatron-core")}


class _MegatronSteps(RivalStream):
    def __init__(self, dataset: Any, setting: RunSetting, consumed_samples: int) -> None:
        if consumed_samples >= len(dataset):
            raise ValueError(f"no samples left: {consumed_samples} of {len(dataset)}")
        self._dataset = dataset
        self._batch = setting.batch
        self._consumed_samples = consumed_samples

    def step(self) -> list[DrawnSample]:
        # Rank r takes the r-th part of the step's samples, so the ranks in turn take them in order.
        begin = self._consumed_samples
        self._consumed_samples = min(begin + self._batch, len(self._dataset))
        numbers = range(begin, self._consumed_samples)
        return list(identify(self._dataset[number]["tokens"] for number in numbers))

    def state(self) -> int:
        return self._consumed_samples


def build_dataset(
    corpora: list[Path],
    weights: list[float],
    *,
    samples: int,
    seed: int,
    row_tokens: int,
    vocab_size: int,
    cache: Path | None = None,
    **settings: Any,
) -> Any:
    """Return a dataset of so many training samples, built as Megatron-LM builds it."""
    warnings.simplefilter("ignore")  # said about packages that play no part here
    logging.getLogger("megatron").setLevel(logging.CRITICAL)
    tokenizer = SimpleNamespace(
        vocab_size=vocab_size, eod=0, pad=-1, unique_identifiers={"class": "none"}
    )
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=row_tokens,
        blend=([str(path) for path in corpora], weights if len(weights) > 1 else None),
        split="100,0,0",
        path_to_cache=None if cache is None else str(cache),
        tokenizer=tokenizer,
        create_attention_mask=False,
        **dict.fromkeys(("reset_position_ids", "reset_attention_mask", "eod_mask_loss"), False),
        **settings,
    )
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config)
    return builder.build()[0]
