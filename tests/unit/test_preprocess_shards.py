"""Corpora of many shards: going on, workers, copies, selection, records that cannot be read."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from megatron_ettin.data import preprocess as module
from megatron_ettin.data.encoding import SelectionRules
from megatron_ettin.data.preprocess import finish_dataset, preprocess, preprocess_shard
from megatron_ettin.data.preprocess_options import PreprocessOptions
from megatron_ettin.data.provenance import Provenance
from megatron_ettin.data.raw_files import expand_inputs
from megatron_ettin.data.shard_maker import ShardMaker
from megatron_ettin.data.tokenize import load_tokenizer, train_tokenizer, write_tokenizer
from megatron_ettin.indexed import IndexedReader
from megatron_ettin.order.shard_list import list_shards

ROOT = Path(__file__).parents[2]
TIMED = (".identity.json", ".inputs.json")
WORDS = ["the", "film", "was", "good", "bad", "long", "short", "plot", "never", "again", "why"]
SHARDS = 5


def texts(seed: int, count: int = 60) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, size=n)) for n in random.integers(0, 9, size=count)]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(train_tokenizer(texts(99, 300), 290), folder)
    return folder


@pytest.fixture
def options(tmp_path: Path, tokenizer_folder: Path) -> PreprocessOptions:
    """Options for five inputs, the third without a document; their texts have many copies."""
    for index in range(SHARDS):
        lines = [
            json.dumps({"text": text, "id": f"{index}-{n}"})
            for n, text in enumerate(texts(index) if index != 2 else [])
        ]
        (tmp_path / f"{index}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return PreprocessOptions(
        inputs=expand_inputs([str(tmp_path / "*.jsonl")]),
        output_prefix=tmp_path / "out" / "c",
        tokenizer=tokenizer_folder,
        shards=True,
        rules=SelectionRules(validation_share=0.1),
    )


def files_in(folder: Path) -> dict[str, bytes]:
    """Return the files by relative name, without those that hold times."""
    paths = [path for path in folder.glob("**/*") if path.is_file()]
    kept = [path for path in paths if not path.name.endswith(TIMED)]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in kept}


def documents_of(folder: Path) -> list[list[int]]:
    prefixes = [path.with_suffix("") for path in sorted(folder.glob("*.idx"))]
    return [ids.tolist() for prefix in prefixes for ids in IndexedReader(str(prefix))]


def elsewhere(options: PreprocessOptions, name: str) -> PreprocessOptions:
    return replace(options, output_prefix=options.output_prefix.parent.parent / name / "c")


def test_shards_hold_what_one_corpus_holds(options: PreprocessOptions) -> None:
    whole = replace(elsewhere(options, "whole"), shards=False)
    counts = preprocess(options).corpora[options.corpus("text", "document")]
    assert counts == preprocess(whole).corpora[whole.corpus("text", "document")]
    for part in ("document", "validation"):
        corpus = IndexedReader(str(whole.corpus("text", part)))
        assert documents_of(options.corpus("text", part)) == [ids.tolist() for ids in corpus]
    dataset = json.loads((options.corpus("text", "document") / "dataset.json").read_text())
    assert [shard["name"] for shard in dataset["shards"]] == [f"{n:05d}" for n in range(SHARDS)]
    assert [shard["inputs"][0]["sha256"] for shard in dataset["shards"]] == [
        hashlib.sha256(Path(file.path).read_bytes()).hexdigest() for file in options.inputs
    ]
    assert sum(shard["documents"] for shard in dataset["shards"]) == dataset["documents"]
    assert dataset["shards"][2]["documents"] == 0


def test_workers_and_machines_give_the_same_bytes(
    options: PreprocessOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MIN_BYTES_PER_WORKER", 1)
    preprocess(options)
    expected = files_in(options.output_prefix.parent)
    assert len(expected) == 2 * (4 * SHARDS + 1) - SHARDS
    processes = elsewhere(options, "processes")
    preprocess(replace(processes, workers=3))
    assert files_in(processes.output_prefix.parent) == expected
    machines = elsewhere(options, "machines")
    for index in (4, 0, 3, 2, 1):
        preprocess_shard(machines, index)
    finish_dataset(machines)
    assert files_in(machines.output_prefix.parent) == expected


def test_a_run_goes_on_after_the_last_committed_shard(
    options: PreprocessOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = elsewhere(options, "fresh")
    preprocess(fresh)
    make, made = ShardMaker.make, []

    def make_three(self: ShardMaker, shard, progress):  # type: ignore[no-untyped-def]
        made.append(shard.index)
        if len(made) == 3:
            raise OSError("the machine went away")
        return make(self, shard, progress)

    with monkeypatch.context() as patch:
        patch.setattr(ShardMaker, "make", make_three)
        with pytest.raises(OSError, match="went away"):
            preprocess(options)
    with pytest.raises(ValueError, match=r"00002: is not made; run the same command again"):
        finish_dataset(options)
    made.clear()
    patched = ShardMaker.make

    def make_noted(self: ShardMaker, shard, progress):  # type: ignore[no-untyped-def]
        made.append(shard.index)
        return patched(self, shard, progress)

    monkeypatch.setattr(ShardMaker, "make", make_noted)
    preprocess(options)
    assert made == [2, 3, 4]
    assert files_in(options.output_prefix.parent) == files_in(fresh.output_prefix.parent)
    assert preprocess(options).seconds == 0


def test_only_changed_and_new_inputs_are_made(
    options: PreprocessOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocess(options)
    (tmp_path / "1.jsonl").write_text('{"text": "the film"}\n')
    (tmp_path / "5.jsonl").write_text('{"text": "the plot"}\n')
    make, made = ShardMaker.make, []

    def make_noted(self: ShardMaker, shard, progress):  # type: ignore[no-untyped-def]
        made.append(shard.index)
        return make(self, shard, progress)

    monkeypatch.setattr(ShardMaker, "make", make_noted)
    now = replace(options, inputs=expand_inputs([str(tmp_path / "*.jsonl")]))
    preprocess(now)
    assert made == [1, 5]
    fewer = replace(options, inputs=now.inputs[:2])
    with pytest.raises(ValueError, match=r"00002.idx: is a shard of no input"):
        preprocess(fewer)
    with pytest.raises(ValueError, match=r"is a folder of shards; .* with --shards"):
        preprocess(replace(now, shards=False))
    one = replace(elsewhere(now, "one"), shards=False)
    preprocess(one)
    with pytest.raises(ValueError, match=r"is a corpus in one piece; .* without --shards"):
        preprocess(replace(one, shards=True))


@pytest.mark.parametrize("shards", [True, False])
def test_the_first_of_equal_texts_is_kept(options: PreprocessOptions, shards: bool) -> None:
    rules = SelectionRules(validation_share=0.1, min_tokens=3)
    once = replace(options, shards=shards, deduplicate="exact", rules=rules)
    counts = preprocess(once).corpora[once.corpus("text", "document")]
    tokenizer = load_tokenizer(options.tokenizer)
    everything = [
        (text, f"{index}-{n}")
        for index in range(SHARDS)
        if index != 2
        for n, text in enumerate(texts(index))
    ]
    first = dict(reversed(everything))
    lengths = {text: len(tokenizer.encode_batch([text])[0]) for text in first}
    kept = {name for text, name in first.items() if lengths[text] >= 3}
    assert counts["duplicate"] == len(everything) - len(first) > 20
    assert counts["empty"] == 1
    assert counts["too_short"] == len(first) - len(kept) - 1 > 5
    found = Counter(
        name
        for part in ("document", "validation")
        for path in once.output_prefix.parent.glob(
            f"**/*{part}*/*.docs.parquet" if shards else f"*{part}.docs.parquet"
        )
        for name in pq.read_table(path)["id"].to_pylist()
    )
    assert found == dict.fromkeys(kept, 1)
    assert not Path(f"{once.output_prefix}.duplicates").exists()
    assert preprocess(once).seconds == 0


def test_copies_of_an_earlier_input_decide_about_later_shards(
    options: PreprocessOptions, tmp_path: Path
) -> None:
    once = replace(options, deduplicate="exact")
    preprocess(once)
    (tmp_path / "0.jsonl").write_text('{"text": "the film"}\n')
    now = replace(once, inputs=expand_inputs([str(tmp_path / "*.jsonl")]))
    preprocess(now)
    fresh = elsewhere(now, "fresh")
    preprocess(fresh)
    assert files_in(now.output_prefix.parent) == files_in(fresh.output_prefix.parent)


def test_lengths_are_limits_of_what_is_stored(options: PreprocessOptions) -> None:
    rules = SelectionRules(min_tokens=4, max_tokens=12, append_eod=True)
    limited = replace(options, rules=rules)
    counts = preprocess(limited).corpora[options.corpus("text", "document")]
    tokenizer = load_tokenizer(options.tokenizer)
    lengths = [
        len(ids)
        for index in range(SHARDS)
        if index != 2
        for ids in tokenizer.encode_batch(texts(index))
    ]
    stored = [len(ids) for ids in documents_of(options.corpus("text", "document"))]
    assert stored == [n + 1 for n in lengths if 4 <= n <= 12]
    assert counts["empty"] == lengths.count(0)
    assert counts["too_short"] == sum(0 < n < 4 for n in lengths) > 0
    assert counts["too_long"] == sum(n > 12 for n in lengths) > 0


def test_bad_records_are_set_aside_with_their_reason(
    options: PreprocessOptions, tmp_path: Path
) -> None:
    path = tmp_path / "1.jsonl"
    good = path.read_bytes()
    bad = [b'{"text": null}', b'{"text"', b'{"text": "\xff"}', b'{"body": 1}']
    path.write_bytes(bad[0] + b"\n" + good + b"\n".join(bad[1:]) + b"\n")
    aside = replace(options, inputs=expand_inputs([str(tmp_path / "*.jsonl")]),
                    on_error="quarantine", max_bad_share=0.1)  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(f'{path}:1: field "text" is null')):
        preprocess(replace(aside, on_error="stop"))
    counts = preprocess(aside).corpora[options.corpus("text", "document")]
    assert counts["bad"] == 4
    entries = [
        json.loads(line)
        for line in Path(f"{options.output_prefix}.bad", "00001.jsonl").read_text().splitlines()
    ]
    assert [(entry["path"], entry["line"]) for entry in entries] == [
        (str(path), line) for line in (1, 62, 63, 64)
    ]
    assert 'field "text" is null' in entries[0]["reason"]
    assert entries[2]["content"] == '{"text": "\\xff"}'
    with pytest.raises(ValueError, match=re.escape(f'{path}:1: field "text" is null')):
        preprocess(replace(aside, on_error="stop"))
    clean = elsewhere(options, "clean")
    path.write_bytes(good)
    preprocess(replace(clean, inputs=options.inputs))
    assert documents_of(clean.corpus("text", "document")) == documents_of(
        options.corpus("text", "document")
    )
    path.write_bytes(bad[0] + b"\n" + good + b"\n".join(bad[1:]) + b"\n")
    with pytest.raises(ValueError, match=r"4 of 64 records cannot be read, more than the share"):
        preprocess(replace(elsewhere(aside, "strict"), max_bad_share=0.01))


def test_two_runs_on_one_shard_are_refused(options: PreprocessOptions) -> None:
    preprocess(options)
    prefix = options.corpus("text", "document") / "00003"
    Path(f"{prefix}.json").unlink()
    with Provenance.open(prefix) as provenance:
        count = provenance.num_documents
    from megatron_ettin.native import TokenFileBuilder

    builder = TokenFileBuilder(prefix, "uint16")
    with pytest.raises(ValueError, match=r"00003.*another writer is at work"):
        preprocess(options)
    builder.abort()
    preprocess(options)
    assert len(IndexedReader(str(prefix))) == count


@pytest.mark.parametrize(
    ("kills", "workers"),
    [
        pytest.param(6, 1, marks=pytest.mark.slow),
        pytest.param(2, 2, marks=pytest.mark.slow),
        pytest.param(150, 1, marks=pytest.mark.long),
        pytest.param(50, 2, marks=pytest.mark.long),
    ],
)
def test_kills_at_any_moment_leave_no_trace(
    tmp_path: Path, tokenizer_folder: Path, kills: int, workers: int
) -> None:
    for index in range(12):
        lines = [json.dumps({"text": " ".join(texts(index + n, 40))}) for n in range(200)]
        (tmp_path / f"{index:02d}.jsonl").write_text("\n".join(lines))
    arguments = [tokenizer_folder, tmp_path / "*.jsonl", tmp_path / "out", kills, workers]
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.kill_shards", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    struck = done.stdout.splitlines()
    assert len(struck) == kills
    if kills > 5:
        assert any(".tmp" in line for line in struck), "every kill came at a quiet moment"
    print(Counter(struck))


def test_dataset_json_never_speaks_of_replaced_shards(
    options: PreprocessOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ends after one of two changed shards leaves a folder that training refuses."""
    preprocess(options)
    for name in ("1", "3"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "the film"}\n')
    now = replace(options, inputs=expand_inputs([str(tmp_path / "*.jsonl")]))
    make = ShardMaker.make

    def make_one(self: ShardMaker, shard, progress):  # type: ignore[no-untyped-def]
        if shard.index == 3:
            raise OSError("the machine went away")
        return make(self, shard, progress)

    with monkeypatch.context() as patch:
        patch.setattr(ShardMaker, "make", make_one)
        with pytest.raises(OSError, match="went away"):
            preprocess(now)
    for part in ("document", "validation"):
        with pytest.raises(ValueError, match="preprocessing that is not finished"):
            list_shards(str(options.corpus("text", part)))
    preprocess(now)
    assert len(list_shards(str(options.corpus("text", "document")))) == SHARDS


def test_a_tokenizer_that_changes_meanwhile_is_refused(
    options: PreprocessOptions, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json was changed while it was in use"):
        module._worker_maker(replace(options, inputs=()), "0" * 64, False)
