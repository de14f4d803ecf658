"""Measure the sample order, with megatron-core's index builder side by side in the same run.

python tools/bench_order.py --documents 4000000
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from megatron_ettin import native
from megatron_ettin.config import DataConfig, PhaseConfig, SourceConfig
from megatron_ettin.evaluation.cold_reads import drop_from_memory, read_cold_rows
from megatron_ettin.file_digests import FileDigest, FileList, differences
from megatron_ettin.indexed import IndexedWriter
from megatron_ettin.objectives import MaskedLM
from megatron_ettin.order import SampleOrder
from megatron_ettin.order.digest import mask_digest, token_digest
from megatron_ettin.order.ledger import Kind, Ledger, LedgerWriter
from megatron_ettin.rows import TokenIds

SEQ_LENGTH = 1024
STEP_ROWS = 4608  # as published
MICRO_BATCH_ROWS = 64
VIRTUAL_ROWS = 1_660_000_000
VOCAB_SIZE = 50_368
BLOCK_DOCUMENTS = 65_536
LOADED_DOCUMENTS = 400_000
COLD_ROWS = 1000
LEDGER_RECORDS = 400_000
STEPS_PER_APPEND = 10  # the default of logging.log_every_steps
REPEAT_SECONDS = 1
HASHED_BYTES, HASHED_FILES = 1 << 29, 8
FULL_DOCUMENTS, FULL_ROWS = 2.67e9, 1.95e9  # of 2 T tokens
SHARES = (0.6, 0.25, 0.1, 0.05)

#: Key, what it is, target, unit and factor of the table, the key beside it for megatron-core.
LINES = (
    ("locate_ns", "locate a row among 1.95 G of 4 sources", "<= 60", "ns", 1, ""),
    ("segments_us", "locate a row and list its pieces", "<= 1.5", "us", 1, ""),
    ("where_us", "all rows of a document, in one epoch", "<= 50", "us", 1, ""),
    ("plan_docs_per_s_core", "index build, one thread", ">= 10", "M docs/s", 1e-6, "mcore_rate"),
    ("plan_peak_bytes_per_doc", "its memory per doc in flight", "<= 32", "B", 1, "mcore_peak"),
    ("index_bytes_per_sample", "its size per row", "<= 6", "B", 1, "mcore_index"),
    ("first_batch_s", "first batch of 1.66 G rows, cold files", "<= 2", "s", 1, ""),
    ("first_batch_rss_mb", "its memory, above the imports", "<= 200", "MB", 1, ""),
    ("cold_read_ratio", "bytes read / wanted, 1,000 cold rows", "<= 10", "", 1, ""),
    ("loader_tokens_per_s_core", "packed and masked batches", ">= 30", "M tokens/s", 1e-6, ""),
    ("checkpoint_hash_gb_s", "SHA-256 of a checkpoint's files", ">= 1", "GB/s", 1, ""),
    ("ledger_append_us", "ledger append, per step, 10 at a time", "<= 20", "us", 1, ""),
    ("verify_400k_s", "verify 400,000 records", "<= 2", "s", 1, ""),
)
MCORE_KEYS = [
    f"mcore_{what}" for what in ("build_ns_per_doc", "index_bytes_per_sample", "peak_bytes_per_doc")
]
Measured = dict[str, float]


class Bench(NamedTuple):
    """What every part is given: the size, and prefixes of corpora without and with real tokens."""

    folder: Path
    large: str
    loaded: str
    documents: int
    threads: int


def main() -> None:
    """Run every part in a fresh process, so that none sees another's memory, and report."""
    args = parse_arguments()
    measured: Measured = {}
    with tempfile.TemporaryDirectory(prefix="bench_order.", dir=args.work_dir) as folder:
        prefixes = (f"{folder}/{name}" for name in ("large", "loaded"))
        bench = Bench(Path(folder), *prefixes, args.documents, args.threads)
        for part in tqdm(PARTS, disable=None):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                measured |= process.submit(part, bench).result()
    print_table(measured, args)
    if args.json:
        keys = [*(line[0] for line in LINES), *MCORE_KEYS]
        print(json.dumps({key: measured[key] for key in keys}))


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--documents", type=int, default=4_000_000, help="of the corpus that is planned (4 M)")
    add("--threads", type=int, default=os.cpu_count(), help="of the build whose memory is taken")
    add("--work-dir", type=Path, help="where a temporary folder is made and removed")
    add("--json", action="store_true", help="end with one JSON object")
    args = parser.parse_args()
    if args.documents < 1 or args.threads < 1:
        parser.error("--documents and --threads must be at least 1")
    return args


