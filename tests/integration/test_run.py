"""Whole runs: resuming, killing, initialising, reporting."""

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_ettin.checkpoint import RunState
from megatron_ettin.checkpoint_files import CheckpointError
from megatron_ettin.evaluation.layouts import (
    LAYOUTS,
    Curve,
    final_weights,
    largest_weight_difference,
    read_curve,
    run_layout,
)
from megatron_ettin.order.ledger import RECORD, Ledger
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.training.console import Totals
from megatron_ettin.training.kept_lines import cut_metrics
from tests.conftest import TinyCorpus
from tests.ranks import pretrain_main, run_layouts, started_ranks
from tests.training import RESUME, cut_off, steps_saved, train_here
from tests.wandb_logs import logged_losses

SAVE_EVERY = "--checkpoint.save_every_tokens=8000"


@pytest.fixture(scope="module")
def whole_run(
    tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Curve]:
    """Return (configuration, run folder, curve) of an uninterrupted run that saved on its way."""
    folder = tmp_path_factory.mktemp("whole")
    config = tiny_corpus.write_config(folder / "run.yaml", objective="MaskedLM")
    curve = train_here([f"--config={config}", SAVE_EVERY], folder / "run")
    return config, folder / "run", curve


def steps_of(ledger: Ledger) -> list[tuple[object, ...]]:
    """Return what a ledger says of each step, without the times and what follows from them."""
    columns = [name for name in RECORD.names or () if name not in ("seq", "unix_ns", "chain")]
    return [tuple(np.asarray(step[c]).tolist() for c in columns) for step in ledger.steps]


