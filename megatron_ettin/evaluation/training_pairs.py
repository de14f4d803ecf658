"""Training data of retrieval: pairs or triplets of texts, and the queries held out of them."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ettin.data.json_lines import read_json_lines
from megatron_ettin.data.raw_files import expand_inputs, read_text_batches
from megatron_ettin.evaluation.beir import Collection

#: Suffixes of local files; any other source is a data set of the Hugging Face Hub.
LOCAL_SUFFIXES = (".jsonl", ".parquet")
REQUIRED = ("anchor", "positive")
OPTIONAL = ("negative",)


def local_file(source: str) -> Path | None:
    """Return the local file that a source names, or None for a data set of the Hub."""
    return Path(source) if source.endswith(LOCAL_SUFFIXES) else None


def read_pairs(source: str, config: str | None, split: str) -> Any:
    """Read pairs of a query (`anchor`) and its document (`positive`), perhaps with a `negative`.

    Args:
        source: Local .jsonl or .parquet file, or a data set of the Hub (downloaded if need be).
        config: Configuration of a data set of the Hub.
        split: Split of a data set of the Hub.

    Returns:
        A `datasets.Dataset` with the columns anchor, positive and, where the first row has it,
        negative. A column `query` of the Hub is read as `anchor`.

    Raises:
        ValueError: a field is missing or no string; the message names file and line.
        OSError: there is no such file.
    """
    from datasets import Dataset

    path = local_file(source)
    if path is None:
        return _read_hub(source, config, split)
    reader = _read_lines if path.suffix == ".jsonl" else _read_table
    columns = reader(path)
    if not columns["anchor"]:
        raise ValueError(f"{path}: no pairs")
    return Dataset.from_dict(columns)


def hold_out(pairs: Any, *, max_pairs: int, num_queries: int) -> tuple[Any, Collection]:
    """Separate the rows of some queries, and draw the rows to train on from the others.

    The held-out queries are those with the smallest SHA-256; the rows to train on, if there are
    more than `max_pairs`, those with the smallest SHA-256 of row number and query. Neither depends
    on a seed.

    Returns:
        The rows to train on, and the held-out queries as a collection whose documents are all
        positives and negatives of their rows.

    Raises:
        ValueError: no row is left to train on.
    """
    anchors = list(pairs["anchor"])
    held_out = set(heapq.nsmallest(num_queries, set(anchors), key=_digest))
    rows = [row for row, anchor in enumerate(anchors) if anchor not in held_out]
    if not rows:
        raise ValueError(
            f"{len(set(anchors))} queries to train on, of which {num_queries} are held out; "
            f"lower held_out_queries"
        )
    if len(rows) > max_pairs:
        rows = sorted(
            heapq.nsmallest(max_pairs, rows, lambda row: _digest(f"{row} {anchors[row]}"))
        )
    others = [row for row, anchor in enumerate(anchors) if anchor in held_out]
    return pairs.select(rows), _collection(pairs.select(others))


def _collection(pairs: Any) -> Collection:
    documents: dict[str, str] = {}
    queries: dict[str, str] = {}
    relevance: dict[str, dict[str, int]] = {}
    for row in pairs:
        query = _digest(row["anchor"])
        queries[query] = row["anchor"]
        positive = _digest(row["positive"])
        relevance.setdefault(query, {})[positive] = 1
        for text in (row["positive"], row.get("negative")):
            if text is not None:
                documents[_digest(text)] = text
    return Collection(documents=documents, queries=queries, relevance=relevance)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read_lines(path: Path) -> dict[str, list[str]]:
    columns: dict[str, list[str]] = {name: [] for name in REQUIRED}
    for line in read_json_lines(path):
        if not columns["anchor"]:
            columns |= {name: [] for name in OPTIONAL if name in line.fields}
        for name, texts in columns.items():
            texts.append(line.text(name))
    return columns


def _read_table(path: Path) -> dict[str, list[str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        present = pyarrow.parquet.read_schema(path).names
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not parquet: {error}") from error
    names = _names(str(path), present)
    batches = list(read_text_batches(expand_inputs([str(path)]), names))
    return {
        name: [text for batch in batches for text in batch.texts[place]]
        for place, name in enumerate(names)
    }


def _names(where: str, present: Sequence[str]) -> list[str]:
    if missing := [name for name in REQUIRED if name not in present]:
        raise ValueError(f"{where}: no field {', '.join(missing)}; there are {', '.join(present)}")
    return [*REQUIRED, *(name for name in OPTIONAL if name in present)]


def _read_hub(name: str, config: str | None, split: str) -> Any:
    from datasets import load_dataset

    try:
        pairs = load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name}: neither a .jsonl or .parquet file nor a data set that can be had: {error}"
        ) from error
    if "query" in pairs.column_names:
        pairs = pairs.rename_column("query", "anchor")
    return pairs.select_columns(_names(name, pairs.column_names))
