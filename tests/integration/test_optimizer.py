"""The optimizers in every layout, step by step, against whole tensors in one process."""

from pathlib import Path

import pytest

from tests.integration.optimizer_program import CASES, RESUMED, main
from tests.ranks import run_ranks


@pytest.mark.slow
def test_fifty_steps_equal_the_reference_in_every_layout(tmp_path: Path) -> None:
    """One world of four ranks for all cases: new process groups cost more than the steps."""
    run_ranks(main, [tmp_path], ranks=4, logs=tmp_path, deadline_seconds=600.0)
    logs = sorted(tmp_path.glob("rank*.log"))
    assert [log.stem for log in logs] == [f"rank{rank}" for rank in range(4)]
    for log in logs:
        assert log.read_text().count(f"{log.stem}: ") == len(CASES + RESUMED)
