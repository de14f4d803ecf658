"""The search for sequences of words, against Python's words of the decoded tokens."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import strategies as st

from megatron_ettin import native
from megatron_ettin.queries.words import word_rules
from tests.native.scanned import shared_grams, words, write_tokens
from tests.properties import cases, check_all

#: Words, parts of words, breaks, what is left out, parts of characters, and no text.
TOKENS = [
    "a", "b", " a", " b", "B ", "a b", "A", " ", "\n\n", ".", ", ", "“", "-", " a-b ", "İ", "É",
    "é", "中文", " b中", "ข", "。", "\u3000", " a a b ", "",
]  # fmt: skip
BYTES = [
    b"\xc3",
    b"\x89",
    b"\xe4\xb8",
    b"\xad",
    b"a\xe4",
    b"\xb8\xad b",
    b"\xff",
    b"\xe4\xb8(",
    b"\x80a",
]
VOCABULARY = [*(token.encode() for token in TOKENS), *BYTES, None]
documents = st.lists(st.lists(st.integers(0, len(VOCABULARY) - 1), max_size=60), max_size=20)
passages = st.lists(st.lists(st.sampled_from(TOKENS), max_size=20).map("".join), max_size=6)


def make_finder(given: list[str], n: int) -> native.GramFinder:
    return native.GramFinder(native.TokenBytes(VOCABULARY), word_rules(), given, n)


def number_grams(given: list[str], n: int) -> tuple[dict[tuple[str, ...], int], list[list[int]]]:
    """Return the number of each sequence, and those of each passage."""
    numbers: dict[tuple[str, ...], int] = {}
    of_passages = []
    for passage in given:
        found = words(passage)
        grams = [tuple(found[at : at + n]) for at in range(len(found) - n + 1)]
        of_passages.append([numbers.setdefault(gram, len(numbers)) for gram in grams])
    return numbers, of_passages


@cases(60)
def test_shared_sequences_are_found(count: int) -> None:
    def check(
        given: list[list[int]],
        texts: list[str],
        n: int,
        cuts: list[int],
        dtypes: list[str],
        threads: int,
    ) -> None:
        numbers, of_passages = number_grams(texts, n)
        finder = make_finder(texts, n)
        assert finder.num_grams == len(numbers)
        for passage, (text, grams) in enumerate(zip(texts, of_passages, strict=True)):
            assert finder.words(passage).split() == words(text)
            assert finder.grams(passage).tolist() == grams
        expected = [
            [number, *found]
            for number, document in enumerate(given)
            for found in shared_grams(VOCABULARY, document, numbers, n)
        ]
        with TemporaryDirectory() as folder:
            corpus = write_tokens(Path(folder), given, cuts, dtypes)
            assert finder.find(corpus, 0, len(given), threads=threads).tolist() == expected

    check_all(
        check,
        count,
        documents,
        passages,
        st.integers(1, 4),
        st.lists(st.integers(0, 20), max_size=3),
        st.lists(st.sampled_from(["uint16", "int32"]), min_size=1, max_size=2),
        st.integers(0, 3),
    )


def test_thousands_of_sequences_are_told_apart(tmp_path: Path) -> None:
    # Words of one letter: 1,500 passages have thousands of different sequences of 5.
    letters = [b" a", b" b", b" c", b" d", b" e", b" f", b" g", b"\n"]
    vocabulary = native.TokenBytes(letters)
    rng = np.random.default_rng(5)
    texts = ["".join(rng.choice(list("abcdefg \n"), 40)) for _ in range(1500)]
    given = [rng.integers(0, 7, 500).tolist() for _ in range(20)]
    numbers, _ = number_grams(texts, 5)
    finder = native.GramFinder(vocabulary, word_rules(), texts, 5)
    assert finder.num_grams == len(numbers) > 5_000
    expected = [
        [number, *found]
        for number, document in enumerate(given)
        for found in shared_grams(letters, document, numbers, 5)
    ]
    assert expected
    corpus = write_tokens(tmp_path, given, [7], ["uint16", "int32"])
    assert finder.find(corpus, 0, len(given), threads=2).tolist() == expected


def test_a_token_may_be_a_long_word(tmp_path: Path) -> None:
    long = b"x" * 70_000
    vocabulary = native.TokenBytes([long, b" ", long + b" " + long])
    finder = native.GramFinder(vocabulary, word_rules(), [(long * 2 + b" " + long).decode()], 2)
    corpus = write_tokens(tmp_path, [[0, 2], [0, 1, 0], [1, 0, 0, 1, 0]], [], ["uint16"])
    assert finder.find(corpus, 0, 3).tolist() == [[0, 0, 0, 2], [2, 0, 1, 5]]


def test_every_character_has_the_rule_of_its_words() -> None:
    rules = word_rules()
    assert rules.words("Don't  “Stop”—it's 3.5\N{NO-BREAK SPACE}% ÉTÉ!") == "dont stopits 35 été"
    assert rules.words("価格は3円。คน") == "価 格 は 3 円 ค น"
    assert rules.words(" \n…") == ""
    assert (
        rules.words("a\ud800b".encode("utf-8", "surrogatepass").decode("utf-8", "ignore")) == "ab"
    )


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    corpus = write_tokens(tmp_path, [[0], [0, len(VOCABULARY)]], [1], ["int32"])
    for n in (0, 1025):
        with pytest.raises(ValueError, match=f"n is {n}; it must be 1 to 1024"):
            make_finder(["a"], n)
    finder = make_finder(["a b"], 2)
    with pytest.raises(IndexError, match="passage 1 of 1"):
        finder.words(1)
    with pytest.raises(IndexError, match="passage -1 of 1"):
        finder.grams(-1)
    message = r"00001\.bin: document 0, position 1: token id \d+ is outside the vocabulary"
    with pytest.raises(ValueError, match=message):
        finder.find(corpus, 0, 2)
    with pytest.raises(ValueError, match="rules has 3 values, expected 1114112"):
        native.WordRules(np.zeros(3, dtype=np.uint8), {})
    rules = np.zeros(0x110000, dtype=np.uint8)
    with pytest.raises(ValueError, match=r"replaced\[65\] has a space"):
        native.WordRules(rules, {65: "a b"})
    rules[7] = 4
    with pytest.raises(ValueError, match=r"rules\[7\] is 4; there are rules 0 to 3"):
        native.WordRules(rules, {})
