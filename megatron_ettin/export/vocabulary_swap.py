"""Vocabulary swap: rows of an embedding for a new tokenizer, made of the rows for the old one."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_ettin.data.raw_files import expand_inputs, read_text_batches
from megatron_ettin.export.vocabulary import Vocabulary

#: Characters of a sample that are read: enough for the tokens that matter, in about a minute.
MAX_SAMPLE_CHARACTERS = 20_000_000
#: Rows that are added up at a time, so that memory stays small.
ROWS_AT_A_TIME = 16_384


@dataclass(frozen=True, kw_only=True)
class VocabularySwap:
    """Weights with which each new token takes the vectors of old ones; they sum to 1 for each."""

    tokenizer: Path
    """Folder of the new tokenizer."""
    old_size: int
    """Rows that the old tokenizer needs."""
    size: int
    """Rows that the new tokenizer needs."""
    new: NDArray[np.int64]
    """[n] new ids, ascending."""
    old: NDArray[np.int64]
    """[n] old ids that they take."""
    weights: NDArray[np.float64]
    """[n] weights."""
    num_kept: int
    """New tokens that the old vocabulary has too; special tokens count by role."""

    def rows(self, table: torch.Tensor) -> torch.Tensor:
        """Return rows [size, ...] in float32 for a table [at least old_size, ...].

        A row that is kept has the same bits. An id without pieces gets the mean of the old tokens.
        """
        made = torch.zeros((self.size, *table.shape[1:]), dtype=torch.float64)
        for begin in range(0, len(self.new), ROWS_AT_A_TIME):
            part = slice(begin, begin + ROWS_AT_A_TIME)
            values = table[torch.from_numpy(self.old[part])].double()
            weights = torch.from_numpy(self.weights[part]).view(-1, *[1] * (table.dim() - 1))
            made.index_add_(0, torch.from_numpy(self.new[part]), values * weights)
        missing = torch.ones(self.size, dtype=torch.bool)
        missing[torch.from_numpy(self.new)] = False
        made[missing] = table[: self.old_size].double().mean(dim=0)
        return made.float()

    def describe(self) -> str:
        """Say in one line how many tokens keep their vectors."""
        num_made = len(np.unique(self.new)) - self.num_kept
        pieces = (len(self.new) - self.num_kept) / max(num_made, 1)
        rest = self.size - self.num_kept - num_made
        line = (
            f"{self.tokenizer}: of {self.size:,} tokens {self.num_kept:,} keep their vectors, "
            f"{num_made:,} take the mean of {pieces:.1f} old ones on average"
        )
        return line + (f", {rest:,} the mean of all" if rest else "")


def plan_swap(model: Path, tokenizer: Path, sample: Sequence[str] = ()) -> VocabularySwap:
    """Return the swap from the tokenizer in the folder `model` to the one in `tokenizer`.

    `sample` names raw text files. With them, a new token takes the pieces that it replaces in that
    text, each by how often it does; without, the pieces of its own text.

    Raises:
        ValueError, OSError: a tokenizer or a file of the sample cannot be read.
    """
    old, new = Vocabulary(model), Vocabulary(tokenizer)
    kept = _kept(old, new)
    made: dict[int, Mapping[int, float]] = {
        token: Counter(pieces)
        for token, text in _texts(new)
        if token not in kept and (pieces := old.pieces(text))
    }
    if sample:
        made.update(replaced_pieces(old, new, _read_sample(sample), set(made)))
    return _swap(tokenizer, old, new, kept, made)


def replaced_pieces(
    old: Vocabulary, new: Vocabulary, texts: Iterable[list[str]], wanted: set[int]
) -> dict[int, dict[int, float]]:
    """Return by new token how many of each old token it replaces in batches of texts.

    An old token that is replaced in part counts by its share of characters. Only `wanted` new
    tokens that occur are there.
    """
    counts: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for batch in texts:
        for olds, news in zip(old.spans(batch), new.spans(batch), strict=True):
            pieces = [(i, span) for i, span in zip(*olds, strict=True) if span[0] < span[1]]
            first = 0
            for token, (begin, end) in zip(*news, strict=True):
                while first < len(pieces) and pieces[first][1][1] <= begin:
                    first += 1
                if token not in wanted:
                    continue
                place = first
                while place < len(pieces) and pieces[place][1][0] < end:
                    piece, (start, stop) = pieces[place]
                    shared = min(end, stop) - max(begin, start)
                    counts[token][piece] += shared / (stop - start)
                    place += 1
    return dict(counts)


def _kept(old: Vocabulary, new: Vocabulary) -> dict[int, int]:
    """Return the old id of each new token that has one: by role, by spelling, by bytes."""
    kept = {i: old.roles[role] for role, i in new.roles.items() if role in old.roles}
    for spelling, i in new.specials.items():
        if spelling in old.specials:
            kept.setdefault(i, old.specials[spelling])
    by_bytes: dict[bytes, int] = {}
    for i in sorted(old.tokens):
        by_bytes.setdefault(old.tokens[i], i)
    return kept | {i: by_bytes[text] for i, text in new.tokens.items() if text in by_bytes}


def _texts(vocabulary: Vocabulary) -> Iterator[tuple[int, bytes]]:
    """Yield the bytes of each token but those of a role, special tokens as they are spelled."""
    yield from vocabulary.tokens.items()
    roles = set(vocabulary.roles.values())
    for spelling, i in vocabulary.specials.items():
        if i not in roles:
            yield i, spelling.encode()


def _read_sample(patterns: Sequence[str]) -> Iterator[list[str]]:
    characters = 0
    for batch in read_text_batches(expand_inputs(patterns), ["text"]):
        texts = list(batch.texts[0])
        yield texts
        characters += sum(map(len, texts))
        if characters >= MAX_SAMPLE_CHARACTERS:
            return


def _swap(
    tokenizer: Path,
    old: Vocabulary,
    new: Vocabulary,
    kept: Mapping[int, int],
    made: Mapping[int, Mapping[int, float]],
) -> VocabularySwap:
    shares = {i: {piece: 1.0} for i, piece in kept.items()}
    for i, counts in made.items():
        total = sum(counts.values())
        shares[i] = {piece: count / total for piece, count in counts.items()}
    triples = [(i, piece, share) for i in sorted(shares) for piece, share in shares[i].items()]
    ids, pieces, weights = zip(*triples, strict=True)
    return VocabularySwap(
        tokenizer=tokenizer,
        old_size=old.size,
        size=new.size,
        new=np.array(ids, dtype=np.int64),
        old=np.array(pieces, dtype=np.int64),
        weights=np.array(weights, dtype=np.float64),
        num_kept=len(kept),
    )
