"""Encoders of texts to token ids: `tokenizers`, or `gigatoken` where it gives the same ids.

gigatoken is about fifty times faster. It implements Unicode's tables and the splitting rules
anew, so it is used only after it was compared with `tokenizers` on the tokenizer and text at hand.
"""

import contextlib
import functools
import itertools
import json
import queue
import random  # noqa: TID251 (drawn with a fixed seed)
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_ettin.data.tokenize import SPECIAL_TOKENS, Tokenizer
from megatron_ettin.native import find_texts

try:
    from gigatoken.gigatoken_rs import load_hf_json
except ImportError:  # there is no wheel for every platform
    load_hf_json = None  # type: ignore[assignment]

#: Characters after which gigatoken is loaded again, because its cache of words only grows.
RESTART_CHARACTERS = 2**30
#: Texts of the comparison before a run: of made text, and characters of the input.
MADE_TEXTS = 500
SAMPLE_CHARACTERS = 2**16
#: Code point below which no character is doubtful.
FIRST_DOUBTFUL = 0x300
#: Planes of Unicode above this one hold no letters, numbers, marks or spaces.
ASSIGNED_PLANES_END = 0x40000


class TokenizedTexts(NamedTuple):
    """Ids of texts, without special tokens."""

    tokens: NDArray[Any]
    """Ids of all texts, end to end: int32 or uint32."""
    lengths: NDArray[np.int64]
    """Tokens of each text."""


class BatchTokenizer(Protocol):
    """Encoder of whole texts, in which a special token spelled out is text."""

    def encode(self, texts: Sequence[str]) -> TokenizedTexts:
        """Return the ids of the texts; threads may call it at the same time."""
        ...


@dataclass(frozen=True)
class LibraryTokenizer:
    """Encoder with `tokenizers`, whose ids are right by definition."""

    tokenizer: Tokenizer

    def encode(self, texts: Sequence[str]) -> TokenizedTexts:
        """Return the ids of the texts, on all cores."""
        ids = self.tokenizer.encode_batch(texts)
        lengths = np.array([len(of_text) for of_text in ids], dtype=np.int64)
        return TokenizedTexts(np.concatenate([np.empty(0, dtype=np.int32), *ids]), lengths)


class GigatokenTokenizer:
    """Encoder with gigatoken, save for texts with a character of `doubtful_characters`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Load the tokenizer.

        Raises:
            ImportError: gigatoken is not installed.
            ValueError: gigatoken cannot load this tokenizer.
        """
        self._library = LibraryTokenizer(tokenizer)
        self._json = _without_special_tokens(tokenizer)
        self._backends: queue.SimpleQueue[_Backend] = queue.SimpleQueue()
        self._backends.put(_Backend(self._json))

    def encode(self, texts: Sequence[str]) -> TokenizedTexts:
        """Return the ids of the texts, on one core; threads may call it at the same time."""
        doubtful = find_doubtful(texts)
        if len(doubtful) == len(texts):
            return self._library.encode(texts)
        encoded = self._encode(texts)
        if not doubtful:
            return encoded
        return _replaced(encoded, doubtful, self._library.encode([texts[i] for i in doubtful]))

    def prepare(self) -> None:
        """Build the tables that gigatoken builds at its first text; needs no lock of Python's."""
        self._encode(["two", "texts"])

    def _encode(self, texts: Sequence[str]) -> TokenizedTexts:
        try:
            backend = self._backends.get_nowait()
        except queue.Empty:  # each thread has a backend of its own, with a cache of its own
            backend = _Backend(self._json)
        encoded = backend.encode(texts)
        if backend.num_characters < RESTART_CHARACTERS:
            self._backends.put(backend)
        return encoded


class _Backend:
    """Loaded tokenizer of gigatoken, for one thread at a time."""

    def __init__(self, tokenizer_json: str) -> None:
        if load_hf_json is None:
            raise ImportError("gigatoken is not installed")
        self.num_characters = 0
        """Characters that were encoded."""
        with _errors_of_gigatoken():
            self._loaded = load_hf_json(tokenizer_json)

    def encode(self, texts: Sequence[str]) -> TokenizedTexts:
        self.num_characters += sum(map(len, texts))
        with _errors_of_gigatoken():
            if len(texts) == 1:
                # A long text is a batch alone, and takes half of the memory in this call.
                ids = self._loaded.encode(texts[0])
                return TokenizedTexts(ids, np.array([len(ids)]))
            # Its own threads would share a cache, and take half as much time again.
            rows = self._loaded.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(rows.offsets.data)
        tokens = np.asarray(rows.content.data)[offsets[0] : offsets[-1]]
        return TokenizedTexts(tokens, np.diff(offsets))


