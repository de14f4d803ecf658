"""One run in every layout: the same losses, the same tokens and the same weights at its end."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ettin.evaluation.layouts import (
    LAYOUTS,
    final_weights,
    largest_weight_difference,
    read_curve,
)
from megatron_ettin.order.row_losses import RowLossReader
from megatron_ettin.order.run_folder import RunFolder
from tests.conftest import TinyCorpus
from tests.ranks import run_layouts

SHIFTED, CAUSAL, DIFFUSION, ENCODER = (
    {"class_path": name} for name in ("MaskedNextToken", "CausalLM", "MaskedDiffusion", "MaskedLM")
)
#: Rows of both directions and of weights in one phase, one direction and weights in the other.
EVERY_KIND = {
    "class_path": "ByPhase",
    "init_args": {
        "objective": DIFFUSION,
        "by_phase": {
            "short": {
                "class_path": "Mixture",
                "init_args": {"objectives": [SHIFTED, CAUSAL, DIFFUSION], "shares": [2, 2, 1]},
            }
        },
    },
}
OBJECTIVES = {"MaskedLM": ENCODER, "CausalLM": CAUSAL, "every_kind": EVERY_KIND}
#: The parts of EVERY_KIND, each alone.
KINDS = {
    "MaskedDiffusion": DIFFUSION,
    "detour": {
        "class_path": "ByPhase",
        "init_args": {"objective": ENCODER, "by_phase": {"short": CAUSAL}},
    },
    "mixture": {
        "class_path": "Mixture",
        "init_args": {"objectives": [SHIFTED, CAUSAL], "shares": [1, 1]},
    },
}
#: Cases: a layout and what else its command line says. Rows are of 128, then of 256 slots.
CASES = {name: (name, ["--hardware.micro_batch_tokens=512"]) for name in LAYOUTS} | {
    f"micro_batch_{rows}": ("tp1", [f"--hardware.micro_batch_tokens={256 * rows}"])
    for rows in (1, 4)
}
#: What every run of the tests has: each kind of parallelism, mostly together with others. The rest
#: tells them apart, and takes twice as long.
MIXED = ("dp2_unsharded", "tp2pp2sp_recompute", "tp2cp2sp", "micro_batch_1")
REST = tuple(case for case in CASES if case not in ("tp1", *MIXED))
MIXED_BF16, REST_BF16 = ("tp2sp",), ("tp2", "pp2", "dp2", "cp2")
#: Largest relative difference of a loss, relative L2 distance of a tensor at the end, and largest
#: difference of a row's loss as a share of the mean.
Tolerance = tuple[float, float, float]
#: Measured: 1.2e-8 (losses are sums in float64), 1.4e-6 and 1.3e-7 (a row's is kept in float32).
FP32: Tolerance = (1e-5, 1e-5, 1e-6)
#: Largest relative difference of a gradient's norm, both runs in fp32, as in test_gradient_norm.py.
#: StableAdamW's weights hardly show a gradient of the wrong scale. Measured in MIXED: 3.7e-7.
FP32_NORMS = 1e-4
#: Between layouts, both in bf16. Measured: 7.3e-5, 9.2e-3 and 1.7e-4.
BF16_LAYOUTS: Tolerance = (2e-4, 2e-2, 1e-3)
#: Between bf16 and fp32. Measured: 5.3e-4, for a row 7.5e-4, and 0.08 for one tensor of the encoder
#: (0.034 for the next, 0.017 for the median): Adam's steps are as long where gradients are small as
#: where they are large, so rounding decides some of them.
BF16_TO_FP32: Tolerance = (1e-3, 1e-1, 3e-3)


def train(
    folder: Path,
    corpus: TinyCorpus,
    objectives: Mapping[str, Any],
    fp32: Sequence[str],
    bf16: Sequence[str],
) -> Path:
    """Leave runs of these cases, and of one process, in folder/OBJECTIVE/PRECISION/CASE."""
    jobs = []
    for objective, section in objectives.items():
        logging = {"log_every_steps": 1, "row_losses": True}
        path = folder / f"{objective}.yaml"
        config = corpus.write_config(path, objective=section, logging=logging)
        for precision, names in (("fp32", fp32), ("bf16", bf16)):
            for name in ("tp1", *names):
                layout, overrides = CASES[name]
                arguments = [
                    f"--config={config}",
                    *overrides,
                    "--model.num_attention_heads=4",
                    f"--hardware.precision={precision}",
                    f"--run_dir={folder / objective / precision / name}",
                ]
                jobs.append((LAYOUTS[layout], arguments))
    run_layouts(jobs, ranks=4, folder=folder)
    return folder


@pytest.fixture(scope="module")
def mixed(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("mixed"), tiny_corpus, OBJECTIVES, MIXED, MIXED_BF16)


@pytest.fixture(scope="module")
def rest(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("rest"), tiny_corpus, OBJECTIVES, REST, REST_BF16)


@pytest.fixture(scope="module")
def kinds(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("kinds"), tiny_corpus, KINDS, (*MIXED, *REST), ())


def largest_row_difference(found: Path, expected: Path) -> float:
    """Return the largest difference of a row's loss as a share of the mean; infinite of counts."""
    one, two = (RowLossReader.open(RunFolder(run).row_losses) for run in (found, expected))
    rows = [reader.read(0, reader.end_g) for reader in (one, two)]
    if not all(
        np.array_equal(getattr(rows[0], n), getattr(rows[1], n)) for n in ("tokens", "states")
    ):
        return math.inf
    ours, theirs = rows[0].means, rows[1].means
    return float(np.nanmax(np.abs(ours - theirs)) / np.nanmean(theirs))


