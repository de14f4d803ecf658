"""What names a raw file: paths, globs, URLs, lists, folders of data sets."""

import functools
import http.server
import json
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest

from megatron_ettin.data.raw_files import RawFile, TokenBatch, expand_inputs, read_batches
from tests.raw_data import TEXTS, jsonl_bytes, mds_bytes, packed, read_rows, write_corpus


def write(path: Path, content: str | bytes = "a") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def paths(*patterns: str | Path) -> list[str]:
    return [file.path for file in expand_inputs([str(pattern) for pattern in patterns])]


@pytest.fixture
def store() -> Iterator[fsspec.AbstractFileSystem]:
    """Return fsspec's store in memory, which is one for the process."""
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def test_inputs_keep_their_order_and_globs_are_sorted(tmp_path: Path) -> None:
    for name in ["z.jsonl", "b/2.jsonl", "b/1.jsonl", "b/[x].txt"]:
        write(tmp_path / name)
    patterns = [tmp_path / pattern for pattern in ["z.jsonl", "b/*.jsonl", "b/[x].txt"]]
    expected = ["z.jsonl", "b/1.jsonl", "b/2.jsonl", "b/[x].txt"]
    assert paths(*patterns) == [str(tmp_path / name) for name in expected]
    (file,) = expand_inputs([str(tmp_path / "z.jsonl")])
    assert (file, file.format) == (RawFile(str(tmp_path / "z.jsonl"), 1), ".jsonl")


def test_inputs_that_cannot_be_meant(tmp_path: Path) -> None:
    good = write(tmp_path / "a.jsonl", "{}")
    other = write(tmp_path / "a.json", "{}")
    cases = [
        ([tmp_path / "b.jsonl"], f"no such file: {tmp_path}/b.jsonl"),
        ([good / "b.jsonl"], f"no such file: {good}/b.jsonl"),
        ([tmp_path / "*.csv"], f"no file matches '{tmp_path}/*.csv'"),
        ([tmp_path], f"{tmp_path}: is a folder; name its files or a glob such as"),
        ([other], f"{other}: no reader for this suffix; known are .jsonl, .jsonl.gz"),
        ([good, tmp_path / "*.jsonl"], f"{good}: given twice"),
        ([good, f"{tmp_path}/../{tmp_path.name}/a.jsonl"], "given twice"),
        ([], "no input: none was named"),
    ]
    for patterns, message in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
            paths(*patterns)


def test_a_list_of_inputs_keeps_its_order(tmp_path: Path) -> None:
    names = ["b/2.jsonl", "b/1.jsonl", "c.txt", "z.jsonl"]
    for name in names:
        write(tmp_path / name)
    lines = f"\ufeff# sources\n\nb/2.jsonl\r\n  b/1.jsonl  \n{tmp_path}/c.txt\n#z\n"
    listed = write(tmp_path / "files.txt", lines)
    assert paths(f"@{listed}", tmp_path / "z.jsonl") == [str(tmp_path / name) for name in names]
    globs = write(tmp_path / "lists" / "more.txt", "../b/*.jsonl\n")
    assert [Path(path).name for path in paths(f"@{globs}")] == ["1.jsonl", "2.jsonl"]
    with pytest.raises(ValueError, match="given twice"):
        paths(f"@{listed}", tmp_path / "b" / "*.jsonl")


