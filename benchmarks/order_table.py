"""Figures of the sample order's benchmark, beside their targets and Megatron-Core's figures."""

from __future__ import annotations

from benchmarks.order_corpora import SEQ_LENGTH
from benchmarks.order_parts import FULL_DOCUMENTS, FULL_ROWS, MICRO_BATCH_ROWS, Measured
from megatron_ettin.text_table import text_table

#: Key, description, target, unit, factor to that unit, and key of megatron-core's figure if any.
LINES = (
    ("locate_ns", "locate a row among 1.95 G of 4 sources", "<= 60", "ns", 1, ""),
    ("pieces_us", "locate a row and list its pieces", "<= 1.5", "us", 1, ""),
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


def figures(measured: Measured) -> Measured:
    """Return the fields of the benchmark's JSON object."""
    return {key: measured[key] for key in (*(line[0] for line in LINES), *MCORE_KEYS)}


def as_text(measured: Measured, *, documents: int, threads: int) -> str:
    """Return the table of figures and targets, then their extrapolation to 2 T tokens."""
    theirs = {
        "mcore_rate": 1e3 / measured["mcore_build_ns_per_doc"],
        "mcore_peak": measured["mcore_peak_bytes_per_doc"],
        "mcore_index": measured["mcore_index_bytes_per_sample"],
    }
    rows = [
        (
            what,
            f"{measured[key] * factor:.3g}",
            target,
            unit,
            f"{theirs[beside]:.3g}" if beside else "",
        )
        for key, what, target, unit, factor, beside in LINES
    ]
    names = ("", "measured", "target", "unit", "megatron-core")
    lines = [
        f"{documents:,} documents, rows of {SEQ_LENGTH}; CPU time, the fastest of many runs",
        "",
        *text_table(names, rows, numbers=("measured", "target", "megatron-core")),
    ]
    build = FULL_DOCUMENTS * measured["mcore_build_ns_per_doc"] / 1e9
    lines.append(f"""
Rows are {measured["fill"]:.3%} full. {threads} threads index {measured["all"]:.3g} M docs/s.
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
    return "\n".join(lines)
