"""The search for a text in a corpus, against Python's search in the joined bytes of the tokens."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import strategies as st

from megatron_ettin import native
from tests.native.scanned import occurrences, write_tokens
from tests.properties import cases, check_all

#: Few letters, so that texts occur, in all ways to cut them; None is a token without text.
VOCABULARY = [b"a", b"b", b"ab", b"ba", b"aab", b"bbbb", b"", None, b"abab", b"\xc3", b"\xa9", b"c"]
documents = st.lists(st.lists(st.integers(0, len(VOCABULARY) - 1), max_size=60), max_size=30)
texts = st.text("abc", min_size=1, max_size=9).map(str.encode) | st.sampled_from(
    ["é".encode(), b"a\xc3\xa9", b"ab" * 40]
)


def finder(text: bytes, counts: list[int] | None = None) -> native.TextFinder:
    each = np.array(counts or [1] * len(VOCABULARY), dtype=np.int64)
    return native.TextFinder(native.TokenBytes(VOCABULARY), text, each)


@cases(60)
def test_documents_with_a_text_are_found(count: int) -> None:
    def check(
        given: list[list[int]],
        text: bytes,
        cuts: list[int],
        dtypes: list[str],
        counts: list[int],
        threads: int,
    ) -> None:
        expected = [occurrences(VOCABULARY, document, text) for document in given]
        with TemporaryDirectory() as folder:
            corpus = write_tokens(Path(folder), given, cuts, dtypes)
            search = finder(text, counts)
            hits = search.find(corpus, 0, len(given), threads=threads)
            assert hits.tolist() == [[n, len(each)] for n, each in enumerate(expected) if each]
            for document, each in enumerate(expected):
                found = search.find_in(corpus, document).tolist()
                assert [tuple(tokens) for tokens in found] == each
            middle = len(given) // 2
            assert search.find(corpus, middle, len(given)).tolist() == [
                hit for hit in hits.tolist() if hit[0] >= middle
            ]

    check_all(
        check,
        count,
        documents,
        texts,
        st.lists(st.integers(0, 30), max_size=3),
        st.lists(st.sampled_from(["uint16", "int32"]), min_size=1, max_size=2),
        st.lists(st.integers(0, 10**12), min_size=len(VOCABULARY), max_size=len(VOCABULARY)),
        st.integers(0, 3),
    )


def test_a_corpus_of_many_blocks_is_searched_whole(tmp_path: Path) -> None:
    # A block has at most 131,072 tokens and one document: these are 9 blocks in two shards.
    rng = np.random.default_rng(3)
    lengths = [200_000, 1, 0, 131_072, *rng.integers(0, 3000, 400).tolist()]
    given = [rng.choice([0, 1, 2, 3, 4, 8], length).tolist() for length in lengths]
    corpus = write_tokens(tmp_path, given, [200], ["uint16", "int32"])
    text = b"abababbaabab"
    expected = [occurrences(VOCABULARY, document, text) for document in given]
    assert 50 < sum(map(bool, expected)) < 400
    for threads in (1, 5):
        hits = finder(text).find(corpus, 0, len(given), threads=threads)
        assert hits.tolist() == [[n, len(each)] for n, each in enumerate(expected) if each]
    assert finder(text).find_in(corpus, 0).tolist() == [list(each) for each in expected[0]]


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    corpus = write_tokens(tmp_path, [[0], [0, 1, 12]], [1], ["uint16", "int32"])
    with pytest.raises(ValueError, match="the text is empty"):
        finder(b"")
    with pytest.raises(ValueError, match="counts has 2 values, expected 12"):
        finder(b"a", [1, 2])
    with pytest.raises(IndexError, match=r"documents \[0, 3\) of 2"):
        finder(b"a").find(corpus, 0, 3)
    with pytest.raises(IndexError, match=r"documents \[2, 3\) of 2"):
        finder(b"a").find_in(corpus, 2)
    with pytest.raises(ValueError, match="threads is -1; it must be 0 to 1024"):
        finder(b"a").find(corpus, 0, 2, threads=-1)
    with pytest.raises(ValueError, match="tokens must have 1 to"):
        native.TokenBytes([])
    message = r"00001\.bin: document 0, position 2: token id 12 is outside the vocabulary of 12"
    with pytest.raises(ValueError, match=message):
        finder(b"zz").find(corpus, 0, 2, threads=2)
