"""Raw text to a corpus: what is stored, what is made anew, what a failed run leaves."""

import gzip
import hashlib
import json
import os
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ettin.data import preprocess as module
from megatron_ettin.data.encoding import in_validation
from megatron_ettin.data.preprocess import PreprocessOptions, preprocess, read_summary
from megatron_ettin.data.provenance import CorpusWriter
from megatron_ettin.data.tokenize import load_tokenizer, train_tokenizer, write_tokenizer
from megatron_ettin.order.corpus_identity import identify_corpus

WORDS = ["the", "film", "was", "good", "bad", "long", "short", "plot", "never", "again", "why"]


def texts(count: int = 300) -> list[str]:
    """Documents of very different lengths; some empty, some twice."""
    random = np.random.default_rng(1)
    made = [" ".join(random.choice(WORDS, size=n)) for n in random.integers(0, 60, size=count)]
    return made + made[:50]


def write_jsonl(path: Path, documents: list[str]) -> Path:
    lines = [json.dumps({"text": text, "title": text[:9]}) + "\n" for text in documents]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def read_corpus(prefix: Path) -> list[list[int]]:
    """Read a Megatron .bin/.idx pair by its definition, apart from the code under test."""
    index = Path(f"{prefix}.idx").read_bytes()
    magic, version, code, sequences, borders = struct.unpack_from("<9sQBQQ", index)
    assert (magic, version) == (b"MMIDIDX\0\0", 1)
    dtype = {4: np.int32, 8: np.uint16}[code]
    lengths = np.frombuffer(index, np.int32, sequences, 34)
    pointers = np.frombuffer(index, np.int64, sequences, 34 + 4 * sequences)
    documents = np.frombuffer(index, np.int64, borders, 34 + 12 * sequences)
    assert documents.tolist() == list(range(sequences + 1))
    data = Path(f"{prefix}.bin").read_bytes()
    return [
        np.frombuffer(data, dtype, length, pointer).tolist()
        for length, pointer in zip(lengths, pointers, strict=True)
    ]


def files_in(folder: Path) -> dict[str, bytes]:
    """Return the files by name, without identities: those hold times."""
    paths = [path for path in folder.glob("**/*") if path.is_file()]
    return {path.name: path.read_bytes() for path in paths if ".identity." not in path.name}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(train_tokenizer(texts(), 300), folder)
    return folder


@pytest.fixture
def options(tmp_path: Path, tokenizer_folder: Path) -> PreprocessOptions:
    return PreprocessOptions(
        inputs=(write_jsonl(tmp_path / "a.jsonl", texts()),),
        output_prefix=tmp_path / "out" / "corpus",
        tokenizer=tokenizer_folder,
    )


@pytest.fixture
def out(options: PreprocessOptions) -> Path:
    return options.output_prefix.parent


def test_corpus_holds_the_tokens_of_every_document_in_order(
    options: PreprocessOptions, out: Path, tmp_path: Path
) -> None:
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"text": "the last one"}\n'))
    result = preprocess(replace(options, inputs=(*options.inputs, packed)))
    documents = [text for text in [*texts(), "the last one"] if text]
    ids = load_tokenizer(options.tokenizer).encode_batch(documents)
    assert read_corpus(out / "corpus_text_document") == [row.tolist() for row in ids]
    (summary,) = result.corpora.values()
    assert (summary.documents, summary.tokens) == (len(ids), sum(map(len, ids)))
    assert summary.dropped == texts().count("") > 0
    assert summary.inputs[1] == {
        "path": str(packed),
        "sha256": hashlib.sha256(packed.read_bytes()).hexdigest(),
    }
    assert read_summary(out / "corpus_text_document") == summary
    assert sorted(files_in(out)) == [
        f"corpus_text_document.{end}" for end in ("bin", "docs.parquet", "idx", "json")
    ]


