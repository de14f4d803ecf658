"""Speed of passes over a corpus in memory: the search for a text, and for sequences of words.

The vocabulary is made up: 50,000 words with a space before them, and single letters. Its words are
drawn with Zipf's frequencies, as those of a language are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.costs import seconds_of
from megatron_ettin.native import GramFinder, TextFinder, TokenBytes, TokenCorpus, TokenFile
from megatron_ettin.native import TokenFileBuilder, WordRules
from megatron_ettin.queries.words import word_rules

WORDS = 50_000
DOCUMENT_TOKENS = 1000
READ_BYTES = 1 << 19
PASSAGE_WORDS, N = 60, 13
LETTERS = "etaoinshrdlucmfwypvbgkjqxz"
DTYPES = ("uint16", "int32")


@dataclass(frozen=True, kw_only=True)
class ScanTime:
    """Speed of one pass, by the CPU seconds of its fastest run."""

    name: str
    dtype: str
    gigabytes_per_second: float
    """10^9 bytes of the .bin in one second of one core."""
    found: int
    """Documents or sequences that were found; 0 for a pass that only reads."""


def scan_times(folder: Path, *, tokens: int, passages: int) -> Iterator[ScanTime]:
    """Measure each pass over `tokens` tokens, and for two dtypes; files in `folder` are written.

    `passages` is the number of texts of 60 words whose sequences are searched at once.
    """
    spellings = spell_words()
    vocabulary = TokenBytes(spellings)
    rng = np.random.default_rng(1)
    shares = 1.0 / np.arange(1, WORDS + 1)
    drawn = draw(rng, shares, tokens)
    counts = np.bincount(drawn, minlength=len(spellings))
    rules = word_rules()
    for dtype in DTYPES:
        corpus = write_corpus(folder / dtype, drawn, dtype)
        size = corpus.num_tokens * np.dtype(dtype).itemsize
        for name, run in passes(corpus, folder / f"{dtype}.bin", vocabulary, counts, rules,
                                read_passages(spellings, drawn, rng, passages)):
            found = run()
            seconds = seconds_of(run)
            yield ScanTime(
                name=name, dtype=dtype, gigabytes_per_second=size / seconds / 1e9, found=found
            )


def passes(
    corpus: TokenCorpus,
    path: Path,
    vocabulary: TokenBytes,
    counts: NDArray[np.int64],
    rules: WordRules,
    passages: list[str],
) -> Iterator[tuple[str, Callable[[], int]]]:
    """Yield each pass by its name; it returns what it found."""
    yield "read only", lambda: read_only(path)
    end = corpus.num_documents
    spellings = spell_words()
    texts = {
        # One in a million tokens, one in five hundred, and one in eleven.
        "text, rare": b"".join(spellings[8000:8003]),
        "text, frequent": b"".join(spellings[40:42]),
        "text, most frequent word": spellings[0],
    }
    for name, text in texts.items():
        finder = TextFinder(vocabulary, text, counts)
        yield name, lambda finder=finder: len(finder.find(corpus, 0, end, threads=1))
    for number in (len(passages) // 100, len(passages)):
        grams = GramFinder(vocabulary, rules, passages[:number], N)
        name = f"{grams.num_grams:,} sequences of {N} words"
        yield name, lambda grams=grams: len(grams.find(corpus, 0, end, threads=1))


def read_only(path: Path) -> int:
    """Copy a file from the page cache into a buffer that stays in the processor's cache."""
    buffer = bytearray(READ_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return 0


def spell_words() -> list[bytes]:
    """Return the spelling of each token: words, each with a space before it, then letters."""
    words = []
    for number in range(WORDS):
        word, rest = "", number + len(LETTERS)
        while rest:
            word, rest = word + LETTERS[rest % len(LETTERS)], rest // len(LETTERS)
        words.append(f" {word}".encode())
    return [*words, *(letter.encode() for letter in LETTERS)]


def draw(rng: np.random.Generator, shares: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Draw tokens with the given shares."""
    edges = np.cumsum(shares) / shares.sum()
    return np.searchsorted(edges, rng.random(count)).astype(np.int64)


def write_corpus(prefix: Path, drawn: NDArray[np.int64], dtype: str) -> TokenCorpus:
    """Write the tokens as documents of one length."""
    builder = TokenFileBuilder(prefix, dtype)
    lengths = np.full(len(drawn) // DOCUMENT_TOKENS, DOCUMENT_TOKENS, dtype=np.int64)
    builder.add_many(drawn[: lengths.sum()].astype(np.int32), lengths)
    builder.commit()
    return TokenCorpus([TokenFile(prefix)])


def read_passages(
    spellings: list[bytes], drawn: NDArray[np.int64], rng: np.random.Generator, count: int
) -> list[str]:
    """Return texts of PASSAGE_WORDS words; one in a hundred is copied from the corpus."""
    passages = []
    for number in range(count):
        if number % 100 == 0:
            begin = rng.integers(0, len(drawn) - PASSAGE_WORDS)
            tokens = drawn[begin : begin + PASSAGE_WORDS]
        else:
            tokens = draw(rng, 1.0 / np.arange(1, WORDS + 1), PASSAGE_WORDS)
        passages.append(b"".join(spellings[token] for token in tokens).decode())
    return passages
