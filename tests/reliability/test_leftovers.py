"""Files that killed processes leave go with the next start of their run."""

from pathlib import Path

import pytest

from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.publication import TEMPORARY_MARK, unfinished_folder
from megatron_ettin.training import host_report
from tests.conftest import TinyCorpus
from tests.training import RESUME, train_here

PHASES = [{"name": "short", "train_tokens": 2_000, "seq_length": 128, "global_batch_size": 8}]


@pytest.mark.slow
def test_a_start_removes_what_killed_ones_left(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    corpus = tiny_corpus.copy_to(tmp_path / "corpus")
    config = corpus.write_config(tmp_path / "run.yaml", objective="MaskedLM", phases=PHASES)
    run = RunFolder(tmp_path / "runs/mine")
    published = (run.config, run.order, run.metrics, run.wandb_id)
    identity = corpus.folder / "alpha.identity.json"
    # Its leftovers go when it is made anew, alone under its lock.
    identity.unlink(missing_ok=True)
    token = host_report._token_prefix(run.path) + "0123"
    left = [path.with_name(f"{path.name}{TEMPORARY_MARK}0123") for path in (*published, identity)]
    left += [run.path / token, run.path.parent / token, tmp_path / token]
    left += [unfinished_folder(run.checkpoint(99)) / "__0_0.distcp"]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    of_another_run = run.path.parent / (host_report._token_prefix(run.path.parent / "twin") + "0")
    of_another_run.touch()
    train_here([f"--config={config}", RESUME], run.path)
    assert [path for path in left if path.exists()] == []
    assert not unfinished_folder(run.checkpoint(99)).exists()
    assert of_another_run.exists(), "another run that starts now needs it"
