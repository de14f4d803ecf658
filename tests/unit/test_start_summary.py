"""Report at the start: its lines, warnings, and epochs against documents counted one by one."""

import dataclasses
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_ettin.checkpoint import RunState
from megatron_ettin.config import PhaseConfig, RunConfig
from megatron_ettin.data.orders import open_order
from megatron_ettin.order import SampleOrder
from megatron_ettin.training.host_report import Hosts
from megatron_ettin.training.start_summary import log_summary, source_readings
from tests.conftest import TinyCorpus
from tests.orders import FIRST, SECOND, make_order
from tests.runs import tiny_config

HOSTS = Hosts(
    ranks=["one (ranks 0-1)", "two (ranks 2-3)"],
    num_ranks=4,
    versions={"python": "3.11", "torch": "2.13"},
    clock_spread_seconds=0.01,
    num_corpus_files=6,
    folder=Path("/runs"),
    free_bytes=3 * 2**30,
    checkpoint_bytes=2**29,
    num_checkpoints=4,
)


def report(
    config: RunConfig,
    caplog: pytest.LogCaptureFixture,
    *,
    state: RunState | None = None,
    **hosts: Any,
) -> dict[str, list[logging.LogRecord]]:
    """Return the records of the report by the name of their line."""
    caplog.clear()
    with caplog.at_level(logging.INFO):
        order = open_order(config)
        log_summary(config, order, state or RunState(), dataclasses.replace(HOSTS, **hosts))
    found: dict[str, list[logging.LogRecord]] = {}
    for record in caplog.records:
        found.setdefault(record.getMessage().strip().split("  ")[0], []).append(record)
    return found


def text_of(records: list[logging.LogRecord]) -> str:
    (record,) = records
    return record.getMessage().strip().split("  ", 1)[1].strip()


