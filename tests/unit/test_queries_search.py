"""search against a scan of decoded documents and of every row."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megatron_ettin.data.tokenize import SPECIAL_TOKENS, load_tokenizer
from megatron_ettin.native import TokenFile, TokenFileBuilder
from megatron_ettin.queries.corpus_scan import CorpusScan
from megatron_ettin.queries.recorded_run import RecordedRun, open_run
from megatron_ettin.queries.search import Search, search
from tests.conftest import TinyCorpus
from tests.native.scanned import occurrences
from tests.runs import add_provenance, record_run, tiny_config
from tests.unit.queried import Queried
from tools import order

ALL = 10**6


def ask(run: RecordedRun, text: str, num: int = ALL) -> Search:
    return search(run, CorpusScan(run, run.order.source_names), text, num=num)


def decoded(run: RecordedRun) -> dict[tuple[str, int], str]:
    """Return the text of each document, by source and number."""
    assert run.config is not None
    tokenizer = load_tokenizer(Path(run.config.data.tokenizer))
    return {
        (source, number): tokenizer.decode(run.order.corpus(source).tokens(number))
        for source in run.order.source_names
        for number in range(run.order.corpus(source).num_documents)
    }


def parts_of(texts: list[str]) -> list[str]:
    """Return parts of texts that begin and end anywhere, of all lengths."""
    rng = np.random.default_rng(11)
    long = [text for text in texts if len(text) > 300]
    parts = []
    for length in (4, 7, 17, 40, 140, 290):
        text = long[rng.integers(len(long))]
        begin = rng.integers(len(text) - length)
        parts.append(text[begin : begin + length])
    return parts


def test_search_finds_what_a_scan_finds(queried: Queried) -> None:
    run = queried.run
    assert run.config is not None
    tokenizer = load_tokenizer(Path(run.config.data.tokenizer))
    # All texts of the tiny corpus are ASCII, so each token is decoded to its own bytes.
    spelled = [tokenizer.decode([id_]).encode() for id_ in range(tokenizer.ids.vocab_size)]
    texts = decoded(run)
    checkpoints = [(point.g, point.name) for point in run.checkpoints]
    cut = 0
    for text in [*parts_of(list(texts.values())), "no such words", "q" * 700]:
        answer = ask(run, text)
        containing = [document for document, content in texts.items() if text in content]
        assert [(each.source, each.ordinal) for each in answer.found] == containing
        assert answer.documents == len(containing)
        assert answer.occurrences == sum(each.occurrences for each in answer.found)
        for each in answer.found:
            ids = run.order.corpus(each.source).tokens(each.ordinal).tolist()
            ranges = occurrences(spelled, ids, text.encode())
            assert each.occurrences == len(ranges)
            assert each.first_token == ranges[0][0]
            expected = {}
            for p in queried.pieces:
                if (p.source, p.document) == (each.source, each.ordinal):
                    held = sum(
                        p.offset <= begin and end <= p.offset + p.length for begin, end in ranges
                    )
                    if held:
                        after = next((name for g, name in checkpoints if g > p.g), None)
                        status = "seen" if p.g < queried.done else "to come"
                        expected[p.g] = (p.step, p.slot, p.epoch, held, status, after)
            found = {
                p.g: (p.step, p.slot, p.epoch, p.occurrences, p.status, p.checkpoint)
                for p in each.places
                if p.status != "skipped"
            }
            assert found == expected
            assert (each.reason is None) == bool(each.places)
            cut += each.reason is not None and each.reason.startswith("no row holds the text whole")
    assert cut, "no text is cut by the end of a row"


def test_documents_beyond_the_number_are_counted(queried: Queried) -> None:
    more, some = ask(queried.run, "a", num=9), ask(queried.run, "a", num=3)
    assert (len(more.found), len(some.found)) == (9, 3)
    assert some.documents == more.documents == more.not_listed + 9 == some.not_listed + 3
    assert some.found == more.found[:3]
    assert some.occurrences == more.occurrences
    assert ask(queried.run, "a", num=0).not_listed == more.documents
    rare = ask(queried.run, "q" * 700)
    assert (rare.documents, rare.not_listed) == (0, None)


def test_the_command_prints_the_answer(
    queried: Queried, capsys: pytest.CaptureFixture[str]
) -> None:
    text = decoded(queried.run)["alpha", 3][:30]
    run = ["--run", str(queried.folder), "--text", text, "--source"]
    order.main(["search", *run, "alpha", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["text"] == text
    assert answer["found"][0]["id"] == "alpha-3"
    assert answer["found"][0]["url"] == "https://alpha.example/3"
    order.main(["search", *run, "beta"])
    assert "documents    0" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no source 'gamma'; there are: alpha, beta"):
        order.main(["search", *run, "gamma"])
    with pytest.raises(SystemExit, match="the text to look for is empty"):
        order.main(["search", *run[:3], "", "--source", "alpha"])
    with pytest.raises(SystemExit, match="the text to look for: character 2 is not UTF-8"):
        order.main(["search", *run[:3], "ab\udcff", "--source", "alpha"])
    with pytest.raises(SystemExit, match="--num -1: must be 0 or more"):
        order.main(["search", *run, "alpha", "--num", "-1"])


def test_a_text_is_looked_for_as_the_tokenizer_reads_it(queried: Queried) -> None:
    assert ask(queried.run, "e\u0301").text == "é"


def word_piece_run(corpus: TinyCorpus, folder: Path) -> RecordedRun:
    """Return a run over the tiny texts, cut by another kind of tokenizer."""
    old = load_tokenizer(corpus.folder / "tokenizer")
    other = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    other.normalizer = normalizers.Lowercase()
    other.pre_tokenizer = pre_tokenizers.Whitespace()
    other.decoder = decoders.WordPiece()
    texts = {}
    for name in ("alpha", "beta", "held_out"):
        file = TokenFile(corpus.folder / name)
        texts[name] = [old.decode(file.tokens(n)) for n in range(file.num_documents)]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=list(SPECIAL_TOKENS))
    other.train_from_iterator(texts["alpha"], trainer)
    other.save(str(corpus.folder / "tokenizer" / "tokenizer.json"))
    loaded = load_tokenizer(corpus.folder / "tokenizer")
    for name, each in texts.items():
        builder = TokenFileBuilder(corpus.folder / name, "uint16")
        for ids in loaded.encode_batch(each):
            builder.add(ids)
        builder.commit()
    return open_run(record_run(tiny_config(corpus, folder / "run"), steps=4, save_steps=(2,)))


def test_documents_of_other_tokenizers_are_decoded(own_corpus: TinyCorpus, tmp_path: Path) -> None:
    run = word_piece_run(own_corpus, tmp_path)
    texts, tokenizer = decoded(run), load_tokenizer(own_corpus.folder / "tokenizer")
    for part in parts_of(list(texts.values()))[3:]:
        # Whole words only: half of one may be spelled otherwise.
        text = " ".join(part.split()[1:-1])
        answer = ask(run, text.upper(), num=5)
        assert answer.text == text
        expected = [document for document, content in texts.items() if text in content]
        assert answer.documents == len(expected) > 0
        assert [(each.source, each.ordinal) for each in answer.found] == expected[:5]
        for each in answer.found:
            tokens = run.order.corpus(each.source).tokens(each.ordinal)
            before = tokenizer.decode(tokens[: each.first_token])
            through = tokenizer.decode(tokens[: each.first_token + 1])
            assert len(before) <= texts[each.source, each.ordinal].index(text) < len(through)


def test_a_corpus_that_has_changed_is_refused(own_corpus: TinyCorpus, tmp_path: Path) -> None:
    folder = record_run(tiny_config(own_corpus, tmp_path / "run"), steps=2)
    file = TokenFile(own_corpus.folder / "beta")
    documents = [file.tokens(n) for n in range(file.num_documents)]
    documents[7][0] += 1
    builder = TokenFileBuilder(own_corpus.folder / "beta", "uint16")
    for document in documents:
        builder.add(document)
    builder.commit()
    with pytest.raises(
        SystemExit, match=r"(?s)the order is not the recorded one.*source beta: tokens_sha256"
    ):
        order.main(["search", "--run", str(folder), "--text", "a"])


def test_a_corpus_of_another_tokenizer_is_refused(own_corpus: TinyCorpus, tmp_path: Path) -> None:
    run = open_run(record_run(tiny_config(own_corpus, tmp_path / "run"), steps=2))
    add_provenance(own_corpus.folder / "beta", "0" * 64)
    with pytest.raises(ValueError, match=r"source 'beta', shard 0: .*beta was made with the token"):
        CorpusScan(run, ["alpha", "beta"])
    CorpusScan(run, ["alpha"])


def test_where_names_documents_by_a_text_that_they_contain(
    queried: Queried, capsys: pytest.CaptureFixture[str]
) -> None:
    text = decoded(queried.run)["alpha", 3][:30]
    run = ["where", "--run", str(queried.folder), "--contains"]
    order.main([*run, text, "--json"])
    by_text = capsys.readouterr().out
    containing = [each for each, content in decoded(queried.run).items() if text in content]
    assert containing == [("alpha", 3)]
    order.main(["where", "--run", str(queried.folder), "--doc", "alpha:3", "--json"])
    assert by_text == capsys.readouterr().out
    with pytest.raises(SystemExit, match="no document of alpha, beta contains 'no such words'"):
        order.main([*run, "no such words"])
