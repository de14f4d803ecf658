"""The benchmark of preprocessing runs through, every figure is there, and our bytes are Megatron's.

How fast anything is, is not asserted.
"""

import json
import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.preprocess_rounds import train_tokenizer
from benchmarks.real_text import BLANK_LINES, SENTENCE_END, TextDocument, read_code, write_text

ROOT = Path(__file__).parents[2]
PEERS = ("gigatoken", "megatron_fast", "megatron", "datatrove")
COUNTS = {"documents", "tokens", "mb", "part_mb", "rounds", "peak_mb"}
KEYS = (
    COUNTS
    | {"same_as_mcore", "same_as_fast"}
    | {
        f"{name}_{what}"
        for name in ("ours", *PEERS)
        for what in ("mb_s", "process_mb_s", "peak_mb", "private_mb")
    }
    | {f"ours_over_{name}{what}" for name in PEERS for what in ("", "_process")}
)
PROSE = [
    "The film begins in a harbour. Nobody speaks! Who sent the letter? It ends in [MASK] silence.",
    "Élodie, née à Lyon, écrit des romans. Elle habite à Paris.",
    "A short one.",
]


def prose() -> list[TextDocument]:
    return [TextDocument(name=str(number), text=text) for number, text in enumerate(PROSE)]


def code() -> list[TextDocument]:
    return read_code([ROOT / "benchmarks"])


def documents(folder: Path) -> list[dict[str, str]]:
    contents = [path.read_bytes() for path in sorted(folder.glob("*.jsonl"))]
    return [json.loads(line) for content in contents for line in content.splitlines()]


def contender_of(key: str) -> str | None:
    """Return the contender that a field is about; the longest name that it begins with."""
    name = key.removeprefix("ours_over_")
    return max((each for each in PEERS if f"{name}_".startswith(f"{each}_")), key=len, default=None)


@pytest.mark.parametrize(
    "peers",
    [
        # The two slow ones start five processes that import torch or datatrove.
        pytest.param(("gigatoken", "megatron_fast"), marks=pytest.mark.slow),
        pytest.param(PEERS, marks=pytest.mark.long),
    ],
)
def test_every_figure_is_measured_and_the_bytes_are_megatrons(
    tmp_path: Path, peers: tuple[str, ...]
) -> None:
    raw, work = tmp_path / "raw", tmp_path / "work"
    raw.mkdir()
    written = write_text(raw, prose=prose(), code=code(), num_bytes=300_000, num_files=2)
    files = sorted(raw.glob("*.jsonl"))
    train_tokenizer(files, tmp_path / "tokenizer", vocab_size=1000)
    options = ["--input", *map(str, files), "--part-mb", "0.1", "--rounds", "1", "--json"]
    options += ["--keep", str(work), "--tokenizer", str(tmp_path / "tokenizer")]
    options += ["--contenders", "ours", *peers]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "bench_preprocess.py"), *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    measured = json.loads(last)
    assert set(measured) == KEYS
    assert measured["same_as_mcore"] is True
    assert measured["documents"] == written.documents
    assert measured["mb"] == pytest.approx(0.3, rel=0.1)
    assert measured["part_mb"] == pytest.approx(0.1 if "megatron" in peers else 0.3, rel=0.2)
    absent = {name for name in peers if not find_spec(name.replace("megatron_fast", "gigatoken"))}
    assert measured["same_as_fast"] is (None if "megatron_fast" in absent else True)
    for key in KEYS - {"same_as_mcore", "same_as_fast"}:
        if contender_of(key) in set(PEERS) - (set(peers) - absent):
            assert measured[key] is None, key
        else:
            assert math.isfinite(measured[key]), key
            assert measured[key] > 0, key
    for name in absent:
        assert any(line.startswith(f"{name}: left out") for line in table)
    assert list(work.iterdir()) == []


def test_text_has_the_size_that_is_asked_for_and_no_document_twice(tmp_path: Path) -> None:
    written = write_text(tmp_path, prose=prose(), code=code(), num_bytes=400_000, num_files=3)
    found = documents(tmp_path)
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) == 3
    assert len(found) == written.documents
    assert sum(sizes) == written.num_bytes
    assert 400_000 <= sum(sizes) < 500_000
    assert 0 < written.recombined_bytes < sum(sizes)
    assert len({each["id"] for each in found}) == len(found)
    originals = [each["text"] for each in found if not each["id"].startswith("recombined/")]
    assert {each.text for each in prose()} < set(originals)
    assert len(set(originals)) == len(originals)


def test_the_same_text_is_made_again(tmp_path: Path) -> None:
    made = []
    for folder in (tmp_path / "one", tmp_path / "other"):
        folder.mkdir()
        write_text(folder, prose=prose(), code=code(), num_bytes=100_000, num_files=1)
        made.append((folder / "text-000.jsonl").read_bytes())
    assert made[0] == made[1]


def test_recombined_documents_consist_of_real_sentences(tmp_path: Path) -> None:
    write_text(tmp_path, prose=prose(), code=code(), num_bytes=200_000, num_files=1)
    sentences = {each for text in PROSE for each in SENTENCE_END.split(text)}
    blocks = {each for one in code() for each in BLANK_LINES.split(one.text)}
    recombined = [each for each in documents(tmp_path) if each["id"].startswith("recombined/1/")]
    assert recombined
    for each in recombined:
        assert set(SENTENCE_END.split(each["text"])) <= sentences
    for each in documents(tmp_path):
        if each["id"].startswith("recombined/2/"):
            assert set(BLANK_LINES.split(each["text"])) <= blocks
