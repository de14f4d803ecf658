"""Records of whole runs: twins that prove each other, ledgers that survive restarts."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_ettin.checkpoint_files import CheckpointError
from megatron_ettin.evaluation.layouts import LAYOUTS, run_layout
from megatron_ettin.export.huggingface import to_huggingface
from megatron_ettin.order.ledger import Kind, Ledger
from tests.conftest import TinyCorpus
from tests.independent.program import rebuild
from tests.training import train_here

ROOT = Path(__file__).parents[2]
STEP_COLUMNS = ["step", "phase", "g_begin", "g_end", "n_tokens"]
DIGESTS = ["order_digest", "token_digest", "mask_digest"]


def ask(*arguments: str, status: int = 0) -> dict[str, Any]:
    """Ask tools/order.py for JSON."""
    done = subprocess.run(
        [sys.executable, "tools/order.py", *arguments, "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def with_ramp(config: Path, path: Path) -> Path:
    """Write the same run with batches that grow inside each phase."""
    document = yaml.safe_load(config.read_text())
    for phase in document["phases"]:
        phase["batch_ramp_start"] = 3
        phase["batch_ramp_tokens"] = phase["train_tokens"] // 2
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture(scope="module")
def twins(
    tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    """Train an encoder on one process, and its twin on two with other batches everywhere."""
    folder = tmp_path_factory.mktemp("twins")
    config = tiny_corpus.write_config(folder / "run.yaml")
    arguments = [f"--config={config}", "--objective=MaskedLM"]
    arguments.append("--checkpoint.save_every_tokens=8000")
    train_here(arguments, folder / "encoder")
    ramp = with_ramp(config, folder / "ramp.yaml")
    arguments = [f"--config={ramp}", "--objective=CausalLM", "--hardware.micro_batch_tokens=512"]
    run_layout(LAYOUTS["dp2"], arguments, folder / "decoder")
    return folder / "encoder", folder / "decoder", config


@pytest.mark.slow
def test_twins_with_other_batches_and_processes_saw_the_same(
    twins: tuple[Path, Path, Path],
) -> None:
    encoder, decoder, _ = twins
    steps = [len(Ledger.read(run / "ledger").steps) for run in (encoder, decoder)]
    assert steps[0] < steps[1], "the ramp gives the decoder more steps"
    answer = ask("twins", "--run", str(encoder), "--run", str(decoder))
    assert answer["verdict"] == "PASS"
    for run in (encoder, decoder):
        assert ask("verify", "--run", str(run), "--tokens")["verdict"] == "PASS"
        assert rebuild(run).startswith("PASS ")


@pytest.mark.slow
def test_a_checkpoint_with_other_weights_is_not_rebuilt(
    twins: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    run = shutil.copytree(twins[0], tmp_path / "run")
    shards = max((run / "checkpoints").glob("*/*.distcp"))
    content = bytearray(shards.read_bytes())
    content[len(content) // 2] ^= 1
    shards.write_bytes(content)
    assert rebuild(run).startswith(f"FAIL {shards}: ")


@pytest.mark.slow
def test_a_run_amended_on_resuming_keeps_its_past(
    twins: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    encoder, _, config = twins
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", encoder, run], check=True)
    saved = sorted((run / "checkpoints").iterdir())
    for folder in saved[1:]:
        subprocess.run(["rm", "-r", folder], check=True)
    g = json.loads((saved[0] / "state.json").read_text())["g"]
    longer = yaml.safe_load(config.read_text())
    longer["phases"][1]["train_tokens"] += 4_000
    longer["data"]["skip_rows"] = [[g + 5, g + 20]]
    amended = tmp_path / "amended.yaml"
    amended.write_text(yaml.safe_dump(longer))
    arguments = [f"--config={amended}", "--objective=MaskedLM", "--checkpoint.resume=true"]
    with pytest.raises(CheckpointError, match=r"had planned other rows from row \d+ on"):
        train_here(arguments, run)
    train_here([*arguments, "--checkpoint.amend_order=true"], run)

    before, after = (Ledger.read(path / "ledger") for path in (encoder, run))
    kept = after.steps[after.steps["g_end"] <= g]
    for column in STEP_COLUMNS + DIGESTS:
        assert np.array_equal(kept[column], before.steps[column][: len(kept)]), column
    kinds = after.records["kind"].tolist()
    assert Kind.AMEND in kinds
    assert Kind.RESUME in kinds
    (skip,) = after.records[after.records["kind"] == Kind.SKIP]
    assert (skip["g_begin"], skip["g_end"]) == (g + 5, g + 20)
    (fork,) = after.forks()
    assert fork.steps == len(before.steps) - len(kept)
    assert ask("verify", "--run", str(run), "--tokens")["verdict"] == "PASS"
    assert rebuild(run).startswith("PASS ")
    assert ask("twins", "--run", str(encoder), "--run", str(run), status=1)["verdict"] == "FAIL"


@pytest.mark.slow
def test_heads_are_found_after_the_run_was_extended(
    twins: tuple[Path, Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run printed one head at its end; the card of its last checkpoint carries another."""
    encoder, _, config = twins
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", encoder, run], check=True)
    printed = Ledger.read(run / "ledger").head.chain
    to_huggingface(sorted((run / "checkpoints").iterdir())[-1], tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    (carried,) = re.findall(r"\| ledger head \| `([0-9a-f]{64})` ", card)
    longer = yaml.safe_load(config.read_text())
    longer["phases"].append({**longer["phases"][1], "name": "more", "train_tokens": 3_000})
    for section in ("blend", "pools"):
        longer["data"][section]["more"] = longer["data"][section]["long"]
    extended = tmp_path / "extended.yaml"
    extended.write_text(yaml.safe_dump(longer))
    arguments = [f"--config={extended}", "--objective=MaskedLM", "--checkpoint.resume=true"]
    with caplog.at_level("INFO"):
        train_here([*arguments, "--checkpoint.amend_order=true"], run)

    ledger = Ledger.read(run / "ledger")
    assert f"ledger head {ledger.head.chain} (record {ledger.head.seq})" in caplog.text
    assert ledger.forks() == [], "nothing was undone"
    for chain, is_last in ((printed, False), (carried, False), (ledger.head.chain, True)):
        answer = ask("verify", "--run", str(run), "--chain", "--head", chain)
        assert answer["verdict"] == "PASS"
        head = answer["head"]
        assert (head["chain"], head["fork"], head["g"] > 0) == (chain, None, True)
        assert head["since"]["ended"] != is_last
        assert (head["since"]["amended"], head["since"]["resumed"]) == (not is_last,) * 2
    assert (
        ask("verify", "--run", str(run), "--chain", "--head", "0" * 64, status=1)["verdict"]
        == "FAIL"
    )


@pytest.mark.slow
def test_resuming_does_not_replace_another_order_file(
    twins: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    encoder, _, config = twins
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", encoder, run], check=True)
    last = sorted((run / "checkpoints").iterdir())[-1]
    subprocess.run(["rm", "-r", last], check=True)
    path = run / "order.json"
    order = json.loads(path.read_text())
    order["phases"][1]["num_rows"] += 1
    path.write_text(json.dumps(order))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    arguments = [f"--config={config}", "--objective=MaskedLM", "--checkpoint.resume=true"]
    rows = order["phases"][1]["num_rows"]
    with pytest.raises(CheckpointError, match=rf"phases\[1\]\.num_rows is {rows}, not {rows - 1}"):
        train_here(arguments, run)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    path.unlink()  # what is not there is not believed either: the checkpoint has the ids
    train_here(arguments, run)
    assert json.loads(path.read_text())["phases"][1]["num_rows"] == rows - 1
    assert ask("verify", "--run", str(run))["verdict"] == "PASS"
    before = (run / "config.yaml").read_bytes()
    train_here([*arguments, "--hardware.threads_per_rank=2"], run)  # nothing is left to do
    assert (run / "config.yaml").read_bytes() == before, "no record would bind another"
    assert ask("verify", "--run", str(run), "--chain")["verdict"] == "PASS"
