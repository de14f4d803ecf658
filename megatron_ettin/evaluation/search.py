"""Exact search of the documents of a collection by the embeddings of an encoder of texts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from megatron_ettin.evaluation.beir import DEPTH, Collection

#: Documents whose embeddings are in memory at the same time.
BLOCK_DOCUMENTS = 10_000


class TextEncoder(Protocol):
    """Methods that sentence-transformers' single-vector and multi-vector encoders share."""

    def encode_query(self, inputs: Sequence[str], **options: Any) -> Any:
        """Return the embeddings of queries."""

    def encode_document(self, inputs: Sequence[str], **options: Any) -> Any:
        """Return the embeddings of documents."""

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Return the scores [queries, documents]."""


def search(
    encoder: TextEncoder, collection: Collection, *, batch_size: int
) -> dict[str, dict[str, float]]:
    """Return the DEPTH best documents of each query, with their scores.

    Raises:
        FloatingPointError: an embedding is not finite, as after training that diverged.
    """
    options = {"batch_size": batch_size, "show_progress_bar": sys.stderr.isatty()}
    queries = encoder.encode_query(list(collection.queries.values()), **options)
    ranking: dict[str, dict[str, float]] = {query: {} for query in collection.queries}
    everything = list(collection.documents)
    for first in range(0, len(everything), BLOCK_DOCUMENTS):
        identities = everything[first : first + BLOCK_DOCUMENTS]
        documents = encoder.encode_document(
            [collection.documents[identity] for identity in identities], **options
        )
        scores = encoder.similarity(queries, documents)
        if not torch.isfinite(scores).all():
            raise FloatingPointError("embeddings are not finite")
        best = scores.topk(min(DEPTH, len(identities)), dim=1)
        for query, values, places in zip(
            ranking, best.values.tolist(), best.indices.tolist(), strict=True
        ):
            found = ranking[query]
            found |= {identities[place]: value for place, value in zip(places, values, strict=True)}
            ranking[query] = dict(sorted(found.items(), key=lambda item: -item[1])[:DEPTH])
    return ranking
