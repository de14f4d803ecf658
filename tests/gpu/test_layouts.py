"""Two GPUs that share each layer compute what one does."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ettin.evaluation.layouts import TP2, Layout, read_curve
from tests.ranks import run_layouts

pytestmark = pytest.mark.multi_gpu


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 1e-2)])
def test_tensor_parallel_ranks_train_alike(
    twenty_steps: Path, tmp_path: Path, precision: str, tolerance: float
) -> None:
    jobs = [
        (
            Layout(ranks, {**layout, "precision": precision}),
            [
                f"--config={twenty_steps}",
                "--objective=MaskedLM",
                f"--run_dir={tmp_path / str(ranks)}",
            ],
        )
        for ranks, layout in ((1, {}), (2, TP2))
    ]
    run_layouts(jobs, ranks=2, folder=tmp_path)
    alone, shared = (read_curve(tmp_path / str(ranks)) for ranks in (1, 2))
    assert shared.token_digest == alone.token_digest
    assert shared.largest_relative_difference(alone) <= tolerance