@pytest.mark.slow
def test_checkpoints_follow_the_token_clock(whole_run: tuple[Path, Path, Curve]) -> None:
    _, run_dir, curve = whole_run
    states = {
        step: json.loads((run_dir / "checkpoints" / f"step_{step:08d}" / "state.json").read_text())
        for step in steps_saved(run_dir)
    }
    tokens = [state["consumed_tokens"] for state in states.values()]
    order = json.loads((run_dir / "order.json").read_text())
    ends = [phase["start_g"] + phase["num_rows"] for phase in order["phases"]]
    assert {state["g"] for state in states.values()} >= set(ends)
    crossed = {count // 8000 for count in tokens}
    assert crossed >= set(range(1, max(tokens) // 8000 + 1))
    last = states[max(states)]
    assert last["g"] == ends[-1]
    assert last["step"] == len(curve.losses)
    assert last["phase"] == "long"


@pytest.mark.slow
def test_every_line_tells_the_optimizers_share(whole_run: tuple[Path, Path, Curve]) -> None:
    _, run_dir, curve = whole_run
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    shares = [line["optimizer_share"] for line in lines if line["kind"] == "train"]
    assert len(shares) == len(curve.losses)
    assert all(0.0 < share < 1.0 for share in shares)


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(
    whole_run: tuple[Path, Path, Curve], tmp_path: Path
) -> None:
    config, run_dir, expected = whole_run
    copy = cut_off(run_dir, tmp_path / "run", keep=1)
    curve = train_here([f"--config={config}", SAVE_EVERY, RESUME], copy)
    assert curve == expected
    assert steps_saved(copy) == steps_saved(run_dir)
    ledgers = [Ledger.read(folder / "ledger") for folder in (run_dir, copy)]
    (fork,) = ledgers[1].forks()
    assert fork.steps > 0, "the steps after the checkpoint were taken twice, and that is recorded"
    assert steps_of(ledgers[0]) == steps_of(ledgers[1])


@pytest.mark.slow
def test_phases_one_by_one_are_the_run_of_all(
    whole_run: tuple[Path, Path, Curve], tmp_path: Path
) -> None:
    config, run_dir, expected = whole_run
    sections = yaml.safe_load(config.read_text())
    sections["phases"] = sections["phases"][:1]
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(sections))
    train_here([f"--config={tmp_path / 'first.yaml'}"], tmp_path / "run")
    resume = [f"--config={config}", RESUME]
    with pytest.raises(CheckpointError, match="amend_order"):
        train_here(resume, tmp_path / "run")
    curve = train_here([*resume, "--checkpoint.amend_order=true"], tmp_path / "run")
    assert (curve.losses, curve.token_digest) == (expected.losses, expected.token_digest)
    assert curve.heldout_losses[-1] == expected.heldout_losses[-1]
    weights = final_weights(tmp_path / "run")
    assert largest_weight_difference(weights, final_weights(run_dir))[0] == 0.0


@pytest.mark.slow
def test_a_run_resumes_under_other_layouts(
    whole_run: tuple[Path, Path, Curve], tmp_path: Path
) -> None:
    config, run_dir, expected = whole_run
    layouts = ("tp2", "pp2", "dp2_unsharded", "cp2")
    jobs = []
    for name in layouts:
        copy = cut_off(run_dir, tmp_path / name, keep=1)
        arguments = [f"--config={config}", SAVE_EVERY, RESUME, f"--run_dir={copy}"]
        jobs.append((LAYOUTS[name], arguments))
    run_layouts(jobs, ranks=2, folder=tmp_path)
    for name in layouts:
        curve = read_curve(tmp_path / name)
        assert curve.largest_relative_difference(expected) <= 1e-5, name
        assert curve.token_digest == expected.token_digest, name


@pytest.mark.slow
def test_a_killed_run_goes_on(whole_run: tuple[Path, Path, Curve], tmp_path: Path) -> None:
    config, run_dir, expected = whole_run
    whole = Ledger.read(run_dir / "ledger")
    arguments = [f"--config={config}", SAVE_EVERY]
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    run = [*arguments, f"--run_dir={tmp_path / 'run'}"]
    with started_ranks(pretrain_main, [run], ranks=1, logs=tmp_path) as (process,):
        while not metrics.exists() or metrics.read_text().count("\n") < 7:
            assert process.is_alive(), "the run ended before it could be killed"
            assert time.monotonic() < deadline, "the run never got to its seventh step"
            time.sleep(0.02)
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    curve = train_here([*arguments, RESUME], tmp_path / "run")
    assert curve == expected
    assert steps_of(Ledger.read(tmp_path / "run" / "ledger")) == steps_of(whole)


@pytest.mark.slow
def test_another_order_is_refused(whole_run: tuple[Path, Path, Curve]) -> None:
    config, run_dir, _ = whole_run
    run, pools = f"--config={config}", "--data.pools={short: [0.0, 0.5], long: [0.6, 1.0]}"
    with pytest.raises(CheckpointError, match="another sample order"):
        train_here([run, RESUME, pools], run_dir)
    with pytest.raises(CheckpointError, match="another objective"):
        train_here([run, RESUME, "--objective=CausalLM"], run_dir)
    with pytest.raises(CheckpointError, match=r"another optimizer\.name"):
        train_here([run, RESUME, "--optimizer.name=adamw"], run_dir)
    with pytest.raises(CheckpointError, match="resume true"):
        train_here([run], run_dir)


@pytest.mark.slow
def test_a_decoder_starts_from_an_encoder_and_reports_to_wandb(
    whole_run: tuple[Path, Path, Curve], tmp_path: Path
) -> None:
    config, run_dir, encoder = whole_run
    newest = max((run_dir / "checkpoints").iterdir())
    arguments = [
        f"--config={config}",
        "--objective=CausalLM",
        f"--checkpoint.initialize_from={newest}",
        "--logging.wandb=true",
        "--optimizer.warmup_tokens=0",
    ]
    curve = run_layout(LAYOUTS["tp1"], arguments, tmp_path / "decoder")
    assert len(curve.losses) == len(encoder.losses)
    assert curve.token_digest == encoder.token_digest, "twins consume the same tokens"
    assert curve.losses[0] < encoder.losses[0] - 0.5, "the encoder's weights are of use"
    (log,) = (tmp_path / "decoder" / "wandb").glob("offline-run-*/*.wandb")
    assert logged_losses(log) == curve.losses


def test_a_torn_last_line_of_the_metrics_is_dropped(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    state = RunState(step=2, g=9)
    assert cut_metrics(run, state) == Totals()
    assert run.metrics.read_text() == ""
    lines = [
        json.dumps({"kind": "train", "step": step, "tokens": step, "loss": 1.0, "seconds": 2.0})
        for step in (1, 2, 3)
    ]
    left_out = ['{"kind": "skip", "step": 2, "rows": [8, 9]}']
    later = ['{"kind": "skip", "step": 2, "rows": [9, 12]}']
    run.metrics.write_text("\n".join([*lines[:2], *left_out, *later, lines[2], '{"ki']))
    assert cut_metrics(run, state) == Totals(tokens=2, seconds=4.0, loss=1.0, steps=2)
    assert run.metrics.read_text().splitlines() == [*lines[:2], *left_out]
    inode = run.metrics.stat().st_ino
    cut_metrics(run, state)
    assert run.metrics.stat().st_ino == inode, "it was written anew"


@pytest.mark.parametrize("damaged", ['{"step": 2', '{"step": 2}', '{"step": 2, "kind": "train"}'])
def test_a_damaged_line_of_the_metrics_is_named(damaged: str, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.metrics.write_text('{"step": 1, "kind": "validation"}\n' + damaged + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not what a run reports \("):
        cut_metrics(run, RunState(step=2, g=9))


def test_a_curve_is_read_back(tmp_path: Path) -> None:
    records = [
        {"kind": "train", "loss": 2.0, "token_digest": "a"},
        {"kind": "validation", "heldout_loss": 3.0},
        {"kind": "train", "loss": 1.0, "token_digest": "b"},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    curve = read_curve(tmp_path)
    assert curve == Curve([2.0, 1.0], "b", [3.0])
    assert curve.largest_relative_difference(Curve([2.0, 0.8], "b", [3.0])) == pytest.approx(0.25)