def differences(found: Path, expected: Path, tolerance: Tolerance) -> list[str]:
    """Return in what two runs differ by more than the tolerance; nothing must be in it."""
    curve, other = read_curve(found), read_curve(expected)
    loss = curve.largest_relative_difference(other)
    distance, tensor = largest_weight_difference(final_weights(found), final_weights(expected))
    row = largest_row_difference(found, expected)
    names = [str(path.relative_to(path.parents[2])) for path in (found, expected)]
    print(
        f"{' to '.join(names)}: losses {loss:.1e}, rows {row:.1e}, "
        f"weights {distance:.1e} ({tensor})"
    )
    wrong = {
        "too few steps": not len(other.losses) >= 15,
        "the run learns nothing": not other.losses[-1] < other.losses[0] - 0.5,
        "other tokens": curve.token_digest != other.token_digest,
        f"losses by {loss:.1e}": not loss <= tolerance[0],
        f"losses of rows by {row:.1e}": not row <= tolerance[2],
        f"{tensor} by {distance:.1e}": not distance <= tolerance[1],
    }
    return [what for what, is_so in wrong.items() if is_so]


def differences_in_fp32(runs: Path, case: str) -> list[str]:
    """Return in what a run in fp32 differs too much from one process, gradient norms included."""
    pairs = zip(gradient_norms(runs / case), gradient_norms(runs / "tp1"), strict=True)
    norms = [abs(a - b) / b for a, b in pairs]
    print(f"{runs.parent.name}/fp32/{case}: gradient norms {max(norms):.1e}")
    found = differences(runs / case, runs / "tp1", FP32)
    are_near = all(norm <= FP32_NORMS for norm in norms)
    return found if are_near else [*found, f"gradient norms by {max(norms):.1e}"]


def gradient_norms(run: Path) -> list[float]:
    """Return the norms that a run has reported, by step."""
    records = RunFolder(run).read_metrics()
    return [record["grad_norm"] for record in records if record["kind"] == "train"]


def differences_in_bf16(runs: Path, objective: str, case: str) -> list[str]:
    """Return in what a run in bf16 differs too much from one process in bf16, and in fp32."""
    found = runs / objective / "bf16" / case
    in_bf16 = differences(found, runs / objective / "bf16" / "tp1", BF16_LAYOUTS)
    return in_bf16 + differences(found, runs / objective / "fp32" / "tp1", BF16_TO_FP32)


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("case", MIXED)
def test_the_layout_changes_nothing(mixed: Path, objective: str, case: str) -> None:
    assert differences_in_fp32(mixed / objective / "fp32", case) == []


@pytest.mark.long
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("case", REST)
def test_no_other_layout_changes_anything(rest: Path, objective: str, case: str) -> None:
    assert differences_in_fp32(rest / objective / "fp32", case) == []


@pytest.mark.long
@pytest.mark.parametrize("objective", KINDS)
@pytest.mark.parametrize("case", [*MIXED, *REST])
def test_no_layout_changes_a_kind_alone(kinds: Path, objective: str, case: str) -> None:
    assert differences_in_fp32(kinds / objective / "fp32", case) == []


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("case", MIXED_BF16)
def test_bf16_stays_near(mixed: Path, objective: str, case: str) -> None:
    assert differences_in_bf16(mixed, objective, case) == []


@pytest.mark.long
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("case", REST_BF16)
def test_bf16_stays_near_in_other_layouts(rest: Path, objective: str, case: str) -> None:
    assert differences_in_bf16(rest, objective, case) == []
