"""Show a document of a corpus: its text, decoded, and where it came from."""

from __future__ import annotations

import argparse
import dataclasses
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ettin.data.corpus_tokenizer import recorded_tokenizer
from megatron_ettin.data.inspection.shards import corpus_shards
from megatron_ettin.data.provenance import Provenance, sidecar_path
from megatron_ettin.data.tokenize import Tokenizer, load_tokenizer
from megatron_ettin.native import TokenFile
from megatron_ettin.text_table import text_facts, text_table

EXAMPLE = "show corpora/small_text_document --doc 3 --tokenizer tokenizer"


@dataclass(frozen=True, kw_only=True)
class ShownDocument:
    """Document with its origin; None where that is not recorded."""

    document: int
    """Number in the corpus, over all shards."""
    shard: str
    """Prefix of the pair that holds it."""
    ordinal: int
    """Number in that pair."""
    id: str | None
    url: str | None
    file: str | None
    line: int | None
    sha256: str | None
    tokens: int
    text: str
    ids: list[int]
    pieces: list[str]
    """Text of each id alone; an id that is a part of a character gives U+FFFD."""


@dataclass(frozen=True, kw_only=True)
class ShownDocuments:
    """Documents that were asked for: several may have one id."""

    documents: list[ShownDocument]
    with_tokens: bool

    @property
    def passed(self) -> bool:
        """True: there is no verdict."""
        return True

    def lines(self) -> Iterator[str]:
        """Yield the origin of each document, then its text or its tokens."""
        for place, document in enumerate(self.documents):
            if place:
                yield ""
            origin = dataclasses.asdict(document)
            shown = ("document", "shard", "ordinal", "id", "url", "file", "line", "sha256")
            facts = [(name, _fact(origin[name])) for name in (*shown, "tokens")]
            yield from text_facts(facts)
            yield ""
            if self.with_tokens:
                rows = [
                    [str(position), str(id_), '"' + printable(piece, keep="") + '"']
                    for position, (id_, piece) in enumerate(
                        zip(document.ids, document.pieces, strict=True)
                    )
                ]
                columns = ["position", "id"]
                yield from text_table([*columns, "piece"], rows, numbers=columns)
            else:
                yield printable(document.text)

    def to_json(self) -> dict[str, Any]:
        """Return the documents as values of JSON."""
        return {"documents": [dataclasses.asdict(document) for document in self.documents]}


def printable(text: str, *, keep: str = "\n\t") -> str:
    """Return a text with its control characters as `\\x1b`, except those in `keep`.

    A document must not steer the terminal that shows it.
    """
    return "".join(
        f"\\x{ord(character):02x}"
        if unicodedata.category(character) == "Cc" and character not in keep
        else character
        for character in text
    )


def show(
    prefix: str, tokenizer: Path, *, document: int | None = None, id_: str | None = None
) -> list[ShownDocument]:
    """Return the document with a number, or all documents with an id.

    Raises:
        ValueError: the corpus has another tokenizer, or no such document.
        FileNotFoundError: there is no corpus, no tokenizer, or (for an id) no sidecar.
    """
    shards, loaded = corpus_shards(prefix), load_tokenizer(tokenizer)
    recorded = recorded_tokenizer(shards[0])
    if recorded not in (None, loaded.digest):
        raise ValueError(
            f"{prefix}: was made with the tokenizer of SHA-256 {recorded}, but "
            f"{tokenizer / 'tokenizer.json'} has {loaded.digest}"
        )
    found, first = [], 0
    for shard in shards:
        file = TokenFile(shard, check=False)
        for ordinal in _ordinals(shard, file, first, document, id_):
            found.append(_shown(file, first, ordinal, loaded))
        first += file.num_documents
    if not found:
        missing = f"document {document}" if id_ is None else f"document with the id {id_!r}"
        raise ValueError(f"{prefix}: no {missing}; it has {first} documents, numbered from 0")
    return found


def _ordinals(
    shard: str, file: TokenFile, first: int, document: int | None, id_: str | None
) -> list[int]:
    if id_ is not None:
        with Provenance.open(shard) as provenance:
            return [int(ordinal) for ordinal in provenance.find_id(id_)]
    inside = document is not None and first <= document < first + file.num_documents
    return [document - first] if document is not None and inside else []


def _shown(file: TokenFile, first: int, ordinal: int, tokenizer: Tokenizer) -> ShownDocument:
    origin: dict[str, Any] = {}
    if sidecar_path(file.prefix).is_file():
        with Provenance.open(file.prefix) as provenance:
            (origin,) = provenance.documents(np.array([ordinal])).to_pylist()
    ids = file.tokens(ordinal).tolist()
    return ShownDocument(
        document=first + ordinal,
        shard=file.prefix,
        ordinal=ordinal,
        id=origin.get("id"),
        url=origin.get("url"),
        file=origin.get("shard"),
        line=origin.get("line"),
        sha256=origin["sha256"].hex() if origin else None,
        tokens=len(ids),
        text=tokenizer.decode(ids),
        ids=ids,
        pieces=[tokenizer.decode([id_]) for id_ in ids],
    )


def _fact(value: object) -> str:
    return "-" if value is None else printable(str(value), keep="")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add("prefix", metavar="PREFIX", help="corpus, without a suffix; or a folder of shards")
    which = parser.add_mutually_exclusive_group(required=True)
    number = "number of the document, from 0, over all shards"
    which.add_argument("--doc", type=int, metavar="N", help=number)
    which.add_argument("--id", metavar="ID", help="id of the document")
    folder = "tokenizer that the corpus was made with"
    add("--tokenizer", type=Path, required=True, metavar="FOLDER", help=folder)
    add("--tokens", action="store_true", help="print ids and pieces in place of the text")


def answer(args: argparse.Namespace) -> ShownDocuments:
    """Return what the command prints."""
    documents = show(args.prefix, args.tokenizer, document=args.doc, id_=args.id)
    return ShownDocuments(documents=documents, with_tokens=args.tokens)
