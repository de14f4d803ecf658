"""Slow references for passes over tokens, and corpora of given tokens."""

import codecs
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from megatron_ettin import native

Vocabulary = Sequence[bytes | None]
#: Thai, Han and kana are enough to tell scripts without spaces.
SPACELESS = "ขไทย中文字かな"


def write_tokens(
    folder: Path, documents: Sequence[Sequence[int]], cuts: Sequence[int], dtypes: Sequence[str]
) -> native.TokenCorpus:
    """Write documents as shards that end at the cuts, with dtypes in turn."""
    edges = [0, *sorted(min(cut, len(documents)) for cut in cuts), len(documents)]
    shards = []
    for number, (begin, end) in enumerate(pairwise(edges)):
        prefix = folder / f"{number:05d}"
        builder = native.TokenFileBuilder(prefix, dtypes[number % len(dtypes)])
        for document in documents[begin:end]:
            builder.add(np.array(document, dtype=np.int64))
        builder.commit()
        shards.append(native.TokenFile(prefix, check=False))
    return native.TokenCorpus(shards)


def occurrences(
    vocabulary: Vocabulary, document: Sequence[int], text: bytes
) -> list[tuple[int, int]]:
    """Return the tokens [begin, end) of each occurrence, overlapping ones too."""
    found = []
    for first, tokens in texts_of(vocabulary, document):
        owners = [first + place for place, token in enumerate(tokens) for _ in token]
        joined = b"".join(tokens)
        at = joined.find(text)
        while at >= 0:
            found.append((owners[at], owners[at + len(text) - 1] + 1))
            at = joined.find(text, at + 1)
    return sorted(found)


def texts_of(vocabulary: Vocabulary, document: Sequence[int]) -> Iterator[tuple[int, list[bytes]]]:
    """Yield the stretches of a document between tokens without text, each with its first token."""
    first, tokens = 0, []
    for place, id_ in enumerate(document):
        token = vocabulary[id_]
        if token is None:
            yield first, tokens
            first, tokens = place + 1, []
        else:
            tokens.append(token)
    yield first, tokens


def normal(character: str) -> str:
    """Return what a character makes of the words, with a space for each end of a word."""
    if character.isspace():
        return " "
    if unicodedata.category(character)[0] in "PS":
        return ""
    return f" {character} " if character in SPACELESS else character.lower()


def words(text: str) -> list[str]:
    return "".join(map(normal, text)).split()


def located_words(
    vocabulary: Vocabulary, first: int, tokens: Sequence[bytes]
) -> list[tuple[str, int, int]]:
    """Return the words of a stretch, each with its tokens [begin, end)."""
    decoder = codecs.getincrementaldecoder("utf-8")("ignore")
    owners = [first + place for place, token in enumerate(tokens) for _ in token]
    found: list[tuple[str, int, int]] = []
    word, begin, end = "", 0, 0
    for at, byte in enumerate(b"".join(tokens)):
        for character in decoder.decode(bytes([byte])):
            begins = owners[at - len(character.encode()) + 1]
            for letter in normal(character):
                if letter == " ":
                    found += [(word, begin, end)] if word else []
                    word = ""
                else:
                    begin = begin if word else begins
                    word, end = word + letter, owners[at] + 1
    return found + ([(word, begin, end)] if word else [])


def shared_grams(
    vocabulary: Vocabulary, document: Sequence[int], numbers: dict[tuple[str, ...], int], n: int
) -> list[tuple[int, int, int]]:
    """Return number and tokens [begin, end) of each sequence of n words that has a number."""
    found = []
    for first, tokens in texts_of(vocabulary, document):
        located = located_words(vocabulary, first, tokens)
        for place in range(len(located) - n + 1):
            window = located[place : place + n]
            gram = tuple(word for word, _, _ in window)
            if gram in numbers:
                found.append((numbers[gram], window[0][1], window[-1][2]))
    return found
