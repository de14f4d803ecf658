"""The made-up run of the benchmark is a run like others, and its questions are answered."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.full_run import EARLY, EARLY_STEPS, PHASES, SOURCES, FullRun
from benchmarks.query_times import QUESTIONS, Answered, as_json, as_text, ask
from benchmarks.row_loss_cost import RowLossCost, measure
from megatron_ettin.queries import command_line
from megatron_ettin.queries.docs import write_docs
from megatron_ettin.queries.documents import DocumentName
from megatron_ettin.queries.export import export_ettin
from megatron_ettin.queries.losses import find_curves
from megatron_ettin.queries.recorded_run import open_run
from megatron_ettin.queries.run_losses import RunLosses
from megatron_ettin.queries.spikes import find_spikes
from megatron_ettin.queries.verify import verify
from megatron_ettin.queries.where import locate

#: Commands that read all tokens of the corpora.
READ_ALL = {"contaminated", "search"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made_up")
    return FullRun(folder=folder, documents=40_000, shards=20, step_rows=32).make()


def test_every_question_is_measured() -> None:
    asked = {question.split()[0] for question in QUESTIONS}
    assert asked | READ_ALL == set(command_line.COMMANDS)


def test_the_run_is_sound_but_for_its_tokens(made: Path) -> None:
    verification = verify(made, order=False, tokens=False)
    assert verification.passed, verification.faults
    run = open_run(made)
    assert [phase.name for phase in run.order.phases] == list(PHASES)
    assert run.order.source_names == sorted(SOURCES)
    assert sum(run.order.corpus(name).num_documents for name in SOURCES) == 40_000
    assert run.steps_done == int(run.num_steps * 0.99)
    (document,) = locate(run, DocumentName(doc="web:21")).documents
    assert document.id is not None
    assert document.id.startswith("000000000021")
    found = find_spikes(run, num=50)
    # The first row of each write, of which there are about 100, and every thousandth after it.
    assert 90 <= found.rows_above <= 130
    assert np.median([row.loss - row.typical for row in found.rows]) == pytest.approx(2.0, abs=0.3)


def test_curves_of_rows_that_all_have_tokens(made: Path) -> None:
    """The shorter way through the file, against one row after the other."""
    run = open_run(made)
    losses, names = RunLosses(run), [phase.name for phase in run.order.phases]
    points = find_curves(run, 3).points
    assert {point.source for point in points} == set(SOURCES)
    for point in points:
        phase = names.index(point.phase)
        pools = [pool.source for pool in losses.phases[phase].pools]
        sums, tokens = [], []
        for g in range(point.g_begin, point.g_end):
            if pools[losses.sources(phase, np.array([g]))[0]] == point.source:
                row = losses.reader.read(g, g + 1)
                assert row.all_scored
                sums.append(float(row.sums[0]))
                tokens.append(int(row.tokens[0]))
        assert point.rows == len(sums)
        assert point.loss == pytest.approx(math.fsum(sums) / sum(tokens), rel=1e-12)


def test_the_first_steps_are_fed_what_their_record_says(made: Path, tmp_path: Path) -> None:
    early = made.with_name(EARLY)
    assert verify(early, tokens=False).passed  # masks are made up, and `export` compares tokens
    run = open_run(early)
    assert run.steps_done == EARLY_STEPS
    (last,) = run.checkpoints[-1:]
    assert write_docs(run, run.checkpoint("0"), last, tmp_path / "docs.parquet").rows == run.end_g
    folders = export_ettin(run, tmp_path / "exported", run.checkpoint("0"), last)
    assert sum(folder.rows for folder in folders) == run.end_g


@pytest.mark.slow
def test_a_question_has_its_cost(made: Path) -> None:
    answer = ask("skips", ["skips", "--run", str(made)])
    assert answer.status == 0
    assert answer.seconds > 0.0 < answer.cpu_seconds
    assert 0 < answer.private_bytes < answer.resident_bytes
    assert ask("skips", ["skips", "--run", str(made / "nowhere")]).status == 1
    assert "skips" in as_text([answer]).splitlines()[-1]
    assert Answered(**json.loads(as_json([answer]))["skips"]) == answer


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
def test_the_cost_of_row_losses_is_measured(tmp_path: Path) -> None:
    cost = measure("nano", tmp_path / "bench", rows=4, rounds=1)
    assert isinstance(cost, RowLossCost)
    assert (cost.rows, cost.rows_seconds > cost.report_seconds > 0.0) == (4, True)
    assert 0.0 < cost.share < 1.0
