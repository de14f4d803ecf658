"""Hashes of texts against hashlib, and the search for characters against Python's own."""

import _hashlib
import hashlib
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from megatron_ettin.native import TextHasher, find_texts

CODE_POINTS = 0x110000
#: Characters of one to four bytes in UTF-8, with the first and last of each length.
CHARACTERS = "a\x00\x7f\x80é\u07ff\u0800中\ud7ff\ue000\uffff\U00010000😀\U0010ffff"


def made_texts(count: int) -> list[str]:
    random_ = random.Random(5)
    return ["".join(random_.choices(CHARACTERS, k=random_.randrange(90))) for _ in range(count)]


def test_hashes_are_those_of_hashlib() -> None:
    hasher = TextHasher(_hashlib.__file__)
    texts = [*made_texts(500), "x" * 1_000_000, ""]
    expected = [hashlib.sha256(text.encode()).digest() for text in texts]
    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(hasher.sha256, [texts] * 8):
            assert found.shape == (len(texts), 32)
            assert [bytes(digest) for digest in found] == expected
    assert hasher.sha256([]).shape == (0, 32)


def test_a_library_that_cannot_hash_is_refused() -> None:
    with pytest.raises(OSError, match="not loaded") as caught:
        TextHasher("/nowhere/libcrypto.so")
    assert caught.value.filename == "/nowhere/libcrypto.so"
    import _json

    with pytest.raises(OSError, match="no function EVP_MD_CTX_new"):
        TextHasher(_json.__file__)


def test_what_is_no_text_is_refused() -> None:
    hasher = TextHasher(_hashlib.__file__)
    with pytest.raises(UnicodeEncodeError):
        hasher.sha256(["good", "\ud83d"])
    with pytest.raises(TypeError):
        hasher.sha256(["good", b"bytes"])  # type: ignore[list-item]


@pytest.mark.parametrize("character", CHARACTERS[3:])
def test_texts_with_a_character_are_found(character: str) -> None:
    searched = np.zeros(CODE_POINTS, dtype=np.bool_)
    searched[ord(character)] = True
    texts = made_texts(300)
    expected = [index for index, text in enumerate(texts) if character in text]
    assert 0 < len(expected) < len(texts)
    assert find_texts(texts, searched) == expected


def test_the_place_of_a_character_does_not_matter() -> None:
    searched = np.zeros(CODE_POINTS, dtype=np.bool_)
    searched[ord("中")] = True
    for before in range(20):
        for after in range(20):
            assert find_texts(["a" * before + "中" + "é" * after], searched) == [0]


def test_a_search_for_ascii_is_refused() -> None:
    searched = np.zeros(CODE_POINTS, dtype=np.bool_)
    searched[0x7F] = True
    with pytest.raises(ValueError, match="ASCII"):
        find_texts(["a"], searched)
    with pytest.raises(ValueError, match="characters has 5 values, expected 1114112"):
        find_texts(["a"], searched[:5])
