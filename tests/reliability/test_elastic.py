"""One run whose ranks, layout and micro-batch change with every start."""

import time
from pathlib import Path

import pytest

from megatron_ettin.evaluation.layouts import LAYOUTS, Curve, Layout, read_curve
from megatron_ettin.order.ledger import Ledger
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.queries.verify import verify
from tests.conftest import TinyCorpus
from tests.ranks import pretrain_main, started_ranks
from tests.training import RESUME, train_here

#: Layout and slots of a micro-batch, start by start: 1 -> 2 -> 1 data-parallel ranks, 2 -> 1
#: tensor-parallel ranks, 1 -> 2 pipeline stages.
CHAIN = [("tp1", 512), ("dp2", 256), ("tp1", 1024), ("tp2", 512), ("tp1", 256), ("pp2", 1024)]
#: Reports after which a start is asked to stop.
STEPS = 2
#: Far above what a start takes.
DEADLINE_SECONDS = 240.0
PHASES = [
    {"name": "short", "train_tokens": 40_000, "seq_length": 128, "global_batch_size": 16},
    {"name": "long", "train_tokens": 10_000, "seq_length": 256, "global_batch_size": 8},
]


def start(layout: Layout, arguments: list[str], run: RunFolder, logs: Path, *, stops: bool) -> None:
    """Go on with the run; ask it to stop after a few steps, or let it end."""
    already = len(run.metrics_lines())
    deadline = time.monotonic() + DEADLINE_SECONDS
    arguments = [*arguments, *layout.arguments()]
    with started_ranks(pretrain_main, [arguments], ranks=layout.processes, logs=logs) as processes:
        while any(process.is_alive() for process in processes):
            assert time.monotonic() < deadline, (logs / "rank0.log").read_text()[-4000:]
            if stops and len(run.metrics_lines()) >= already + STEPS:
                run.stop.touch()
            time.sleep(0.01)
        codes = [process.exitcode for process in processes]
    assert not any(codes), (logs / "rank0.log").read_text()[-4000:]


@pytest.mark.slow
def test_a_run_goes_on_under_every_number_of_ranks(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    config = tiny_corpus.write_config(
        tmp_path / "run.yaml", objective="MaskedLM", phases=PHASES, validation={"num_rows": 8}
    )
    expected: Curve = train_here([f"--config={config}"], tmp_path / "alone")
    run = RunFolder(tmp_path / "run")
    for number, (name, slots) in enumerate(CHAIN):
        arguments = [
            f"--config={config}",
            f"--run_dir={run.path}",
            f"--hardware.micro_batch_tokens={slots}",
            RESUME,
        ]
        start(LAYOUTS[name], arguments, run, tmp_path, stops=number < len(CHAIN) - 1)
    ledger = Ledger.read(run.ledger)
    layouts = [event["layout"] for event in ledger.events.values() if "layout" in event]
    found = [
        (
            layout["data_parallel_size"],
            layout["tensor_parallel_size"],
            layout["pipeline_parallel_size"],
            layout["micro_batch_tokens"],
        )
        for layout in layouts
    ]
    assert found == [
        (1, 1, 1, 512),
        (2, 1, 1, 256),
        (1, 1, 1, 1024),
        (1, 2, 1, 512),
        (1, 1, 1, 256),
        (1, 1, 2, 1024),
    ]
    assert ledger.forks() == [], "every start took up the rows where the one before ended"
    curve = read_curve(run.path)
    assert curve.largest_relative_difference(expected) <= 1e-5
    assert curve.token_digest == expected.token_digest
    assert verify(run.path, share=1.0, weights=True).passed
