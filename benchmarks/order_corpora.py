"""Corpora that the benchmark of the sample order plans and reads, and orders over them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.made_up_corpus import draw_lengths, write_shard
from megatron_ettin.config import DataConfig, PhaseConfig, SourceConfig
from megatron_ettin.indexed import IndexedWriter
from megatron_ettin.order import SampleOrder
from megatron_ettin.rows import TokenIds

SEQ_LENGTH = 1024
STEP_ROWS = 4608  # as published
VOCAB_SIZE = 50_368
LOADED_DOCUMENTS = 400_000


class Bench(NamedTuple):
    """Size of the benchmark, and prefixes of its corpora without and with real tokens."""

    folder: Path
    large: str
    loaded: str
    documents: int
    threads: int


def prepare(bench: Bench) -> dict[str, float]:
    """Write a corpus to plan, all tokens 0 and none on disk, and one to load batches from."""
    write_shard(Path(bench.large), bench.documents)
    few = draw_lengths(min(bench.documents, LOADED_DOCUMENTS), seed=2)
    ids = np.random.default_rng(3).integers(5, VOCAB_SIZE, int(few.sum()), dtype=np.uint16)
    with IndexedWriter(bench.loaded, "uint16") as writer:
        writer.add_many(ids, few.astype(np.int64))
    for prefix in (bench.large, bench.loaded):
        open_order(prefix, rows=1)  # writes the identity and the plan
    return {}


def open_order(prefix: str, rows: int) -> SampleOrder:
    """Return an order of one phase over one corpus."""
    phase = PhaseConfig(
        name="bench",
        train_tokens=rows * SEQ_LENGTH,
        train_rows=rows,
        seq_length=SEQ_LENGTH,
        global_batch_size=STEP_ROWS,
    )
    sources, blend = {"web": SourceConfig(prefix=prefix)}, {"bench": {"web": 1.0}}
    data = DataConfig(tokenizer="none", sources=sources, blend=blend)
    ids = TokenIds(vocab_size=VOCAB_SIZE, unk=0, cls=1, sep=2, pad=3, mask=4)
    return SampleOrder(phases=[phase], data=data, seed=1, tokenizer_sha256="none", ids=ids)


def files_of(prefix: str) -> list[Path]:
    """Return the files of a corpus and its plans."""
    files = [Path(f"{prefix}.idx"), Path(f"{prefix}.bin"), *Path(f"{prefix}.plans").iterdir()]
    return [path for path in files if path.is_file()]
