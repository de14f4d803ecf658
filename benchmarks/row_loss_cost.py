"""Cost of keeping the loss of every row, as a share of a training step of one process."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.made_up_corpus import draw_lengths
from megatron_ettin.config import RunConfig, parse_args
from megatron_ettin.data.orders import open_order
from megatron_ettin.data.tokenize import train_tokenizer, write_tokenizer
from megatron_ettin.indexed import IndexedWriter
from megatron_ettin.order.row_loss_writer import RowLossWriter
from megatron_ettin.training import set_up
from megatron_ettin.training.interval import Interval
from megatron_ettin.training.loop import Training, train_step
from megatron_ettin.training.micro_batch import Report
from megatron_ettin.training.preparation import StepRange, phase_micro_batches

SEQ_LENGTH, VOCAB_SIZE = 1024, 300
DOCUMENTS = 4000


@dataclass(frozen=True, kw_only=True)
class RowLossCost:
    """CPU seconds, medians."""

    rows: int
    """Rows of a step."""
    step_seconds: float
    """A step, with its report."""
    report_seconds: float
    """Adding up a step's losses, and the sum over ranks, without rows."""
    rows_seconds: float
    """The same with the loss of each row, and writing these to the file."""

    @property
    def share(self) -> float:
        """Part of a step that the rows add, if every step has a report."""
        return (self.rows_seconds - self.report_seconds) / self.step_seconds


def measure(model: str, folder: Path, *, rows: int, rounds: int) -> RowLossCost:
    """Measure steps of `rows` rows; needs process groups.

    The parts that differ are timed by themselves, on the losses of a real step: between whole steps
    the difference is lost in their spread.
    """
    config = _config(model, folder, rows)
    order = open_order(config)
    state = set_up.starting_state(config, order)
    run = set_up.build_training(config, order, state)
    writer = RowLossWriter.open(folder, 0, fork=None, is_on=True)
    assert writer is not None
    with run.reporter:
        taken: list[list[Report]] = []
        coming = phase_micro_batches(config, run.loader, state, order.spec.phases[0].end_g)
        steps, step = [], StepRange(step=1, phase=0, g_begin=0, g_end=rows, tokens=0)
        kept = _keeping_reports(run, taken)
        for _ in range(rounds):
            begin, interval = time.process_time(), Interval()
            batches = (next(coming) for _ in range(run.loader.num_micro_batches(0, rows)))
            train_step(kept, step, batches, state, 1e-6, interval)
            interval.sum_over_ranks()
            steps.append(time.process_time() - begin)

        def report(*, keeps_rows: bool) -> None:
            interval = Interval(keeps_rows=keeps_rows)
            interval.begin_step(step)
            interval.add_losses(taken[0])
            summary = interval.sum_over_ranks()
            if summary.row_losses is not None:
                writer.write(0, summary.row_losses)

        plain, with_rows = _in_turns(
            lambda: report(keeps_rows=False), lambda: report(keeps_rows=True), rounds=20 * rounds
        )
    run.recorder.record_end(state)
    writer.close()
    return RowLossCost(
        rows=rows,
        step_seconds=statistics.median(steps),
        report_seconds=plain,
        rows_seconds=with_rows,
    )


def _keeping_reports(run: Training, taken: list[list[Report]]) -> Training:
    """Return the training with passes whose reports are kept in `taken`."""

    def forward_backward(**given: Any) -> list[Report]:
        taken.append(run.forward_backward(**given))
        return taken[-1]

    return dataclasses.replace(run, forward_backward=forward_backward)


def _in_turns(*ways: Callable[[], None], rounds: int) -> list[float]:
    taken: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds):
        for times, way in zip(taken, ways, strict=True):
            begin = time.process_time()
            way()
            times.append(time.process_time() - begin)
    return [statistics.median(times) for times in taken]


def _config(model: str, folder: Path, rows: int) -> RunConfig:
    """Return a run over made up tokens, whose micro-batches hold four rows."""
    folder.mkdir()
    texts = [f"{letter} made up text, number {n}" for n, letter in enumerate("abcdefgh" * 64)]
    write_tokenizer(train_tokenizer(texts, VOCAB_SIZE), folder / "tokenizer")
    lengths = draw_lengths(DOCUMENTS, seed=1).astype(np.int64)
    ids = np.random.default_rng(1).integers(10, 200, int(lengths.sum()), dtype=np.uint16)
    with IndexedWriter(str(folder / "corpus"), "uint16") as corpus:
        corpus.add_many(ids, lengths)
    phase = {"name": "bench", "train_rows": 2**20, "train_tokens": 1, "seq_length": SEQ_LENGTH}
    sections = {
        "phases": [{**phase, "global_batch_size": rows}],
        "data": {
            "tokenizer": str(folder / "tokenizer"),
            "sources": {"made_up": {"prefix": str(folder / "corpus")}},
            "blend": {"bench": {"made_up": 1.0}},
        },
        "hardware": {"micro_batch_tokens": 4 * SEQ_LENGTH},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(sections))
    configs = [f"examples/model/{model}.yaml", "examples/objective/mlm.yaml", folder / "run.yaml"]
    return parse_args([*(f"--config={path}" for path in configs), f"--run_dir={folder / 'run'}"])
