"""Raw files in an object store are read as if they were local."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import zstandard

boto3 = pytest.importorskip("boto3")
pytest.importorskip("s3fs")
server = pytest.importorskip("moto.server")
raw_files = pytest.importorskip("megatron_ettin.data.raw_files")

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
