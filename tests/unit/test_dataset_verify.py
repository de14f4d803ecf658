"""`tools/dataset.py verify` passes what is right, and finds each planted fault."""

import hashlib
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from megatron_ettin.data.encoding import SelectionRules
from megatron_ettin.data.inspection.shards import corpus_shards, read_shard_summary, text_field
from megatron_ettin.data.inspection.verify import CorpusVerification, verify
from megatron_ettin.data.inspection.verify_sample import choose
from megatron_ettin.data.preprocess import preprocess
from megatron_ettin.data.preprocess_options import PreprocessOptions
from megatron_ettin.data.provenance import SCHEMA, Provenance
from megatron_ettin.data.raw_files import expand_inputs
from megatron_ettin.order.corpus_identity import identify_corpus
from tests.unit.dataset_corpora import (
    MadeCorpus,
    flip_bit,
    made_texts,
    make_corpus,
    make_folder,
    make_tokenizer,
    write_mosaic,
    write_raw,
)
from tools.dataset import main

CHECKS = {"summary", "hashes", "sidecar", "tokenizer", "inputs", "texts"}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> MadeCorpus:
    """Return a corpus that no test may change."""
    return make_corpus(tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def corpus(tmp_path: Path) -> MadeCorpus:
    return make_corpus(tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> MadeCorpus:
    return make_folder(tmp_path)


def check(corpus: MadeCorpus, share: float = 1.0) -> CorpusVerification:
    return verify(str(corpus.prefix), tokenizer=corpus.tokenizer, share=share)


def verdicts(verification: CorpusVerification) -> dict[str, str]:
    return {check.name: check.verdict for check in verification.checks}


def failed(verification: CorpusVerification) -> set[str]:
    assert verification.passed == ("FAIL" not in verdicts(verification).values())
    return {name for name, verdict in verdicts(verification).items() if verdict == "FAIL"}


def faults(verification: CorpusVerification) -> str:
    return "\n".join(fault for check in verification.checks for fault in check.faults)


def test_a_right_corpus_passes_all_checks(pristine: MadeCorpus) -> None:
    verification = check(pristine)
    assert verdicts(verification) == dict.fromkeys(CHECKS, "PASS")
    assert verification.documents == len(pristine.stored)
    assert verification.tokens == sum(map(len, pristine.ids()))
    compared = {check.name: check.compared for check in verification.checks}
    assert compared["texts"] == len(pristine.stored)
    assert compared["inputs"] == 2
    assert list(verification.lines())[-1] == "PASS"


@pytest.mark.parametrize("options", [{"append_eod": True}, {"validation_share": 0.3}], ids=str)
def test_options_of_the_corpus_are_seen(tmp_path: Path, options: dict[str, float]) -> None:
    corpus = make_corpus(tmp_path, **options)
    assert verdicts(check(corpus)) == dict.fromkeys(CHECKS, "PASS")
    if "validation_share" in options:
        held_out = corpus.prefix.with_name("small_text_validation")
        verification = verify(str(held_out), tokenizer=corpus.tokenizer, share=1.0)
        assert verdicts(verification) == dict.fromkeys(CHECKS, "PASS")
        assert 0 < verification.documents < len(corpus.stored)


def test_a_folder_of_shards_passes(folder: MadeCorpus) -> None:
    assert corpus_shards(str(folder.prefix)) == [f"{folder.prefix}/{n:05d}" for n in (0, 1)]
    verification = check(folder)
    assert verdicts(verification) == dict.fromkeys({*CHECKS, "dataset"}, "PASS")
    assert (verification.shards, verification.documents) == (2, len(folder.stored))


def test_validation_shards_have_their_own_counts(folder: MadeCorpus) -> None:
    # The folder of validation shards: dataset.json counts them apart from the training shards,
    # whose folder has the summaries.
    held_out = folder.prefix.with_name("many_text_validation")
    shutil.copytree(folder.prefix, held_out)
    dataset = held_out / "dataset.json"
    content = json.loads(dataset.read_text())
    summaries = [folder.prefix / f"{shard['name']}.json" for shard in content["shards"]]
    for counts in (content, *content["shards"]):
        for name in ("documents", "tokens"):
            counts[f"validation_{name}"], counts[name] = counts[name], 1
    content.update({name: len(summaries) for name in ("documents", "tokens")})
    dataset.write_text(json.dumps(content))
    for path, shard in zip(summaries, content["shards"], strict=True):
        path.write_text(json.dumps({**json.loads(path.read_text()), **shard}))
        (held_out / path.name).unlink()
    verification = verify(str(held_out), tokenizer=folder.tokenizer, share=1.0)
    assert verdicts(verification) == dict.fromkeys({*CHECKS, "dataset"}, "PASS")
    counts = {check.name: check.compared for check in verification.checks}
    assert counts["dataset"] == 2 + 2 + 4
    content["shards"][0]["validation_tokens"] += 1
    dataset.write_text(json.dumps(content))
    assert failed(verify(str(held_out))) == {"dataset"}


def test_a_flipped_bit_in_the_tokens_is_found(corpus: MadeCorpus) -> None:
    flip_bit(Path(f"{corpus.prefix}.bin"), 2000)
    verification = check(corpus)
    assert failed(verification) == {"hashes", "texts"}
    assert f"{corpus.prefix}.bin: tokens_sha256 is" in faults(verification)


def test_any_flipped_bit_in_the_index_is_found(pristine: MadeCorpus, tmp_path: Path) -> None:
    shutil.copytree(pristine.prefix.parent, tmp_path / "corpora")
    prefix = tmp_path / "corpora" / pristine.prefix.name
    index = Path(f"{prefix}.idx")
    places = [*range(34), *random.Random(1).sample(range(34, index.stat().st_size), 40)]
    for place in places:
        flip_bit(index, place)
        assert "hashes" in failed(verify(str(prefix))), f"byte {place}"
        flip_bit(index, place)
    assert verify(str(prefix)).passed


def test_no_flipped_bit_in_the_sidecar_changes_it_unnoticed(
    pristine: MadeCorpus, tmp_path: Path
) -> None:
    shutil.copytree(pristine.prefix.parent, tmp_path / "corpora")
    prefix = tmp_path / "corpora" / pristine.prefix.name
    sidecar = Path(f"{prefix}.docs.parquet")
    rows = pq.read_table(sidecar)
    begin = pq.read_metadata(sidecar).row_group(0).column(3).data_page_offset  # of the hashes
    places = random.Random(1).sample(range(sidecar.stat().st_size), 60)
    found = 0
    for place in [begin + 200, *places]:
        flip_bit(sidecar, place)
        is_found = bool(failed(verify(str(prefix))) & {"sidecar", "tokenizer"})
        assert is_found or pq.read_table(sidecar).equals(rows), f"byte {place}"
        assert is_found or place != begin + 200
        found += is_found
        flip_bit(sidecar, place)
    assert found > 30
    assert verify(str(prefix)).passed


def test_a_sidecar_of_other_lengths_is_found(corpus: MadeCorpus) -> None:
    sidecar = Path(f"{corpus.prefix}.docs.parquet")
    file = pq.ParquetFile(sidecar)
    table, metadata = file.read(), file.metadata.metadata
    lengths = table["n_tokens"].to_pylist()
    lengths[3], lengths[4] = lengths[3] + 1, lengths[4] - 1
    changed = table.set_column(table.schema.names.index("n_tokens"), "n_tokens", [lengths])
    with pq.ParquetWriter(sidecar, SCHEMA) as writer:
        writer.add_key_value_metadata({"tokens": metadata[b"tokens"]})
        writer.write_table(changed.cast(SCHEMA))
    verification = check(corpus)
    assert failed(verification) == {"summary", "sidecar"}  # the file's size is another, too
    assert f"document 3 has {lengths[3]} tokens, but {lengths[3] - 1} in" in faults(verification)


def test_a_changed_raw_line_is_found(corpus: MadeCorpus) -> None:
    texts = list(corpus.texts[0])
    texts[41] = texts[41].replace("e", "a", 1)
    write_raw(corpus.raw[0], texts)
    verification = check(corpus)
    assert failed(verification) == {"inputs", "texts"}
    assert f"{corpus.raw[0]}:42, id a-42): the raw record has another SHA-256" in faults(
        verification
    )


def test_a_cut_raw_file_is_found(corpus: MadeCorpus) -> None:
    write_raw(corpus.raw[1], corpus.texts[1][:100])
    verification = check(corpus)
    assert failed(verification) == {"inputs", "texts"}
    assert f"{corpus.raw[1]}:101: no record, but document " in faults(verification)


def test_another_tokenizer_is_found(corpus: MadeCorpus, tmp_path: Path) -> None:
    other = make_tokenizer(tmp_path / "other", 290)
    verification = verify(str(corpus.prefix), tokenizer=other, share=1.0)
    assert failed(verification) == {"tokenizer"}
    assert f"{other}/tokenizer.json: SHA-256 is" in faults(verification)


def test_ids_that_the_text_does_not_give_are_found(corpus: MadeCorpus) -> None:
    # Tokens that were wrong before they were hashed: only the texts can show it.
    flip_bit(Path(f"{corpus.prefix}.bin"), 0)
    Path(f"{corpus.prefix}.identity.json").unlink()
    identify_corpus(str(corpus.prefix))
    verification = check(corpus)
    assert failed(verification) == {"texts"}
    first = corpus.ids()[0][0]
    assert f"token 0 is {first ^ 1}, the text gives {first}" in faults(verification)


def test_a_missing_file_is_found(corpus: MadeCorpus) -> None:
    for suffix, name in (("docs.parquet", "summary"), ("bin", "hashes")):
        Path(f"{corpus.prefix}.{suffix}").unlink()
        verification = check(corpus)
        assert {"summary", name} <= failed(verification)
        assert f"{corpus.prefix}.{suffix}" in faults(verification)


def test_a_changed_identity_is_found(corpus: MadeCorpus) -> None:
    path = Path(f"{corpus.prefix}.identity.json")
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "bin_mtime_ns": 1}))
    assert failed(check(corpus)) == {"hashes"}


