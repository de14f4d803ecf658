"""Series of revisions: each loads offline by name, equals its checkpoint, and is written once."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from megatron_ettin import checkpoint
from megatron_ettin.checkpoint_files import read_files
from megatron_ettin.export.huggingface import to_huggingface
from megatron_ettin.export.revisions import Average, list_revisions
from megatron_ettin.file_digests import FileDigest, FileList
from megatron_ettin.order.ledger import RECORD
from megatron_ettin.order.run_folder import RunFolder
from tests.conftest import TinyCorpus
from tests.training import train_here
from tools.convert import main

# Twins train for half a minute.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
AUTO: dict[str, Any] = {"encoder": AutoModelForMaskedLM, "decoder": AutoModelForCausalLM}
OBJECTIVES = {"encoder": "MaskedLM", "decoder": "CausalLM"}
AVERAGES = ["--average=last:2", "--average=every:4000"]


def sections(corpus: TinyCorpus) -> dict[str, Any]:
    """Return three phases with the names of the recipe."""
    blend = {"alpha": 0.7, "beta": 0.3}
    shape = {"seq_length": 128, "global_batch_size": 8}
    phases = [
        {"name": "pretrain", "train_tokens": 7_000, **shape},
        {"name": "extension", "train_tokens": 2_500, "rotary_base_global": 160_000.0, **shape},
        {"name": "decay", "train_tokens": 3_000, "lr_end": 0.1, **shape},
    ]
    data = {**corpus.data, "blend": {phase["name"]: blend for phase in phases}, "pools": {}}
    return {"phases": phases, "data": data, "checkpoint": {"save_every_tokens": 1_500}}


@pytest.fixture(scope="module")
def runs(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Train twins."""
    folder = tmp_path_factory.mktemp("runs")
    for name, objective in OBJECTIVES.items():
        given = sections(tiny_corpus) | {"objective": objective}
        config = tiny_corpus.write_config(folder / f"{name}.yaml", **given)
        train_here([f"--config={config}"], folder / name)
    return {name: folder / name for name in OBJECTIVES}