def seconds_of(run: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    """Return the fastest of many runs in CPU seconds, which a busy machine changes little."""
    taken: list[float] = []
    while len(taken) < 3 or sum(taken) < REPEAT_SECONDS:
        begin = clock()
        run()
        taken.append(clock() - begin)
    return min(taken)


def rise_of(run: Callable[[], Any]) -> tuple[Any, float, int]:
    """Return a run's result, seconds, and bytes by which resident memory rose at its peak."""

    def peak() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024

    # Sets VmHWM back to what is resident now, which the imports have exceeded.
    Path("/proc/self/clear_refs").write_text("5")
    before, begin = peak(), time.perf_counter()
    result = run()
    return result, time.perf_counter() - begin, peak() - before


def prepare(bench: Bench) -> Measured:
    """Write a corpus to plan, all tokens 0 and none on disk, and one to load batches from."""
    lengths = draw_lengths(bench.documents, seed=1)
    # By hand, because no writer of the format can leave the tokens out.
    bounds = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    with open(f"{bench.large}.idx", "wb") as index:
        index.write(b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + b"\x08")
        index.write(np.array([len(lengths), len(bounds)], dtype="<i8").tobytes())
        for section in (lengths, bounds[:-1] * 2, np.arange(len(bounds))):
            section.tofile(index)
    with open(f"{bench.large}.bin", "wb") as tokens:
        tokens.truncate(2 * int(bounds[-1]))
    few = draw_lengths(min(bench.documents, LOADED_DOCUMENTS), seed=2)
    ids = np.random.default_rng(3).integers(5, VOCAB_SIZE, int(few.sum()), dtype=np.uint16)
    with IndexedWriter(bench.loaded, "uint16") as writer:
        writer.add_many(ids, few)
    for prefix in (bench.large, bench.loaded):
        open_order(prefix, rows=1)  # writes the identity and the plan
    return {}


def draw_lengths(count: int, seed: int) -> np.ndarray:
    """Return int32 document lengths, 750 tokens on average."""
    lengths = np.random.default_rng(seed).lognormal(5.9, 1.2, count)
    return lengths.clip(8, 200_000).astype(np.int32)


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
        quotas=native.blend_quotas(SHARES),
        rows=rows,
        drawn=[0] * 4,
    )
    steps = some_steps(sum(rows), 50)
    seconds = seconds_of(lambda: [order.locate(step) for step in steps])
    return {"locate_ns": seconds / sum(map(len, steps)) * 1e9}


def measure_segments(bench: Bench) -> Measured:
    """List the pieces of the rows of whole steps, from a plan that is in the page cache."""
    ((pool, plan),) = open_order(bench.large, rows=1).plans(0)
    order = native.PhaseOrder(seed=1, source_ids=[11], quotas=[1], rows=[pool.rows], drawn=[0])
    steps = some_steps(pool.rows, 10)
    plan.segments(np.arange(pool.rows))  # checks every block, which happens once
    seconds = seconds_of(lambda: [plan.segments(order.locate(step)[2]) for step in steps])
    return {"segments_us": seconds / sum(map(len, steps)) * 1e6}


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
    # As after a boot. Also, of files just written the kernel maps pieces of up to 2 MB at a time.
    drop_from_memory(files_of(bench.large))
    _, seconds, rise = rise_of(lambda: make_batch(open_order(bench.large, VIRTUAL_ROWS), 0))
    return {"first_batch_s": seconds, "first_batch_rss_mb": rise / 1e6}


