"""Overlap of benchmark items with a run's documents, and when the model read it.

One pass over the corpora finds all sequences of n words of all items. A document that has some is
looked up in the order of the run: a sequence counts as read in a row that holds all of its tokens.
Memory grows with the items, not with the corpora.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_ettin.native import GramFinder
from megatron_ettin.queries.benchmark_items import BenchmarkItem
from megatron_ettin.queries.corpus_scan import CorpusScan
from megatron_ettin.queries.documents import Document
from megatron_ettin.queries.recorded_run import RecordedRun
from megatron_ettin.queries.search import holds
from megatron_ettin.queries.where import list_places
from megatron_ettin.queries.words import word_rules

#: Row number of what no row holds; after every row of any run.
NEVER = np.iinfo(np.int64).max
#: Documents of an item that are remembered as examples.
EXAMPLES = 3


class ItemDocument(NamedTuple):
    """A document that shares sequences of words with an item."""

    item: int
    document: Document
    grams: int
    """Different sequences of the item that the document has."""
    begin: int
    """First token of the first of them."""
    end: int
    """Token after the last of them."""
    first_g: int
    """First row that holds one of them whole, taken or to come; NEVER if there is none."""
    rows: int
    """Rows that were trained on and hold one of them whole."""


class WordCover(NamedTuple):
    """Words of an item's passage, with the first row that held each in a sequence of n words."""

    words: list[str]
    in_document: NDArray[np.bool_]
    """True if a document has a sequence with the word."""
    first_g: NDArray[np.int64]
    """NEVER where no row of the run holds such a sequence whole."""


@dataclass
class Contamination:
    """Findings of the pass so far, by item and by sequence."""

    items: Sequence[BenchmarkItem]
    n: int
    finder: GramFinder
    passages_of: list[range]
    """Passages of each item, as `finder` numbers them."""
    first_g: NDArray[np.int64]
    """First row that holds each sequence whole; NEVER if there is none."""
    in_document: NDArray[np.bool_]
    """True if a document has the sequence."""
    documents: NDArray[np.int64]
    """Documents with a sequence of each item."""
    rows: NDArray[np.int64]
    """Rows that were trained on and hold a sequence of each item whole, counted by document."""
    last_g: NDArray[np.int64]
    """Last of these rows; -1 if there is none."""
    any_documents: int = 0
    """Documents with a sequence of any item."""
    examples: dict[int, list[ItemDocument]] = field(default_factory=dict)
    """The first EXAMPLES documents of each item, by source and number."""
    _items_of: tuple[NDArray[np.int64], NDArray[np.int64]] = field(init=False)

    def __post_init__(self) -> None:
        """Index the items by sequence."""
        numbers = [self.grams_of(item) for item in range(len(self.items))]
        grams = np.concatenate([*numbers, np.empty(0, dtype=np.int64)])
        items = np.repeat(np.arange(len(numbers)), [len(each) for each in numbers])
        order = np.lexsort((items, grams))
        begins = np.searchsorted(grams[order], np.arange(self.finder.num_grams + 1))
        self._items_of = items[order], begins.astype(np.int64)

    def grams_of(self, item: int) -> NDArray[np.int64]:
        """Return the different sequences of an item, ascending."""
        grams = [self.finder.grams(passage) for passage in self.passages_of[item]]
        return np.unique(np.concatenate([*grams, np.empty(0, dtype=np.int64)]))

    def items_with(self, gram: int) -> NDArray[np.int64]:
        """Return the items that have a sequence, ascending."""
        items, begins = self._items_of
        return items[begins[gram] : begins[gram + 1]]

    def cover(self, item: int) -> list[WordCover]:
        """Return the words of each passage of an item, with what has held them."""
        covers = []
        for passage in self.passages_of[item]:
            words = self.finder.words(passage).split()
            grams = self.finder.grams(passage)
            in_document = np.zeros(len(words), dtype=np.bool_)
            first_g = np.full(len(words), NEVER, dtype=np.int64)
            for place in np.flatnonzero(self.in_document[grams]).tolist():
                span = slice(place, place + self.n)
                in_document[span] = True
                first_g[span] = np.minimum(first_g[span], self.first_g[grams[place]])
            covers.append(WordCover(words, in_document, first_g))
        return covers


