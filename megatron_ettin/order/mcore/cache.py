"""Index caches of Megatron-Core's GPTDataset and BlendedDataset: choosing, opening, checking.

A cache is a description (JSON whose MD5 is part of every file name) and two or three `.npy` tables.
Layout: megatron/core/datasets/{gpt_dataset,blended_dataset,megatron_dataset}.py of megatron-core
0.16.1, unchanged in 0.19.2. Megatron writes the tables in place and takes any file for complete,
so every table is checked here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ettin.order.mcore.run import SPLITS, McoreRun

_DESCRIPTION = re.compile(
    r"(?P<key>[0-9a-f]{32})-(?P<kind>GPTDataset|BlendedDataset)-(?P<split>\w+)-description\.txt"
)
REBUILD = (
    "delete the files of this hash; Megatron builds the same ones again when it is started with "
    "the same options"
)


@dataclass(frozen=True)
class Description:
    """Description file of one dataset: its key, and the settings whose MD5 the key is."""

    folder: Path
    key: str
    kind: str
    split: str
    identifiers: Mapping[str, Any]

    def path(self, table: str) -> Path:
        """Return the path of one of the cache's tables."""
        return self.folder / f"{self.key}-{self.kind}-{self.split}-{table}.npy"

    @property
    def summary(self) -> str:
        """Hash and size, for messages that list several."""
        of_kind = "size" if self.kind == "BlendedDataset" else "num_samples"
        seeds = {d.get("random_seed") for d in self.identifiers.get("datasets", [self.identifiers])}
        return f"{self.key} ({of_kind} {self.identifiers.get(of_kind)}, seed {min(seeds, key=str)})"

    def open(self, table: str, dtypes: tuple[str, ...], ndim: int = 1) -> NDArray[Any]:
        """Map a table into memory, read-only.

        Raises:
            FileNotFoundError: the file is missing.
            ValueError: the table is truncated, or its type or shape is not Megatron's.
        """
        path = self.path(table)
        if not path.exists():
            raise FileNotFoundError(
                f"{path}: missing, but the cache has its description: {REBUILD}"
            )
        try:
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(
                f"{path}: truncated or damaged ({path.stat().st_size} bytes; {error}). Megatron "
                f"was probably stopped while it saved the file: {REBUILD}"
            ) from error
        actual = f"{mapped.dtype.name}, shape {mapped.shape}"
        if mapped.dtype.name not in dtypes or mapped.ndim != ndim or mapped.dtype.byteorder == ">":
            raise ValueError(
                f"{path}: expected {' or '.join(dtypes)} in {ndim} dimensions: {actual}"
            )
        if mapped.flags.f_contiguous and mapped.ndim > 1 and not mapped.flags.c_contiguous:
            raise ValueError(f"{path}: stored by columns, which Megatron does not do")
        return mapped.view(np.ndarray)


@dataclass(frozen=True, kw_only=True)
class IndexTables:
    """The three tables of one corpus and the range of its documents that they use."""

    description: Description
    documents: NDArray[np.int32]
    """[epochs * documents of the split]: documents in the order they are laid end to end."""
    samples: NDArray[Any]
    """[samples + 1, 2]: position in `documents` and token offset at which each sample begins."""
    shuffle: NDArray[Any]
    """[samples]: which sample is drawn."""
    first_document: int
    end_document: int

    @property
    def num_samples(self) -> int:
        """Samples that can be drawn."""
        return len(self.shuffle)


@dataclass(frozen=True)
class Blend:
    """Tables of a blend, [rows]: the corpus of each row, and the sample of it that is drawn.

    Samples of a corpus are drawn in order, so `sample` counts the earlier rows of the corpus.
    """

    description: Description
    dataset: NDArray[np.int16]
    sample: NDArray[np.int64]


@dataclass(frozen=True)
class Cache:
    """All tables of a run; `blend` is None if Megatron was given a single corpus."""

    blend: Blend | None
    tables: tuple[IndexTables, ...]


def open_cache(run: McoreRun, num_documents: Mapping[str, int]) -> Cache:
    """Find and open the tables of a run; `num_documents` are those of each corpus.

    Raises:
        FileNotFoundError: no folder, or a table that is missing from it.
        ValueError: no cache fits, several do, or a table is truncated or of another corpus.
    """
    top, parts = _choose(run, _read_descriptions(run.cache))
    tables = tuple(
        _open_tables(description, num_documents[name])
        for name, description in zip(run.prefixes, parts, strict=True)
    )
    if top.kind == "GPTDataset":
        return Cache(None, tables)
    blend = Blend(
        top, top.open("dataset_index", ("int16",)), top.open("dataset_sample_index", ("int64",))
    )
    if len(blend.dataset) != len(blend.sample):
        raise ValueError(
            f"{top.path('dataset_sample_index')}: {len(blend.sample)} entries, but dataset_index "
            f"has {len(blend.dataset)}: {REBUILD}"
        )
    return Cache(blend, tables)


