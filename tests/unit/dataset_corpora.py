"""Corpora of raw files that a test may change, made as a user makes them."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ettin.data.encoding import SelectionRules
from megatron_ettin.data.preprocess import preprocess
from megatron_ettin.data.preprocess_options import PreprocessOptions
from megatron_ettin.data.raw_files import expand_inputs
from megatron_ettin.data.tokenize import load_tokenizer, train_tokenizer, write_tokenizer

WORDS = ["the", "film", "was", "good", "bad", "long", "short", "plot", "never", "again", "why"]


def made_texts(seed: int, count: int) -> list[str]:
    """Return documents of very different lengths; a few are empty."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 60, size=count)
    made = [" ".join(random.choice(WORDS, size=n)) + f" {i}" for i, n in enumerate(lengths)]
    return ["" if i % 50 == 7 else text for i, text in enumerate(made)]


@dataclass(frozen=True)
class MadeCorpus:
    """A corpus of two raw files."""

    prefix: Path
    tokenizer: Path
    raw: tuple[Path, Path]
    texts: tuple[list[str], list[str]]
    """Texts of each raw file, with those that are empty."""

    @property
    def stored(self) -> list[tuple[Path, int, str]]:
        """Raw file, line and text of each document that is stored, in order."""
        return [
            (path, line, text)
            for path, texts in zip(self.raw, self.texts, strict=True)
            for line, text in enumerate(texts, 1)
            if text
        ]

    def ids(self) -> list[list[int]]:
        """Return the token ids of each stored document."""
        tokenizer = load_tokenizer(self.tokenizer)
        return [row.tolist() for row in tokenizer.encode_batch([text for *_, text in self.stored])]


def write_raw(path: Path, texts: list[str]) -> Path:
    """Write JSON lines with ids such as `a-12` and urls, packed if the name ends in .gz."""
    name = path.name.partition(".")[0]
    lines = [
        json.dumps({"text": text, "id": f"{name}-{line}", "url": f"https://x.org/{line}"}) + "\n"
        for line, text in enumerate(texts, 1)
    ]
    content = "".join(lines).encode()
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return path


def make_tokenizer(folder: Path, size: int = 300) -> Path:
    """Train a tokenizer on the words of the texts."""
    write_tokenizer(train_tokenizer(made_texts(0, 200), size), folder)
    return folder


def make_corpus(
    root: Path, *, output: str = "corpora/small", shards: bool = False, **rules: Any
) -> MadeCorpus:
    """Tokenise two raw files to ROOT/OUTPUT_text_document, or to a folder of two shards."""
    texts = made_texts(1, 200), made_texts(2, 120)
    raw = write_raw(root / "a.jsonl", texts[0]), write_raw(root / "b.jsonl.gz", texts[1])
    made = MadeCorpus(
        Path(f"{root / output}_text_document"), make_tokenizer(root / "tokenizer"), raw, texts
    )
    preprocess(
        PreprocessOptions(
            inputs=expand_inputs([str(path) for path in raw]),
            output_prefix=root / output,
            tokenizer=made.tokenizer,
            shards=shards,
            rules=SelectionRules(**rules),
        )
    )
    return made


def make_folder(root: Path) -> MadeCorpus:
    """Tokenise two raw files to a folder of two shards."""
    return make_corpus(root, output="corpora/many", shards=True)


def write_mosaic(path: Path, documents: list[list[int]]) -> Path:
    """Write an MDS shard of token ids, as the published corpora have them."""
    samples = []
    for number, ids in enumerate(documents, 1):
        values = [f"c-{number}".encode(), np.array(ids, dtype="<u2").tobytes()]
        samples.append(np.array([*map(len, values)], dtype="<u4").tobytes() + b"".join(values))
    columns = json.dumps(
        {
            "column_names": ["id", "input_ids"],
            "column_encodings": ["str", "bytes"],
            "column_sizes": [None, None],
        }
    ).encode()
    begin = 4 + 4 * (len(samples) + 1) + len(columns)
    places = np.cumsum([begin, *map(len, samples)]).astype("<u4")
    header = np.array([len(samples)], dtype="<u4").tobytes() + places.tobytes() + columns
    path.write_bytes(header + b"".join(samples))
    return path


def flip_bit(path: Path, byte: int, bit: int = 0) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)
