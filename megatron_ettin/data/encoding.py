"""From batches of raw documents to the tokens of each corpus: hashing, selection, validation."""

import functools
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_ettin.data.batch_tokenizer import (
    BatchTokenizer,
    Ids,
    LibraryTokenizer,
    TokenizedTexts,
)
from megatron_ettin.data.batches import BATCH_BYTES
from megatron_ettin.data.raw_files import TextBatch, TokenBatch
from megatron_ettin.data.text_parts import PART_CHARACTERS, find_cutter
from megatron_ettin.data.tokenize import Tokenizer
from megatron_ettin.native import TextHasher

#: Reasons why a document is not stored, in the order in which they are tried.
DROPPED = ("duplicate", "empty", "too_short", "too_long")
#: Share of the documents that are tokenised twice while a corpus is made, chosen by their hash.
COMPARED_SHARE = 1 / 1000
#: Longest text that `tokenizers` gets in one piece for this, in characters; it takes 150 bytes a
#: token. Texts of more than PART_CHARACTERS were encoded in parts, so that cuts are compared, too.
MAX_WHOLE_CHARACTERS = 4 * PART_CHARACTERS
PARTS = ("document", "validation")


def count_name(part: str, unit: str) -> str:
    """Return the name under which the documents or tokens of a part are counted in summaries."""
    return unit if part == "document" else f"{part}_{unit}"


class EncodedPart(NamedTuple):
    """Documents of one corpus, in order."""

    tokens: Ids
    """Ids of all documents, end to end."""
    lengths: NDArray[np.int64]
    """Tokens of each document, none of them 0."""
    places: NDArray[np.int64]
    """Index of each document in its batch, ascending."""
    sha256: bytes
    """SHA-256 of the UTF-8 text of each document, 32 bytes each, end to end."""


class EncodedField(NamedTuple):
    """One field of a batch of documents."""

    parts: dict[str, EncodedPart]
    dropped: Counter[str]
    """Documents that are not stored, by reason."""


@dataclass(frozen=True, kw_only=True)
class SelectionRules:
    """Rules that say which documents are stored, and in which corpus."""

    append_eod: bool = False
    """Append [SEP] to each document."""
    validation_share: float = 0.0
    """Share of documents, by hash of their text, that go to the validation corpus."""
    min_tokens: int = 1
    """Fewest tokens of a document that is stored, without the [SEP] of `append_eod`."""
    max_tokens: int | None = None
    """Most tokens, counted likewise; no limit if None."""

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant; the message names the option."""
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"validation-share {self.validation_share}: must be in [0, 1)")
        if self.min_tokens < 1:
            raise ValueError(f"min-tokens {self.min_tokens}: at least 1, as no document is empty")
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise ValueError(
                f"max-tokens {self.max_tokens}: fewer than min-tokens, {self.min_tokens}"
            )


class DocumentSelector:
    """Selection of documents by fixed rules; compares a sample of their ids with `tokenizers`."""

    def __init__(
        self, tokenizer: Tokenizer, library: BatchTokenizer, rules: SelectionRules
    ) -> None:
        """Take the library that `choose_library` returned for the tokenizer."""
        self._tokenizer = tokenizer
        self._library = library
        self._reference = LibraryTokenizer(tokenizer)
        self._rules = rules

    def select(
        self,
        batch: TextBatch | TokenBatch,
        field: int,
        encoded: TokenizedTexts,
        hashes: NDArray[np.uint8],
        duplicate: NDArray[np.bool_] | None,
        name: str,
    ) -> EncodedField:
        """Return the documents of one field that are stored, by corpus.

        `hashes` [n, 32] are those of `hash_documents`; `duplicate` [n] marks documents whose text
        came before; `name` is the raw file's, for messages. ValueError naming the document whose
        ids are not those of `tokenizers`.
        """
        if isinstance(batch, TextBatch) and not isinstance(self._library, LibraryTokenizer):
            self._compare(batch.texts[field], batch.lines, encoded, hashes, name)
        kept, dropped = self._kept(encoded.lengths, duplicate)
        chosen = _in_share(hashes[:, :8], self._rules.validation_share)
        masks = {"document": kept & ~chosen}
        if self._rules.validation_share:
            masks["validation"] = kept & chosen
        parts = {part: self._part(encoded, mask, hashes) for part, mask in masks.items()}
        return EncodedField(parts, dropped)

    def _kept(
        self, lengths: NDArray[np.int64], duplicate: NDArray[np.bool_] | None
    ) -> tuple[NDArray[np.bool_], Counter[str]]:
        """Return [n] bool, the documents that are stored, and the others' count by reason."""
        kept = np.ones(len(lengths), dtype=np.bool_)
        dropped: Counter[str] = Counter()
        most = self._rules.max_tokens
        faults = (
            duplicate,
            lengths == 0,
            lengths < self._rules.min_tokens,
            None if most is None else lengths > most,
        )
        for reason, fault in zip(DROPPED, faults, strict=True):
            if fault is not None:
                dropped[reason] += int(np.count_nonzero(kept & fault))
                kept &= ~fault
        return kept, dropped

    def _part(
        self, encoded: TokenizedTexts, mask: NDArray[np.bool_], hashes: NDArray[np.uint8]
    ) -> EncodedPart:
        tokens: NDArray[Any] = encoded.tokens
        lengths = encoded.lengths
        # Most of what is left out has no token.
        if lengths[~mask].any():
            tokens = tokens[np.repeat(mask, lengths)]
        lengths = lengths[mask]
        if self._rules.append_eod:
            tokens = np.insert(tokens, np.cumsum(lengths), self._tokenizer.ids.sep)
            lengths = lengths + 1
        return EncodedPart(
            tokens,
            lengths,
            np.flatnonzero(mask),
            hashes[mask].tobytes(),
        )

    def _compare(
        self,
        texts: Sequence[str],
        lines: Sequence[int],
        encoded: TokenizedTexts,
        hashes: NDArray[np.uint8],
        name: str,
    ) -> None:
        """Raise ValueError at a document of the sample whose ids are not those of `tokenizers`."""
        ends = np.cumsum(encoded.lengths)
        for index in np.flatnonzero(_in_share(hashes[:, 8:16], COMPARED_SHARE)).tolist():
            expected: Ids
            if len(texts[index]) <= MAX_WHOLE_CHARACTERS:
                (expected,) = self._tokenizer.encode_batch([texts[index]])
            elif find_cutter(self._tokenizer) is not None:
                expected = self._reference.encode([texts[index]]).tokens
            else:
                continue
            found = encoded.tokens[ends[index] - encoded.lengths[index] : ends[index]]
            if not np.array_equal(found, expected):
                raise ValueError(
                    f"{name}:{lines[index]}: gigatoken gives other ids than tokenizers for this "
                    f"document ({texts[index][:60]!a}...); run again with --library tokenizers"
                )