def files_of(prefix: str) -> list[Path]:
    """Return the files of a corpus and its plans."""
    files = [Path(f"{prefix}.idx"), Path(f"{prefix}.bin"), *Path(f"{prefix}.plans").iterdir()]
    return [path for path in files if path.is_file()]


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
    from megatron_ettin.evaluation.mcore_index import McoreIndex, blend

    cache = bench.folder / "mcore"
    index = McoreIndex(bench.large, bench.documents, cache, vocab_size=VOCAB_SIZE)
    samples, _, rise = rise_of(lambda: index.build(SEQ_LENGTH))
    seconds = seconds_of(lambda: index.build(SEQ_LENGTH))
    # A blend adds two tables with one entry per sample each.
    tables = blend(samples, SHARES)
    blending = seconds_of(lambda: blend(samples, SHARES))
    saved = sum(path.stat().st_size for path in cache.glob("*.npy"))
    return {
        "mcore_build_ns_per_doc": seconds / bench.documents * 1e9,
        "mcore_blend_ns_per_sample": blending / samples * 1e9,
        "mcore_peak_bytes_per_doc": rise / bench.documents,
        "mcore_index_bytes_per_sample": (saved + sum(t.nbytes for t in tables)) / samples,
    }


def print_table(measured: Measured, args: argparse.Namespace) -> None:
    """Print what was measured beside its target, then what it means for 2 T tokens."""
    theirs = {
        "mcore_rate": 1e3 / measured["mcore_build_ns_per_doc"],
        "mcore_peak": measured["mcore_peak_bytes_per_doc"],
        "mcore_index": measured["mcore_index_bytes_per_sample"],
    }
    print(
        f"{args.documents:,} documents, rows of {SEQ_LENGTH}; CPU time, the fastest of many runs\n"
    )
    print(f"{'':40} {'measured':>9} {'target':>8}  {'unit':12} megatron-core")
    for key, what, target, unit, factor, beside in LINES:
        shown = f"{theirs[beside]:13.3g}" if beside else ""
        print(f"{what:40} {measured[key] * factor:9.3g} {target:>8}  {unit:12} {shown}".rstrip())
    build = FULL_DOCUMENTS * measured["mcore_build_ns_per_doc"] / 1e9
    print(f"""
Rows are {measured["fill"]:.3%} full. {args.threads} threads index {measured["all"]:.3g} M docs/s.
A step appended to the ledger alone: {measured["ledger_single_append_us"]:.3g} us.
Batches with all three digests for the ledger: {measured["recorded"]:.3g} M tokens/s.
The first batch, in elapsed time, is {MICRO_BATCH_ROWS} rows of many epochs of this corpus, whose
identity and plan are there; imports are not counted. megatron-core's memory is for every document
of the corpus, not those in flight, and its index has the blend's 10 B per sample.

Extrapolated linearly to 2 T tokens (2.67 G documents, 1.95 G rows), not measured:
  index build    {FULL_DOCUMENTS / measured["plan_docs_per_s_core"]:.0f} core-seconds, \
{FULL_ROWS * measured["index_bytes_per_sample"] / 1e9:.1f} GB
  megatron-core  {build:.0f} s on one thread, {FULL_ROWS * theirs["mcore_index"] / 1e9:.1f} GB, \
{FULL_DOCUMENTS * theirs["mcore_peak"] / 1e9:.0f} GB of memory; a blend of 4 takes \
{FULL_ROWS * measured["mcore_blend_ns_per_sample"] / 1e9:.0f} s more""")


PARTS: list[Callable[[Bench], Measured]] = [
    prepare,
    measure_locate,
    measure_segments,
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

if __name__ == "__main__":
    main()
