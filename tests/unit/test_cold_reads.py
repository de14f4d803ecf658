"""Random rows of a corpus that is not in memory read little beside what they need."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.cold_reads import (
    device_bytes,
    drop_from_memory,
    read_cold_rows,
)
from megatron_ettin.config import DataConfig, PhaseConfig, SourceConfig
from megatron_ettin.indexed import IndexedWriter
from megatron_ettin.order import SampleOrder
from megatron_ettin.order.corpus_identity import identify_corpus
from megatron_ettin.rows import TokenIds

pytestmark = pytest.mark.slow

DOCUMENTS, MEAN_TOKENS, ROWS = 40_000, 800, 300
IDS = TokenIds(vocab_size=50_368, unk=0, cls=1, sep=2, pad=3, mask=4)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write a corpus of 64 MB, with its identity and plan, on a file system that can forget it."""
    prefix = str(tmp_path_factory.mktemp("cold") / "corpus")
    random = np.random.default_rng(1)
    lengths = random.integers(8, 2 * MEAN_TOKENS, DOCUMENTS)
    with IndexedWriter(prefix, "uint16") as writer:
        writer.add_many(random.integers(5, 50_368, lengths.sum(), dtype=np.uint16), lengths)
    open_order(prefix)
    drop_from_memory(files_of(prefix))
    before = device_bytes()
    size = len(Path(f"{prefix}.bin").read_bytes())
    if device_bytes() - before < size // 2:
        pytest.skip("this file system keeps files in memory, or does not count what it reads")
    return prefix


def files_of(prefix: str) -> list[Path]:
    files = Path(prefix).parent.rglob("*")
    return [path for path in files if path.is_file()]


def open_order(prefix: str) -> SampleOrder:
    phase = PhaseConfig(name="cold", train_tokens=8_000_000, seq_length=1024, global_batch_size=64)
    data = DataConfig(
        tokenizer="none",
        sources={"web": SourceConfig(prefix=prefix)},
        blend={"cold": {"web": 1.0}},
    )
    return SampleOrder(phases=[phase], data=data, seed=1, tokenizer_sha256="none", ids=IDS)


def test_random_rows_read_at_most_ten_times_what_they_hold(prefix: str) -> None:
    order = open_order(prefix)
    drop_from_memory(files_of(prefix))
    reads = read_cold_rows(order, ROWS)
    assert reads.wanted_bytes >= ROWS * 1024
    assert reads.read_bytes >= reads.wanted_bytes, "the files were in memory"
    assert reads.ratio <= 10


def test_opening_an_order_reads_no_corpus(prefix: str) -> None:
    drop_from_memory(files_of(prefix))
    before = device_bytes()
    open_order(prefix)
    assert device_bytes() - before < 1_000_000


def test_scans_read_each_byte_once_and_ahead(prefix: str) -> None:
    """The .idx and the .bin are read through, each by few requests, and no page twice."""
    Path(f"{prefix}.identity.json").unlink()
    drop_from_memory(files_of(prefix))
    before, faults = device_bytes(), major_faults()
    identify_corpus(prefix)
    size = sum(Path(f"{prefix}{suffix}").stat().st_size for suffix in (".idx", ".bin"))
    assert size <= device_bytes() - before < 1.1 * size
    # Read page by page, the .idx alone would be waited for 200 times.
    assert major_faults() - faults < 50


def major_faults() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt
