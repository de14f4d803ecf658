"""The made-up run of the benchmark is a run like others, and its questions are answered."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.full_run import PHASES, SOURCES, FullRun
from benchmarks.query_times import QUESTIONS, Answered, as_json, as_text, ask
from benchmarks.row_loss_cost import RowLossCost, measure
from megatron_ettin.queries import command_line
from megatron_ettin.queries.documents import DocumentName
from megatron_ettin.queries.recorded_run import open_run
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