def begin_contamination(scan: CorpusScan, items: Sequence[BenchmarkItem], n: int) -> Contamination:
    """Cut the items into sequences of n words; ValueError if n is out of range."""
    passages_of: list[range] = []
    passages: list[str] = []
    for item in items:
        passages_of.append(range(len(passages), len(passages) + len(item.passages)))
        passages += [scan.spell(text) for text in item.passages]
    finder = GramFinder(scan.vocabulary, word_rules(), passages, n)
    zeros = np.zeros(len(items), dtype=np.int64)
    return Contamination(
        items=items,
        n=n,
        finder=finder,
        passages_of=passages_of,
        first_g=np.full(finder.num_grams, NEVER, dtype=np.int64),
        in_document=np.zeros(finder.num_grams, dtype=np.bool_),
        documents=zeros.copy(),
        rows=zeros.copy(),
        last_g=zeros - 1,
    )


def find_contamination(
    run: RecordedRun, scan: CorpusScan, found: Contamination
) -> Iterator[list[ItemDocument]]:
    """Read all documents and add what they have to `found`; yield it for some at a time.

    Raises:
        ValueError: a corpus has ids that its tokenizer has not.
    """
    for stretch in scan.stretches("comparing"):
        with scan.reading(stretch) as read:
            matches = found.finder.find(read.corpus, read.begin, read.end)
        matches[:, 0] += read.offset
        ends = np.flatnonzero(np.diff(matches[:, 0])) + 1
        shared = []
        for of_document in np.split(matches, ends) if len(matches) else ():
            ordinal = int(of_document[0, 0])
            ranges = scan.token_ranges(stretch.source, ordinal, of_document[:, 2:])
            document = Document(stretch.source, ordinal)
            shared += _add_document(run, found, document, of_document[:, 1], ranges)
        yield shared


def _add_document(
    run: RecordedRun,
    found: Contamination,
    document: Document,
    grams: NDArray[np.int64],
    ranges: NDArray[np.int64],
) -> list[ItemDocument]:
    """Add a document with sequences [m] in its tokens [m, 2]; return its share in each item."""
    places = [place for place in list_places(run, document) if place.step is not None]
    inside = [holds(place, ranges) for place in places]
    first_g = np.full(len(grams), NEVER, dtype=np.int64)
    for place, held in zip(reversed(places), reversed(inside), strict=True):
        first_g[held] = place.g
    np.minimum.at(found.first_g, grams, first_g)
    found.in_document[grams] = True
    found.any_documents += 1
    items = [found.items_with(gram) for gram in grams.tolist()]
    owners = np.concatenate(items)
    at = np.repeat(np.arange(len(grams)), [len(each) for each in items])
    shared = []
    for item in np.unique(owners).tolist():
        mine = at[owners == item]
        rows = [
            place.g
            for place, held in zip(places, inside, strict=True)
            if place.status == "seen" and held[mine].any()
        ]
        share = ItemDocument(
            item=item,
            document=document,
            grams=len(np.unique(grams[mine])),
            begin=int(ranges[mine, 0].min()),
            end=int(ranges[mine, 1].max()),
            first_g=int(first_g[mine].min()),
            rows=len(set(rows)),
        )
        found.documents[item] += 1
        found.rows[item] += share.rows
        found.last_g[item] = max(int(found.last_g[item]), *rows, -1)
        examples = found.examples.setdefault(item, [])
        examples += [share] if len(examples) < EXAMPLES else []
        shared.append(share)
    return shared