@pytest.fixture(scope="module")
def series(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write both series."""
    output = tmp_path_factory.mktemp("series") / "repo"
    write(runs.values(), output)
    return output


def write(runs: Any, output: Path, *options: str) -> None:
    given = [f"--run={run}" for run in runs]
    main(["series", *given, f"--output={output}", *AVERAGES, *options])


def git(series: Path, name: str, *arguments: str) -> str:
    command = ["git", f"--git-dir={series / f'{name}.git'}", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def branches(series: Path, name: str) -> dict[str, str]:
    lines = git(series, name, "for-each-ref", "--format=%(refname:lstrip=2) %(objectname)")
    return dict(line.split() for line in lines.splitlines())  # type: ignore[misc]


def expected_names(run: Path) -> dict[str, Path]:
    """Return the checkpoints by published name: steps are counted from the last of the phase."""
    prefixes = {"pretrain": "step", "extension": "ext", "decay": "decay"}
    ends, named = {"": 0}, {}
    paths = sorted(RunFolder(run).complete_checkpoints())
    before = {"pretrain": "", "extension": "pretrain", "decay": "extension"}
    for path in paths:
        state = checkpoint.read_state(path)
        ends[state.phase] = state.step
    for path in paths:
        state = checkpoint.read_state(path)
        count = state.step - ends[before[state.phase]]
        named[f"{prefixes[state.phase]}{count}"] = path
    return named


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_revision_loads_offline_and_is_its_checkpoint(
    name: str, series: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    named = expected_names(runs[name])
    assert {"step2", "ext1", "decay1"} <= named.keys()
    own = {branch for branch in branches(series, name) if not branch.startswith("averaged-")}
    assert own == {*named, "main"}
    for revision, path in named.items():
        to_huggingface(path, tmp_path / revision)
        found = AUTO[name].from_pretrained(name, revision=revision, cache_dir=series)
        kept = AUTO[name].from_pretrained(tmp_path / revision)
        assert found.config.rope_parameters == kept.config.rope_parameters
        weights = found.state_dict()
        assert weights.keys() == kept.state_dict().keys()
        assert all(torch.equal(weights[key], kept.state_dict()[key]) for key in weights)
    tokenizer = AutoTokenizer.from_pretrained(name, revision="ext1", cache_dir=series)
    assert len(tokenizer) == kept.config.vocab_size


@pytest.mark.parametrize("name", OBJECTIVES)
def test_main_is_the_last_checkpoint(name: str, series: Path, runs: dict[str, Path]) -> None:
    *_, last = expected_names(runs[name])
    assert branches(series, name)["main"] == branches(series, name)[last]
    default = AUTO[name].from_pretrained(name, cache_dir=series).state_dict()
    chosen = AUTO[name].from_pretrained(name, revision=last, cache_dir=series).state_dict()
    assert all(torch.equal(default[key], chosen[key]) for key in default)
    with pytest.raises(OSError, match="cached files"):
        AUTO[name].from_pretrained(name, revision="step99999", cache_dir=series)


def test_loads_in_a_process_without_this_project(series: Path) -> None:
    program = (
        "from transformers import AutoModelForCausalLM as M\n"
        "print(M.from_pretrained('decoder', revision='ext1').config.rope_parameters)"
    )
    # The environment of the documentation, and nothing of the tests.
    environment = {"HF_HUB_CACHE": str(series), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "160000.0" in done.stdout, done.stderr


def test_the_branch_holds_what_the_hub_would(series: Path) -> None:
    """Small files as they are, the weights as a pointer whose object is the cache's blob."""
    shown = git(series, "encoder", "show", "step2:model.safetensors").splitlines()
    snapshot = series / "models--encoder" / "snapshots" / branches(series, "encoder")["step2"]
    weights = (snapshot / "model.safetensors").read_bytes()
    digest = hashlib.sha256(weights).hexdigest()
    assert shown == [
        "version https://git-lfs.github.com/spec/v1",
        f"oid sha256:{digest}",
        f"size {len(weights)}",
    ]
    large = series / "encoder.git" / "lfs" / "objects" / digest[:2] / digest[2:4] / digest
    assert large.samefile(snapshot / "model.safetensors")
    names = git(series, "encoder", "ls-tree", "--name-only", "step2").splitlines()
    assert sorted(path.name for path in snapshot.iterdir()) == sorted(names)
    for name in names:
        if name != "model.safetensors":
            shown_text = git(series, "encoder", "show", f"step2:{name}")
            assert shown_text == (snapshot / name).read_text().strip()
    assert "*.safetensors filter=lfs diff=lfs merge=lfs -text" in git(
        series, "encoder", "show", "step2:.gitattributes"
    )
    assert git(series, "encoder", "fsck", "--full", "--strict") == ""


def test_the_card_and_its_command(series: Path, runs: dict[str, Path]) -> None:
    path = expected_names(runs["encoder"])["ext1"]
    state = checkpoint.read_state(path)
    card = git(series, "encoder", "show", "ext1:README.md")
    order = json.loads((runs["encoder"] / "order.json").read_text())
    assert f"| tokens | {state.consumed_tokens:,}," in card
    assert f"| order id | `{state.phase_ids[1]}` |" in card
    assert state.phase_ids[1] in json.dumps(order)
    assert f"| ledger head | `{state.ledger_chain}`" in card
    assert f"| checkpoint files | SHA-256 `{read_files(path).sha256}` |" in card
    (command,) = [line for line in card.splitlines() if line.startswith("python tools/order.py")]
    words = command.replace("RUN", str(runs["encoder"])).split()[1:]
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    words[-1] = "0" * 64
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_averages_are_means(name: str, series: Path, runs: dict[str, Path]) -> None:
    states = {
        revision: checkpoint.read_state(path)
        for revision, path in expected_names(runs[name]).items()
    }
    revisions = list(states)
    expected = {f"averaged-last2-{revisions[-1]}": revisions[-2:]}
    windows: dict[tuple[str, int], list[str]] = {}
    for revision, state in states.items():
        window = (state.phase_tokens - 1) // 4000
        windows.setdefault((state.phase, window), []).append(revision)
    for members in windows.values():
        if len(members) > 1:
            expected[f"averaged-every4000-{members[-1]}"] = members
    assert len(expected) >= 4
    commits = branches(series, name)
    assert {branch for branch in commits if branch.startswith("averaged-")} == expected.keys()

    def tensors(revision: str) -> dict[str, torch.Tensor]:
        folder = series / f"models--{name}" / "snapshots" / commits[revision]
        return load_file(folder / "model.safetensors")

    for revision, members in expected.items():
        found, parts = tensors(revision), [tensors(member) for member in members]
        for key, tensor in found.items():
            mean = torch.stack([part[key].double() for part in parts]).mean(0)
            torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-8)
        card = git(series, name, "show", f"{revision}:README.md")
        assert ", ".join(f"`{member}`" for member in members) in card


