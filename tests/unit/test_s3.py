"""Raw files, corpora and checkpoints in an object store are used as if they were local."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from megatron_ettin.data import raw_files
from megatron_ettin.data.anchor import Anchor, AnchorError
from megatron_ettin.data.command_line import parse_command
from megatron_ettin.data.preprocess import preprocess
from megatron_ettin.data.shard_maker import ShardMaker
from megatron_ettin.data.tokenize import train_tokenizer, write_tokenizer
from megatron_ettin.order.ledger import Head
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.training.second_place import SecondPlace
from tests.conftest import TinyCorpus
from tests.runs import record_run, tiny_config
from tests.saved_checkpoints import publish_recorded

boto3 = pytest.importorskip("boto3")
pytest.importorskip("s3fs")
server = pytest.importorskip("moto.server")

pytestmark = [
    # Said by boto3, moto and s3fs of themselves and of connections left to the garbage collector.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
BUCKET = "corpora"
TEXTS = [f"Document {number}, with a German ß.\nSecond line." for number in range(2000)]


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run an object store on this machine that fsspec finds; yield the address of a bucket."""
    import fsspec

    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"AWS_{name}", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    content = json_lines(TEXTS)
    for key, body in (
        ("web/a.jsonl.zst", zstandard.compress(content)),
        ("web/b.jsonl", json_lines(["another file"])),
        ("web/cut.jsonl.zst", zstandard.compress(content)[:-9]),
    ):
        client.put_object(Bucket=BUCKET, Key=key, Body=body)
    # A file system of an earlier test would have the address of a store that is gone.
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield f"s3://{BUCKET}"
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    # The next server of this process would have the same objects.
    with urllib.request.urlopen(f"http://{host}:{port}/moto-api/reset", data=b""):
        running.stop()


def read(address: str) -> list[str]:
    return [
        text
        for file in raw_files.expand_inputs([address])
        for batch in raw_files.read_batches(file, ["text"], None)
        for text in batch.texts[0]
    ]


def test_compressed_object_is_read(store: str) -> None:
    assert read(f"{store}/web/a.jsonl.zst") == TEXTS


def test_glob_of_objects_is_sorted(store: str) -> None:
    assert read(f"{store}/web/[ab].jsonl*") == [*TEXTS, "another file"]


def test_object_that_is_not_there_is_named(store: str) -> None:
    with pytest.raises((ValueError, OSError), match=r"none\.jsonl"):
        read(f"{store}/web/none.jsonl")


def test_damaged_object_is_named(store: str) -> None:
    with pytest.raises(ValueError, match=r"cut\.jsonl\.zst"):
        read(f"{store}/web/cut.jsonl.zst")


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    write_tokenizer(train_tokenizer(TEXTS, 280), tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def objects(store: str, prefix: str) -> dict[str, bytes]:
    """Return the objects that begin with a prefix, by name, without those that hold times."""
    import fsspec

    system, root = fsspec.core.url_to_fs(store)
    system.invalidate_cache()
    found = {name.removeprefix(f"{root}/"): name for name in system.find(root)}
    return {
        name: system.cat_file(path)
        for name, path in found.items()
        if name.startswith(prefix) and not name.endswith(".inputs.json")
    }


def run(tokenizer: Path, *arguments: str) -> None:
    corpora, _ = parse_command("", ["--tokenizer", str(tokenizer), *arguments])
    for options in corpora:
        preprocess(options)


@pytest.mark.parametrize("shards", [[], ["--shards"]])
def test_corpus_is_written_to_the_store(
    store: str, tokenizer: Path, tmp_path: Path, shards: list[str]
) -> None:
    inputs = ["--input", f"{store}/web/[ab].jsonl*", "--validation-share", "0.1", *shards]
    run(tokenizer, *inputs, "--output-prefix", str(tmp_path / "out" / "c"))
    run(tokenizer, *inputs, "--output-prefix", f"{store}/corpora/c")
    local = {
        path.relative_to(tmp_path / "out").as_posix(): path.read_bytes()
        for path in (tmp_path / "out").rglob("*")
        if path.is_file() and not path.name.endswith((".inputs.json", ".identity.json"))
    }
    stored = objects(f"{store}/corpora", "c")
    assert stored == local
    assert len(stored) > 6


def test_a_run_goes_on_after_the_shards_of_the_store(
    store: str, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = ["--input", f"{store}/web/[ab].jsonl*", "--shards"]
    prefix = ["--output-prefix", f"{store}/corpora/c"]
    make, made = ShardMaker.make, []

    def make_one(self: ShardMaker, shard: Any, progress: Any) -> Any:
        made.append(shard.index)
        if len(made) == 2:
            raise OSError("the machine went away")
        return make(self, shard, progress)

    monkeypatch.setattr(ShardMaker, "make", make_one)
    with pytest.raises(OSError, match="went away"):
        run(tokenizer, *inputs, *prefix)
    assert "c_text_document/00000.json" in objects(f"{store}/corpora", "c")
    assert "c_text_document/dataset.json" not in objects(f"{store}/corpora", "c")
    run(tokenizer, *inputs, *prefix)
    run(tokenizer, *inputs, *prefix)
    assert made == [0, 1, 1]
    assert "c_text_document/dataset.json" in objects(f"{store}/corpora", "c")
    with pytest.raises(ValueError, match="made with min_tokens 1, not with min_tokens 2"):
        run(tokenizer, *inputs, *prefix, "--min-tokens", "2")


def test_checkpoints_go_to_the_store_and_come_back(
    store: str, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    run = RunFolder(record_run(tiny_config(tiny_corpus, tmp_path / "run"), save_steps=[2]))
    folders, place = publish_recorded(run), SecondPlace(f"{store}/runs/mine")
    assert place.steps() == []
    for folder in folders:
        assert not place.holds(folder)
        for _ in range(2):  # an undone checkpoint of the same step is replaced
            place.put(run, folder, lambda: None)
            assert place.holds(folder)
    again = RunFolder(tmp_path / "again")
    place.fetch(again, place.steps()[-1])
    assert again.read_ledger().checkpoints() == run.read_ledger().checkpoints()
    newest = again.newest_checkpoint()
    assert newest is not None
    for path in folders[-1].iterdir():
        assert (newest / path.name).read_bytes() == path.read_bytes()


def test_heads_in_a_store_are_never_written_again(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    anchor = Anchor(f"{store}/anchor")
    assert anchor.owner() is None
    heads = [Head(seq, f"{seq:064x}") for seq in (3, 9, 4)]
    for head in heads:
        anchor.add(head, "f" * 64)
    assert [entry.head for entry in anchor.heads()[0]] == heads
    assert anchor.owner() == "f" * 64
    # The store runs in this process and asks for the time too.
    written_at = anchor.heads()[0][0].unix_ns
    monkeypatch.setattr(time, "time_ns", lambda: written_at)
    with pytest.raises(AnchorError, match=r"FileExistsError|PreconditionFailed"):
        anchor.add(heads[0], "e" * 64)
    assert anchor.heads()[0][0].first_record == "f" * 64
