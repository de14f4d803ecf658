"""gigatoken against tokenizers: where it is taken, where not, and that its ids are never others."""

import json
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ettin.data import batch_tokenizer as module
from megatron_ettin.data.batch_tokenizer import (
    GigatokenTokenizer,
    LibraryTokenizer,
    TokenizedTexts,
    choose_library,
    doubtful_characters,
    find_difference,
    find_doubtful,
)
from megatron_ettin.data.batches import TextBatch
from megatron_ettin.data.encoding import DocumentSelector, SelectionRules, hash_documents
from megatron_ettin.data.tokenize import (
    Tokenizer,
    load_tokenizer,
    train_tokenizer,
    write_tokenizer,
)

pytest.importorskip("gigatoken", reason="there is no gigatoken wheel for this platform")

TEXTS = [
    "The film was good, don't you think? It's 3 hours and 27 minutes long.",
    "Übermäßig — “schön” … naïve café ﬁn\n\n\tEnde  ",
    "電影很好看 फ़िल्म अच्छी है 영화 \U0001f600\U0001f3fd",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(train_tokenizer(TEXTS * 3, 300), folder)
    return load_tokenizer(folder)


def changed(tokenizer: Tokenizer, folder: Path, **changes: object) -> Tokenizer:
    """Return the tokenizer with other fields in its tokenizer.json."""
    content = json.loads((tokenizer.folder / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps(content | changes), encoding="utf-8")
    return load_tokenizer(folder)


def different(tokenizer: Tokenizer, texts: list[str]) -> str | None:
    """Return the first text to which gigatoken gives other ids, escaped; None if there is none."""
    found = GigatokenTokenizer(tokenizer).encode(texts)
    difference = find_difference(texts, found, LibraryTokenizer(tokenizer).encode(texts))
    return None if difference is None else ascii(texts[difference])


def test_gigatoken_is_taken_where_it_agrees(tokenizer: Tokenizer) -> None:
    library, why = choose_library(tokenizer, TEXTS)
    assert isinstance(library, GigatokenTokenizer)
    assert why == "tokenising with gigatoken: same ids as tokenizers for 503 texts"


def test_special_tokens_in_text_are_text_and_added_ones_are_tokens(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    content = json.loads((tokenizer.folder / "tokenizer.json").read_text(encoding="utf-8"))
    added = {
        "id": 300, "content": "|||IP|||", "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": True, "special": False,
    }  # fmt: skip
    other = changed(tokenizer, tmp_path, added_tokens=[*content["added_tokens"], added])
    texts = ["a [MASK] b[CLS]", "at |||IP||| now", "[SEP]|||IP|||[PAD]"]
    assert different(other, texts) is None
    encoded = GigatokenTokenizer(other).encode(texts)
    assert np.count_nonzero(encoded.tokens == 300) == 2
    assert other.ids.mask not in encoded.tokens
    assert isinstance(choose_library(other, texts)[0], GigatokenTokenizer)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "gigatoken"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "gigatoken"),
    ],
)
def test_a_tokenizer_that_gigatoken_does_not_know_is_left_to_tokenizers(
    tokenizer: Tokenizer, tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    other = changed(tokenizer, tmp_path, **changes)
    library, why = choose_library(other, TEXTS)
    texts = [*TEXTS, "Straße ABC"]
    assert (
        find_difference(texts, library.encode(texts), LibraryTokenizer(other).encode(texts)) is None
    )
    if isinstance(library, LibraryTokenizer):
        assert why.startswith("tokenising with tokenizers: ")
        assert reason in why


def test_without_gigatoken_tokenizers_does_it(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "load_hf_json", None)
    library, why = choose_library(changed(tokenizer, tmp_path), TEXTS)
    assert isinstance(library, LibraryTokenizer)
    assert why == "tokenising with tokenizers: gigatoken is not installed"


class Wrong:
    """Encoder whose ids are wrong for texts with an x."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._library = LibraryTokenizer(tokenizer)

    def encode(self, texts: list[str]) -> TokenizedTexts:
        return self._library.encode([text.replace("x", "y") for text in texts])


def test_other_ids_for_the_input_are_found_before_the_run(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_compare_on_made_texts", lambda of: (Wrong(of), None))
    library, why = choose_library(tokenizer, ["good", "an example"])
    assert isinstance(library, LibraryTokenizer)
    assert why == "tokenising with tokenizers: gigatoken gives other ids for 'an example'"
    assert isinstance(choose_library(tokenizer, ["good"])[0], Wrong)


def test_other_ids_in_the_run_stop_it_and_name_the_document(tokenizer: Tokenizer) -> None:
    texts = [f"document {n} x" for n in range(4000)]
    batch = TextBatch((texts,), None, None, range(11, 4011), 0)
    wrong = Wrong(tokenizer)
    library = DocumentSelector(tokenizer, wrong, SelectionRules())
    hashes = hash_documents(batch)
    with pytest.raises(ValueError, match=r"a.jsonl:\d+: gigatoken gives other ids .*--library tok"):
        library.select(batch, 0, wrong.encode(texts), hashes, None, "a.jsonl")
    right = LibraryTokenizer(tokenizer).encode(texts)
    assert not sum(library.select(batch, 0, right, hashes, None, "a.jsonl").dropped.values())


def test_doubtful_characters_are_few_and_rare() -> None:
    doubtful = doubtful_characters()
    for text in TEXTS:
        assert not find_doubtful([text])
    assert not doubtful[:0x300].any()
    common = "\u2019\u201c\u201d\u2026\u2013\u2014\u20ac\u2122"
    common += "\u00ad\u200b\u200d\ufe0f\ufeff\u0301\u064b\u0e31\u3099"
    common += "\u4e2d\ud55c\u3042\u30a2\U0001f600\U0001f3fd"
    assert not doubtful[[ord(character) for character in common]].any()
    assert doubtful[0x089A]
    assert doubtful[0x33022]


def test_texts_with_doubtful_characters_get_the_ids_of_tokenizers(tokenizer: Tokenizer) -> None:
    # Marks that one of the libraries orders and the other does not; a letter of Unicode 17.
    texts = [
        "plain",
        "e\u035d\u089a",
        "",
        "\U00033022's",
        "e\u031d\U000113cf",
        "end",
        "\u035c\U00010eac",
    ]
    assert find_doubtful(texts) == [1, 3, 4, 6]
    assert different(tokenizer, texts) is None
    alone = GigatokenTokenizer(tokenizer)._encode(texts)
    expected = LibraryTokenizer(tokenizer).encode(texts)
    assert find_difference(texts, alone, expected) is not None, (
        "gigatoken has the same tables by now: less needs to be doubtful"
    )


def test_the_encoder_starts_anew_before_its_cache_grows(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    load = module.load_hf_json
    monkeypatch.setattr(module, "load_hf_json", lambda text: loads.append(text) or load(text))
    monkeypatch.setattr(module, "RESTART_CHARACTERS", 2 * sum(map(len, TEXTS)))
    library = GigatokenTokenizer(tokenizer)
    for calls in range(1, 7):
        found = library.encode(TEXTS)
        assert find_difference(TEXTS, found, LibraryTokenizer(tokenizer).encode(TEXTS)) is None
        assert len(loads) == (calls + 1) // 2


def test_threads_encode_at_the_same_time(tokenizer: Tokenizer) -> None:
    library = GigatokenTokenizer(tokenizer)
    batches = [[f"{text} {n}" for text in TEXTS for n in range(i, 200)] for i in range(40)]
    expected = [LibraryTokenizer(tokenizer).encode(texts) for texts in batches]
    with ThreadPoolExecutor(4) as threads:
        for texts, found, right in zip(
            batches, threads.map(library.encode, batches), expected, strict=True
        ):
            assert find_difference(texts, found, right) is None


CHARACTERS = st.characters(exclude_categories=("Cs",))
PIECES = st.sampled_from(
    [
        "'s",
        "'re",
        " ",
        "  ",
        "\n",
        "\r\n",
        "[MASK]",
        " [SEP]",
        "e\u0301",
        "\u1100\u1161",
        "1",
        "\u00bd",
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(CHARACTERS | PIECES, max_size=30).map("".join), min_size=1, max_size=8))
def test_ids_are_those_of_tokenizers(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert different(tokenizer, texts) is None


@pytest.mark.long
def test_ids_of_every_character_are_those_of_tokenizers(tokenizer: Tokenizer) -> None:
    """All characters in places where splitting and NFC depend on them; decompositions; marks."""
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for pattern in ("{}'s", "\u0301{}", "{}\u0301", "a{}\u0323\u0301", "{}1a {}"):
        assert (
            different(tokenizer, [pattern.replace("{}", character) for character in characters])
            is None
        )
    decomposed = [unicodedata.normalize("NFD", character) for character in characters]
    assert (
        different(tokenizer, [f"{text}\u0323\u0301" for text in decomposed if len(text) > 1])
        is None
    )
    marks = [character for character in characters if unicodedata.combining(character)]
    assert (
        different(tokenizer, [f"e{first}{second}" for first in marks for second in marks[::7]])
        is None
    )
