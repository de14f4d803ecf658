"""Parts of the sample order, measured one by one, and Megatron-Core's index builder beside them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from benchmarks.cold_reads import drop_from_memory, read_cold_rows
from benchmarks.costs import rise_of, seconds_of
from benchmarks.order_corpora import (
    SEQ_LENGTH,
    STEP_ROWS,
    VOCAB_SIZE,
    Bench,
    files_of,
    open_order,
    prepare,
)
from megatron_ettin import native
from megatron_ettin.file_digests import FileDigest, FileList, differences
from megatron_ettin.objectives import MaskedLM
from megatron_ettin.order import SampleOrder
from megatron_ettin.order.blend import blend_quotas
from megatron_ettin.order.digest import mask_digest, token_digest
from megatron_ettin.order.ledger import Kind, Ledger, LedgerWriter

MICRO_BATCH_ROWS = 64
VIRTUAL_ROWS = 1_660_000_000
BLOCK_DOCUMENTS = 65_536
COLD_ROWS = 1000
LEDGER_RECORDS = 400_000
STEPS_PER_APPEND = 10  # the default of logging.log_every_steps
HASHED_BYTES, HASHED_FILES = 1 << 29, 8
FULL_DOCUMENTS, FULL_ROWS = 2.67e9, 1.95e9  # of 2 T tokens
SHARES = (0.6, 0.25, 0.1, 0.05)

Measured = dict[str, float]


def some_steps(rows: int, count: int) -> list[np.ndarray]:
    """Return the rows of `count` steps at random places among `rows`."""
    size = min(STEP_ROWS, rows)
    begins = np.random.default_rng(1).integers(0, rows - size + 1, count)
    return [np.arange(begin, begin + size) for begin in begins]


def measure_locate(_: Bench) -> Measured:
    """Locate the rows of steps anywhere in a phase of 1.95 G rows of four sources."""
    rows = [int(FULL_ROWS * share) for share in SHARES]
    order = native.PhaseOrder(
        seed=1,
        source_ids=[11, 12, 13, 14],
        quotas=blend_quotas(SHARES),
        rows=rows,
        drawn=[0] * 4,
    )
    steps = some_steps(sum(rows), 50)
    seconds = seconds_of(lambda: [order.locate(step) for step in steps])
    return {"locate_ns": seconds / sum(map(len, steps)) * 1e9}


def measure_pieces(bench: Bench) -> Measured:
    """List the pieces of the rows of whole steps, from a plan that is in the page cache."""
    ((pool, plan),) = open_order(bench.large, rows=1).plans(0)
    order = native.PhaseOrder(seed=1, source_ids=[11], quotas=[1], rows=[pool.rows], drawn=[0])
    steps = some_steps(pool.rows, 10)
    plan.pieces(np.arange(pool.rows))  # checks every block, which happens once
    seconds = seconds_of(lambda: [plan.pieces(order.locate(step)[2]) for step in steps])
    return {"pieces_us": seconds / sum(map(len, steps)) * 1e6}


def measure_where(bench: Bench) -> Measured:
    """Look up documents anywhere in the corpus, in a phase that is one epoch."""
    ((pool, _),) = open_order(bench.large, rows=1).plans(0)
    order = open_order(bench.large, rows=pool.rows)
    documents = np.random.default_rng(1).integers(0, bench.documents, 1000).tolist()
    seconds = seconds_of(lambda: [order.where("web", document) for document in documents])
    return {"where_us": seconds / len(documents) * 1e6}


def build_plan(bench: Bench, threads: int) -> Path:
    """Pack the large corpus into a new file."""
    path = Path(tempfile.mkdtemp(dir=bench.folder)) / "timed.plan"
    native.build_row_plan(
        native.TokenFile(bench.large, check=False),
        path,
        first_document=0,
        end_document=bench.documents,
        seq_length=SEQ_LENGTH,
        pack="bfd",
        specials="add",
        min_doc_tokens=1,
        max_segments_per_row=SEQ_LENGTH // 16,
        threads=threads,
    )
    return path


def measure_plan(bench: Bench) -> Measured:
    """Pack the corpus with one thread, then with all."""
    one = seconds_of(lambda: build_plan(bench, threads=1))
    every = seconds_of(lambda: build_plan(bench, bench.threads), time.perf_counter)
    ((_, plan),) = open_order(bench.large, rows=1).plans(0)
    (path,) = Path(f"{bench.large}.plans").glob("*.plan")
    return {
        "plan_docs_per_s_core": bench.documents / one,
        "all": bench.documents / every / 1e6,
        "index_bytes_per_sample": path.stat().st_size / plan.num_rows,
        "fill": plan.num_tokens / (plan.num_rows * SEQ_LENGTH),
    }


def measure_plan_memory(bench: Bench) -> Measured:
    """Pack the corpus with all threads, each of which has the documents of one block."""
    _, _, rise = rise_of(lambda: build_plan(bench, bench.threads))
    in_flight = min(bench.documents, bench.threads * BLOCK_DOCUMENTS)
    return {"plan_peak_bytes_per_doc": rise / in_flight}


def measure_first_batch(bench: Bench) -> Measured:
    """Open an order of 1.66 G rows, many epochs of the corpus, and make the first batch."""
    # As after a boot. Files just written are in the page cache, of which the kernel maps up to
    # 2 MB at a touch: that would count as our resident memory.
    drop_from_memory(files_of(bench.large))
    _, seconds, rise = rise_of(lambda: make_batch(open_order(bench.large, VIRTUAL_ROWS), 0))
    return {"first_batch_s": seconds, "first_batch_rss_mb": rise / 1e6}


def measure_cold_reads(bench: Bench) -> Measured:
    """Read rows from anywhere in a corpus that is not in memory."""
    order = open_order(bench.loaded, rows=1 << 20)
    drop_from_memory(files_of(bench.loaded))
    return {"cold_read_ratio": read_cold_rows(order, COLD_ROWS).ratio}


def make_batch(order: SampleOrder, begin: int, record: bool = False) -> int:
    """Assemble and mask one micro-batch, as training does, and return its tokens."""
    rows = order.rows(0, np.arange(begin, begin + MICRO_BATCH_ROWS))
    batch = MaskedLM().make_batch(rows, phase="bench", mask_seed=1, ids=order.ids)
    if record:
        order.order_digests_of(0, rows.g), token_digest(rows, rows.tokens), mask_digest(batch)
    return int(rows.num_tokens.sum())


def measure_checkpoint_hash(bench: Bench) -> Measured:
    """Compare files with a list of their digests, as before a checkpoint is loaded."""
    folder = Path(tempfile.mkdtemp(dir=bench.folder))
    content = bytes(HASHED_BYTES // HASHED_FILES)
    listed = FileList({f"{n}": FileDigest.of_content(content) for n in range(HASHED_FILES)})
    for name in listed.files:
        (folder / name).write_bytes(content)
    seconds = seconds_of(lambda: differences(folder, listed, listed.files), time.perf_counter)
    return {"checkpoint_hash_gb_s": HASHED_BYTES / seconds / 1e9}


def measure_loader(bench: Bench) -> Measured:
    """Make batches from a corpus that is in the page cache."""
    order = open_order(bench.loaded, rows=1 << 20)
    begins = range(0, 20 * MICRO_BATCH_ROWS, MICRO_BATCH_ROWS)
    tokens = sum(make_batch(order, begin) for begin in begins)
    seconds = seconds_of(lambda: [make_batch(order, begin) for begin in begins])
    recorded = seconds_of(lambda: [make_batch(order, begin, record=True) for begin in begins])
    return {"loader_tokens_per_s_core": tokens / seconds, "recorded": tokens / recorded / 1e6}


def measure_ledger(bench: Bench) -> Measured:
    """Append the records of a run as training does, without syncing, then verify them."""
    folder = bench.folder / "ledger"
    lanes = np.random.default_rng(1).integers(0, 2**63, (STEPS_PER_APPEND, 2), dtype=np.uint64)

    def append(writer: LedgerWriter, first: int, count: int) -> float:
        step, phase = np.arange(first, first + count), np.zeros(count, dtype=np.int64)
        tokens, digests = phase + STEP_ROWS * SEQ_LENGTH, lanes[:count]
        rows = ((step - 1) * STEP_ROWS, step * STEP_ROWS)
        begin = time.process_time()
        writer.append_steps(step, phase, *rows, tokens, digests, digests, digests[:, 0])
        return time.process_time() - begin

    with LedgerWriter.open(folder) as writer:
        writer.append(Kind.START, step=0, g_begin=0, g_end=0, payload={})
        singly = sum(append(writer, step, 1) for step in range(1, 1000))
        firsts = range(1000, LEDGER_RECORDS, STEPS_PER_APPEND)
        together = sum(append(writer, step, STEPS_PER_APPEND) for step in firsts)
        writer.sync()
    return {
        "ledger_append_us": together / len(firsts) / STEPS_PER_APPEND * 1e6,
        "ledger_single_append_us": singly / 999 * 1e6,
        "verify_400k_s": seconds_of(lambda: Ledger.read(folder, verify=True)),
    }


def measure_mcore(bench: Bench) -> Measured:
    """Let megatron-core build and save its indices for one epoch of the same corpus."""
    from benchmarks.mcore_index import McoreIndex, blend

    cache = bench.folder / "mcore"
    index = McoreIndex(bench.large, bench.documents, cache, vocab_size=VOCAB_SIZE)
    samples, _, rise = rise_of(lambda: index.build(SEQ_LENGTH))
    seconds = seconds_of(lambda: index.build(SEQ_LENGTH))
    # GPTDataset is one corpus: a blend adds two tables, of 2 and 8 bytes per sample.
    tables = blend(samples, SHARES)
    blending = seconds_of(lambda: blend(samples, SHARES))
    saved = sum(path.stat().st_size for path in cache.glob("*.npy"))
    return {
        "mcore_build_ns_per_doc": seconds / bench.documents * 1e9,
        "mcore_blend_ns_per_sample": blending / samples * 1e9,
        "mcore_peak_bytes_per_doc": rise / bench.documents,
        "mcore_index_bytes_per_sample": (saved + sum(t.nbytes for t in tables)) / samples,
    }


PARTS: list[Callable[[Bench], Measured]] = [
    prepare,
    measure_locate,
    measure_pieces,
    measure_where,
    measure_plan,
    measure_plan_memory,
    measure_first_batch,
    measure_cold_reads,
    measure_checkpoint_hash,
    measure_loader,
    measure_ledger,
    measure_mcore,
]


def measure_parts(bench: Bench) -> Iterator[Measured]:
    """Run every part in a fresh process, so that none sees another's memory."""
    for part in PARTS:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            yield process.submit(part, bench).result()
