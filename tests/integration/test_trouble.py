"""Steps that go wrong: left out as if `data.skip_rows` had named their rows, on every layout."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_ettin.order.ledger import Kind, Ledger
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.queries.skips import list_skips
from megatron_ettin.queries.verify import verify
from megatron_ettin.training import loop
from megatron_ettin.training.trouble import DivergedError
from tests.conftest import TinyCorpus
from tests.independent.program import rebuild
from tests.poison import Factors, poisoned_step
from tests.training import RESUME, train_here

pytestmark = pytest.mark.slow

NAN = math.nan


@pytest.fixture
def config(tiny_corpus: TinyCorpus, tmp_path: Path) -> Path:
    """A ramp in the first phase, so that the cuts depend on the tokens that count."""
    path = tiny_corpus.write_config(
        tmp_path / "run.yaml", objective="MaskedLM", checkpoint={"save_every_tokens": 6_000}
    )
    document = yaml.safe_load(path.read_text())
    document["phases"][0] |= {"batch_ramp_start": 4, "batch_ramp_tokens": 10_000}
    path.write_text(yaml.safe_dump(document))
    return path


def train(config: Path, run: Path, *options: str, factors: Factors | None = None) -> list[float]:
    """Train in this process, with a fault or without; return the losses of the steps."""
    with pytest.MonkeyPatch.context() as patch:
        if factors is not None:
            patch.setattr(loop, "forward_step", poisoned_step(factors))
        return train_here([f"--config={config}", *options], run).losses


def steps(run: Path) -> list[tuple[int, int]]:
    return [(int(r["g_begin"]), int(r["g_end"])) for r in Ledger.read(run / "ledger").steps]


def bits(run: Path) -> dict[str, Any]:
    """Return what decides how a run goes on: weights, moments, and the state's numbers."""
    newest = RunFolder(run).newest_checkpoint()
    assert newest is not None
    state = json.loads((newest / "state.json").read_text())
    shards = {name: file for name, file in state["files"].items() if name.endswith(".distcp")}
    assert shards
    names = ("g", "step", "consumed_tokens", "phase_tokens", "order_digest", "token_digest")
    return {"name": newest.name, **shards, **{name: state[name] for name in names}}


def with_skipped(config: Path, ranges: list[tuple[int, int]]) -> Path:
    """Write the same run with `data.skip_rows`, from which the reference is trained."""
    document = yaml.safe_load(config.read_text())
    document["data"]["skip_rows"] = [list(rows) for rows in ranges]
    path = config.parent / f"skips_{len(ranges)}_{ranges[0][0]}.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def check_record(run: Path) -> None:
    verification = verify(run)
    assert verification.passed, verification.faults
    answer = rebuild(run)
    assert answer.startswith("PASS "), answer


def test_a_skipped_step_leaves_no_trace(config: Path, tmp_path: Path) -> None:
    train(config, tmp_path / "whole")
    cuts = steps(tmp_path / "whole")
    short = json.loads((tmp_path / "whole" / "order.json").read_text())["phases"][0]["num_rows"]
    last = max(index for index, (_, end) in enumerate(cuts) if end <= short)
    # The first row is in the first step. The last step of the phase is short, and has its last row.
    factors = {0: NAN, cuts[4][0] + 1: NAN, short - 1: NAN}
    run = tmp_path / "run"
    losses = train(config, run, "--trouble.on_nan=skip", factors=factors)

    skips = list_skips(run).skips
    assert [(skip.fork, skip.reason, skip.action) for skip in skips] == [
        (None, "trouble.on_nan", "skip")
    ] * 3
    assert skips[0].g_begin == 0
    assert skips[2].g_end == short
    assert {(skip.loss, skip.gradient_norm) for skip in skips} == {(None, None)}
    reference = with_skipped(config, [(skip.g_begin, skip.g_end) for skip in skips])
    assert losses == train(reference, tmp_path / "reference")
    assert steps(run) == steps(tmp_path / "reference")
    assert bits(run) == bits(tmp_path / "reference")
    assert last  # the run without a fault has a step to lose there
    check_record(run)
    lines = [line for line in RunFolder(run).read_metrics() if line["kind"] == "skip"]
    assert [line["rows"] for line in lines] == [[s.g_begin, s.g_end] for s in skips]