def test_a_second_time_writes_nothing(
    series: Path, runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.lstat().st_mtime_ns for path in series.rglob("*") if path.is_file()}
    write(runs.values(), series)
    lines = capsys.readouterr().out.splitlines()
    assert all(line.endswith("there already") for line in lines if "main:" not in line)
    changed = {
        path
        for path in series.rglob("*")
        if path.is_file() and path.lstat().st_mtime_ns != before.get(path)
    }
    assert {path.name for path in changed} <= {"main", "config"}


def test_goes_on_with_the_same_ids(series: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    """The series of a run that was shorter then, and of one whose cache has lost a revision."""
    run = tmp_path / "run"
    shutil.copytree(runs["decoder"], run)
    later = sorted((run / "checkpoints").iterdir())[2:]
    for path in later:
        path.rename(tmp_path / path.name)
    main(["series", f"--run={run}", f"--output={tmp_path / 'repo'}"])
    assert len(branches(tmp_path / "repo", "decoder")) == 3
    for path in later:
        (tmp_path / path.name).rename(path)
    (tmp_path / "repo" / "models--decoder" / "refs" / "step2").unlink()
    write([run], tmp_path / "repo")
    assert branches(tmp_path / "repo", "decoder") == branches(series, "decoder")
    AUTO["decoder"].from_pretrained("decoder", revision="step2", cache_dir=tmp_path / "repo")


def test_other_files_are_refused_by_name(
    series: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    before = branches(series, "encoder")
    run = tmp_path / "run"
    shutil.copytree(runs["encoder"], run)
    state = RunFolder(run).complete_checkpoints()[0] / "state.json"
    document = json.loads(state.read_text())
    document["files"]["config.yaml"]["sha256"] = "0" * 64
    listed = {name: (entry["bytes"], entry["sha256"]) for name, entry in document["files"].items()}
    changed = FileList({name: FileDigest(*entry) for name, entry in listed.items()})
    state.write_text(json.dumps(document | changed.to_document()))
    with pytest.raises(SystemExit, match=r"encoder has a revision step2 of files with SHA-256"):
        main(["series", f"--run={run}", f"--output={series}"])
    assert branches(series, "encoder") == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--average=last:1"], "'last:1' is neither last:COUNT"),
        (["--average=last:99"], "but last:99 averages 99"),
        (["--average=last:8"], "rotary_base_global is"),
    ],
)
def test_averages_that_cannot_be_are_refused(
    options: list[str], message: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    arguments = [f"--run={runs['encoder']}", f"--output={tmp_path / 'repo'}", *options]
    with pytest.raises(SystemExit, match=message):
        main(["series", *arguments])
    assert not (tmp_path / "repo").exists()


def test_two_runs_of_one_kind_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    both = [f"--run={runs['encoder']}"] * 2
    with pytest.raises(SystemExit, match="the second encoder"):
        main(["series", *both, f"--output={tmp_path / 'repo'}"])


def test_a_run_that_goes_on(runs: dict[str, Path], tmp_path: Path) -> None:
    """Its last window waits; checkpoints that its ledger does not hold are left out."""
    run = tmp_path / "run"
    shutil.copytree(runs["encoder"], run)
    named = expected_names(run)
    third = checkpoint.read_state(list(named.values())[2])
    records = run / "ledger" / "records.led"
    records.write_bytes(records.read_bytes()[: (third.ledger_seq + 1) * RECORD.itemsize])
    window = Average.parse("every:1_000_000")
    found = list_revisions(RunFolder(run), [window])
    assert [revision.name for revision in found] == list(named)[:3]
    whole = list_revisions(RunFolder(runs["encoder"]), [window])
    assert [len(revision.checkpoints) for revision in whole[len(named) :]] == [
        sum(name.startswith(prefix) for name in named) for prefix in ("step", "ext", "decay")
    ]
