"""Weights are bound to the run: a checkpoint's files, their list, the ledger's record of it."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_ettin import checkpoint_files
from megatron_ettin.checkpoint_files import CheckpointError
from megatron_ettin.export.huggingface import to_huggingface
from megatron_ettin.order.ledger import Kind, Ledger, LedgerError
from megatron_ettin.queries.attest import attest
from megatron_ettin.queries.verify import Verification, verify
from tests.conftest import TinyCorpus
from tests.keys import write_keys
from tests.training import RESUME, train_here
from tools import convert

ROOT = Path(__file__).parents[2]
PHASES = [{"name": "short", "train_tokens": 6_000, "seq_length": 128, "global_batch_size": 8}]
UNCHECKED = "--checkpoint.check_files=false"


@dataclass(frozen=True)
class Saved:
    """Twins of two checkpoints each; a test may damage its copies."""

    arguments: dict[str, list[str]]
    runs: dict[str, Path]

    def copy(self, kind: str, folder: Path) -> tuple[Path, Path]:
        """Copy a run; return its folder and its first checkpoint."""
        shutil.copytree(self.runs[kind], folder)
        return folder, sorted((folder / "checkpoints").iterdir())[0]


@pytest.fixture(scope="module")
def saved(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("saved")
    config = tiny_corpus.write_config(folder / "run.yaml", phases=PHASES)
    arguments = {
        kind: [f"--config={config}", f"--objective={objective}"]
        for kind, objective in (("encoder", "MaskedLM"), ("decoder", "CausalLM"))
    }
    for kind, given in arguments.items():
        train_here([*given, "--checkpoint.save_every_tokens=3000"], folder / kind)
    return Saved(arguments, {kind: folder / kind for kind in arguments})


def state_of(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    return state


def sha256_of_json(value: object) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def check_weights(run: Path) -> Verification:
    return verify(run, order=False, tokens=False, weights=True)


@pytest.mark.slow
def test_an_attestation_covers_every_file_of_a_trained_checkpoint(
    saved: Saved, tmp_path: Path
) -> None:
    run, first = saved.copy("decoder", tmp_path / "run")
    private, public = write_keys(tmp_path)
    attest(run, key=private, output=tmp_path / "attestation.json")
    command = [
        *(sys.executable, "-I", str(ROOT / "examples" / "verify_attestation.py"), f"--run={run}"),
        *(f"--key={public}", f"--attestation={tmp_path / 'attestation.json'}"),
        *(f"--checkpoint={folder}" for folder in (run / "checkpoints").iterdir()),
    ]
    verified = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"checkpoint {first.name}: {len(state_of(first)['files'])} files" in verified.stdout
    for name in state_of(first)["files"]:
        flip_bit(first / name)
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
        assert refused.stderr == f"FAIL: {first / name}: is not the file that was signed\n"
        flip_bit(first / name)


@pytest.mark.slow
def test_a_state_lists_every_file_and_the_ledger_holds_the_lists_digest(saved: Saved) -> None:
    run = saved.runs["encoder"]
    ledger = Ledger.read(run / "ledger")
    recorded = {entry.payload["name"]: entry.payload for entry in ledger.checkpoints()}
    folders = sorted((run / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == sorted(recorded)
    assert len(folders) == 2
    for folder in folders:
        state = state_of(folder)
        written = {
            path.name: {
                "bytes": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
            for path in folder.iterdir()
            if path.name != "state.json"
        }
        assert state["files"] == written
        assert {"__0_0.distcp", ".metadata", "config.yaml", "model.json"} <= set(written)
        assert state["files_sha256"] == sha256_of_json(written)
        assert recorded[folder.name]["files_sha256"] == state["files_sha256"]
    assert check_weights(run).passed
    assert ledger.events[0]["initialized_from"] is None


@pytest.mark.slow
def test_a_flipped_bit_in_any_file_is_found(saved: Saved, tmp_path: Path) -> None:
    run, folder = saved.copy("encoder", tmp_path / "run")
    names = sorted(state_of(folder)["files"])
    assert "metadata.json" in names
    for name in names:
        before = (folder / name).read_bytes()
        flip_bit(folder / name)
        with pytest.raises(CheckpointError, match=f"{name}: has SHA-256 .* was written"):
            checkpoint_files.check_files(folder)
        found = check_weights(run)
        assert [fault.what.split(":")[0] for fault in found.faults] == [str(folder / name)]
        assert verify(run, order=False, tokens=False).passed, "only --weights reads the files"
        (folder / name).write_bytes(before)
    assert check_weights(run).passed


@pytest.mark.slow
def test_files_that_are_gone_cut_or_new_are_found(saved: Saved, tmp_path: Path) -> None:
    _, folder = saved.copy("encoder", tmp_path / "run")
    shard = folder / "__0_0.distcp"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: has \d+ bytes, but \d+ were"):
        checkpoint_files.check_files(folder)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: is missing"):
        checkpoint_files.check_files(folder)
    _, folder = saved.copy("encoder", tmp_path / "other")
    (folder / "__9_9.distcp").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"__9_9\.distcp: is not one of the files"):
        checkpoint_files.check_files(folder)


@pytest.mark.slow
def test_the_twins_shards_are_refused_even_with_a_list_that_fits(
    saved: Saved, tmp_path: Path
) -> None:
    run, _ = saved.copy("encoder", tmp_path / "run")
    _, _ = saved.copy("decoder", tmp_path / "twin")
    mine, theirs = (
        sorted((tmp_path / name / "checkpoints").iterdir())[-1] for name in ("run", "twin")
    )
    for name in ("__0_0.distcp", ".metadata"):
        shutil.copy(theirs / name, mine / name)
    shutil.rmtree(sorted((run / "checkpoints").iterdir())[0])
    assert not check_weights(run).passed
    resume = [*saved.arguments["encoder"], RESUME]
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: has SHA-256"):
        train_here(resume, run)

    state = state_of(mine)
    for name in ("__0_0.distcp", ".metadata"):
        state["files"][name] = state_of(theirs)["files"][name]
    state["files_sha256"] = sha256_of_json(state["files"])
    (mine / "state.json").write_text(json.dumps(state))
    (fault,) = check_weights(run).faults
    assert "its list of files has SHA-256" in fault.what
    assert not verify(run, order=False, tokens=False).passed, "the lists need no hashing"


@pytest.fixture
def cut_off(saved: Saved, tmp_path: Path) -> tuple[Path, Path, list[str]]:
    """Return a run that ended after its first checkpoint, that, and the arguments to resume it."""
    run, folder = saved.copy("encoder", tmp_path / "run")
    for later in sorted((run / "checkpoints").iterdir())[1:]:
        shutil.rmtree(later)
    return run, folder, [*saved.arguments["encoder"], RESUME]


@pytest.mark.slow
def test_a_resume_compares_before_anything_is_written(
    cut_off: tuple[Path, Path, list[str]],
) -> None:
    run, folder, resume = cut_off
    records = (run / "ledger" / "records.led").read_bytes()
    state = (folder / "state.json").read_bytes()
    flip_bit(folder / "__0_0.distcp")
    with pytest.raises(CheckpointError, match="has SHA-256"):
        train_here(resume, run)

    changed = json.loads(state)
    shard = (folder / "__0_0.distcp").read_bytes()
    changed["files"]["__0_0.distcp"]["sha256"] = hashlib.sha256(shard).hexdigest()
    changed["files_sha256"] = sha256_of_json(changed["files"])
    (folder / "state.json").write_text(json.dumps(changed))
    with pytest.raises(LedgerError, match=r"record \d+ says files_sha256 \w+, but the checkpoint"):
        train_here(resume, run)
    assert (run / "ledger" / "records.led").read_bytes() == records
    assert not list((run / "ledger" / "forks").iterdir())

    train_here([*resume, UNCHECKED], run)  # what the flipped bit of a weight costs is nobody's loss
    assert (run / "ledger" / "records.led").read_bytes() != records


@pytest.mark.slow
def test_a_checkpoint_without_digests_needs_the_option(
    cut_off: tuple[Path, Path, list[str]],
) -> None:
    """Write a state as earlier versions did: sizes alone, and nothing in the ledger."""
    run, folder, resume = cut_off
    state = state_of(folder)
    state["files"] = {name: entry["bytes"] for name, entry in state["files"].items()}
    del state["files_sha256"], state["initialized_from"], state["state_sha256"]
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"earlier version.*checkpoint\.check_files false"):
        train_here(resume, run)
    curve = train_here([*resume, UNCHECKED], run)
    assert len(curve.losses) > state["step"]


@pytest.mark.slow
def test_a_new_run_says_which_files_its_weights_came_from(saved: Saved, tmp_path: Path) -> None:
    _, source = saved.copy("encoder", tmp_path / "source")
    arguments = [*saved.arguments["decoder"], f"--checkpoint.initialize_from={source}"]
    train_here(arguments, tmp_path / "new")
    expected = {"checkpoint": str(source), "files_sha256": state_of(source)["files_sha256"]}
    start = Ledger.read(tmp_path / "new" / "ledger").events[0]
    assert start["initialized_from"] == expected
    for folder in (tmp_path / "new" / "checkpoints").iterdir():
        assert state_of(folder)["initialized_from"] == expected
    flip_bit(source / "model.json")
    with pytest.raises(CheckpointError, match=r"model\.json: has SHA-256"):
        train_here(arguments, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_conversion_checks_and_lists_files(saved: Saved, tmp_path: Path) -> None:
    _, source = saved.copy("encoder", tmp_path / "run")
    to_huggingface(source, tmp_path / "hf")
    convert.main(["from-hf", "--input", str(tmp_path / "hf"), "--output", str(tmp_path / "back")])
    listed = checkpoint_files.check_files(tmp_path / "back").files
    assert {path.name for path in (tmp_path / "back").iterdir()} == {*listed, "state.json"}
    flip_bit(tmp_path / "back" / "__0_0.distcp")
    given = ["to-hf", "--checkpoint", str(tmp_path / "back"), "--output", str(tmp_path / "again")]
    with pytest.raises(SystemExit, match=r"__0_0\.distcp: has SHA-256"):
        convert.main(given)
    assert not (tmp_path / "again").exists()
    convert.main([*given, "--no-check-files"])
    assert (tmp_path / "again" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_record_without_its_folder_becomes_a_fork(saved: Saved, tmp_path: Path) -> None:
    """A run that ends between the ledger's record and the folder's name resumes exactly."""
    run, folder = saved.copy("encoder", tmp_path / "run")
    later = sorted((run / "checkpoints").iterdir())[1]
    later.rename(later.with_name(later.name + ".unfinished"))
    (later.with_name(later.name + ".unfinished") / "state.json").unlink()
    assert Ledger.read(run / "ledger").checkpoints()[-1].payload["name"] == later.name
    curve = train_here(
        [*saved.arguments["encoder"], RESUME, "--checkpoint.save_every_tokens=3000"], run
    )
    assert curve.losses == [
        json.loads(line)["loss"]
        for line in (saved.runs["encoder"] / "metrics.jsonl").read_text().splitlines()
        if json.loads(line)["kind"] == "train"
    ]
    ledger = Ledger.read(run / "ledger")
    (fork,) = ledger.forks()
    assert Kind.CHECKPOINT in ledger.read_fork(fork).records["kind"].tolist()
    assert (
        state_of(later)["files"]["__0_0.distcp"]
        == (state_of(saved.runs["encoder"] / "checkpoints" / later.name)["files"]["__0_0.distcp"])
    )
    assert check_weights(run).passed
    assert folder.is_dir()


@pytest.mark.slow
def test_a_checkpoint_of_steps_gone_back_on_is_checked_too(saved: Saved, tmp_path: Path) -> None:
    run, first = saved.copy("encoder", tmp_path / "run")
    (run / "checkpoints").rename(tmp_path / "aside")
    train_here([*saved.arguments["encoder"], RESUME], run)  # from the beginning, saved at the end
    assert not first.exists()
    (tmp_path / "aside" / first.name).rename(first)
    (fork,) = Ledger.read(run / "ledger").forks()
    assert fork.parent_seq == -1
    found = check_weights(run)
    assert found.passed
    assert any(first.name in note and "went back" in note for note in found.notes)
    flip_bit(first / "__0_0.distcp")
    (fault,) = check_weights(run).faults
    assert str(first / "__0_0.distcp") in fault.what
