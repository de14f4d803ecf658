"""Look-up of documents by their number in a corpus, an id, a hash, or the text."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_ettin.queries.recorded_run import RecordedRun

if TYPE_CHECKING:
    from megatron_ettin.data.provenance import Provenance
    from megatron_ettin.data.sharded_provenance import ShardedProvenance


class Document(NamedTuple):
    """Document number `ordinal`, from 0, of the corpus of `source`."""

    source: str
    ordinal: int


class DocumentOrigin(NamedTuple):
    """Id, url and place of a raw document; None where they are not recorded."""

    id: str | None = None
    url: str | None = None
    shard: str | None = None
    """Raw file."""
    line: int | None = None
    """Line of it, or number of the record, from 1."""


@dataclass(frozen=True, kw_only=True)
class DocumentName:
    """Name of a document, as the options give it; one of the first five is set, if any."""

    doc: str | None = None
    """SOURCE:ORDINAL."""
    id: str | None = None
    sha: str | None = None
    """SHA-256 of its text, hexadecimal."""
    text_file: Path | None = None
    contains: str | None = None
    """Text that it contains."""
    source: str | None = None
    """Source to look in; None for all."""

    @property
    def is_given(self) -> bool:
        """Tell whether an option named a document."""
        return any((self.doc, self.id, self.sha, self.text_file, self.contains))


def add_document_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add the options that name a document."""
    name = parser.add_mutually_exclusive_group(required=required).add_argument
    name("--doc", metavar="SOURCE:ORDINAL", help="source and number (from 0) of the document")
    name("--id", metavar="ID", help="id of the document in the raw file")
    name("--sha", metavar="HASH", help="SHA-256 of the document's text, hexadecimal")
    name("--text-file", type=Path, metavar="FILE", help="file with the document's exact text")
    contains = "text that the document contains, letter by letter; reads the corpora"
    name("--contains", metavar="TEXT", help=contains)
    parser.add_argument("--source", metavar="NAME", help="look only in this source")


def document_name(args: argparse.Namespace) -> DocumentName:
    """Return the name that the options give."""
    return DocumentName(
        doc=args.doc,
        id=args.id,
        sha=args.sha,
        text_file=args.text_file,
        contains=args.contains,
        source=args.source,
    )


class Sidecars:
    """Provenance sidecars of a run's corpora, opened at first use; a corpus may have none."""

    def __init__(self, run: RecordedRun) -> None:
        """Open nothing yet."""
        self._run = run
        self._opened: dict[str, Provenance | ShardedProvenance | None] = {}

    def provenance(self, source: str) -> Provenance | ShardedProvenance | None:
        """Return the provenance of a source; None if a shard of it has no sidecar."""
        if source not in self._opened:
            prefixes = self._run.order.prefixes(source)
            self._opened[source] = None if _without_sidecar(prefixes) else _open(prefixes)
        return self._opened[source]

    def origins(
        self, documents: Sequence[Document], fields: Sequence[str] = ("id", "url")
    ) -> list[DocumentOrigin]:
        """Return the origin of each document, in the given order, of which `fields` are known."""
        origins: dict[Document, DocumentOrigin] = {}
        for source in {document.source for document in documents}:
            provenance = self.provenance(source)
            if provenance is None:
                continue
            ordinals = [document.ordinal for document in documents if document.source == source]
            numbers = np.array(ordinals, dtype=np.int64)
            rows = provenance.documents(numbers, fields)
            for ordinal, row in zip(ordinals, rows.to_pylist(), strict=True):
                origins[Document(source, ordinal)] = DocumentOrigin(**row)
        return [origins.get(document, DocumentOrigin()) for document in documents]


def _without_sidecar(prefixes: Sequence[str]) -> list[Path]:
    """Return the sidecars of a corpus that are not there."""
    paths = [Path(f"{prefix}.docs.parquet") for prefix in prefixes]
    return [path for path in paths if not path.exists()]


def _open(prefixes: Sequence[str]) -> Provenance | ShardedProvenance:
    # Importing Arrow takes longer than answering a question about a corpus without a sidecar.
    from megatron_ettin.data.sharded_provenance import open_provenance

    return open_provenance(prefixes)


def select_sources(run: RecordedRun, name: str | None) -> list[str]:
    """Return the named source, or all sources if `name` is None.

    Raises:
        ValueError: the run has no such source.
    """
    names = run.order.source_names
    if name is not None and name not in names:
        raise ValueError(f"{run.folder}: no source {name!r}; there are: {', '.join(names)}")
    return names if name is None else [name]


def find_documents(run: RecordedRun, name: DocumentName, sidecars: Sidecars) -> list[Document]:
    """Return all documents that a name matches, at least one.

    Raises:
        FileNotFoundError: no sidecar has the document, and a source without a sidecar may have it.
        ValueError: no document matches.
    """
    sources = select_sources(run, name.source)
    if name.doc is not None:
        return [_parse(run, name.doc, sources)]
    if name.contains is not None:
        from megatron_ettin.queries.search import documents_that_contain

        if not (documents := list(documents_that_contain(run, sources, name.contains))):
            raise ValueError(f"no document of {', '.join(sources)} contains {name.contains!r}")
        return documents
    known = {
        source: provenance
        for source in sources
        if (provenance := sidecars.provenance(source)) is not None
    }
    documents = [
        Document(source, ordinal)
        for source, provenance in known.items()
        for ordinal in _find(provenance, name).tolist()
    ]
    if documents:
        return documents
    what = f"no document with {_describe(name)}"
    looked = f"in {', '.join(known)}" if known else "was looked for"
    if len(known) < len(sources):
        without = next(source for source in sources if source not in known)
        missing = _without_sidecar(run.order.prefixes(without))
        raise FileNotFoundError(
            f"{what} {looked}: source {without!r} has no {missing[0]}, "
            f"which tools/preprocess_data.py writes; name the document as SOURCE:ORDINAL with --doc"
        )
    raise ValueError(f"{what} {looked}")


def _parse(run: RecordedRun, text: str, sources: list[str]) -> Document:
    source, colon, digits = text.rpartition(":")
    if not colon or not digits.isdecimal():
        raise ValueError(f"--doc {text!r}: expected SOURCE:ORDINAL, such as {sources[0]}:17")
    (source,) = select_sources(run, source)
    count = run.order.corpus(source).num_documents
    if int(digits) >= count:
        raise ValueError(f"--doc {text!r}: source {source!r} has documents 0 to {count - 1}")
    return Document(source, int(digits))


def _find(provenance: Provenance | ShardedProvenance, name: DocumentName) -> NDArray[np.int64]:
    if name.id is not None:
        return provenance.find_id(name.id)
    if name.sha is not None:
        return provenance.find_sha256(name.sha)
    assert name.text_file is not None
    try:
        text = name.text_file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name.text_file}: byte {error.start} is not UTF-8") from error
    ordinals = provenance.find_text(text)
    # An editor may have added a newline at the end of the file.
    return ordinals if len(ordinals) else provenance.find_text(text.removesuffix("\n"))


def _describe(name: DocumentName) -> str:
    if name.id is not None:
        return f"id {name.id!r}"
    return f"SHA-256 {name.sha}" if name.sha is not None else f"the text of {name.text_file}"
