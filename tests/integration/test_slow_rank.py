"""A rank that is slower than the others shows in metrics.jsonl, and waiting for it does not."""

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.training import preparation
from tests.conftest import TinyCorpus
from tests.ranks import pretrain_main, run_ranks

#: Added to each step of one rank; far above what a step takes.
SECONDS = 1.0


def pretrain_slowly(arguments: Sequence[str], slow_rank: str) -> None:
    """Pretrain; the data of one rank takes time."""
    phase_steps = preparation.phase_steps

    def slow_steps(*own: Any) -> Iterator[preparation.StepRange]:
        for step in phase_steps(*own):
            time.sleep(SECONDS)
            yield step

    if os.environ["RANK"] == slow_rank:
        preparation.phase_steps = slow_steps
    pretrain_main(arguments)


@pytest.mark.slow
def test_the_slowest_rank_is_named(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    phase = {"name": "short", "train_tokens": 12_000, "seq_length": 128, "global_batch_size": 16}
    config = tiny_corpus.write_config(
        tmp_path / "run.yaml",
        objective="MaskedLM",
        phases=[phase],
        logging={"log_every_steps": 2},
    )
    run = RunFolder(tmp_path / "run")
    arguments = [f"--config={config}", f"--run_dir={run.path}"]
    run_ranks(pretrain_slowly, [arguments, "1"], ranks=2, logs=tmp_path, deadline_seconds=200.0)
    lines = [line for line in run.read_metrics() if line["kind"] == "train"]
    assert len(lines) > 2
    # The first steps allocate on both ranks.
    for line in lines[1:]:
        assert line["slowest_rank"] == 1
        assert line["slowest_host"]
        # A part of it goes by during other work; all that rank 0 waits for rank 1 is left out.
        assert line["rank_seconds_max"] - line["rank_seconds_min"] > 0.3 * SECONDS
        middle = (line["rank_seconds_min"] + line["rank_seconds_max"]) / 2
        assert line["rank_seconds_median"] == pytest.approx(middle)
