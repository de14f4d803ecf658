"""Passes over the documents of a run's corpora, as the bytes of their texts.

Texts of a byte-level tokenizer are the joined bytes of their tokens: C++ reads the .bin itself.
Documents of another tokenizer are decoded first, some at a time, into a corpus of single bytes.
"""

from __future__ import annotations

import argparse
import bisect
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_ettin.data.corpus_tokenizer import compare_tokenizers
from megatron_ettin.data.token_bytes import token_bytes
from megatron_ettin.data.tokenize import load_tokenizer
from megatron_ettin.native import TokenBytes, TokenCorpus, TokenFile, TokenFileBuilder
from megatron_ettin.queries.recorded_run import RecordedRun

#: Tokens that are read between two looks at the keyboard; a decoded text needs memory.
READ_TOKENS, DECODED_TOKENS = 2**25, 2**20
#: Documents and tokens of each, to learn which tokens are frequent.
SAMPLED_DOCUMENTS, SAMPLED_TOKENS = 64, 4096


class DocumentRange(NamedTuple):
    """Documents [first, end) of a source."""

    source: str
    first: int
    end: int


@dataclass(frozen=True)
class ReadableDocuments:
    """Documents of a stretch in the units of a scan's vocabulary: [begin, end) of a corpus."""

    corpus: TokenCorpus
    begin: int
    end: int
    offset: int
    """Number that `begin` of the corpus has in the source, minus `begin`."""


def add_scan_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a question that reads corpora."""
    parser.add_argument("--source", metavar="NAME", help="look only in this source")
    folder = "tokenizer of the corpora, for a run of Megatron, which does not record it"
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help=folder)


class CorpusScan:
    """Corpora of some sources of a run, to be read as texts."""

    def __init__(
        self, run: RecordedRun, sources: Sequence[str], tokenizer: Path | None = None
    ) -> None:
        """Load the tokenizer: the run's, or the one of a folder.

        Raises:
            ValueError: a corpus was made with another tokenizer, or none is recorded.
            OSError: there is no tokenizer in the folder.
        """
        self._run, self._sources = run, list(sources)
        if tokenizer is None:
            remedy = "name its folder with --tokenizer"
            tokenizer = Path(run.config_for("tokenizer's files", remedy).data.tokenizer)
        self._tokenizer = load_tokenizer(tokenizer)
        self._require_tokenizer(tokenizer)
        tokens = token_bytes(self._tokenizer)
        self.joins_bytes = tokens is not None
        """True if the .bin itself is read."""
        self.vocabulary = TokenBytes(tokens or [bytes([byte]) for byte in range(256)])

    def _require_tokenizer(self, folder: Path) -> None:
        if self._run.allows_other_tokenizers:
            return
        prefixes = {
            f"source {name!r}, shard {number}": prefix
            for name in self._sources
            for number, prefix in enumerate(self._run.order.prefixes(name))
        }
        if mixed := compare_tokenizers(prefixes, self._tokenizer.digest).mixed:
            raise ValueError(
                f"{'; '.join(mixed)}, that of {folder}/tokenizer.json; name the tokenizer that the "
                f"corpora have with --tokenizer"
            )

    def spell(self, text: str) -> str:
        """Return a text as it stands in documents: normalised, and cut and decoded if need be."""
        if self.joins_bytes:
            return self._tokenizer.normalize(text)
        return self._tokenizer.decode(self._tokenizer.encode_batch([text])[0])

    def token_counts(self) -> NDArray[np.int64]:
        """Return int64[len(vocabulary)]: how often a sample of documents has each token."""
        counts = np.zeros(len(self.vocabulary), dtype=np.int64)
        for source in self._sources if self.joins_bytes else ():
            corpus = self._run.order.corpus(source)
            total = corpus.num_documents
            for place in range(min(total, SAMPLED_DOCUMENTS)):
                document = place * total // min(total, SAMPLED_DOCUMENTS)
                length = min(corpus.length(document), SAMPLED_TOKENS)
                tokens = corpus.tokens(document, 0, length)
                counts += np.bincount(tokens[tokens < len(counts)], minlength=len(counts))
        return counts

    def stretches(self, what: str) -> Iterator[DocumentRange]:
        """Yield all documents of the sources; a bar that is named `what` counts tokens."""
        corpora = {source: self._run.order.corpus(source) for source in self._sources}
        total = sum(corpus.num_tokens for corpus in corpora.values())
        read = READ_TOKENS if self.joins_bytes else DECODED_TOKENS
        with tqdm(total=total, desc=what, unit=" tokens", unit_scale=True, disable=None) as bar:
            for source, corpus in corpora.items():
                step = max(1, read * corpus.num_documents // max(1, corpus.num_tokens))
                for first in range(0, corpus.num_documents, step):
                    end = min(first + step, corpus.num_documents)
                    yield DocumentRange(source, first, end)
                    bar.update(corpus.num_tokens * (end - first) // corpus.num_documents)

    @contextmanager
    def reading(self, stretch: DocumentRange) -> Iterator[ReadableDocuments]:
        """Yield the documents of a stretch; those that are decoded are there until the block ends.

        OSError where the folder for temporary files (TMPDIR) cannot take them.
        """
        corpus = self._run.order.corpus(stretch.source)
        if self.joins_bytes:
            yield ReadableDocuments(corpus, stretch.first, stretch.end, 0)
            return
        with tempfile.TemporaryDirectory(prefix="decoded.") as folder:
            prefix = Path(folder) / "bytes"
            builder = TokenFileBuilder(prefix, "uint16")
            for document in range(stretch.first, stretch.end):
                text = self._tokenizer.decode(corpus.tokens(document)).encode()
                builder.add(np.frombuffer(text, dtype=np.uint8).astype(np.uint16))
            builder.commit()
            decoded = TokenCorpus([TokenFile(prefix)])
            yield ReadableDocuments(decoded, 0, stretch.end - stretch.first, stretch.first)

    def token_ranges(
        self, source: str, document: int, ranges: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Return the tokens [m, 2] of a document that hold ranges [m, 2] in units of the scan.

        They are the ranges themselves if the .bin was read, else tokens whose decoded beginnings
        have as many bytes.
        """
        if self.joins_bytes:
            return ranges
        ids = self._run.order.corpus(source).tokens(document)
        counts = range(len(ids) + 1)

        def decoded_bytes(count: int) -> int:
            return len(self._tokenizer.decode(ids[:count]).encode())

        found = [
            (
                bisect.bisect_right(counts, begin, key=decoded_bytes) - 1,
                bisect.bisect_left(counts, end, key=decoded_bytes),
            )
            for begin, end in ranges.tolist()
        ]
        return np.array(found, dtype=np.int64).reshape(-1, 2)
