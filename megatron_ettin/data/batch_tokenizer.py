"""Encoders of texts to token ids: `tokenizers`, or `gigatoken` where it gives the same ids.

gigatoken is about fifty times faster. It implements Unicode's tables and the splitting rules
anew, so it is used only after it was compared with `tokenizers` on the tokenizer and text at hand.
"""

import contextlib
import functools
import json
import queue
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_ettin.data.made_texts import NUM_MADE_TEXTS, made_texts
from megatron_ettin.data.text_parts import PART_CHARACTERS, find_cutter, grouped_parts
from megatron_ettin.data.tokenize import Tokenizer
from megatron_ettin.indexed import optimal_dtype
from megatron_ettin.native import find_texts

try:
    from gigatoken.gigatoken_rs import load_hf_json
except ImportError:  # there is no wheel for every platform
    load_hf_json = None  # type: ignore[assignment]

#: Characters after which gigatoken is loaded again, because its cache of words only grows.
RESTART_CHARACTERS = 2**30
#: Characters of the input that are compared before a run.
SAMPLE_CHARACTERS = 2**16
#: Characters that a library encodes in one call. `tokenizers` takes up to 3 tokens for one of them,
#: and 150 to 250 bytes for a token.
GROUP_CHARACTERS = 2**22
SLOW_GROUP_CHARACTERS = 2**18
#: Code point below which no character is doubtful.
FIRST_DOUBTFUL = 0x300
#: Planes of Unicode above this one hold no letters, numbers, marks or spaces.
ASSIGNED_PLANES_END = 0x40000


Ids = NDArray[np.int32] | NDArray[np.uint16]


class TokenizedTexts(NamedTuple):
    """Ids of texts, without special tokens."""

    tokens: Ids
    """Ids of all texts, end to end: int32, or of long texts the type of the corpus."""
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
        """Return the ids of the texts, on all cores; long texts in parts, if it is known where."""
        cutter = find_cutter(self.tokenizer) if _longest(texts) > PART_CHARACTERS else None
        groups = grouped_parts(texts, cutter, SLOW_GROUP_CHARACTERS)
        return _encode_groups(self._encode, groups, len(texts), self.tokenizer)

    def _encode(self, texts: Sequence[str]) -> TokenizedTexts:
        ids = self.tokenizer.encode_batch(texts)
        lengths = np.array([len(of_text) for of_text in ids], dtype=np.int64)
        return TokenizedTexts(np.concatenate(ids), lengths)


class GigatokenTokenizer:
    """Encoder with gigatoken, save for texts with a character of `doubtful_characters`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Load the tokenizer.

        Raises:
            ImportError: gigatoken is not installed.
            ValueError: gigatoken cannot load this tokenizer.
        """
        self._tokenizer = tokenizer
        self._library = LibraryTokenizer(tokenizer)
        self._json = _without_special_tokens(tokenizer)
        self._backends: queue.SimpleQueue[_Backend] = queue.SimpleQueue()
        self._backends.put(_Backend(self._json))

    def encode(self, texts: Sequence[str]) -> TokenizedTexts:
        """Return the ids of the texts, on one core; threads may call it at the same time.

        Of a long text with a doubtful character, only the parts with one go to `tokenizers`.
        """
        if _longest(texts) <= PART_CHARACTERS:
            return self._encode_group(texts)
        groups = grouped_parts(texts, find_cutter(self._tokenizer), GROUP_CHARACTERS)
        return _encode_groups(self._encode_group, groups, len(texts), self._tokenizer)

    def _encode_group(self, texts: Sequence[str]) -> TokenizedTexts:
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
                # A long text without a place to cut takes half of the memory in this call.
                ids = self._loaded.encode(texts[0])
                return TokenizedTexts(ids.view(np.int32), np.array([len(ids)]))
            # Its own threads would share a cache, and take half as much time again.
            rows = self._loaded.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(rows.offsets.data)
        tokens = np.asarray(rows.content.data)[offsets[0] : offsets[-1]]
        # Ids are below 2^31, so that the view is exact.
        return TokenizedTexts(tokens.view(np.int32), np.diff(offsets))


def _longest(texts: Sequence[str]) -> int:
    return max(map(len, texts), default=0)


def _encode_groups(
    encode: Callable[[Sequence[str]], TokenizedTexts],
    groups: Iterable[tuple[list[str], list[int]]],
    num_texts: int,
    tokenizer: Tokenizer,
) -> TokenizedTexts:
    """Return the ids of texts that come as groups of parts, of `grouped_parts`."""
    dtype = optimal_dtype(tokenizer.ids.vocab_size)
    found = []
    lengths = np.zeros(num_texts, dtype=np.int64)
    for parts, owners in groups:
        encoded = encode(parts)
        found.append(encoded.tokens.astype(dtype))
        np.add.at(lengths, owners, encoded.lengths)
    tokens = np.empty(lengths.sum(), dtype=dtype)
    end = len(tokens)
    while found:  # each is freed when it is copied, so that a long text is not there twice
        group = found.pop()
        tokens[end - len(group) : end] = group
        end -= len(group)
    return TokenizedTexts(tokens, lengths)


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
        return library, f"tokenising with tokenizers: {error}{_about_memory(tokenizer)}"
    if other is not None:
        why = f"gigatoken gives other ids for {other[:60]!a}"
        return library, f"tokenising with tokenizers: {why}{_about_memory(tokenizer)}"
    count = NUM_MADE_TEXTS + len(texts)
    why = f"same ids as tokenizers for {count:,} texts"
    return fast, f"tokenising with gigatoken: {why}{_about_memory(tokenizer)}"


def only_tokenizers(tokenizer: Tokenizer) -> tuple[BatchTokenizer, str]:
    """Return `tokenizers` as the library that the user wants, and a sentence saying so."""
    why = "tokenising with tokenizers, as --library says"
    return LibraryTokenizer(tokenizer), why + _about_memory(tokenizer)


def _about_memory(tokenizer: Tokenizer) -> str:
    """Return a warning for a tokenizer whose long texts cannot be encoded in parts."""
    if find_cutter(tokenizer) is not None:
        return ""
    return "; this tokenizer has no known places to cut long texts, so 100 MB may take 12 GB"


@functools.cache
def _compare_on_made_texts(tokenizer: Tokenizer) -> tuple[GigatokenTokenizer, str | None]:
    """Return gigatoken with the tokenizer, and a made text for which it gives other ids or None."""
    fast = GigatokenTokenizer(tokenizer)
    with ThreadPoolExecutor(1) as thread:
        prepared = thread.submit(fast.prepare)
        texts = made_texts(tokenizer)
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
        parts.append(new.tokens[new_end - new_length : new_end])
        begin = ends[place]
    lengths[places] = new.lengths
    return TokenizedTexts(np.concatenate([*parts, encoded.tokens[begin:]]), lengths)
