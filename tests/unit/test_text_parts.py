"""Texts in parts: the ids of the parts are those of the whole, for each tokenizer with cuts."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ettin.data.batch_tokenizer import (
    SLOW_GROUP_CHARACTERS,
    GigatokenTokenizer,
    LibraryTokenizer,
    choose_library,
    only_tokenizers,
)
from megatron_ettin.data.batches import BATCH_BYTES, TextBatch, is_large
from megatron_ettin.data.encoding import hash_documents
from megatron_ettin.data.made_texts import made_texts
from megatron_ettin.data.text_parts import PART_CHARACTERS, TextCutter, find_cutter
from megatron_ettin.data.tokenize import Tokenizer, load_tokenizer, train_tokenizer

ROOT = Path(__file__).parents[2]
TEXTS = [
    "The film was good, don't you think? It's 3 hours and 27 minutes long.",
    "Übermäßig — “schön” … naïve café ﬁn\n\n\tEnde  ",
    "電影很好看 फ़िल्म अच्छी है 영화 \U0001f600\U0001f3fd",
]
PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
BYTES = {"type": "ByteLevel", "trim_offsets": True}


def added(*contents: str, special: bool = False, **flags: bool) -> dict[str, Any]:
    """Return the change that adds tokens."""
    tokens = [
        {"id": 300 + n, "content": content, "special": special, **PLAIN, **flags}
        for n, content in enumerate(contents)
    ]
    return {"added_tokens": tokens}


def split_by(numbers: str, **flags: Any) -> dict[str, Any]:
    rule = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + numbers + "|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = {"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated", "invert": False}
    level = BYTES | {"add_prefix_space": False, "use_regex": False}
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split | flags, level]}}


# Changes of tokenizer.json, and the characters before which texts are cut.
CUT: dict[str, tuple[dict[str, Any], str]] = {
    "ours": ({}, " \n"),
    "ModernBERT": (added("  ", "   ", "    ", "|||IP_ADDRESS|||", "\n\n", "\t\t"), " \n"),
    "prefix space": (
        {"pre_tokenizer": BYTES | {"add_prefix_space": True, "use_regex": True}},
        " ",
    ),
    "no normalizer": ({"normalizer": None}, " \n"),
    "decomposed": ({"normalizer": {"type": "NFD"}}, " \n"),
    "Llama 3": (split_by(r"\p{N}{1,3}"), " "),
    "Qwen 2": (split_by(r"\p{N}"), " "),
    "takes in spaces before it": (added("|||IP|||", lstrip=True), " \n"),
    "special, takes in spaces": (added("|||IP|||", rstrip=True, special=True), " \n"),
    "with a space inside": (added("e the", "don't"), "\n"),
}
WHOLE: dict[str, dict[str, Any]] = {
    "no splitting": {"pre_tokenizer": BYTES | {"add_prefix_space": False, "use_regex": False}},
    "another splitting": split_by(r"\p{N}+"),
    "joined splitting": split_by(r"\p{N}", behavior="MergedWithNext"),
    "Metaspace": {
        "pre_tokenizer": {
            "type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True,
        }
    },
    "no pre-tokenizer": {"pre_tokenizer": None},
    "lower case": {"normalizer": {"type": "Lowercase"}},
    "takes in spaces after it": added("|||IP|||", rstrip=True),
    "whole words": added("film", single_word=True),
    "with both inside": added("e the", "a\nb"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


def changed(folder: Path, changes: dict[str, Any]) -> Tokenizer:
    """Return our tokenizer with other fields in its tokenizer.json."""
    content = json.loads(train_tokenizer(TEXTS * 3, 300).to_str())
    more = changes.get("added_tokens", [])
    place = folder / str(len(list(folder.iterdir())))
    place.mkdir()
    content |= changes | {"added_tokens": content["added_tokens"] + more}
    (place / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return load_tokenizer(place)


@pytest.fixture(scope="module", params=CUT)
def cut(request: pytest.FixtureRequest, folder: Path) -> tuple[Tokenizer, TextCutter, str]:
    """Return a tokenizer, its cutter, and the characters before which it cuts."""
    changes, characters = CUT[request.param]
    tokenizer = changed(folder, changes)
    cutter = find_cutter(tokenizer)
    assert cutter is not None
    return tokenizer, cutter, characters


def ids_of(tokenizer: Tokenizer, *parts: str) -> list[int]:
    return [number for ids in tokenizer.encode_batch(parts) for number in ids.tolist()]


PIECES = st.sampled_from(
    [" ", "  ", "\n", "\n\n", "\r\n", "\t", "\xa0", "\u200b", "\u180e", "\x1c", "\x85", "'s", "e",
     "e\u0301", "\u103a", "a", ".", "...\n", "1234", "|||IP|||", "|||IP_ADDRESS|||", "[MASK]",
     " [SEP] ", "don't", "e the", "\u1100\u1161", "電", "\U0001f600", "\u00a8", "\u037a"]
)  # fmt: skip
CHARACTERS = st.characters(exclude_categories=("Cs",))


@settings(max_examples=80, deadline=None)
@given(text=st.lists(PIECES | CHARACTERS, max_size=60).map("".join))
def test_parts_have_the_ids_of_the_whole(cut: tuple[Tokenizer, TextCutter, str], text: str) -> None:
    tokenizer, cutter, _ = cut
    parts = list(cutter.parts(text, 1))
    assert "".join(parts) == text
    assert ids_of(tokenizer, *parts) == ids_of(tokenizer, text)


def test_cuts_are_where_they_are_said_to_be(cut: tuple[Tokenizer, TextCutter, str]) -> None:
    _, cutter, characters = cut
    text = "one two\nthree  four\n\nfive\u200b six.\u1000\u103a seven"
    places = [
        n for n in range(1, len(text))
        if text[n] in characters and not text[n - 1].isspace() and text[n - 1] != "\u200b"
    ]  # fmt: skip
    parts = list(cutter.parts(text, 1))
    assert np.cumsum([len(part) for part in parts])[:-1].tolist() == places


def test_parts_end_at_the_first_place_after_their_size() -> None:
    sizes = [len(part) for part in TextCutter(" ").parts("word " * 100, 20)]
    assert sizes == [24, *[20] * 23, 16]


@pytest.mark.parametrize("name", WHOLE)
def test_no_text_is_cut_where_no_place_is_known(folder: Path, name: str) -> None:
    tokenizer = changed(folder, WHOLE[name])
    assert find_cutter(tokenizer) is None
    for _, why in (choose_library(tokenizer, TEXTS), only_tokenizers(tokenizer)):
        assert why.endswith("no known places to cut long texts, so 100 MB may take 12 GB")
    text = "word. " * (PART_CHARACTERS // 4)
    found = LibraryTokenizer(tokenizer).encode([text, "end"])
    assert found.tokens.tolist() == ids_of(tokenizer, text, "end")


def long_text(seed: int) -> str:
    """Return a text of several parts, one of them without a place to cut."""
    random_ = random.Random(seed)
    words = [word for text in TEXTS for word in text.split(" ")]
    plain = [random_.choice(words) for _ in range(PART_CHARACTERS // 8)]
    return " ".join([*plain, "x" * PART_CHARACTERS, *plain, "\u1000\u103a", *plain])


def test_long_texts_among_others_have_their_ids(folder: Path) -> None:
    pytest.importorskip("gigatoken", reason="there is no gigatoken wheel for this platform")
    tokenizer = changed(folder, {})
    texts = ["short", long_text(1), "", "\u103a", long_text(2)]
    expected = [ids_of(tokenizer, text) for text in texts]
    for library in (LibraryTokenizer(tokenizer), GigatokenTokenizer(tokenizer)):
        for chosen in ([0, 1, 2, 3, 4], [1], [3, 4], [0, 2]):
            found = library.encode([texts[n] for n in chosen])
            assert found.lengths.tolist() == [len(expected[n]) for n in chosen]
            assert found.tokens.tolist() == [i for n in chosen for i in expected[n]]


def test_only_the_parts_with_a_doubtful_character_go_to_tokenizers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gigatoken", reason="there is no gigatoken wheel for this platform")
    library = GigatokenTokenizer(changed(folder, {}))
    slowly: list[str] = []
    encode = LibraryTokenizer.encode
    monkeypatch.setattr(
        LibraryTokenizer, "encode", lambda self, texts: slowly.extend(texts) or encode(self, texts)
    )
    library.encode([long_text(1)])
    assert len(slowly) == 1
    assert "\u103a" in slowly[0]
    assert len(slowly[0]) < 1.1 * PART_CHARACTERS


def test_the_hash_of_a_long_text_is_that_of_its_bytes() -> None:
    text = "ü\U0001f600" * (BATCH_BYTES // 2 + 5)
    batch = TextBatch(([text],), None, None, range(1, 2), 0)
    pair = TextBatch(([text, text],), None, None, range(1, 3), 0)
    assert (hash_documents(pair) == hash_documents(batch)).all()
    assert not is_large(batch)
    assert is_large(batch._replace(texts=([text * 4],)))


@pytest.mark.slow
def test_memory_of_a_long_text_is_that_of_a_few_parts(folder: Path) -> None:
    """`tokenizers` takes 150 to 250 bytes for each token: 2 MB of Burmese as a whole, 400 MB."""
    tokenizer = changed(folder, {})
    words = [chr(0x1000 + n % 30) + "\u103a" * (1 + n % 3) for n in range(90)]
    text = " ".join(random.Random(0).choices(words, k=220_000))
    (folder / "text").write_text(text, encoding="utf-8")
    program = f"""
import resource
from pathlib import Path
from megatron_ettin.data.batch_tokenizer import LibraryTokenizer
from megatron_ettin.data.tokenize import load_tokenizer
library = LibraryTokenizer(load_tokenizer(Path({str(tokenizer.folder)!r})))
text = Path({str(folder / "text")!r}).read_text(encoding="utf-8")
library.encode([text[:2 * {SLOW_GROUP_CHARACTERS}]])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tokens = library.encode([text]).tokens
print(len(tokens), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    num_tokens, kilobytes = map(int, done.stdout.split())
    assert num_tokens > 1_700_000
    assert kilobytes < 50_000, "memory grows with the text"


def test_made_texts_have_places_to_cut(folder: Path) -> None:
    tokenizer = changed(folder, {})
    assert sum(len(list(TextCutter(" ").parts(text, 1))) > 1 for text in made_texts(tokenizer)) > 50