def test_shards_that_are_missing_or_too_many_are_found(folder: MadeCorpus) -> None:
    for suffix in (".bin", ".idx", ".docs.parquet", ".json", ".identity.json"):
        Path(f"{folder.prefix}/00001{suffix}").rename(f"{folder.prefix}/00002{suffix}")
    verification = check(folder)
    assert {"dataset", "summary"} <= failed(verification)
    assert "00001.idx: is missing, but dataset.json names it" in faults(verification)
    assert "00002.idx: dataset.json does not name it" in faults(verification)


def test_counts_of_a_dataset_are_compared(folder: MadeCorpus) -> None:
    path = folder.prefix / "dataset.json"
    content = json.loads(path.read_text())
    content["shards"][1]["documents"] += 1
    path.write_text(json.dumps(content))
    verification = check(folder)
    assert failed(verification) == {"dataset"}
    (dataset,) = [check for check in verification.checks if check.name == "dataset"]
    assert dataset.failures == 2


def test_sources_that_are_gone_are_not_checked(corpus: MadeCorpus, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in corpus.raw:
        path.rename(moved / path.name)
    verification = check(corpus)
    found = verdicts(verification)
    assert (found["inputs"], found["texts"]) == ("NOT CHECKED", "NOT CHECKED")
    assert verification.passed
    text = "\n".join(verification.lines())
    assert f"not checked: {corpus.raw[0]}: no such file here (--sources)" in text
    again = verify(str(corpus.prefix), tokenizer=corpus.tokenizer, share=1.0, sources=moved)
    assert verdicts(again) == dict.fromkeys(CHECKS, "PASS")


@pytest.mark.parametrize("append_eod", [False, True])
def test_raw_files_of_token_ids_are_compared_as_they_are(
    corpus: MadeCorpus, tmp_path: Path, append_eod: bool
) -> None:
    raw = write_mosaic(tmp_path / "c.mds", corpus.ids())
    output = tmp_path / "corpora" / "ids"
    options = PreprocessOptions(
        inputs=expand_inputs([str(raw)]),
        output_prefix=output,
        tokenizer=corpus.tokenizer,
        rules=SelectionRules(append_eod=append_eod),
    )
    preprocess(options)
    prefix = f"{output}_text_document"
    verification = verify(prefix, tokenizer=corpus.tokenizer, share=1.0)
    assert verdicts(verification) == dict.fromkeys(CHECKS, "PASS")
    assert verification.checks[-1].compared == len(corpus.stored)
    # The last byte is the high one of the last document's last id.
    flip_bit(raw, -1)
    assert failed(verify(prefix, share=1.0)) == {"inputs", "texts"}


@pytest.mark.parametrize("append_eod", [False, True])
def test_summaries_of_earlier_versions_are_read(tmp_path: Path, append_eod: bool) -> None:
    corpus = make_corpus(tmp_path, append_eod=append_eod)
    path = Path(f"{corpus.prefix}.json")
    content = json.loads(path.read_text())
    for name in ("format", "settings"):
        del content[name]
    path.write_text(json.dumps({**content, "dropped": content["dropped"]["empty"]}))
    assert verdicts(check(corpus)) == dict.fromkeys(CHECKS, "PASS")
    summary = read_shard_summary(str(corpus.prefix))
    assert summary is not None
    assert summary.dropped == {"no token": sum(texts.count("") for texts in corpus.texts)}


def test_records_in_quarantine_are_passed_over(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "a.jsonl", made_texts(1, 50))
    lines = raw.read_text().splitlines()
    raw.write_text("\n".join([*lines[:9], '{"text": 1}', *lines[9:]]) + "\n")
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    options = PreprocessOptions(
        inputs=expand_inputs([str(raw)]),
        output_prefix=tmp_path / "small",
        tokenizer=tokenizer,
        on_error="quarantine",
        max_bad_share=0.1,
    )
    preprocess(options)
    verification = verify(f"{tmp_path}/small_text_document", tokenizer=tokenizer, share=1.0)
    assert verdicts(verification) == dict.fromkeys(CHECKS, "PASS")
    assert verification.checks[-1].compared == 49


def test_a_sample_is_chosen_by_the_texts_alone(pristine: MadeCorpus) -> None:
    hashes = [hashlib.sha256(text.encode()).digest() for *_, text in pristine.stored]
    keys = [int.from_bytes(sha256[16:24], "big") / 2**64 for sha256 in hashes]
    with Provenance.open(pristine.prefix) as provenance:
        half, least = choose(provenance, 0.5), choose(provenance, 1e-6)
    assert half.tolist() == [i for i, key in enumerate(keys) if key < 0.5]
    assert 0.3 * len(keys) < len(half) < 0.7 * len(keys)
    assert least.tolist() == sorted(np.argsort(keys)[:10].tolist())


def test_command_prints_a_line_for_each_check(
    pristine: MadeCorpus, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["verify", str(pristine.prefix), "--tokenizer", str(pristine.tokenizer)])
    lines = capsys.readouterr().out.splitlines()
    documents, tokens = len(pristine.stored), sum(map(len, pristine.ids()))
    assert lines[0] == f"{pristine.prefix}: 1 shard, {documents} documents, {tokens:,} tokens"
    assert lines[1:3] == ["summary: PASS, 5 compared", "hashes: PASS, 5 compared"]
    assert lines[-2:] == ["texts: PASS, 10 compared", "PASS"]


def test_command_fails_with_the_corpus(
    corpus: MadeCorpus, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_bit(Path(f"{corpus.prefix}.bin"), 0)
    with pytest.raises(SystemExit) as stopped:
        main(["verify", str(corpus.prefix), "--json"])
    assert stopped.value.code == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["verdict"] == "FAIL"
    assert [c["name"] for c in answer["checks"] if c["verdict"] == "FAIL"] == ["hashes"]


def test_a_corpus_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"error: {tmp_path}/no: no corpus"):
        main(["verify", f"{tmp_path}/no"])
    with pytest.raises(SystemExit, match=r"error: --sample: 0\.0 is no share"):
        main(["verify", f"{tmp_path}/no", "--sample", "0"])


def test_the_field_is_in_the_name() -> None:
    assert text_field("corpora/small_title_document") == "title"
    assert text_field("small_text_validation") == "text"
    assert text_field("small") == "small"


@pytest.mark.parametrize("content", ['{"key": 1', "[1]", '{"key": 1}'])
def test_damaged_records_are_faults(folder: MadeCorpus, content: str) -> None:
    shard = f"{folder.prefix}/00000"
    records = {
        f"{shard}.json": "summary",
        f"{shard}.identity.json": "hashes",
        f"{folder.prefix}/dataset.json": "dataset",
    }
    for name, check_name in records.items():
        path = Path(name)
        whole = path.read_text()
        path.write_text(content)
        verification = check(folder)
        assert check_name in failed(verification)
        assert name in faults(verification)
        path.write_text(whole)
    Path(f"{shard}.json").write_text(content)
    with pytest.raises(ValueError, match=f"{shard}.json: damaged"):
        read_shard_summary(shard)
