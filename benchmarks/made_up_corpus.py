"""A corpus without tokens, whose documents have lengths and provenance."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megatron_ettin.data.corpus_tokenizer import METADATA_KEY
from megatron_ettin.data.provenance import GROUP_DOCUMENTS, SCHEMA, sidecar_path, sidecar_writer


def draw_lengths(count: int, seed: int) -> NDArray[np.int32]:
    """Return document lengths [count], 750 tokens on average."""
    lengths = np.random.default_rng(seed).lognormal(5.9, 1.2, count)
    return lengths.clip(8, 200_000).astype(np.int32)


def write_shard(prefix: Path, documents: int) -> NDArray[np.int32]:
    """Write a .bin that is a hole, and its .idx; return the lengths of the documents."""
    lengths = draw_lengths(documents, seed=1)
    # No writer of the format can leave the tokens out: a .bin of holes costs no disk.
    bounds = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    with open(f"{prefix}.idx", "wb") as index:
        index.write(b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + b"\x08")
        index.write(np.array([len(lengths), len(bounds)], dtype="<i8").tobytes())
        for section in (lengths, bounds[:-1] * 2, np.arange(len(bounds))):
            section.tofile(index)
    with open(f"{prefix}.bin", "wb") as tokens:
        tokens.truncate(2 * int(bounds[-1]))
    return lengths


def write_sidecar(prefix: Path, lengths: NDArray[np.int32], tokenizer_sha256: str) -> None:
    """Write provenance as preprocessing does, with ids of 20 and urls of 40 characters."""
    with sidecar_writer(sidecar_path(prefix)) as writer:
        for begin in range(0, len(lengths), GROUP_DOCUMENTS):
            ordinals = np.arange(begin, min(begin + GROUP_DOCUMENTS, len(lengths)))
            writer.write_table(_group(ordinals, lengths[ordinals]), row_group_size=GROUP_DOCUMENTS)
        tokens = str(int(lengths.sum(dtype=np.int64)))
        writer.add_key_value_metadata({"tokens": tokens, METADATA_KEY: tokenizer_sha256})


def _group(ordinals: NDArray[np.int64], lengths: NDArray[np.int32]) -> pa.Table:
    # Random hexadecimal digits: ids that compress no better than real ones.
    random = np.frombuffer(os.urandom(32 * len(ordinals)), np.uint8).reshape(-1, 32)
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)[random & 15]
    texts = [bytes(row) for row in digits]
    ids = [f"{n:012d}{text[:8].decode()}" for n, text in zip(ordinals.tolist(), texts, strict=True)]
    columns = {
        "ordinal": ordinals,
        "id": ids,
        "url": [f"https://made.up/{text[:24].decode()}" for text in texts],
        "sha256": pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(32), len(ordinals), [None, pa.py_buffer(random.tobytes())]
        ),
        "n_tokens": lengths.astype(np.int64),
        "shard": pa.array(["made_up.jsonl"] * len(ordinals)).dictionary_encode(),
        "line": ordinals + 1,
    }
    return pa.table(columns).cast(SCHEMA)
