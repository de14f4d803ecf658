"""Corpora of raw files that a test may change, made as a user makes them."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ettin.data.preprocess import PreprocessOptions, preprocess
from megatron_ettin.data.tokenize import load_tokenizer, train_tokenizer, write_tokenizer

WORDS = ["the", "film", "was", "good", "bad", "long", "short", "plot", "never", "again", "why"]
FOLDER_SUFFIXES = (".bin", ".idx", ".docs.parquet", ".json", ".identity.json")


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


def make_corpus(root: Path, **options: Any) -> MadeCorpus:
    """Tokenise two raw files to ROOT/corpora/small_text_document."""
    texts = made_texts(1, 200), made_texts(2, 120)
    raw = write_raw(root / "a.jsonl", texts[0]), write_raw(root / "b.jsonl.gz", texts[1])
    tokenizer = make_tokenizer(root / "tokenizer")
    output = root / "corpora" / "small"
    preprocess(PreprocessOptions(inputs=raw, output_prefix=output, tokenizer=tokenizer, **options))
    return MadeCorpus(Path(f"{output}_text_document"), tokenizer, raw, texts)


def make_folder(root: Path) -> MadeCorpus:
    """Tokenise the same files to a folder ROOT/corpora/many_text_document of two shards."""
    made = make_corpus(root)
    folder = root / "corpora" / "many_text_document"
    folder.mkdir()
    shards = []
    for number, path in enumerate(made.raw):
        name = f"{number:05d}"
        output = root / "parts" / name
        preprocess(
            PreprocessOptions(inputs=(path,), output_prefix=output, tokenizer=made.tokenizer)
        )
        for suffix in FOLDER_SUFFIXES:
            Path(f"{output}_text_document{suffix}").rename(folder / f"{name}{suffix}")
        summary = folder / f"{name}.json"
        content = json.loads(summary.read_text())
        content["sizes"] = {
            each.replace(f"{name}_text_document", name): size
            for each, size in content["sizes"].items()
        }
        content["dropped"] = {"empty": content["dropped"]}
        (content["input"],) = content.pop("inputs")
        summary.write_text(json.dumps(content))
        shards.append({"name": name, **{k: content[k] for k in ("input", "documents", "tokens")}})
    total = {key: sum(shard[key] for shard in shards) for key in ("documents", "tokens")}
    dataset = {
        "format": "megatron-ettin-dataset/1",
        "tokenizer_digest": load_tokenizer(made.tokenizer).digest,
        **total,
        "validation_documents": 0,
        "validation_tokens": 0,
        "dropped": {"empty": sum(texts.count("") for texts in made.texts)},
        "shards": shards,
    }
    (folder / "dataset.json").write_text(json.dumps(dataset))
    return MadeCorpus(folder, made.tokenizer, made.raw, made.texts)


def flip_bit(path: Path, byte: int, bit: int = 0) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)