@pytest.mark.usefixtures("one_process")
def test_ten_lines_say_what_will_run(
    tiny_corpus: TinyCorpus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(tiny_corpus, tmp_path / "run")
    lines = report(config, caplog)
    assert list(lines) == [
        "run", "model", "hosts", "layout", "software", "phase short", "phase long", "held out",
        "checkpoints",
    ]  # fmt: skip
    order = open_order(config)
    assert text_of(lines["run"]).startswith(f"{tmp_path / 'run'}: new; order ")
    assert order.spec.order_id[:12] in text_of(lines["run"])
    assert "MaskedLM (bidirectional), 4 layers of width 64; 177,280 parameters" in text_of(
        lines["model"]
    )
    assert text_of(lines["hosts"]).startswith("2: one (ranks 0-1), two (ranks 2-3); clocks within")
    assert text_of(lines["layout"]).startswith("tensor 1 x pipeline 1 x context 1 x data 4; fp32")
    rows = [phase.num_rows for phase in order.spec.phases]
    assert text_of(lines["phase short"]).startswith(
        f"20,000 tokens, {rows[0]} rows of 128, {-(-rows[0] // 16)} steps of 16 rows: "
        f"1 micro-batch of 4 rows a rank, no rank idle; epochs: alpha 0."
    )
    assert text_of(lines["phase long"]).startswith(
        f"10,000 tokens, {rows[1]} rows of 256, {-(-rows[1] // 8)} steps of 8 rows: "
    )
    assert text_of(lines["held out"]) == (
        f"8 rows of 128 from {tiny_corpus.folder / 'held_out'}, at the end"
    )
    assert text_of(lines["checkpoints"]) == (
        "at most 4 to come of 512.0 MiB: 2.00 GiB; /runs has 3.00 GiB free"
    )
    assert {record.levelno for records in lines.values() for record in records} == {logging.INFO}


@pytest.mark.usefixtures("one_process")
def test_what_deserves_care_is_a_warning(
    tiny_corpus: TinyCorpus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    phase = {"name": "short", "train_tokens": 90_000, "seq_length": 128, "global_batch_size": 9}
    data = {**tiny_corpus.data, "pools": {}, "validation": []}
    config = tiny_config(tiny_corpus, tmp_path / "run", phases=[phase], data=data)
    state = RunState(g=100, step=12)
    lines = report(config, caplog, state=state, clock_spread_seconds=7.0, free_bytes=2**30)
    warned = {
        name
        for name, records in lines.items()
        if all(record.levelno == logging.WARNING for record in records)
    }
    assert warned == {"hosts", "instead", "repeats", "checkpoints"}
    assert "goes on after step 12 (" in text_of(lines["run"])
    assert "1 micro-batch of 4 rows a rank, 1 of 4 ranks idle: 43.8% of the time lost" in text_of(
        lines["phase short"]
    )
    # 9 rows over 4 ranks: 3 for each lose 25 %, and 3 ranks with 4 rows lose as much as 4 do.
    assert [record.getMessage().split("  ")[-1].strip() for record in lines["instead"]] == [
        "global_batch_size 16 leaves no rank idle",
        "hardware.micro_batch_tokens 384 loses 25.0% of the run",
        "3 ranks with these micro-batches take as long",
    ]
    (reading,) = [r for r in source_readings(open_order(config))[0] if r.source == "beta"]
    assert reading.epochs > 1.5
    assert f"documents are read again: beta {reading.epochs:.2f} epochs; " in text_of(
        lines["repeats"]
    )
    assert text_of(lines["held out"]) == "none"


def pieces_read(order: SampleOrder, begin: int, end: int) -> Counter[tuple[str, int]]:
    """Count the tokens of each document that rows [begin, end) hold."""
    pieces = order.pieces(begin, end)
    found: Counter[tuple[str, int]] = Counter()
    for source, document, length in zip(
        pieces.source.tolist(), pieces.document.tolist(), pieces.length.tolist(), strict=True
    ):
        found[order.source_names[source], document] += length
    return found


@pytest.mark.parametrize("factor", [1, 4])
@pytest.mark.parametrize("repeats", [False, True])
def test_epochs_are_those_of_documents_counted_one_by_one(
    factor: int, repeats: bool, tiny_corpus: TinyCorpus
) -> None:
    """Whole epochs show as the most that a document is read, the rest as a part of one."""
    second = dataclasses.replace(SECOND, allow_repeats=True) if repeats else SECOND
    phases: list[PhaseConfig] = [FIRST.scaled(factor), second.scaled(factor)]
    pools = {"first": (0.0, 0.6), "second": (0.4, 1.0) if repeats else (0.6, 1.0)}
    order = make_order(tiny_corpus, *phases, pools=pools)
    for phase, readings in zip(order.spec.phases, source_readings(order), strict=True):
        drawn = pieces_read(order, phase.start_g, phase.end_g)
        so_far = pieces_read(order, 0, phase.end_g)
        for pool, reading in zip(phase.pools, readings, strict=True):
            assert reading.source == pool.source
            inside = range(pool.first_document, pool.end_document)
            lengths = {n: len(order.corpus(pool.source).tokens(n)) for n in inside}
            times = [drawn[pool.source, n] / lengths[n] for n in inside if lengths[n]]
            # A document comes once in each epoch, so counts are the epochs rounded up or down.
            assert min(times) - 1e-9 <= reading.epochs <= max(times) + 1e-9
            assert max(times) - min(times) <= 1.0 + 1e-9
            most = max(so_far[pool.source, n] / lengths[n] for n in inside if lengths[n])
            # Of two pools, each rounds.
            assert reading.times_read - 1e-9 <= most <= reading.times_read + 2.0


def test_a_source_that_is_read_again_is_named_with_what_was_read_before(
    tiny_corpus: TinyCorpus,
) -> None:
    again = dataclasses.replace(FIRST, name="again")
    pools = {"first": (0.0, 0.6), "again": (0.0, 0.6)}
    order = make_order(tiny_corpus, FIRST, again, pools=pools)
    first, second = source_readings(order)
    for once, twice in zip(first, second, strict=True):
        assert twice.times_read == pytest.approx(once.epochs + twice.epochs)
        assert str(once) == f"{once.source} {once.epochs:.2f}"
        assert str(twice).endswith(f"({twice.times_read:.2f} with earlier phases)")
