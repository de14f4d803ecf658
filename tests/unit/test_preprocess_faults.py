"""Disks that are full and files without permission: named, and nothing that was there is lost."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_ettin.data.tokenize import train_tokenizer, write_tokenizer
from tests.disks import may_mount

ROOT = Path(__file__).parents[2]
WORDS = ["the", "film", "was", "good", "bad", "long", "short", "plot", "never", "again", "why"]
FILES_OF_A_SHARD = 7  # four for training; no summary of their own for the three of validation
#: Root without the rights to read and write what permissions deny.
OBEYING = ["setpriv", "--inh-caps=-all", "--bounding-set=-dac_override,-dac_read_search"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder with a tokenizer and two raw files of 20 documents."""
    random = np.random.default_rng(0)
    for name in "ab":
        lines = [json.dumps({"text": " ".join(random.choice(WORDS, size=300))}) for _ in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    write_tokenizer(train_tokenizer(iter(WORDS * 50), 290), tmp_path / "tokenizer")
    return tmp_path


@pytest.mark.slow
@pytest.mark.skipif(not may_mount(), reason="needs the right to mount (unshare -rm)")
def test_a_full_disk_is_named_and_the_next_run_goes_on(folder: Path) -> None:
    """Whatever did not fit: two shards, on disks with room for nothing to all of it."""
    (folder / "disk").mkdir()
    mounted = f'mount -t tmpfs -o size=2m tmpfs "{folder}/disk" && exec "$@"'
    program = [sys.executable, "-m", "tests.unit.fill_preprocessing"]
    arguments = [folder / "tokenizer", folder / "*.jsonl", folder / "disk", 12288]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mounted, "sh", *program, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *failed, last = (json.loads(line) for line in done.stdout.splitlines())
    assert last["errno"] is None
    refused = set()
    for each in failed:
        assert each["errno"] == "ENOSPC", each
        assert str(folder / "disk" / "out") in each["message"], "the message names no file"
        assert each["other"] == [], "a file is there in part, or by another name"
        assert each["same"], "the next run ends otherwise"
        refused.add(each["message"].rpartition("/")[2].rstrip("'"))
    assert {"00000.bin.tmp", "00001.bin.tmp"} < refused
    assert any(name.endswith("json") for name in refused), refused
    kept = [len(each["left"]) for each in failed]
    assert kept == sorted(kept)
    assert kept[0] == 0
    assert sum(count >= FILES_OF_A_SHARD for count in kept) > 5, "the first shard did not stay"


@pytest.mark.slow
@pytest.mark.skipif(
    os.geteuid() == 0 and shutil.which("setpriv") is None, reason="root may do everything"
)
def test_what_may_not_be_read_or_written_is_named(folder: Path) -> None:
    denied = [folder / "b.jsonl", folder / "one", folder / "two" / "c_text_document"]
    outputs = [folder / "zero", folder / "one", folder / "two"]
    runs = []
    for path, output in zip(denied, outputs, strict=True):
        if output != outputs[0]:
            path.mkdir(parents=True)
        options = ["--input", folder / "*.jsonl", "--tokenizer", folder / "tokenizer"]
        arguments = [*options, "--output-prefix", output / "c", "--shards"]
        runs.append((str(path), list(map(str, arguments))))
    # A user whom permissions bind makes all three; root as one without the rights to pass them by.
    words = OBEYING if os.geteuid() == 0 else []
    program = f"""
import os
from tools.preprocess_data import main
for path, arguments in {runs!r}:
    os.chmod(path, 0o500 if os.path.isdir(path) else 0)
    try:
        main(arguments)
    except SystemExit as error:
        print(repr(error.code))
    os.chmod(path, 0o700)
"""
    done = subprocess.run(
        [*words, sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    messages = [line for line in done.stdout.splitlines() if "error" in line]
    assert len(messages) == 3, done.stderr
    for path, message in zip(denied, messages, strict=True):
        assert "error: [Errno 13] Permission denied: " in message
        assert str(path) in message
    left = {output: {path.name for path in output.glob("**/*.*")} for output in outputs}
    assert {"00000.idx", "00000.json"} < left[outputs[0]], "the first shard did not stay"
    assert not any(".tmp" in name for names in left.values() for name in names)
    assert not left[outputs[1]] | left[outputs[2]]
