"""The sidecar of a corpus against the raw files; what it refuses; what a writer leaves behind."""

import csv
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_ettin.data import blocks
from megatron_ettin.data import provenance as module
from megatron_ettin.data.batches import TextBatch
from megatron_ettin.data.encoding import EncodedPart, SelectionRules
from megatron_ettin.data.preprocess import preprocess
from megatron_ettin.data.preprocess_options import PreprocessOptions
from megatron_ettin.data.provenance import CorpusWriter, Provenance, sidecar_path
from megatron_ettin.data.raw_files import expand_inputs
from megatron_ettin.data.tokenize import load_tokenizer, train_tokenizer, write_tokenizer
from megatron_ettin.indexed import IndexedWriter

ROOT = Path(__file__).parents[2]
WORDS = ["the", "film", "was", "good", "bad", "long", "short", "plot", "never", "again", "why"]
COLUMNS = ["ordinal", "id", "url", "sha256", "n_tokens", "shard", "line"]


def texts(seed: int, count: int) -> list[str]:
    """Documents of very different lengths; some empty, some twice."""
    random = np.random.default_rng(seed)
    made = [" ".join(random.choice(WORDS, size=n)) for n in random.integers(0, 30, size=count)]
    return made + made[: count // 10]


def write_inputs(folder: Path) -> list[tuple[Path, int, str | None, str | None, str]]:
    """Write three files; return (path, line, id, url, text) of each record."""
    expected: list[tuple[Path, int, str | None, str | None, str]] = []
    lines = folder / "a.jsonl"
    with lines.open("w") as file:
        for line, text in enumerate(texts(1, 100), 1):
            record: dict[str, Any] = {"text": text, "id": line if line % 2 else f"a-{line}"}
            if line % 3:
                record["url"] = f"https://example.org/{line}"
            file.write(json.dumps(record) + "\n")
            expected.append((lines, line, str(record["id"]), record.get("url"), text))
    table = folder / "b.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "id"])
        for line, text in enumerate(texts(2, 30), 2):
            writer.writerow([text, f"b-{line}"])
            expected.append((table, line, f"b-{line}", None, text))
    plain = folder / "c.txt"
    plain.write_text("the film\n\nwhy\n")
    expected += [(plain, 1, None, None, "the film"), (plain, 3, None, None, "why")]
    return expected


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(train_tokenizer(texts(0, 300), 300), folder)
    return folder


@pytest.fixture
def options(tmp_path: Path, tokenizer_folder: Path) -> PreprocessOptions:
    records = write_inputs(tmp_path)
    return PreprocessOptions(
        inputs=expand_inputs(list(dict.fromkeys(str(path) for path, *_ in records))),
        output_prefix=tmp_path / "out" / "c",
        tokenizer=tokenizer_folder,
        rules=SelectionRules(validation_share=0.2),
    )


def expected_rows(options: PreprocessOptions, part: str) -> list[dict[str, Any]]:
    """Say what the sidecar must hold, from the raw files alone."""
    tokenizer = load_tokenizer(options.tokenizer)
    rows: list[dict[str, Any]] = []
    for path, line, id_, url, text in write_inputs(Path(options.inputs[0].path).parent):
        sha256 = hashlib.sha256(text.encode()).digest()
        held_out = int.from_bytes(sha256[:8], "big") < options.rules.validation_share * 2**64
        (ids,) = tokenizer.encode_batch([text])
        if len(ids) and held_out == (part == "validation"):
            values = [len(rows), id_, url, sha256, len(ids), str(path), line]
            rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("part", ["document", "validation"])
@pytest.mark.parametrize("batch_bytes", [2**22, 500])
def test_sidecar_says_where_every_document_came_from(
    options: PreprocessOptions, part: str, batch_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BATCH_BYTES", batch_bytes)
    preprocess(options)
    prefix = options.corpus("text", part)
    expected = expected_rows(options, part)
    assert len(expected) > 20
    # Read by the library alone, as another program would.
    assert pq.read_table(sidecar_path(prefix)).to_pylist() == expected
    with Provenance.open(prefix) as provenance:
        assert provenance.num_documents == len(expected)
        everything = np.arange(len(expected))
        assert provenance.documents(everything).to_pylist() == expected


@pytest.fixture
def small_groups(
    options: PreprocessOptions, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Provenance]:
    """Make a training corpus in row groups of 7 documents, the last one short."""
    monkeypatch.setattr(module, "GROUP_DOCUMENTS", 7)
    monkeypatch.setattr(blocks, "BATCH_BYTES", 500)
    preprocess(options)
    with Provenance.open(options.corpus("text", "document")) as provenance:
        yield provenance


def test_documents_come_in_the_order_asked_for(
    options: PreprocessOptions, small_groups: Provenance
) -> None:
    expected = expected_rows(options, "document")
    metadata = pq.read_metadata(sidecar_path(options.corpus("text", "document")))
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert set(sizes[:-1]) == {7}
    random = np.random.default_rng(0)
    for count in (0, 1, 2, 300):
        ordinals = random.integers(0, len(expected), size=count)
        table = small_groups.documents(ordinals)
        assert table.schema.equals(module.SCHEMA)
        assert table.to_pylist() == [expected[ordinal] for ordinal in ordinals]


def groups_read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[str]]]:
    """Return a list that every row group is added to when it is read, with its columns."""
    read, found = Provenance._read, []

    def record(self: Provenance, group: int, columns: list[str]) -> pa.Table:
        found.append((group, columns))
        return read(self, group, columns)

    monkeypatch.setattr(Provenance, "_read", record)
    return found