def test_bad_lists(tmp_path: Path) -> None:
    empty = write(tmp_path / "empty.txt", "# nothing\n\n")
    with pytest.raises(ValueError, match=re.escape(f"no input: @{empty}")):
        paths(f"@{empty}")
    nested = write(tmp_path / "nested.txt", "\n@empty.txt\n")
    with pytest.raises(ValueError, match=re.escape(f"{nested}:2: @empty.txt: a list in a list")):
        paths(f"@{nested}")
    binary = write(tmp_path / "binary.txt", b"a\xff")
    with pytest.raises(ValueError, match=re.escape(f"{binary}: invalid UTF-8 at byte 2")):
        paths(f"@{binary}")
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "no.txt"))):
        paths(f"@{tmp_path}/no.txt")


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst", ".parquet", ".arrow", ".csv", ".mds"])
def test_urls_are_read_as_files_are(
    tmp_path: Path, suffix: str, store: fsspec.AbstractFileSystem
) -> None:
    local = write_corpus(tmp_path, suffix)
    for number in (2, 1):
        store.pipe(f"/bucket/x/{number}{suffix}", local.read_bytes())
    files = expand_inputs([f"memory://bucket/x/*{suffix}", f"file://{local}"])
    assert [re.sub("/+", "/", file.path) for file in files] == [
        f"memory:/bucket/x/1{suffix}",
        f"memory:/bucket/x/2{suffix}",
        f"file:{local}",
    ]
    expected = list(read_rows(local))
    for file in files:
        assert list(read_rows(file)) == expected
        assert file.digest() == RawFile(str(local), local.stat().st_size).digest()


def test_lists_and_folders_behind_urls(tmp_path: Path, store: fsspec.AbstractFileSystem) -> None:
    store.pipe("/x/files.txt", b"b.jsonl\nmemory://x/a.jsonl\n")
    for name in "ab":
        store.pipe(f"/x/{name}.jsonl", jsonl_bytes())
    assert paths("@memory://x/files.txt") == ["memory://x/b.jsonl", "memory://x/a.jsonl"]
    write_shards(tmp_path, ".zstd")
    store.put(str(tmp_path), "/shards", recursive=True)
    found = expand_inputs(["memory://shards"])
    assert [text for file in found for row in read_rows(file) for text in row.texts] == TEXTS


def test_urls_that_cannot_be_read(store: fsspec.AbstractFileSystem) -> None:
    cases = [
        ("memory://x/a.jsonl", "no such file: memory://x/a.jsonl"),
        ("memory://x/*.jsonl", "no file matches 'memory://x/*.jsonl'"),
        ("nowhere://x/a.jsonl", "nowhere://x/a.jsonl: Protocol not known: nowhere"),
    ]
    for url, message in cases:
        with pytest.raises((ValueError, OSError), match=re.escape(message)):
            paths(url)


def test_a_store_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ValueError, match=r"s3://b/a\.jsonl: s3:// needs a package: .*s3fs"):
        paths("s3://b/a.jsonl")


def test_a_url_that_changes_while_it_is_read(store: fsspec.AbstractFileSystem) -> None:
    store.pipe("/a.jsonl", jsonl_bytes())
    (file,) = expand_inputs(["memory://a.jsonl"])
    store.pipe("/a.jsonl", jsonl_bytes() * 2)
    with pytest.raises(ValueError, match=r"memory://a\.jsonl: changed while it was in use"):
        list(read_rows(file))


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """Serve tmp_path; return the address. The server gives whole files only."""
    pytest.importorskip("aiohttp")
    handler = functools.partial(SilentHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class SilentHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        pass


def test_a_web_server_that_gives_whole_files(tmp_path: Path, web: str) -> None:
    path = write_corpus(tmp_path, ".jsonl.zst")
    (file,) = expand_inputs([f"{web}/corpus.jsonl.zst?download=true"])
    assert [row.texts[0] for row in read_rows(file)] == TEXTS
    assert (file.format, file.size) == (".jsonl.zst", path.stat().st_size)
    assert paths(f"{web}/*.zst") == [f"{web}/corpus.jsonl.zst"]
    with pytest.raises(FileNotFoundError, match=re.escape(f"no such file: {web}/no.jsonl")):
        paths(f"{web}/no.jsonl")


def write_shards(folder: Path, suffix: str = "") -> list[Path]:
    """Write TEXTS as a folder of two MDS shards, whose names are not in their order."""
    shards, written = [], []
    for number, texts in ((1, TEXTS[:2]), (0, TEXTS[2:])):
        raw = mds_bytes({"text": "str"}, [{"text": text} for text in texts])
        zipped = packed(raw, suffix)
        name = f"shard.{number:05}.mds"
        written.append(write(folder / f"{name}{suffix}", zipped))
        entry = {"format": "mds", "raw_data": {"basename": name, "bytes": len(raw)}}
        zip_data = {"basename": f"{name}{suffix}", "bytes": len(zipped)} if suffix else None
        shards.append({**entry, "zip_data": zip_data, "samples": len(texts)})
    write(folder / "index.json", json.dumps({"version": 2, "shards": shards}))
    return written


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".zstd"])
def test_shards_come_in_the_order_of_their_index(tmp_path: Path, suffix: str) -> None:
    written = write_shards(tmp_path, suffix)
    files = expand_inputs([str(tmp_path)])
    assert [file.path for file in files] == [str(path) for path in written]
    assert [text for file in files for row in read_rows(file) for text in row.texts] == TEXTS


