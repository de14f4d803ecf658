"""The console of a run: its line, its bar, the time that is left, the totals at the end."""

import dataclasses
import io
import logging
from pathlib import Path
from typing import Any

import pytest

from megatron_ettin.checkpoint import RunState
from megatron_ettin.config import PhaseConfig
from megatron_ettin.order import PhaseSpec
from megatron_ettin.training.console import Console, RunProgress, Totals, duration
from tests.conftest import TinyCorpus
from tests.training import train_here

PHASES = [
    PhaseConfig(name="short", train_tokens=1_000_000, seq_length=128, global_batch_size=8),
    PhaseConfig(name="long", train_tokens=3_000_000, seq_length=512, global_batch_size=8),
]


def rows(phase: PhaseConfig, start_g: int, num_rows: int) -> PhaseSpec:
    return PhaseSpec(
        name=phase.name, start_g=start_g, num_rows=num_rows, seq_length=phase.seq_length,
        max_segments_per_row=8, pack="best_fit", pools=(),
    )  # fmt: skip


def progress() -> RunProgress:
    return RunProgress(PHASES, [rows(PHASES[0], 0, 1000), rows(PHASES[1], 1000, 1500)])


def state(g: int, tokens: int, phase: str = "short") -> RunState:
    return RunState(g=g, step=g // 10, consumed_tokens=tokens, phase=phase)


def record(state: RunState, **fields: Any) -> dict[str, Any]:
    return {
        "kind": "train", "step": state.step, "phase": state.phase,
        "tokens": state.consumed_tokens, "loss": 4.25, "lr": 3e-4, "grad_norm": 0.625,
        "seconds": 2.0, "tokens_per_second": 50_000.0, "peak_memory_bytes": 3 * 2**29, **fields,
    }  # fmt: skip


def test_no_time_is_told_before_a_report() -> None:
    assert progress().seconds_left(state(0, 0)) is None


def test_the_time_that_is_left_is_that_of_the_rows_that_are_left() -> None:
    found = progress()
    at = state(100, 100_000)
    found.add(at, 100_000, started=50.0, now=60.0)
    assert found.tokens_left(at) == pytest.approx((900_000, 3_900_000))
    assert found.seconds_left(at) == pytest.approx((90.0, 390.0))
    # Rows that were skipped are no work that is left.
    skipped = dataclasses.replace(at, g=600)
    assert found.seconds_left(skipped) == pytest.approx((40.0, 340.0))
    end = state(2500, 3_999_000, "long")
    assert found.tokens_left(end) == (0.0, 0.0)


def test_the_rate_is_the_recent_one() -> None:
    """A run that was slow at first, then ten times as fast for long."""
    found = progress()
    now = 0.0
    for index in range(1, 61):
        before, now = now, now + (10.0 if index <= 30 else 1.0)
        at = state(10 * index, 10_000 * index)
        found.add(at, 10_000, started=before, now=now)
    assert found.seconds_left(at) == pytest.approx((40.0, 340.0))


def test_time_between_reports_counts() -> None:
    found = progress()
    found.add(state(10, 10_000), 10_000, started=0.0, now=1.0)
    at = state(20, 20_000)
    found.add(at, 10_000, started=3.0, now=4.0)  # two seconds of validation before it
    left = found.seconds_left(at)
    assert left is not None
    assert left[0] == pytest.approx(980_000 * 4.0 / 20_000)


def test_a_phase_has_a_rate_of_its_own() -> None:
    found = progress()
    found.add(state(1000, 1_000_000), 1_000_000, started=0.0, now=1.0)
    at = state(1100, 1_200_000, "long")
    found.add(at, 200_000, started=1.0, now=101.0)
    left = found.seconds_left(at)
    assert left is not None
    assert left[0] == left[1] == pytest.approx(2_800_000 * 100.0 / 200_000)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.6, "1 m 00 s"),
        (249, "4 m 09 s"),
        (3900, "1 h 05 m"),
        (183_600, "2 d 03 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_line_has_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    console = Console(progress(), 0, stream=io.StringIO())
    at = state(100, 100_000)
    console.advance(100_000)
    console.report_steps(at, record(at, mfu=0.414), tokens=100_000, started=0.0, now=10.0)
    console.close()
    assert caplog.messages == [
        "short step 10 · 0.10M of 4.00M tokens (2.5%) · loss 4.2500 · lr 3.000e-04 · "
        "gradient norm 0.625 · 50,000 tok/s · MFU 41.4% · 1.50 GiB · "
        "left: phase 1 m 30 s, run 6 m 30 s"
    ]


def test_every_line_has_the_share_that_is_done_and_the_time_that_is_left(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    console = Console(progress(), 0, stream=io.StringIO())
    at = state(100, 100_000)
    console.report(at, "an event before any report")
    console.report_steps(at, record(at), tokens=100_000, started=0.0, now=10.0)
    console.report(at, "held-out loss 4.0000")
    # The last rows held more than planned: the run is done, not more than done.
    console.report(state(2500, 4_100_000, "long"), "an event at the end")
    console.close()
    assert caplog.messages[0] == (
        "short step 10 · 0.10M of 4.00M tokens (2.5%) · an event before any report"
    )
    assert caplog.messages[2] == (
        "short step 10 · 0.10M of 4.00M tokens (2.5%) · held-out loss 4.0000 · "
        "left: phase 1 m 30 s, run 6 m 30 s"
    )
    assert caplog.messages[3] == (
        "long step 250 · 4.10M of 4.00M tokens (100.0%) · an event at the end · "
        "left: phase 0 s, run 0 s"
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_a_bar_and_no_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    stream = Terminal()
    console = Console(progress(), 1_000_000, stream=stream)
    at = state(1100, 1_200_000, "long")
    console.advance(200_000)
    console.report_steps(at, record(at), tokens=200_000, started=0.0, now=10.0)
    console.close()
    assert caplog.messages == []
    assert "long step 110 30.0%|" in stream.getvalue()
    assert "1.20M of 4.00M tokens, loss 4.2500 · lr 3.000e-04" in stream.getvalue()
    assert "left: phase 2 m 20 s, run 2 m 20 s" in stream.getvalue()


def test_totals_count_earlier_sessions() -> None:
    totals = Totals()
    totals.add({"kind": "train", "step": 100, "tokens": 3_600_000, "seconds": 1800.0, "loss": 5.0})
    totals.add({"kind": "validation", "tokens": 3_600_000, "heldout_loss": 6.0})
    totals.add({"kind": "train", "step": 200, "tokens": 7_200_000, "seconds": 3600.0, "loss": 4.5})
    text = "7,200,000 tokens, 200 steps in 1 h 30 m, 1,333 tok/s on average, last loss 4.5000"
    assert str(totals) == text


@pytest.mark.slow
def test_a_run_says_what_it_does(
    tiny_corpus: TinyCorpus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = tiny_corpus.write_config(tmp_path / "run.yaml", objective="MaskedLM")
    curve = train_here([f"--config={config}"], tmp_path / "run")
    text = "\n".join(caplog.messages)
    lines = [line for line in caplog.messages if "gradient norm" in line]
    assert len(lines) == len(curve.losses)
    assert "left: phase 0 s, run 0 s" in lines[-1]
    assert text.count("saved ") == 2
    assert f"saved {tmp_path / 'run' / 'checkpoints'}/step_" in text
    assert f"last loss {curve.losses[-1]:.4f}" in text
