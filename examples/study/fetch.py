"""Fetch and make the data of the nano study, about 40 MB.

    lm_eval/TASK/               evaluation sets of lm-eval's tasks, see harness_sets.py
    glue/{mrpc,rte,sst2}/       validation sets of GLUE
    reviews/                    film reviews in GLUE's form: train, validation, test
    wikipedia-retrieval/        queries and documents in BEIR's form, and pairs to train on
    blimp/                      BLiMP's minimal pairs, from a folder (--blimp)
    winogender/                 Winogender's sentences, from a folder (--winogender)

The first two are in a package of the Python package index, the next two are made of the
quickstart's text. A folder that has the expected content is left as it is. The file data.sha256
holds the expected SHA-256 of each file, or of its rows as JSON lines if it is a Parquet file.
"""

import argparse
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq

from examples import fetch_text
from examples.fetch_text import Record, check_sha256, json_lines
from examples.study import harness_sets, retrieval_sets, review_sets
from megatron_ettin.publication import publish_bytes

DIGESTS = Path(__file__).with_name("data.sha256")
Contents = dict[str, bytes]


@dataclass(frozen=True, kw_only=True)
class Part:
    """Folders of the output that are made together."""

    folders: tuple[str, ...]
    make: Callable[[], tuple[Contents, str]]
    """Returns the content of each file by its path, and a remark on how it was made."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, fetch or make each part, print one line per folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument(
        "--text",
        type=Path,
        default=Path("quickstart/text"),
        metavar="FOLDER",
        help="the quickstart's text; fetched if it is not there (default: %(default)s)",
    )
    parser.add_argument(
        "--blimp",
        type=Path,
        metavar="FOLDER",
        help="the folder data/ of github.com/alexwarstadt/blimp",
    )
    parser.add_argument(
        "--winogender",
        type=Path,
        metavar="FOLDER",
        help="the folder data/ of github.com/rudinger/winogender-schemas",
    )
    options = parser.parse_args(arguments)
    try:
        for line in provide(options.output, options.text, options.blimp, options.winogender):
            print(line, flush=True)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


def provide(output: Path, text: Path, blimp: Path | None, winogender: Path | None) -> Iterator[str]:
    """Make the parts that are not there yet; yield a line on each folder."""
    expected = read_digests()
    parts = []  # the user's folders first: a wrong name is found before the download
    for name, source in (("blimp", blimp), ("winogender", winogender)):
        files = select(expected, (name,))
        if source is not None or is_current(output, files):
            make = partial(copy, f"--{name}", source or output / name, files)
            parts.append(Part(folders=(name,), make=make))
        else:
            yield f"{output / name}: left out; --{name} FOLDER copies it (see docs/evaluation.md)"
    parts += [
        Part(folders=("lm_eval", "glue"), make=lambda: (harness_sets.fetch(), "fetched")),
        Part(folders=("reviews",), make=partial(make_reviews, text, output)),
        Part(folders=("wikipedia-retrieval",), make=partial(make_retrieval, text)),
    ]
    for part in parts:
        wanted = select(expected, part.folders)
        action = "up to date" if is_current(output, wanted) else publish(part, output, wanted)
        for folder in part.folders:
            paths = [output / path for path in select(wanted, (folder,))]
            size = sum(path.stat().st_size for path in paths) / 1e6
            yield f"{output / folder}: {len(paths)} files, {size:.1f} MB; {action}"


def read_digests() -> dict[str, str]:
    """Return the expected SHA-256 of each file of the output, by its path."""
    lines = DIGESTS.read_text().splitlines()
    return {path: digest for digest, path in (line.split("  ") for line in lines)}


def select(digests: dict[str, str], folders: tuple[str, ...]) -> dict[str, str]:
    """Return the part of the digests whose files are in the folders."""
    return {path: each for path, each in digests.items() if path.split("/")[0] in folders}


def is_current(output: Path, expected: dict[str, str]) -> bool:
    """Tell whether all files are there with the expected content."""
    try:
        return all(
            hashlib.sha256(identity(path, (output / path).read_bytes())).hexdigest() == digest
            for path, digest in expected.items()
        )
    except (FileNotFoundError, ValueError):  # ValueError: a damaged Parquet file
        return False


def identity(path: str, content: bytes) -> bytes:
    """Return what the digest of a file is taken of."""
    return harness_sets.rows_as_json(content) if path.endswith(".parquet") else content


def publish(part: Part, output: Path, expected: dict[str, str]) -> str:
    """Make a part's files, check all of them, then write them; return the remark on them."""
    contents, remark = part.make()
    for path, digest in expected.items():
        check_sha256(path, identity(path, contents[path]), digest)
    for path in expected:
        (output / path).parent.mkdir(parents=True, exist_ok=True)
        publish_bytes(output / path, contents[path])
    return remark


def read_text(folder: Path, name: str) -> list[Record]:
    """Return the records of a file of the quickstart's text, which is fetched if need be."""
    if not fetch_text.is_current(folder):
        fetch_text.fetch(folder)
    return fetch_text.read_json_lines((folder / name).read_text())


def make_reviews(text: Path, output: Path) -> tuple[Contents, str]:
    """Split the held-out reviews; SST-2 is already in the output."""
    sst2 = pq.read_table(output / "glue/sst2/validation.parquet")["sentence"].to_pylist()
    sets, remark = review_sets.split(read_text(text, "probe.jsonl"), sst2)
    contents = {f"reviews/{name}.jsonl": json_lines(each).encode() for name, each in sets.items()}
    return contents, remark


def make_retrieval(text: Path) -> tuple[Contents, str]:
    """Turn the articles into files of BEIR's form."""
    sets, remark = retrieval_sets.split(read_text(text, "wikipedia.jsonl"))
    qrels = sets.pop("qrels")
    rows = [list(qrels[0]), *(list(each.values()) for each in qrels)]
    table = "".join("\t".join(map(str, row)) + "\n" for row in rows)
    contents = {f"{name}.jsonl": json_lines(each).encode() for name, each in sets.items()}
    contents["qrels/test.tsv"] = table.encode()
    return {f"wikipedia-retrieval/{name}": each for name, each in contents.items()}, remark


def copy(option: str, folder: Path, files: Iterable[str]) -> tuple[Contents, str]:
    """Read the files, paths of the output, out of a user's folder.

    Raises ValueError if one is not there.
    """
    sources = {path: folder / Path(path).name for path in files}
    missing = [source for source in sources.values() if not source.is_file()]
    if missing:
        raise ValueError(
            f"{missing[0]} does not exist ({len(missing)} of {len(sources)} files are missing): "
            f"{option} needs the folder data/ of the published repository"
        )
    return {path: source.read_bytes() for path, source in sources.items()}, "copied"


if __name__ == "__main__":
    main()
