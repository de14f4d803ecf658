"""Describe the corpora of a run as a Croissant file, with the hashes that its order names."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.order.spec import OrderSpec, PoolSpec, ShardSpec
from megatron_ettin.publication import publish_text
from megatron_ettin.queries.answer import add_shared_arguments, show
from megatron_ettin.queries.recorded_run import RecordedRun, open_run

EXAMPLE = "croissant --run runs/encoder --license MIT --output corpora.json"


@dataclass(frozen=True, kw_only=True)
class Croissant:
    """The file that was written."""

    run: str
    output: str
    corpora: int
    files: int
    """Files that it describes: the .bin of every shard."""
    recommended: list[str]
    """Properties that the format recommends and that are not given."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_shared_arguments(parser, EXAMPLE)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="FILE", help="JSON-LD file to write")
    add("--license", metavar="NAME", help="license of the corpora: an SPDX name or a URL")


def print_answer(args: argparse.Namespace) -> int:
    """Print the answer; return 0."""
    return show(write_croissant(args.run, args.output, license=args.license), args)


def write_croissant(folder: Path, output: Path, *, license: str | None = None) -> Croissant:  # noqa: A002
    """Write a description of a run's corpora that mlcroissant accepts.

    Raises:
        ValueError: order.json or config.yaml is damaged, a corpus is not the one that the run was
            trained on, or the package mlcroissant is missing.
        OSError: a corpus is gone.
    """
    croissant = _import_mlcroissant()
    spec = RunFolder(folder).read_order()
    pools = {pool.source: pool for phase in spec.phases for pool in phase.pools}
    files = list(_files(croissant, spec, pools, open_run(folder)))
    metadata = croissant.Metadata(
        name=f"corpora of {folder.resolve().name}",
        description=(
            f"Tokenised corpora that the run {folder.resolve().name} was trained on, as Megatron's "
            f".bin files: the tokens of all documents, one after another. The order of training "
            f"has the id {spec.order_id}, the tokenizer the SHA-256 {spec.tokenizer_sha256}."
        ),
        license=[license] if license else None,
        distribution=files,
    )
    document = metadata.to_json()
    publish_text(output, json.dumps(document, indent=2, default=str) + "\n")
    return Croissant(
        run=str(folder),
        output=str(output),
        corpora=len(pools),
        files=len(files),
        recommended=sorted(warning.split('"')[1] for warning in metadata.ctx.issues.warnings),
    )


def _import_mlcroissant() -> ModuleType:
    # It says what is recommended when it is imported and at each use; the answer says it once.
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        import mlcroissant
    except ImportError as error:
        raise ValueError(f"{error.name} is missing: install megatron-ettin[attest]") from error
    module: ModuleType = mlcroissant
    return module


def _files(
    croissant: ModuleType, spec: OrderSpec, pools: dict[str, PoolSpec], run: RecordedRun
) -> Iterator[Any]:
    """Yield a description of the .bin of every shard."""
    for source, pool in pools.items():
        whole = ShardSpec(
            documents=pool.documents_in_file,
            tokens=pool.tokens_in_file,
            lengths_sha256=pool.lengths_sha256,
            tokens_sha256=pool.tokens_sha256,
        )
        # The order has no shards that the folder got since.
        shards = spec.shards.get(source) or (whole,)
        for prefix, shard in zip(run.order.prefixes(source), shards, strict=True):
            path = Path(f"{prefix}.bin")
            name = f"{source}/{path.name}"
            yield croissant.FileObject(
                id=name,
                name=name,
                description=_describe(source, shard),
                content_url=name,
                content_size=f"{path.stat().st_size} B",
                encoding_formats=["application/octet-stream"],
                sha256=shard.tokens_sha256,
            )


def _describe(source: str, shard: ShardSpec) -> str:
    return (
        f"Source {source}: {shard.documents} documents, {shard.tokens} tokens. The lengths of its "
        f"documents in tokens, as little-endian 64-bit integers, have the SHA-256 "
        f"{shard.lengths_sha256}."
    )
