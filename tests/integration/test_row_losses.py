"""Losses of rows that training keeps: as computed row by row from the weights; after a resume."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ettin.config import parse_args
from megatron_ettin.data.orders import open_order
from megatron_ettin.order.ledger import Ledger
from megatron_ettin.order.row_losses import RowLosses, RowLossReader, RowState, fork_losses
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.queries.recorded_run import open_run
from megatron_ettin.queries.skips import list_skips
from megatron_ettin.queries.spikes import find_spikes
from megatron_ettin.queries.verify import verify
from megatron_ettin.training import set_up
from megatron_ettin.training.interval import Interval
from megatron_ettin.training.loop import Training, train_step
from megatron_ettin.training.micro_batch import make_micro_batch
from megatron_ettin.training.preparation import phase_micro_batches, phase_steps
from tests.conftest import TinyCorpus
from tests.training import RESUME, cut_off, train_here

pytestmark = pytest.mark.slow

OBJECTIVES: dict[str, Any] = {
    "MaskedLM": "MaskedLM",
    "mixture": {
        "class_path": "Mixture",
        "init_args": {
            "objectives": [
                {"class_path": name} for name in ("MaskedNextToken", "CausalLM", "MaskedDiffusion")
            ],
            "shares": [1, 1, 2],
        },
    },
}
SKIPPED = (4, 7)


def losses_of(run: Path) -> RowLosses:
    reader = RowLossReader.open(RunFolder(run).row_losses)
    return reader.read(0, reader.end_g)


def reference(run: Training, g: int) -> tuple[float, int]:
    """Return sum and tokens of a row, from logits of a stream that holds it alone."""
    rows = run.loader.order.rows(0, np.array([g]))
    batch = run.config.objective.make_batch(
        rows, phase="short", mask_seed=run.config.seeds.mask, ids=run.loader.order.ids
    )
    given = make_micro_batch(batch, slots=slice(0, len(rows.tokens)), capacity=1, stream=None)
    with torch.no_grad():
        logits = run.stage(tokens=given.tokens, packed=given.packed).double()
    logarithms = torch.log_softmax(logits, dim=-1).numpy()
    scored = np.flatnonzero(batch.loss_mask)
    weights = np.ones(len(scored)) if batch.weights is None else batch.weights[scored]
    total = -float((weights * logarithms[scored, batch.labels[scored]]).sum())
    return total, int(np.count_nonzero(batch.averaged))


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_gives_the_losses_that_its_rows_have_alone(
    name: str, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    """The rows of a step share streams there; here each is computed by itself, in float64."""
    path = tiny_corpus.write_config(tmp_path / "run.yaml", objective=OBJECTIVES[name])
    config = parse_args([f"--config={path}", f"--run_dir={tmp_path / 'run'}"])
    order = open_order(config)
    state = set_up.starting_state(config, order)
    run = set_up.build_training(config, order, state)
    with run.reporter:
        run.stage.set_rotary_bases(*run.config.phases[0].rotary_bases)
        end = order.spec.phases[0].end_g
        step = next(phase_steps(config, order, state, end))
        expected = [reference(run, g) for g in range(step.g_begin, step.g_end)]
        interval = Interval(keeps_rows=True)
        train_step(
            run, step, phase_micro_batches(config, run.loader, state, end), state, 0.0, interval
        )
        found = interval.sum_over_ranks().row_losses
    run.recorder.record_end(state)
    assert found is not None
    assert (found["word"] - (1 << 30)).tolist() == [tokens for _, tokens in expected]
    # Sums are kept in float32, whose rounding is 6e-8; the passes compute in float32 too.
    assert found["loss_sum"] == pytest.approx([total for total, _ in expected], rel=2e-6)


@pytest.fixture(scope="module")
def whole(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run that keeps losses, leaves out rows and has several checkpoints."""
    folder = tmp_path_factory.mktemp("runs")
    sections = {
        "objective": "MaskedLM",
        "checkpoint": {"save_every_tokens": 6_000},
        "logging": {"row_losses": True},
        "data": {**tiny_corpus.data, "skip_rows": [list(SKIPPED)]},
    }
    config = tiny_corpus.write_config(folder / "run.yaml", **sections)
    train_here([f"--config={config}"], folder / "whole")
    return folder / "whole"


def test_all_rows_of_a_run_have_their_losses(whole: Path) -> None:
    losses, ledger = losses_of(whole), Ledger.read(whole / "ledger")
    assert len(losses.sums) == int(ledger.records["g_end"][-1])
    skipped = np.flatnonzero(losses.states == RowState.LEFT_OUT)
    assert skipped.tolist() == list(range(*SKIPPED))
    assert (np.delete(losses.states, skipped) == RowState.TRAINED).all()
    lines = [line for line in RunFolder(whole).read_metrics() if line["kind"] == "train"]
    assert len(lines) == len(ledger.steps) > 10
    for line, step in zip(lines, ledger.steps, strict=True):
        rows = slice(int(step["g_begin"]), int(step["g_end"]))
        total = losses.sums[rows].astype(np.float64).sum() / losses.tokens[rows].sum()
        assert total == pytest.approx(line["loss"], rel=1e-6)


def test_a_resume_keeps_the_losses_and_the_fork_keeps_the_old_ones(
    whole: Path, tmp_path: Path
) -> None:
    run = cut_off(whole, tmp_path / "run", keep=2)
    back = Ledger.read(run / "ledger").checkpoints()[1].g
    train_here([f"--config={whole.parent / 'run.yaml'}", RESUME], run)
    path = RunFolder(run).row_losses
    assert path.read_bytes() == RunFolder(whole).row_losses.read_bytes()
    (fork,) = Ledger.read(run / "ledger").forks()
    old, end = RowLossReader.open(fork_losses(run / "ledger", fork.file)), losses_of(whole)
    assert (old.first_g, old.end_g) == (back, len(end.sums))
    assert old.read(back, old.end_g).sums.tolist() == end.sums[back:].tolist()


def test_a_run_repeated_without_the_spikes_is_a_recorded_fork(whole: Path, tmp_path: Path) -> None:
    run = cut_off(whole, tmp_path / "run", keep=1)
    back = Ledger.read(run / "ledger").checkpoints()[0].g
    found = find_spikes(open_run(run), back, z=1.0, num=3, skip=tmp_path / "skip.yaml")
    spikes = sorted(row.g for row in found.rows)
    assert len(spikes) == 3
    configs = [f"--config={path}" for path in (whole.parent / "run.yaml", tmp_path / "skip.yaml")]
    train_here([*configs, RESUME], run)
    (fork,) = Ledger.read(run / "ledger").forks()
    assert fork.steps > 0
    skips = list_skips(run).skips
    rows = {g for skip in skips if skip.fork is None for g in range(skip.g_begin, skip.g_end)}
    assert rows == {*range(*SKIPPED), *spikes}
    assert {skip.reason for skip in skips} == {"data.skip_rows"}
    left_out = np.flatnonzero(losses_of(run).states == RowState.LEFT_OUT)
    assert left_out.tolist() == sorted(rows)
    verification = verify(run)
    assert verification.passed, verification.faults
    (checked,) = [check for check in verification.checks if check.check == "row losses"]
    bound = len(Ledger.read(run / "ledger").checkpoints()) + len(
        Ledger.read(run / "ledger").read_fork(fork).checkpoints()
    )
    assert (checked.compared, checked.failures) == (bound, 0)
