"""verify --files: what a corpus holds is hashed anew, whatever its time stamps say."""

import dataclasses
import os
from pathlib import Path

import pytest

from megatron_ettin.order import corpus_identity
from megatron_ettin.order.corpus_identity import identify_corpus
from megatron_ettin.queries.verify import Verification, verify
from tests.conftest import TinyCorpus
from tests.mutations import change_token
from tests.runs import record_run, tiny_config
from tools import order as order_tool


@pytest.fixture
def run(own_corpus: TinyCorpus, tmp_path: Path) -> Path:
    return record_run(tiny_config(own_corpus, tmp_path / "run"), steps=2)


def files(run: Path) -> Verification:
    return verify(run, order=False, tokens=False, files=True)


def test_files_that_are_what_they_were(run: Path, own_corpus: TinyCorpus) -> None:
    before = {path: path.stat().st_mtime_ns for path in own_corpus.folder.rglob("*")}
    found = files(run)
    assert found.passed, found.faults
    assert found.checks[1].compared == 1 + 2 * 2, "the tokenizer, and two files of two sources"
    assert before == {path: path.stat().st_mtime_ns for path in own_corpus.folder.rglob("*")}


def test_a_token_behind_the_old_identity(run: Path, own_corpus: TinyCorpus) -> None:
    path = own_corpus.folder / "beta.bin"
    stored = path.with_name("beta.identity.json")
    known = identify_corpus(str(path.with_suffix("")))
    lengths = verify(run, order=True, tokens=False)
    change_token(path.with_suffix(""), document=199)
    # As on a disk that flips a bit by itself, or with files that tell all times wrongly.
    stamps = corpus_identity._stamps(str(path.with_suffix("")))
    stored.write_text(corpus_identity._to_json(dataclasses.replace(known, **stamps)))
    assert verify(run, order=True, tokens=False) == lengths, "the stamps are believed"
    found = files(run)
    (fault,) = found.faults
    assert fault.what.startswith(f"{path} (source 'beta'): tokens_sha256 is ")
    assert fault.what.endswith(f"but order.json says {known.tokens_sha256}")
    assert not found.passed


def test_files_that_are_gone_or_cut(run: Path, own_corpus: TinyCorpus) -> None:
    (own_corpus.folder / "alpha.bin").unlink()
    path = own_corpus.folder / "beta.idx"
    path.write_bytes(path.read_bytes()[:-8])
    tokenizer = own_corpus.folder / "tokenizer" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    found = [fault.what for fault in files(run).faults]
    assert found[0].startswith(f"{tokenizer}: its SHA-256 is ")
    assert found[1].startswith("source 'alpha': ")
    assert "alpha.bin" in found[1]
    assert found[2].startswith("source 'beta': ")
    assert "beta.idx" in found[2]
    assert len(found) == 3


def test_the_command_hashes_only_when_asked(
    run: Path, own_corpus: TinyCorpus, capsys: pytest.CaptureFixture[str]
) -> None:
    path = own_corpus.folder / "beta.bin"
    stamps = path.stat().st_atime_ns, path.stat().st_mtime_ns
    change_token(path.with_suffix(""), document=199)
    os.utime(path, ns=stamps)
    order_tool.main(["verify", "--run", str(run), "--chain"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as status:
        order_tool.main(["verify", "--run", str(run), "--files"])
    assert status.value.code == 1
    assert "files: FAIL, 5 compared, 1 wrong" in capsys.readouterr().out
