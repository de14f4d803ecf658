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

from megatron_ettin.data import blocks, corpus_summary
from megatron_ettin.data.corpus_summary import OtherSettingsError, read_summary
from megatron_ettin.data.encoding import SelectionRules, in_validation
from megatron_ettin.data.preprocess import preprocess
from megatron_ettin.data.preprocess_options import PreprocessOptions
from megatron_ettin.data.provenance import CorpusWriter
from megatron_ettin.data.raw_files import RawFile, expand_inputs
from megatron_ettin.data.tokenize import load_tokenizer, train_tokenizer, write_tokenizer
from megatron_ettin.order.corpus_identity import identify_corpus

#: Ends of files that hold times.
TIMED = (".identity.json", ".inputs.json")
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
    """Return the files by name, without those that hold times."""
    paths = [path for path in folder.glob("**/*") if path.is_file()]
    return {path.name: path.read_bytes() for path in paths if not path.name.endswith(TIMED)}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(train_tokenizer(texts(), 300), folder)
    return folder


@pytest.fixture
def options(tmp_path: Path, tokenizer_folder: Path) -> PreprocessOptions:
    return PreprocessOptions(
        inputs=expand_inputs([str(write_jsonl(tmp_path / "a.jsonl", texts()))]),
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
    inputs = expand_inputs([options.inputs[0].path, str(packed)])
    result = preprocess(replace(options, inputs=inputs))
    documents = [text for text in [*texts(), "the last one"] if text]
    ids = load_tokenizer(options.tokenizer).encode_batch(documents)
    assert read_corpus(out / "corpus_text_document") == [row.tolist() for row in ids]
    (counts,) = result.corpora.values()
    assert (counts["documents"], counts["tokens"]) == (len(ids), sum(map(len, ids)))
    assert counts["empty"] == texts().count("") > 0
    summary = read_summary(out / "corpus_text_document")
    assert summary is not None
    assert summary.inputs[1] == {
        "path": str(packed),
        "format": ".jsonl.gz",
        "bytes": packed.stat().st_size,
        "sha256": hashlib.sha256(packed.read_bytes()).hexdigest(),
    }
    assert sorted(files_in(out)) == [
        f"corpus_text_document.{end}" for end in ("bin", "docs.parquet", "idx", "json")
    ]


def test_batches_of_any_size_give_the_same_bytes(
    options: PreprocessOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = SelectionRules(validation_share=0.2, append_eod=True)
    both = replace(options, json_keys=("title", "text"), rules=rules)
    contents = []
    for size in (blocks.BATCH_BYTES, 700):
        monkeypatch.setattr(blocks, "BATCH_BYTES", size)
        folder = options.output_prefix.parent / str(size)
        preprocess(replace(both, output_prefix=folder / "corpus"))
        contents.append(files_in(folder))
    assert len(contents[0]) == 14
    assert contents[0] == contents[1]


def test_append_eod_ends_each_document_with_sep(options: PreprocessOptions, out: Path) -> None:
    preprocess(options)
    plain = read_corpus(out / "corpus_text_document")
    eod = replace(options, rules=SelectionRules(append_eod=True), output_prefix=out / "eod")
    preprocess(eod)
    sep = load_tokenizer(options.tokenizer).ids.sep
    assert read_corpus(out / "eod_text_document") == [[*ids, sep] for ids in plain]


def test_validation_documents_are_chosen_by_their_text(
    options: PreprocessOptions, out: Path
) -> None:
    preprocess(replace(options, rules=SelectionRules(validation_share=0.25)))
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
    preprocess(replace(options, rules=SelectionRules(validation_share=0.25)))
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
    rewrite(options, ["film [unused69999]"])
    preprocess(replace(options, inputs=as_now(options), tokenizer=tmp_path / "large"))
    (ids,) = read_corpus(out / "corpus_text_document")
    assert ids[-1] == 69_999


def test_a_second_run_finds_its_work_done(options: PreprocessOptions, tmp_path: Path) -> None:
    first = preprocess(options)
    moved = write_jsonl(tmp_path / "moved.jsonl", texts())
    second = preprocess(replace(options, workers=2, inputs=expand_inputs([str(moved)])))
    assert first.seconds > 0
    assert second.seconds == 0
    assert second.corpora == first.corpora


def rewrite(options: PreprocessOptions, documents: list[str]) -> None:
    write_jsonl(Path(options.inputs[0].path), documents)


def as_now(options: PreprocessOptions) -> tuple[RawFile, ...]:
    """Return the inputs with the sizes that they have now."""
    return expand_inputs([file.path for file in options.inputs])


def changed_input(options: PreprocessOptions) -> PreprocessOptions:
    rewrite(options, [*texts(), "one more"])
    return replace(options, inputs=as_now(options))


def rewritten_input(options: PreprocessOptions) -> PreprocessOptions:
    """Change the content and not the size, at another time."""
    rewrite(options, [text[::-1] for text in texts()])
    return replace(options, inputs=as_now(options))


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
    "content": rewritten_input,
    "truncated output": truncated_output,
    "lost sidecar": lost_sidecar,
    "lost summary": lost_summary,
    "damaged summary": damaged_summary,
    "another field": lambda options: replace(options, json_keys=("text", "title")),
}
OTHER_SETTINGS: dict[str, tuple[Callable[[PreprocessOptions], PreprocessOptions], str]] = {
    "validation share": (
        lambda options: replace(options, rules=SelectionRules(validation_share=0.1)),
        "made with validation_share 0.0, not with validation_share 0.1; choose another",
    ),
    "end of document": (
        lambda options: replace(options, rules=SelectionRules(append_eod=True)),
        "made with append_eod False, not with append_eod True",
    ),
    "another id": (lambda options: replace(options, id_key="title"), "made with id_key None"),
    "another url": (lambda options: replace(options, url_key="title"), "made with url_key None"),
    "shortest": (
        lambda options: replace(options, rules=SelectionRules(min_tokens=3)),
        "made with min_tokens 1, not with min_tokens 3",
    ),
    "copies": (lambda options: replace(options, deduplicate="exact"), "made with deduplicate None"),
}


@pytest.mark.parametrize("change", OTHER_SETTINGS)
def test_a_corpus_of_other_settings_is_not_replaced(
    options: PreprocessOptions, out: Path, change: str
) -> None:
    preprocess(options)
    before = files_in(out)
    changed, message = OTHER_SETTINGS[change]
    with pytest.raises(OtherSettingsError, match=re.escape(message)):
        preprocess(changed(options))
    assert files_in(out) == before


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
    path = Path(options.inputs[0].path)
    good = path.read_bytes()
    path.write_bytes(good + b'{"text": "cut')
    place = re.escape(f"{path}:{len(texts()) + 1}: invalid JSON at column 10")
    with pytest.raises(ValueError, match=place):
        preprocess(replace(options, inputs=as_now(options)))
    assert files_in(out) == before
    path.write_bytes(good)
    assert preprocess(options).seconds == 0


def test_a_summary_never_vouches_for_half_replaced_files(
    options: PreprocessOptions, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = replace(options, rules=SelectionRules(validation_share=0.2))
    preprocess(both)
    path = Path(options.inputs[0].path)
    good = path.read_bytes()
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
            preprocess(replace(both, inputs=as_now(both)))
    path.write_bytes(good)
    assert preprocess(both).seconds > 0


def test_a_corpus_without_tokens_is_refused(options: PreprocessOptions, out: Path) -> None:
    rewrite(options, ["", "one", ""])
    with pytest.raises(
        ValueError,
        match=re.escape(
            f'field "text": no document for {out}/corpus_text_validation: 1 for training, 0 for'
            " validation, dropped: 0 duplicate, 2 empty, 0 too_short, 0 too_long, 0 bad"
        ),
    ):
        preprocess(
            replace(options, inputs=as_now(options), rules=SelectionRules(validation_share=1e-9))
        )
    assert files_in(out) == {}


def test_a_validation_set_is_not_left_beside_a_corpus_that_contains_it(
    options: PreprocessOptions, out: Path
) -> None:
    preprocess(replace(options, rules=SelectionRules(validation_share=0.2)))
    before = files_in(out)
    with pytest.raises(ValueError, match=re.escape(f"{out}/corpus_text_validation.idx: made by")):
        preprocess(options)
    assert files_in(out) == before


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("workers", 0, "workers 0: at least 1"),
        ("json_keys", ("a", "a"), "json-keys ['a', 'a']: a field is named twice"),
        ("json_keys", ("a/b",), "json-keys 'a/b': becomes part of a file name"),
        ("max_bad_share", 2.0, "max-bad-share 2.0: must be in [0, 1]"),
    ],
)
def test_options_that_cannot_be_meant(
    options: PreprocessOptions, option: str, value: Any, message: str
) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        replace(options, **{option: value})


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"validation_share": 1.0}, "validation-share 1.0: must be in [0, 1)"),
        ({"validation_share": -0.1}, "validation-share -0.1: must be"),
        ({"min_tokens": 0}, "min-tokens 0: at least 1"),
        ({"min_tokens": 5, "max_tokens": 4}, "max-tokens 4: fewer than min-tokens, 5"),
    ],
)
def test_rules_that_cannot_be_meant(rules: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        SelectionRules(**rules)


def test_times_of_other_inputs_never_vouch_for_a_corpus(
    options: PreprocessOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ends between a new summary and the times of its inputs leaves no times."""
    preprocess(options)
    other = write_jsonl(tmp_path / "b.jsonl", [text[::-1] for text in texts()])
    publish = corpus_summary.publish_text

    def publish_summary_only(path: Path, content: str) -> None:
        if path.name.endswith(".inputs.json"):
            raise OSError("the machine went away")
        publish(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(corpus_summary, "publish_text", publish_summary_only)
        with pytest.raises(OSError, match="went away"):
            preprocess(replace(options, inputs=expand_inputs([str(other)])))
    assert other.stat().st_size == options.inputs[0].size
    assert preprocess(options).seconds > 0
