"""The identity of a corpus: what it hashes, when it is believed, and what it refuses."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ettin.indexed import IndexedWriter
from megatron_ettin.order import corpus_identity as module
from megatron_ettin.order.corpus_identity import CorpusIdentity, identify_corpus

ROOT = Path(__file__).parents[2]
DOCUMENTS = [[1, 2, 3], [4], [5, 6]]


def write(prefix: Path, documents: list[list[int]]) -> str:
    with IndexedWriter(prefix, "uint16") as writer:
        for document in documents:
            writer.add(np.array(document))
    return str(prefix)


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write(tmp_path / "c", DOCUMENTS)


def forbid_hashing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(prefix: str) -> None:
        raise AssertionError(f"{prefix} was opened")

    monkeypatch.setattr(module, "TokenFile", refuse)


def expected(prefix: str, documents: list[list[int]]) -> CorpusIdentity:
    idx, data = os.stat(f"{prefix}.idx"), os.stat(f"{prefix}.bin")
    lengths = np.array([len(document) for document in documents], "<i8")
    tokens = np.concatenate(documents).astype("<u2")
    return CorpusIdentity(
        idx_bytes=idx.st_size,
        idx_mtime_ns=idx.st_mtime_ns,
        bin_bytes=data.st_size,
        bin_mtime_ns=data.st_mtime_ns,
        idx_inode=idx.st_ino,
        idx_ctime_ns=idx.st_ctime_ns,
        bin_inode=data.st_ino,
        bin_ctime_ns=data.st_ctime_ns,
        documents=len(documents),
        tokens=len(tokens),
        lengths_sha256=hashlib.sha256(lengths.tobytes()).hexdigest(),
        tokens_sha256=hashlib.sha256(tokens.tobytes()).hexdigest(),
    )


def test_identity_hashes_lengths_and_tokens(prefix: str) -> None:
    assert identify_corpus(prefix) == expected(prefix, DOCUMENTS)
    stored = json.loads(Path(f"{prefix}.identity.json").read_text())
    assert stored["format"] == "megatron-ettin-corpus-identity/2"
    assert sorted(stored) == sorted([*vars(expected(prefix, DOCUMENTS)), "format", "sha256"])


def test_chunks_do_not_change_the_hashes(
    tmp_path: Path, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = identify_corpus(prefix, folder=tmp_path / "whole")
    monkeypatch.setattr(module, "CHUNK_DOCUMENTS", 2)
    monkeypatch.setattr(module, "CHUNK_BYTES", 5)
    assert identify_corpus(prefix, folder=tmp_path / "chunks") == whole


def test_a_known_identity_is_read_and_not_computed(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = identify_corpus(prefix)
    forbid_hashing(monkeypatch)
    assert identify_corpus(prefix) == first
    assert identify_corpus(prefix, folder=tmp_path / "plans") == first
    assert not (tmp_path / "plans").exists()
    os.utime(f"{prefix}.bin", ns=(0, 0))
    with pytest.raises(AssertionError, match="was opened"):
        identify_corpus(prefix)


def test_one_of_many_hashes_and_the_others_wait(
    prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = []
    hash_tokens = module._hash_tokens

    def slowly(*arguments: Any) -> str:
        hashed.append(arguments)
        time.sleep(0.2)
        return hash_tokens(*arguments)

    monkeypatch.setattr(module, "_hash_tokens", slowly)
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(identify_corpus, [prefix] * 4))
    assert (len(found), len(hashed)) == (1, 1)


@pytest.mark.parametrize("documents", [[[1, 2, 3], [4], [5, 7]], [[1, 2], [3, 4], [5, 6]], [[9]]])
def test_other_content_is_another_identity(prefix: str, documents: list[list[int]]) -> None:
    first = identify_corpus(prefix)
    write(Path(prefix), documents)
    second = identify_corpus(prefix)
    assert second == expected(prefix, documents)
    assert second.content != first.content


def test_copies_have_the_same_content(prefix: str, tmp_path: Path) -> None:
    copy = write(tmp_path / "copy", DOCUMENTS)
    assert identify_corpus(prefix).content == identify_corpus(copy).content


@pytest.mark.parametrize("end", ["bin", "idx"])
@pytest.mark.parametrize("how", ["in place", "as another file"])
def test_bytes_that_change_behind_the_old_time_are_hashed(
    prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, end: str, how: str
) -> None:
    other = write(tmp_path / "other", [[1, 2], [3, 4], [5, 7]])
    first = identify_corpus(prefix)
    path, content = Path(f"{prefix}.{end}"), Path(f"{other}.{end}").read_bytes()
    before = path.stat()
    assert before.st_size == len(content)
    if how == "as another file":
        path.unlink()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = identify_corpus(prefix)
    assert [a == b for a, b in zip(first.content, second.content, strict=True)] == [
        end == "bin",
        end == "idx",
    ]
    (line,) = caplog.messages
    assert line.startswith(f"{path}: its bytes changed, though")


def test_a_copied_corpus_is_hashed_again_and_taken(
    prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = identify_corpus(prefix)
    for path in tmp_path.glob("c.*"):
        shutil.copy2(path, tmp_path / f"copy{path.suffixes[-1]}")
    shutil.copy2(f"{prefix}.identity.json", tmp_path / "copy.identity.json")
    caplog.set_level("INFO")
    copy = str(tmp_path / "copy")
    found = identify_corpus(copy)
    assert found == expected(copy, DOCUMENTS)
    assert (found.content, found.bin_mtime_ns) == (first.content, first.bin_mtime_ns)
    (line,) = caplog.messages
    assert line.startswith(f"{copy}: copied, moved or touched; hashed again")
    forbid_hashing(monkeypatch)
    assert identify_corpus(copy) == found


DAMAGES = {
    "cut": lambda text: text[:-20],
    "empty": lambda text: "",
    "not json": lambda text: "rubbish",
    "not an object": lambda text: "[1]",
    "another hash": lambda text: re.sub(r'("tokens_sha256": ")..', r"\1zz", text),
    "another count": lambda text: text.replace('"documents": 3', '"documents": 4'),
    "another format": lambda text: text.replace("identity/2", "identity/1"),
    "a field less": lambda text: text.replace('  "documents": 3,\n', ""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_identity_is_computed_again(prefix: str, damage: str) -> None:
    first = identify_corpus(prefix)
    path = Path(f"{prefix}.identity.json")
    good = path.read_text()
    path.write_text(DAMAGES[damage](good))
    assert path.read_text() != good
    assert identify_corpus(prefix) == first
    assert path.read_text() == good


def test_the_folder_keeps_corpora_of_one_name_apart(tmp_path: Path) -> None:
    plans = tmp_path / "plans"
    prefixes = []
    for name, documents in (("a", [[1]]), ("b", [[2]])):
        (tmp_path / name).mkdir()
        prefixes.append(write(tmp_path / name / "c", documents))
    first, second = (identify_corpus(prefix, folder=plans) for prefix in prefixes)
    assert first.tokens_sha256 != second.tokens_sha256
    assert len(list(plans.iterdir())) == 2
    assert not list(tmp_path.glob("*/c.identity.json"))
    assert [identify_corpus(prefix, folder=plans) for prefix in prefixes] == [first, second]


def test_a_folder_that_cannot_be_written_is_refused_before_hashing(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_hashing(monkeypatch)
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match=re.escape(f"{tmp_path}/file/plans: the identity")):
        identify_corpus(prefix, folder=tmp_path / "file" / "plans")
    if os.geteuid() != 0:  # root may write everywhere
        tmp_path.chmod(0o555)
        with pytest.raises(PermissionError, match=r"\(Permission denied\); set data\.plan_dir"):
            identify_corpus(prefix)
        tmp_path.chmod(0o755)


def test_a_pair_that_is_missing_or_not_valid_is_refused(prefix: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path}/none.idx")):
        identify_corpus(str(tmp_path / "none"))
    os.truncate(f"{prefix}.bin", 6)
    with pytest.raises(ValueError, match=re.escape(f"{prefix}.bin")):
        identify_corpus(prefix)
    assert not Path(f"{prefix}.identity.json").exists()


def test_a_pair_that_changes_while_it_is_hashed_is_refused(
    prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hash_tokens = module._hash_tokens

    def replace_meanwhile(prefix: str, total: int) -> str:
        write(Path(prefix), [[9]])
        return hash_tokens(prefix, total)

    monkeypatch.setattr(module, "_hash_tokens", replace_meanwhile)
    with pytest.raises(ValueError, match=r"c\.bin or \.idx: changed while its identity"):
        identify_corpus(prefix)
    assert not Path(f"{prefix}.identity.json").exists()


REPEAT = """
import sys
from pathlib import Path
from megatron_ettin.order.corpus_identity import identify_corpus
print("ready", flush=True)
while True:
    identify_corpus(sys.argv[1])
    Path(sys.argv[1] + ".identity.json").unlink(missing_ok=True)
"""


@pytest.mark.slow
def test_processes_that_are_killed_leave_a_whole_identity_or_none(prefix: str) -> None:
    good = identify_corpus(prefix)
    path = Path(f"{prefix}.identity.json")
    content = path.read_bytes()
    found = set()
    for turn in range(4):
        command = [sys.executable, "-c", REPEAT, prefix]
        processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(2)]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
        for _ in range(200):
            try:
                found.add(path.read_bytes())
            except FileNotFoundError:
                found.add(b"none")
            time.sleep(0.0002)
        time.sleep(0.001 * turn)
        for process in processes:
            assert process.poll() is None, "a reader failed"
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
        assert not path.exists() or path.read_bytes() == content
    assert found == {content, b"none"}
    assert identify_corpus(prefix) == good