def _read_descriptions(folder: Path) -> list[Description]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: `cache` is not a folder")
    descriptions = []
    for path in sorted(folder.iterdir()):
        name = _DESCRIPTION.fullmatch(path.name)
        if name is None:
            continue
        content = path.read_bytes()
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != name["key"]:
            raise ValueError(
                f"{path}: its MD5 is not the {name['key']} of its name, so it was cut short or "
                f"changed: {REBUILD}"
            )
        descriptions.append(
            Description(folder, name["key"], name["kind"], name["split"], json.loads(content))
        )
    if not descriptions:
        raise FileNotFoundError(f"{folder}: no *-GPTDataset-*-description.txt of Megatron-Core")
    return descriptions


def _choose(
    run: McoreRun, descriptions: list[Description]
) -> tuple[Description, list[Description]]:
    """Return the description that fits the run, and one for each of its corpora."""
    fitting, reasons = [], []
    for description in descriptions:
        differences = _differences(run, description)
        if differences:
            reasons.append(f"  {description.summary}: {'; '.join(differences)}")
        else:
            fitting.append(description)
    # For a one-corpus blend both the blend and its member match; drop the member.
    parts_of_blends = [part for d in fitting for part in d.identifiers.get("datasets", [])]
    fitting = [d for d in fitting if d.identifiers not in parts_of_blends]
    if not fitting:
        hint = (
            " (Megatron saves the table of a blend only where --data-cache-path is given)"
            if len(run.prefixes) > 1
            else ""
        )
        raise ValueError(
            f"{run.cache}: no cache fits this run{hint}. There are:\n" + "\n".join(reasons)
        )
    if len(fitting) > 1:
        several = "\n".join(f"  {description.summary}" for description in fitting)
        raise ValueError(
            f"{run.cache}: several caches fit this run; say which with `cache_key`:\n{several}"
        )
    top = fitting[0]
    wanted = top.identifiers.get("datasets", [top.identifiers])
    # A blend holds the settings of its members, not their keys; JSON makes them comparable.
    by_identifiers = {json.dumps(d.identifiers): d for d in descriptions}
    parts = [by_identifiers.get(json.dumps(identifiers)) for identifiers in wanted]
    for name, part in zip(run.prefixes, parts, strict=True):
        if part is None:
            raise FileNotFoundError(
                f"{run.cache}: the blend {top.key} draws from {name!r}, whose own tables "
                f"(*-GPTDataset-{run.split}-*) are not there"
            )
    return top, [part for part in parts if part is not None]


def _differences(run: McoreRun, description: Description) -> list[str]:
    """List the settings of a cache that differ from the run's."""
    if run.cache_key not in (None, description.key):
        return [f"not cache_key {run.cache_key}"]
    datasets = description.identifiers.get("datasets", [description.identifiers])
    if len(datasets) != len(run.prefixes):
        return [f"{len(datasets)} corpora, not {len(run.prefixes)}"]
    wanted = {"index_split": run.split, "sequence_length": run.seq_length}
    if run.seed is not None:
        wanted["random_seed"] = run.seed
    differences = []
    for (name, prefix), dataset in zip(run.prefixes.items(), datasets, strict=True):
        known = str(dataset.get("dataset_path"))
        if name in run.cached_as:
            same = run.cached_as[name] == known
        else:
            same = os.path.realpath(prefix) == os.path.realpath(known)
        if not same:
            differences.append(
                f"corpus {known}, not {prefix} (if it has moved: `cached_as: {{{name}: {known}}}`)"
            )
        for key, value in wanted.items():
            if dataset.get(key) != value:
                differences.append(f"{key} {dataset.get(key)}, not {value}")
    return differences


def _open_tables(description: Description, num_documents: int) -> IndexTables:
    """Open the tables of one corpus; check their shapes, without reading them whole."""
    tables = IndexTables(
        description=description,
        documents=description.open("document_index", ("int32",)),
        samples=description.open("sample_index", ("int32", "int64"), ndim=2),
        shuffle=description.open("shuffle_index", ("uint32", "int64")),
        **_split_range(description, num_documents),
    )
    of_split = tables.end_document - tables.first_document
    if of_split < 1 or len(tables.documents) < 1 or len(tables.documents) % of_split:
        raise ValueError(
            f"{description.path('document_index')}: {len(tables.documents)} entries are no whole "
            f"number of epochs of the {of_split} documents in the {description.split} split of "
            f"{description.identifiers['dataset_path']}: the cache is of another corpus"
        )
    if tables.samples.shape != (tables.num_samples + 1, 2):
        raise ValueError(
            f"{description.path('sample_index')}: shape {tables.samples.shape}, expected "
            f"{(tables.num_samples + 1, 2)} from shuffle_index: {REBUILD}"
        )
    return tables


def _split_range(description: Description, num_documents: int) -> dict[str, int]:
    """Return the documents of the split, rounded as BlendedMegatronDatasetBuilder does."""
    matrix = description.identifiers.get("split_matrix")
    shares = (0.0, 1.0) if matrix is None else matrix[SPLITS.index(description.split)]
    first, end = (round(share * float(num_documents)) for share in shares)
    return {"first_document": first, "end_document": end}