def hash_documents(batch: TextBatch | TokenBatch, field: int = 0) -> NDArray[np.uint8]:
    """Return [n, 32]: the SHA-256 of each document's UTF-8 text, or of its ids as int32."""
    if isinstance(batch, TextBatch):
        if len(batch.texts[field]) == 1:
            return _hash_in_parts(batch.texts[field][0])
        hasher = _text_hasher()
        if hasher is not None:
            return hasher.sha256(batch.texts[field])
        contents: Iterable[bytes] = (text.encode() for text in batch.texts[field])
    else:
        ends = np.cumsum(batch.lengths)
        parts = np.split(batch.tokens.astype("<i4", copy=False), ends[:-1])
        contents = (part.tobytes() for part in parts)
    digests = [hashlib.sha256(content).digest() for content in contents]
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 32)


def _hash_in_parts(text: str) -> NDArray[np.uint8]:
    """Return [1, 32]; Python would keep the UTF-8 of a text that is encoded as a whole."""
    sha256 = hashlib.sha256()
    for begin in range(0, len(text), BATCH_BYTES):
        sha256.update(text[begin : begin + BATCH_BYTES].encode())
    return np.frombuffer(sha256.digest(), dtype=np.uint8)[None]


@functools.cache
def _text_hasher() -> TextHasher | None:
    """Return the hasher that needs no lock of Python's; None where Python holds OpenSSL inside."""
    try:
        import _hashlib

        return TextHasher(_hashlib.__file__)
    except (ImportError, AttributeError, OSError):
        return None


def in_validation(text: str, share: float) -> bool:
    """Say whether a document belongs to the validation corpus: a function of its text only.

    It does if the first 8 bytes of the SHA-256 of its UTF-8 text, as a big-endian fraction of 2^64,
    are below the share. Copies of a text are therefore on the same side, and a larger share keeps
    all documents of a smaller one.
    """
    sha256 = np.frombuffer(hashlib.sha256(text.encode()).digest(), dtype=np.uint8)
    return bool(_in_share(sha256[None, :8], share)[0])


def _in_share(numbers: NDArray[np.uint8], share: float) -> NDArray[np.bool_]:
    """Return [n] bool: the big-endian numbers [n, 8] below share · 2^64, exactly."""
    if share <= 0:
        return np.zeros(len(numbers), dtype=np.bool_)
    # A number is below a limit exactly if it is below the limit rounded up to a whole number.
    numerator, denominator = share.as_integer_ratio()
    limit = -(-numerator * 2**64 // denominator)
    values = np.ascontiguousarray(numbers).view(">u8")[:, 0]
    return np.asarray(values < np.uint64(limit), dtype=np.bool_)