def test_a_shard_that_its_index_does_not_know(tmp_path: Path) -> None:
    first, second = write_shards(tmp_path)
    whole = second.read_bytes()
    second.write_bytes(whole[:-3])
    with pytest.raises(ValueError, match=f"has {len(whole) - 3} bytes, and the index of .* says"):
        paths(tmp_path)
    second.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"no such file: {second}; the index")):
        paths(tmp_path)
    write(tmp_path / "index.json", '{"shards": [{"format": "json"}]}')
    with pytest.raises(ValueError, match="shard 0 has the format json, not mds"):
        paths(tmp_path)
    write(tmp_path / "index.json", "[]")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/index.json: is not what its name")):
        paths(tmp_path)
    write(first.with_suffix(".mds.br"))
    data = {"basename": "shard.00001.mds.br", "bytes": 1}
    shard = {"format": "mds", "raw_data": {"basename": "no", "bytes": 1}, "zip_data": data}
    write(tmp_path / "index.json", json.dumps({"shards": [shard]}))
    with pytest.raises(ValueError, match="packed in a way that no reader knows"):
        paths(tmp_path)


def save_dataset(folder: Path, shards: list[list[str]]) -> None:
    """Write a folder as `datasets.save_to_disk` does: streams, listed in state.json."""
    names = [f"data-{n:05}-of-{len(shards):05}.arrow" for n in reversed(range(len(shards)))]
    folder.mkdir(parents=True)
    for name, texts in zip(names, shards, strict=True):
        table = pa.table({"text": texts})
        with pa.ipc.new_stream(folder / name, table.schema) as stream:
            stream.write_table(table)
    write(folder / "state.json", json.dumps({"_data_files": [{"filename": n} for n in names]}))
    write(folder / "dataset_info.json", "{}")


def test_a_saved_data_set(tmp_path: Path) -> None:
    save_dataset(tmp_path / "all" / "train", [TEXTS[:1], TEXTS[1:]])
    files = expand_inputs([str(tmp_path / "all" / "train")])
    assert [text for file in files for row in read_rows(file) for text in row.texts] == TEXTS
    save_dataset(tmp_path / "all" / "test", [["x"]])
    chosen = {"_data_files": [], "_indices_data_files": [{"filename": "indices.arrow"}]}
    write(tmp_path / "chosen" / "state.json", json.dumps(chosen))
    with pytest.raises(ValueError, match=r"keeps a selection of rows .* flatten_indices"):
        paths(tmp_path / "chosen")
    write(tmp_path / "all" / "dataset_dict.json", '{"splits": ["train", "test"]}')
    message = f"holds several splits; name one or more: {tmp_path}/all/train, {tmp_path}/all/test"
    with pytest.raises(ValueError, match=re.escape(message)):
        paths(tmp_path / "all")


def test_the_library_that_saves_data_sets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": TEXTS})
    data.save_to_disk(tmp_path / "saved", num_shards=2)
    files = expand_inputs([str(tmp_path / "saved")])
    assert len(files) == 2
    batches = [batch for file in files for batch in read_batches(file, ["text"])]
    assert not any(isinstance(batch, TokenBatch) for batch in batches)
    assert [text for batch in batches for text in batch.texts[0]] == TEXTS  # type: ignore[union-attr]
