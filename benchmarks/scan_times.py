"""Speed of passes over a corpus in memory: the search for a text, and for sequences of words.

The vocabulary is made up: 50,000 words with a space before them, and single letters. Its words are
drawn with Zipf's frequencies, as those of a language are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_ettin.native import (
    GramFinder,
    TextFinder,
    TokenBytes,
    TokenCorpus,
    TokenFile,
    TokenFileBuilder,
)
from megatron_ettin.queries.words import word_rules

WORDS = 50_000
DOCUMENT_TOKENS = 1000
READ_BYTES = 1 << 19
PASSAGE_WORDS, N = 60, 13
LETTERS = "etaoinshrdlucmfwypvbgkjqxz"
DTYPES = ("uint16", "int32")
#: Words of the searched texts by their frequency: three of one in 100,000 tokens each, two of one
#: in 500, and the most frequent, one in eleven.
TEXTS = {"rare": (8000, 8003), "frequent": (40, 42), "most frequent": (0, 1)}


@dataclass(frozen=True, kw_only=True)
class ScanTime:
    """Speed of one pass, by the CPU seconds of its fastest run."""

    name: str
    dtype: str
    gigabytes_per_second: float
    """10^9 bytes of the .bin in one second of one core."""
    found: int
    """Documents or sequences that were found; 0 for a pass that only reads."""


@dataclass(frozen=True)
class MadeText:
    """Tokens of a made-up language, and their spelling."""

    spellings: list[bytes]
    tokens: NDArray[np.int64]
    passages: list[str]
    """Texts of PASSAGE_WORDS words; one in a hundred is a part of the tokens."""


def scan_times(folder: Path, *, tokens: int, passages: int, rounds: int) -> Iterator[ScanTime]:
    """Measure each pass over `tokens` tokens, for both dtypes; corpora are left in `folder`.

    `passages` is the number of texts whose sequences are searched at once. Each pass runs once to
    fill the caches, and then `rounds` times.
    """
    made = make_text(tokens, passages)
    for dtype in DTYPES:
        prefix = folder / dtype
        corpus = write_corpus(prefix, made.tokens, dtype)
        size = corpus.num_tokens * np.dtype(dtype).itemsize
        for name, run in passes(corpus, prefix, made):
            found, seconds = run(), []
            for _ in range(rounds):
                # CPU seconds change less with other work than those of a clock.
                begin = time.process_time()
                run()
                seconds.append(time.process_time() - begin)
            yield ScanTime(
                name=name,
                dtype=dtype,
                gigabytes_per_second=size / min(seconds) / 1e9,
                found=found,
            )


def passes(
    corpus: TokenCorpus, prefix: Path, made: MadeText
) -> Iterator[tuple[str, Callable[[], int]]]:
    """Yield each pass by its name; it returns what it found."""
    yield "read only", partial(read_only, Path(f"{prefix}.bin"))
    vocabulary = TokenBytes(made.spellings)
    counts = np.bincount(made.tokens, minlength=len(made.spellings))
    for name, (begin, end) in TEXTS.items():
        text = b"".join(made.spellings[begin:end])
        yield f"search, {name}", partial(find, TextFinder(vocabulary, text, counts), corpus)
    for count in (len(made.passages) // 100, len(made.passages)):
        grams = GramFinder(vocabulary, word_rules(), made.passages[:count], N)
        yield f"{grams.num_grams:,} sequences", partial(find, grams, corpus)


def find(finder: TextFinder | GramFinder, corpus: TokenCorpus) -> int:
    """Search a corpus in one thread; return what was found."""
    return len(finder.find(corpus, 0, corpus.num_documents, threads=1))


def read_only(path: Path) -> int:
    """Copy a file from the page cache into a buffer that stays in the processor's cache."""
    buffer = bytearray(READ_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return 0


def make_text(tokens: int, passages: int) -> MadeText:
    """Draw tokens and passages."""
    rng = np.random.default_rng(1)
    shares = 1.0 / np.arange(1, WORDS + 1)
    edges = np.cumsum(shares) / shares.sum()
    drawn = np.searchsorted(edges, rng.random(tokens)).astype(np.int64)
    spellings = spell_words()
    texts = []
    for number in range(passages):
        begin = rng.integers(0, tokens - PASSAGE_WORDS)
        other = np.searchsorted(edges, rng.random(PASSAGE_WORDS))
        chosen = drawn[begin : begin + PASSAGE_WORDS] if number % 100 == 0 else other
        texts.append(b"".join(spellings[token] for token in chosen).decode())
    return MadeText(spellings, drawn, texts)


def spell_words() -> list[bytes]:
    """Return the spelling of each token: words, each with a space before it, then letters."""
    words = []
    for number in range(WORDS):
        word, rest = "", number + len(LETTERS)
        while rest:
            word, rest = word + LETTERS[rest % len(LETTERS)], rest // len(LETTERS)
        words.append(f" {word}".encode())
    return [*words, *(letter.encode() for letter in LETTERS)]


def write_corpus(prefix: Path, tokens: NDArray[np.int64], dtype: str) -> TokenCorpus:
    """Write the tokens as documents of one length; what is left of them is dropped."""
    builder = TokenFileBuilder(prefix, dtype)
    lengths = np.full(len(tokens) // DOCUMENT_TOKENS, DOCUMENT_TOKENS, dtype=np.int64)
    builder.add_many(tokens[: lengths.sum()].astype(np.int32), lengths)
    builder.commit()
    return TokenCorpus([TokenFile(prefix)])