def test_any_number_of_workers_gives_the_same_bytes(
    options: PreprocessOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_DOCUMENTS", 7)
    both = replace(options, json_keys=("title", "text"), validation_share=0.2, append_eod=True)
    contents = []
    for workers in (1, 3):
        folder = options.output_prefix.parent / str(workers)
        preprocess(replace(both, workers=workers, output_prefix=folder / "corpus"))
        contents.append(files_in(folder))
    assert len(contents[0]) == 14
    assert contents[0] == contents[1]


def test_append_eod_ends_each_document_with_sep(options: PreprocessOptions, out: Path) -> None:
    preprocess(options)
    plain = read_corpus(out / "corpus_text_document")
    preprocess(replace(options, append_eod=True))
    sep = load_tokenizer(options.tokenizer).ids.sep
    assert read_corpus(out / "corpus_text_document") == [[*ids, sep] for ids in plain]


def test_validation_documents_are_chosen_by_their_text(
    options: PreprocessOptions, out: Path
) -> None:
    preprocess(replace(options, validation_share=0.25))
    tokenizer = load_tokenizer(options.tokenizer)
    decoded = {
        part: [tokenizer.decode(ids) for ids in read_corpus(out / f"corpus_text_{part}")]
        for part in ("document", "validation")
    }
    quarter = 2**62
    expected: dict[str, list[str]] = {"document": [], "validation": []}
    for text in filter(None, texts()):
        value = struct.unpack(">Q", hashlib.sha256(text.encode()).digest()[:8])[0]
        expected["validation" if value < quarter else "document"].append(text)
    assert decoded == expected
    assert not set(decoded["document"]) & set(decoded["validation"])
    assert len(decoded["validation"]) > len(set(decoded["validation"]))  # copies are in it
    larger = {text for text in texts() if in_validation(text, 0.5)}
    assert {text for text in texts() if in_validation(text, 0.25)} < larger


def test_each_corpus_gets_its_identity(options: PreprocessOptions, out: Path) -> None:
    preprocess(replace(options, validation_share=0.25))
    for part in ("document", "validation"):
        prefix = out / f"corpus_text_{part}"
        made = Path(f"{prefix}.identity.json").stat().st_mtime_ns
        assert identify_corpus(str(prefix)).documents == len(read_corpus(prefix))
        assert Path(f"{prefix}.identity.json").stat().st_mtime_ns == made


def test_a_large_vocabulary_is_stored_as_int32(
    options: PreprocessOptions, out: Path, tmp_path: Path
) -> None:
    content = json.loads((options.tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    last = max(token["id"] for token in content["added_tokens"])
    filler = {
        "single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False
    }  # fmt: skip
    content["added_tokens"] += [
        {"id": i, "content": f"[unused{i}]", **filler} for i in range(last + 1, 70_000)
    ]
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    write_jsonl(options.inputs[0], ["film [unused69999]"])
    preprocess(replace(options, tokenizer=tmp_path / "large"))
    (ids,) = read_corpus(out / "corpus_text_document")
    assert ids[-1] == 69_999


def test_a_second_run_finds_its_work_done(options: PreprocessOptions, tmp_path: Path) -> None:
    first = preprocess(options)
    moved = write_jsonl(tmp_path / "moved.jsonl", texts())
    second = preprocess(replace(options, workers=2, inputs=(moved,)))
    assert first.seconds > 0
    assert second.seconds == 0
    assert second.corpora == first.corpora


def changed_input(options: PreprocessOptions) -> PreprocessOptions:
    write_jsonl(options.inputs[0], [*texts(), "one more"])
    return options


def truncated_output(options: PreprocessOptions) -> PreprocessOptions:
    os.truncate(f"{options.output_prefix}_text_document.bin", 10)
    return options


def lost_summary(options: PreprocessOptions) -> PreprocessOptions:
    Path(f"{options.output_prefix}_text_document.json").unlink()
    return options


def damaged_summary(options: PreprocessOptions) -> PreprocessOptions:
    Path(f"{options.output_prefix}_text_document.json").write_text('{"key": 1')
    return options


def lost_sidecar(options: PreprocessOptions) -> PreprocessOptions:
    Path(f"{options.output_prefix}_text_document.docs.parquet").unlink()
    return options


CHANGES: dict[str, Callable[[PreprocessOptions], PreprocessOptions]] = {
    "input": changed_input,
    "truncated output": truncated_output,
    "lost sidecar": lost_sidecar,
    "lost summary": lost_summary,
    "damaged summary": damaged_summary,
    "validation share": lambda options: replace(options, validation_share=0.1),
    "end of document": lambda options: replace(options, append_eod=True),
    "another id": lambda options: replace(options, id_key="title"),
    "another url": lambda options: replace(options, url_key="title"),
    "another field": lambda options: replace(options, json_keys=("text", "title")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_content_is_made_anew(options: PreprocessOptions, out: Path, change: str) -> None:
    preprocess(options)
    changed = CHANGES[change](options)
    assert preprocess(changed).seconds > 0
    found = files_in(out)
    preprocess(replace(changed, output_prefix=out / "fresh" / "corpus"))
    assert found == files_in(out / "fresh")
    assert preprocess(changed).seconds == 0


def test_a_corpus_of_another_tokenizer_is_not_replaced(
    options: PreprocessOptions, out: Path
) -> None:
    preprocess(options)
    before = files_in(out)
    write_tokenizer(train_tokenizer(texts(), 290), out / "other")
    other = replace(options, tokenizer=out / "other")
    with pytest.raises(ValueError, match=r"corpus of another tokenizer .*another --output-prefix"):
        preprocess(other)
    assert before.items() <= files_in(out).items()
    Path(f"{options.output_prefix}_text_document.json").unlink()
    assert preprocess(other).seconds > 0


def test_a_failed_run_leaves_what_was_there(options: PreprocessOptions, out: Path) -> None:
    preprocess(options)
    before = files_in(out)
    good = options.inputs[0].read_bytes()
    options.inputs[0].write_bytes(good + b'{"text": "cut')
    place = re.escape(f"{options.inputs[0]}:{len(texts()) + 1}: invalid JSON at column 10")
    for workers in (1, 2):
        with pytest.raises(ValueError, match=place):
            preprocess(replace(options, workers=workers))
        assert files_in(out) == before
    options.inputs[0].write_bytes(good)
    assert preprocess(options).seconds == 0


def test_a_summary_never_vouches_for_half_replaced_files(
    options: PreprocessOptions, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = replace(options, validation_share=0.2)
    preprocess(both)
    good = options.inputs[0].read_bytes()
    commit, commits = CorpusWriter.commit, []

    def commit_one_of_two(writer: CorpusWriter) -> None:
        commits.append(writer)
        if len(commits) == 2:
            raise OSError("disk full")
        commit(writer)

    with monkeypatch.context() as patch:
        patch.setattr(CorpusWriter, "commit", commit_one_of_two)
        changed_input(options)
        with pytest.raises(OSError, match="disk full"):
            preprocess(both)
    options.inputs[0].write_bytes(good)
    assert preprocess(both).seconds > 0


def test_a_corpus_without_tokens_is_refused(options: PreprocessOptions, out: Path) -> None:
    write_jsonl(options.inputs[0], ["", "one", ""])
    with pytest.raises(
        ValueError,
        match=re.escape(
            f'field "text": no document for {out}/corpus_text_validation: 1 for training, 0 for'
            " validation, 2 without any token"
        ),
    ):
        preprocess(replace(options, validation_share=1e-9))
    assert files_in(out) == {}


def test_a_validation_set_is_not_left_beside_a_corpus_that_contains_it(
    options: PreprocessOptions, out: Path
) -> None:
    preprocess(replace(options, validation_share=0.2))
    before = files_in(out)
    with pytest.raises(ValueError, match=re.escape(f"{out}/corpus_text_validation.idx: made by")):
        preprocess(options)
    assert files_in(out) == before


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("workers", 0, "workers 0: at least 1"),
        ("validation_share", 1.0, "validation-share 1.0: must be in [0, 1)"),
        ("validation_share", -0.1, "validation-share -0.1: must be"),
        ("json_keys", ("a", "a"), "json-keys ['a', 'a']: a field is named twice"),
        ("json_keys", ("a/b",), "json-keys 'a/b': becomes part of a file name"),
    ],
)
def test_options_that_cannot_be_meant(
    options: PreprocessOptions, option: str, value: Any, message: str
) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        replace(options, **{option: value})
