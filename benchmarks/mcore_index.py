"""Megatron-Core's own index of a corpus, for comparison with the sample order (bench_order.py)."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split
from numpy.typing import NDArray


class McoreIndex:
    """The indices that GPTDataset builds and saves for one epoch of a corpus."""

    def __init__(self, prefix: str, documents: int, cache: Path, *, vocab_size: int) -> None:
        """Take a corpus of so many documents and the folder that the indices go to."""
        warnings.simplefilter("ignore")  # said about packages that play no part here
        logging.getLogger("megatron").setLevel(logging.CRITICAL)
        self._prefix = prefix
        self._documents = np.arange(documents, dtype=np.int32)
        self._cache = cache
        self._tokenizer = SimpleNamespace(
            vocab_size=vocab_size, eod=0, pad=-1, unique_identifiers={}
        )

    def build(self, seq_length: int) -> int:
        """Build the indices anew for samples of `seq_length` tokens; return their number."""
        shutil.rmtree(self._cache, ignore_errors=True)
        config = GPTDatasetConfig(
            random_seed=1,
            sequence_length=seq_length,
            blend=([self._prefix], None),
            split="100,0,0",
            path_to_cache=str(self._cache),
            tokenizer=self._tokenizer,
            **dict.fromkeys(("reset_position_ids", "reset_attention_mask", "eod_mask_loss"), False),
        )
        corpus = GPTDataset.build_low_level_dataset(self._prefix, config)
        return len(GPTDataset(corpus, self._prefix, self._documents, None, Split.train, config))


def blend(samples: int, weights: Sequence[float]) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """Return (source, sample of the source) of each sample of a blend, by Megatron-Core."""
    dataset, sample = np.zeros(samples, dtype=np.int16), np.zeros(samples, dtype=np.int64)
    shares = np.array(weights)
    helpers.build_blending_indices(dataset, sample, shares, len(weights), samples, False)
    return dataset, sample