@contextlib.contextmanager
def _errors_of_gigatoken() -> Iterator[None]:
    """Raise ValueError for whatever the library raises; a panic of it is no Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ValueError(f"gigatoken fails: {error}") from error


def choose_library(tokenizer: Tokenizer, sample: Sequence[str]) -> tuple[BatchTokenizer, str]:
    """Return the fastest library that gives the ids of `tokenizers`, and a sentence saying why.

    It is compared on `sample`, texts of the input, of which `SAMPLE_CHARACTERS` are used, and on
    made texts: unusual Unicode, spaces, and all added tokens spelled out.
    """
    library = LibraryTokenizer(tokenizer)
    texts = _beginning(sample)
    try:
        fast, other = _compare_on_made_texts(tokenizer)
        other = other or _find_difference(fast, library, texts)
    except (ImportError, ValueError) as error:
        return library, f"tokenising with tokenizers: {error}"
    if other is not None:
        return library, f"tokenising with tokenizers: gigatoken gives other ids for {other[:60]!a}"
    count = MADE_TEXTS + len(texts)
    return fast, f"tokenising with gigatoken: same ids as tokenizers for {count:,} texts"


@functools.cache
def _compare_on_made_texts(tokenizer: Tokenizer) -> tuple[GigatokenTokenizer, str | None]:
    """Return gigatoken with the tokenizer, and a made text for which it gives other ids or None."""
    fast = GigatokenTokenizer(tokenizer)
    with ThreadPoolExecutor(1) as thread:
        prepared = thread.submit(fast.prepare)
        texts = _made_texts(tokenizer)
        doubtful_characters()
        prepared.result()
    return fast, _find_difference(fast, LibraryTokenizer(tokenizer), texts)


def _find_difference(
    fast: BatchTokenizer, library: BatchTokenizer, texts: Sequence[str]
) -> str | None:
    difference = find_difference(texts, fast.encode(texts), library.encode(texts))
    return None if difference is None else texts[difference]


def find_difference(
    texts: Sequence[str], found: TokenizedTexts, expected: TokenizedTexts
) -> int | None:
    """Return the index of the first text whose ids differ; None if all are equal."""
    if np.array_equal(found.lengths, expected.lengths) and np.array_equal(
        found.tokens, expected.tokens
    ):
        return None
    ends, expected_ends = np.cumsum(found.lengths), np.cumsum(expected.lengths)
    for index in range(len(texts)):
        begin, expected_begin = (
            e[index] - n[index]
            for e, n in ((ends, found.lengths), (expected_ends, expected.lengths))
        )
        if not np.array_equal(
            found.tokens[begin : ends[index]],
            expected.tokens[expected_begin : expected_ends[index]],
        ):
            return index
    raise AssertionError("the ids differ, but those of no text")


def find_doubtful(texts: Sequence[str]) -> list[int]:
    """Return the indices of the texts with a character of `doubtful_characters`."""
    return find_texts(list(texts), doubtful_characters())


@functools.cache
def doubtful_characters() -> NDArray[np.bool_]:
    """Return [0x110000] bool: code points for which two libraries may have other Unicode tables.

    These are marks younger than Unicode 3.2, whose order under NFC `tokenizers` does not know, and
    characters that Python's own table does not have yet: one library may call them letters, the
    other not. The texts that hold one are few.
    """
    old = unicodedata.ucd_3_2_0
    doubtful = np.zeros(0x110000, dtype=np.bool_)
    codes = range(FIRST_DOUBTFUL, ASSIGNED_PLANES_END)
    categories = map(unicodedata.category, map(chr, codes))
    for code, category in zip(codes, categories, strict=True):
        if category == "Cn" or (category[0] == "M" and old.category(chr(code)) == "Cn"):
            doubtful[code] = True
    return doubtful


def _without_special_tokens(tokenizer: Tokenizer) -> str:
    """Return tokenizer.json without the special tokens, which gigatoken would find in text."""
    content = json.loads(tokenizer.to_json())
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["special"]]
    # A template of [CLS] and [SEP], which no longer exist.
    return json.dumps(content | {"post_processor": None})


def _made_texts(tokenizer: Tokenizer) -> list[str]:
    """Return texts of characters and pieces at which implementations of a tokenizer may differ."""
    random_ = random.Random(0)
    added = [*SPECIAL_TOKENS, *tokenizer.added_tokens]
    pieces = [
        *added, *(f" {token} " for token in added), "'s", "'LL", "don't", " ", "  ", "\n", "\r\n",
        "\t", "\x00", "\x85", "\xa0", "\u200b", "\u2028", "\u3000", "\ufeff", "\ufb01", "\u212b",
        "\u1100\u1161\u11a8", "\u0958", "\u0915\u093c", "123", "\uff11\uff12", "\n\n b", "    ",
    ]  # fmt: skip
    kinds = [
        [chr(code) for code in range(32, 127)],
        pieces,
        [f"e{chr(code)}" for code in range(0x300, 0x370)],
        [chr(code) for code in random_.sample(range(0x80, 0x3000), 1000)],
        # All of Unicode but the surrogates.
        [chr(n + 0x800 * (n >= 0xD800)) for n in random_.sample(range(0x110000 - 0x800), 3000)],
    ]
    pool = [part for kind in kinds for part in kind]
    # Each kind is drawn as often as its share says, whatever its size.
    shares = (0.4, 0.2, 0.1, 0.15, 0.15)
    weights = [share / len(kind) for kind, share in zip(kinds, shares, strict=True) for _ in kind]
    totals = list(itertools.accumulate(weights))
    return [
        "".join(random_.choices(pool, cum_weights=totals, k=random_.randrange(1, 60)))
        for _ in range(MADE_TEXTS)
    ]


def _beginning(sample: Sequence[str]) -> list[str]:
    """Return the first texts, or the beginning of the first one, of about SAMPLE_CHARACTERS."""
    texts: list[str] = []
    rest = SAMPLE_CHARACTERS
    for text in sample:
        if rest <= 0:
            break
        texts.append(text[:rest])
        rest -= len(text)
    return texts


def _replaced(encoded: TokenizedTexts, places: list[int], new: TokenizedTexts) -> TokenizedTexts:
    """Return the ids with those of the texts at `places`, ascending, taken from `new`."""
    lengths = encoded.lengths.copy()
    ends, new_ends = np.cumsum(encoded.lengths), np.cumsum(new.lengths)
    parts, begin = [], 0
    for place, new_end, new_length in zip(places, new_ends, new.lengths, strict=True):
        parts.append(encoded.tokens[begin : ends[place] - lengths[place]])
        parts.append(new.tokens[new_end - new_length : new_end].astype(encoded.tokens.dtype))
        begin = ends[place]
    lengths[places] = new.lengths
    return TokenizedTexts(np.concatenate([*parts, encoded.tokens[begin:]]), lengths)
