"""Unigram loss: what the held-out loss would be if a model knew the tokens' frequencies alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import assert_never

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_ettin.config import RunConfig, SourceConfig
from megatron_ettin.data.loader import Loader
from megatron_ettin.data.orders import open_held_out_order
from megatron_ettin.indexed import IndexedReader
from megatron_ettin.order.shard_list import list_shards
from megatron_ettin.rows import TokenIds
from megatron_ettin.training.validation import HeldOutLoss, mean_over_rows

CHUNK_DOCUMENTS = 4096


def unigram_loss(config: RunConfig) -> HeldOutLoss:
    """Return the loss of the training corpora's token frequencies on a run's held-out labels.

    The rows, the masks, the weights and so the scored tokens are those of the run's own held-out
    loss, in its last phase. Each token of the vocabulary is counted once more than it occurs
    (add-one smoothing).
    """
    order = open_held_out_order(config)
    counts = token_counts(config.data.sources, order.ids) + 1
    nats = np.log(counts.sum()) - np.log(counts)
    objective = config.objective.for_phase(config.phases[-1].name)
    loader = replace(Loader.of_run(config, order), objective=objective)
    num_rows = config.validation.num_rows
    rows = torch.zeros(num_rows, 2, dtype=torch.float64)
    for batch in loader.micro_batches(0, num_rows):
        scored = np.flatnonzero(batch.loss_mask)
        row = torch.from_numpy(batch.rows.g[scored // batch.rows.seq_length])
        losses = nats[batch.labels[scored]]
        if batch.weights is not None:
            losses = losses * batch.weights[scored]
        rows[:, 0].index_add_(0, row, torch.from_numpy(losses))
        averaged = np.flatnonzero(batch.averaged)
        row = torch.from_numpy(batch.rows.g[averaged // batch.rows.seq_length])
        rows[:, 1].index_add_(0, row, torch.ones(len(row), dtype=torch.float64))
    return mean_over_rows(rows)


def token_counts(sources: Mapping[str, SourceConfig], ids: TokenIds) -> NDArray[np.int64]:
    """Return [vocab_size] counts over corpora, with one [SEP] for each document that lacks it."""
    counts = np.zeros(ids.vocab_size, dtype=np.int64)
    for source in sources.values():
        for prefix in list_shards(source.prefix):
            shard = IndexedReader(prefix)
            shard.check_tokens(ids.vocab_size)
            for begin in range(0, len(shard), CHUNK_DOCUMENTS):
                end = min(begin + CHUNK_DOCUMENTS, len(shard))
                tokens = np.concatenate([shard[document] for document in range(begin, end)])
                counts += np.bincount(tokens, minlength=ids.vocab_size)
            match source.specials:
                case "add":
                    counts[ids.sep] += len(shard)
                case "present":
                    pass
                case _:
                    assert_never(source.specials)
    return counts