def test_only_the_row_groups_needed_are_read(
    small_groups: Provenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = groups_read(monkeypatch)
    small_groups.documents(np.array([15, 0, 20, 14, 0]))
    assert [group for group, _ in read] == [0, 2]


def test_only_the_columns_asked_for_are_read(
    options: PreprocessOptions, small_groups: Provenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = expected_rows(options, "document")
    read = groups_read(monkeypatch)
    # Of few documents, all columns but these are read page by page.
    assert small_groups.documents(np.array([9, 2, 9]), ["url", "line"]).num_rows == 3
    assert read == [(0, ["line"]), (1, ["line"])]
    del read[:]
    table = small_groups.documents(np.array([9, 2, 9]), ["url", "id"])
    assert read == []
    wanted = [{n: expected[i][n] for n in ("url", "id")} for i in (9, 2, 9)]
    assert table.to_pylist() == wanted
    monkeypatch.setattr(module, "FEW_DOCUMENTS", 1)
    del read[:]
    table = small_groups.documents(np.array([9, 2, 9, 10]), ["url", "id"])
    assert read == [(1, ["ordinal", "url", "id"])]
    assert table.to_pylist()[:3] == wanted


def test_a_name_is_looked_for_where_it_may_be(
    options: PreprocessOptions, small_groups: Provenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = expected_rows(options, "document")
    read = groups_read(monkeypatch)
    holding = 0
    for row in expected:
        for name, value in (("id", row["id"]), ("sha256", row["sha256"].hex())):
            if value:
                getattr(small_groups, f"find_{name}")(value)
                holding += len({r["ordinal"] // 7 for r in expected if r[name] == row[name]})
    assert holding <= len(read) <= 1.1 * holding
    del read[:]
    for number in range(200):
        assert not len(small_groups.find_text(f"unknown {number}"))
        assert not len(small_groups.find_id(f"a-{number}-unknown"))
    groups = -(-len(expected) // 7)
    assert len(read) <= 0.02 * groups * 400


def test_sidecars_without_filters_answer_the_same(
    options: PreprocessOptions, small_groups: Provenance
) -> None:
    """Earlier versions wrote such sidecars."""
    path = sidecar_path(options.corpus("text", "document"))
    expected = expected_rows(options, "document")
    tokens = pq.read_metadata(path).metadata[b"tokens"]
    table = pq.read_table(path).cast(small_groups._file.schema_arrow)
    with pq.ParquetWriter(path, table.schema, use_dictionary=["shard"]) as writer:
        writer.write_table(table, row_group_size=7)
        writer.add_key_value_metadata({"tokens": tokens.decode()})
    assert pq.read_metadata(path).row_group(0).column(1).bloom_filter_offset is None
    with Provenance.open(options.corpus("text", "document")) as provenance:
        for row in expected:
            if row["id"]:
                found = provenance.find_id(row["id"]).tolist()
                assert found == [r["ordinal"] for r in expected if r["id"] == row["id"]]
            assert row["ordinal"] in provenance.find_sha256(row["sha256"].hex())


def test_documents_are_found_by_id_hash_and_text(
    options: PreprocessOptions, small_groups: Provenance
) -> None:
    expected = expected_rows(options, "document")
    for row in expected:
        same_id = [r["ordinal"] for r in expected if row["id"] and r["id"] == row["id"]]
        if row["id"]:
            assert small_groups.find_id(row["id"]).tolist() == same_id
        same_text = [r["ordinal"] for r in expected if r["sha256"] == row["sha256"]]
        assert small_groups.find_sha256(row["sha256"].hex()).tolist() == same_text
        assert small_groups.find_sha256(row["sha256"].hex().upper()).tolist() == same_text
    twice = next(text for text in texts(1, 100)[100:] if small_groups.find_text(text).size > 1)
    assert [expected[i]["sha256"] for i in small_groups.find_text(twice)] == [
        hashlib.sha256(twice.encode()).digest()
    ] * len(small_groups.find_text(twice))
    for nothing in (small_groups.find_id("a"), small_groups.find_text("a")):
        assert nothing.dtype == np.int64
        assert len(nothing) == 0


def test_batches_leave_no_trace_in_the_file(
    options: PreprocessOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GROUP_DOCUMENTS", 30)
    contents = []
    for size in (1, 2000, 2**22):
        monkeypatch.setattr(blocks, "BATCH_BYTES", size)
        path = sidecar_path(options.corpus("text", "document"))
        path.unlink(missing_ok=True)
        preprocess(options)
        contents.append(path.read_bytes())
    assert contents[0] == contents[1] == contents[2]


def test_questions_that_cannot_be_answered(small_groups: Provenance) -> None:
    count = small_groups.num_documents
    for ordinals, named in (([0, -1], -1), ([count + 5, count], count + 5)):
        with pytest.raises(IndexError, match=f"document {named} of {count}; documents are numb"):
            small_groups.documents(np.array(ordinals))
    for sha256 in ("", "0" * 63, "0" * 65, "g" * 64):
        with pytest.raises(ValueError, match=re.escape(f"{sha256!r}: not a SHA-256")):
            small_groups.find_sha256(sha256)


def test_a_corpus_of_another_program_is_named(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "c", "uint16") as writer:
        writer.add(np.array([1]))
    message = f"{tmp_path}/c.docs.parquet: no such file: this corpus was made by another program"
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        Provenance.open(tmp_path / "c")


def test_a_sidecar_of_another_corpus_is_refused(options: PreprocessOptions) -> None:
    preprocess(options)
    prefix = options.corpus("text", "document")
    tokenizer = load_tokenizer(options.tokenizer)
    others = {"another count": [[1], [2]], "another length": [[1]] * 5}
    ids = [row.tolist() for row in tokenizer.encode_batch([t for t in texts(1, 100) if t])]
    others["one token less"] = [*ids[:-1], ids[-1][:-1]]
    for documents in others.values():
        with IndexedWriter(prefix, "uint16") as writer:
            for document in documents:
                writer.add(np.array(document))
        with pytest.raises(ValueError, match="hold others: another program has replaced them"):
            Provenance.open(prefix)


def test_damaged_sidecars_are_refused(options: PreprocessOptions) -> None:
    preprocess(options)
    prefix = options.corpus("text", "document")
    path = sidecar_path(prefix)
    good = path.read_bytes()
    for data in (b"", good[:-1], good[: len(good) // 2], good[:-9] + b"x" + good[-8:], good + b"x"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=re.escape(f"{path}: damaged, or not written by")):
            Provenance.open(prefix)
    path.write_bytes(good[:2000] + bytes([good[2000] ^ 1]) + good[2001:])
    with (
        Provenance.open(prefix) as provenance,
        pytest.raises(ValueError, match=r"row group 0: .*CRC"),
    ):
        provenance.documents(np.arange(provenance.num_documents))
    path.write_bytes(good)
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["url"]), path)
    with pytest.raises(ValueError, match="not the columns of megatron-ettin-documents/1"):
        Provenance.open(prefix)


def test_rows_out_of_order_are_refused(
    options: PreprocessOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = module._SidecarFile.add

    def add_backwards(self: Any, part: EncodedPart, batch: TextBatch, shard: str) -> None:
        add(self, part, batch, shard)
        self._pending[-1] = self._pending[-1].take(np.arange(len(part.lengths))[::-1].copy())

    with monkeypatch.context() as patch:
        patch.setattr(module._SidecarFile, "add", add_backwards)
        preprocess(options)
    message = "its rows are not in the order of the documents"
    prefix = options.corpus("text", "document")
    with Provenance.open(prefix) as provenance, pytest.raises(ValueError, match=message):
        provenance.documents(np.array([0, 5]))


def one_part(lengths: list[int]) -> tuple[EncodedPart, TextBatch, str]:
    """Return what `CorpusWriter.add` takes, for documents of these lengths."""
    count = len(lengths)
    texts = [str(n) for n in range(count)]
    batch = TextBatch((texts,), [f"id-{n}" for n in texts], None, range(1, count + 1), 0)
    hashes = b"".join(hashlib.sha256(text.encode()).digest() for text in texts)
    tokens = np.ones(sum(lengths), np.int32)
    part = EncodedPart(tokens, np.array(lengths), np.arange(count), hashes)
    return part, batch, "a.txt"


def test_an_exception_leaves_what_was_there(tmp_path: Path) -> None:
    with CorpusWriter(tmp_path / "c", "uint16", tokenizer_sha256="0" * 64) as writer:
        writer.add(*one_part([1, 2]))
    whole = ["c.bin", "c.docs.parquet", "c.idx"]
    assert names(tmp_path) == whole
    before = [(tmp_path / name).read_bytes() for name in whole]

    def fail() -> None:
        with CorpusWriter(tmp_path / "c", "uint16", tokenizer_sha256="0" * 64) as writer:
            writer.add(*one_part([3]))
            assert len(names(tmp_path)) == 6
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert names(tmp_path) == whole
    assert [(tmp_path / name).read_bytes() for name in whole] == before


def test_a_second_writer_is_refused_and_does_no_harm(tmp_path: Path) -> None:
    with CorpusWriter(tmp_path / "c", "uint16", tokenizer_sha256="0" * 64) as writer:
        writer.add(*one_part([1, 2]))
        with pytest.raises(ValueError, match="another writer is at work"):
            CorpusWriter(tmp_path / "c", "uint16", tokenizer_sha256="0" * 64)
        writer.add(*one_part([4]))
    with Provenance.open(tmp_path / "c") as provenance:
        assert provenance.documents(np.arange(3))["n_tokens"].to_pylist() == [1, 2, 4]


WRITER = """
import resource, sys
from pathlib import Path
import numpy as np
from megatron_ettin.data.encoding import EncodedPart
from megatron_ettin.data.provenance import CorpusWriter
from megatron_ettin.data.raw_files import TextBatch
count = 2**15
hashes = np.random.default_rng(0).bytes(32 * count)
part = EncodedPart(np.ones(count, np.int32), np.ones(count, np.int64), np.arange(count), hashes)
ids = [f"document-{n:020}" for n in range(count)]
batch = TextBatch(([""] * count,), ids, None, range(count), 0)
"""

FULL_DISK = """
resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, 4_000_000))
try:
    with CorpusWriter(Path(sys.argv[1]), "uint16", tokenizer_sha256="0" * 64) as writer:
        for _ in range(int(sys.argv[2])):
            writer.add(part, batch, "a")
except OSError as error:
    print(type(error).__name__, error.errno, error.filename)
"""


@pytest.mark.parametrize("turns", [10, 5])
def test_a_full_disk_is_an_os_error_that_names_the_file(tmp_path: Path, turns: int) -> None:
    command = [sys.executable, "-W", "error", "-c", WRITER + FULL_DISK, str(tmp_path / "c")]
    done = subprocess.run(
        [*command, str(turns)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["OSError", "27", str(tmp_path / "c.docs.parquet.tmp")]
    assert done.stderr == ""
    assert names(tmp_path) == []


MEMORY = """
with CorpusWriter(Path(sys.argv[1]), "uint16", tokenizer_sha256="0" * 64) as writer:
    for turn in range(24):
        writer.add(part, batch, "a")
        if turn == 5:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER + MEMORY, str(tmp_path / "c")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    # The hashes and ids of the 18 later turns alone are 36 MB.
    assert int(done.stdout) < 12_000  # kilobytes


@pytest.mark.slow
def test_sigkill_never_leaves_an_index_with_another_sidecar(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    inputs = []
    for seed, name in enumerate("ab"):
        inputs.append(tmp_path / f"{name}.jsonl")
        lines = [
            json.dumps({"id": f"{name}-{n}", "text": text})
            for n, text in enumerate(texts(seed, 50 + 20 * seed))
        ]
        inputs[-1].write_text("\n".join(lines))
    (tmp_path / "out").mkdir()
    arguments = [tokenizer_folder, *inputs, tmp_path / "out" / "c"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.kill_preprocessing", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    left = set(done.stdout.splitlines())
    assert len(left) > 1, "every kill came at a quiet moment: the test shows nothing"
    options = PreprocessOptions(
        inputs=expand_inputs([str(inputs[0])]), output_prefix=tmp_path / "out" / "c",
        tokenizer=tokenizer_folder, rules=SelectionRules(validation_share=0.2),
    )  # fmt: skip
    preprocess(options)
    fresh = tmp_path / "fresh" / "c"
    preprocess(replace(options, output_prefix=fresh))
    for name in names(fresh.parent):
        # Those two hold times.
        if not name.endswith((".identity.json", ".inputs.json")):
            assert (fresh.parent / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
