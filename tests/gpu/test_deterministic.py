"""`hardware.deterministic`: a run repeats bit by bit, and so does one that is resumed.

Each run has a process of its own, because libraries read their settings when they are first used.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ettin.evaluation.layouts import (
    Layout,
    final_weights,
    largest_weight_difference,
    read_curve,
)
from tests.gpu.conftest import BACKENDS, skip_without
from tests.ranks import run_layouts
from tests.training import RESUME, cut_off

pytestmark = pytest.mark.gpu

DETERMINISTIC = Layout(1, {"precision": "bf16", "deterministic": True})
OBJECTIVES = ("MaskedLM", "CausalLM")


def train(arguments: list[str], folder: Path) -> None:
    """Train with both objectives in one new process; the runs are in folder/OBJECTIVE."""
    folder.mkdir(exist_ok=True)
    jobs = [
        (DETERMINISTIC, [*arguments, f"--objective={name}", f"--run_dir={folder / name}"])
        for name in OBJECTIVES
    ]
    run_layouts(jobs, ranks=1, folder=folder)


def assert_equal(found: Path, expected: Path) -> None:
    """Check that two runs reported the same losses and ended in the same weights."""
    for name in OBJECTIVES:
        assert read_curve(found / name) == read_curve(expected / name)
        weights = final_weights(expected / name)
        assert largest_weight_difference(final_weights(found / name), weights)[0] == 0.0


@pytest.fixture(scope="module", params=BACKENDS)
def arguments(request: pytest.FixtureRequest, twenty_steps: Path) -> list[str]:
    skip_without(request.param)
    return [f"--config={twenty_steps}", f"--model.backend={request.param}"]


@pytest.fixture(scope="module")
def first(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    train(arguments, folder)
    return folder


def test_a_run_repeats_bit_by_bit(arguments: list[str], first: Path, tmp_path: Path) -> None:
    train(arguments, tmp_path)
    assert_equal(tmp_path, first)


def test_a_resumed_run_equals_an_uninterrupted_one(
    arguments: list[str], first: Path, tmp_path: Path
) -> None:
    for name in OBJECTIVES:
        cut_off(first / name, tmp_path / name, keep=1)
        assert len(list((tmp_path / name / "checkpoints").iterdir())) == 1
    train([*arguments, RESUME], tmp_path)
    assert_equal(tmp_path, first)
