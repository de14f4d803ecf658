"""Files of a contamination report: three Parquet tables and a page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_ettin.publication import publish_text, publishing
from megatron_ettin.queries.contamination import NEVER, Contamination, ItemDocument, WordCover
from megatron_ettin.queries.documents import Sidecars
from megatron_ettin.queries.overlap import Overlaps
from megatron_ettin.queries.recorded_run import RecordedRun
from megatron_ettin.templates import template_environment

if TYPE_CHECKING:
    from megatron_ettin.queries.contaminated import Contaminated

PAGE = "contamination.html.j2"
#: Items on the page, those with the largest overlap.
SHOWN_ITEMS = 100
DOCUMENTS = pa.schema(
    {
        "item": pa.int64(),
        "line": pa.int64(),
        "source": pa.string(),
        "ordinal": pa.int64(),
        "id": pa.string(),
        "url": pa.string(),
        "sequences": pa.int64(),
        "begin_token": pa.int64(),
        "end_token": pa.int64(),
        "first_g": pa.int64(),
        "rows_read": pa.int64(),
    }
)

#: Rows of a row group of documents.parquet.
GROUP_ROWS = 65_536

Write = Callable[[Sequence[ItemDocument]], None]


@contextmanager
def writing_documents(
    folder: Path | None, found: Contamination, sidecars: Sidecars
) -> Iterator[Write]:
    """Yield what writes rows of documents.parquet, which is published at the block's end.

    A row is a document that shares a sequence with an item. `first_g` is null if no row holds one
    whole. Without a folder nothing is written.
    """
    if folder is None:
        yield lambda _: None
        return
    with (
        publishing(folder / "documents.parquet") as temporary,
        pq.ParquetWriter(temporary, DOCUMENTS, compression="zstd") as writer,
    ):
        # Arrow remembers each row group until the file is closed, and a corpus of 2 T tokens is
        # read in 60,000 stretches, so rows of many stretches go into one.
        pending = [DOCUMENTS.empty_table()]

        def flush() -> None:
            table = pa.concat_tables(pending)
            if table.num_rows:
                writer.write_table(table, row_group_size=GROUP_ROWS)
            pending[1:] = []

        def write(shared: Sequence[ItemDocument]) -> None:
            if shared:
                pending.append(_documents_table(shared, found, sidecars))
            if sum(map(len, pending)) >= GROUP_ROWS:
                flush()

        yield write
        flush()


def _documents_table(
    shared: Sequence[ItemDocument], found: Contamination, sidecars: Sidecars
) -> pa.Table:
    """Return the rows of documents.parquet for these documents."""
    origins = sidecars.origins([each.document for each in shared])
    rows = [
        {
            "item": each.item,
            "line": found.items[each.item].line,
            "source": each.document.source,
            "ordinal": each.document.ordinal,
            "id": origin.id,
            "url": origin.url,
            "sequences": each.grams,
            "begin_token": each.begin,
            "end_token": each.end,
            "first_g": _row_or_none(each.first_g),
            "rows_read": each.rows,
        }
        for each, origin in zip(shared, origins, strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=DOCUMENTS)


def publish_report(
    folder: Path, run: RecordedRun, found: Contamination, overlaps: Overlaps, answer: Contaminated
) -> None:
    """Write items.parquet, checkpoints.parquet and report.html, each of which appears whole."""
    _write_table(folder / "items.parquet", items_table(run, found, overlaps))
    _write_table(folder / "checkpoints.parquet", checkpoints_table(overlaps))
    publish_text(folder / "report.html", page(run, found, overlaps, answer))


def items_table(run: RecordedRun, found: Contamination, overlaps: Overlaps) -> pa.Table:
    """Return one row for each item; steps and rows are null where no row of the run holds any."""
    count = len(found.items)
    begun = [g if g < run.end_g else None for g in overlaps.first_g.tolist()]
    last = [g if g >= 0 else None for g in found.last_g.tolist()]
    after = [None if g is None else run.checkpoint_after(g) for g in begun]
    grams = [found.grams_of(item) for item in range(count)]
    return pa.table(
        {
            "item": pa.array(range(count), pa.int64()),
            "line": pa.array([item.line for item in found.items], pa.int64()),
            "id": pa.array([item.id for item in found.items], pa.string()),
            "words": pa.array(overlaps.words),
            "sequences": pa.array([len(each) for each in grams], pa.int64()),
            "sequences_in_documents": pa.array(
                [int(found.in_document[each].sum()) for each in grams], pa.int64()
            ),
            "documents": pa.array(found.documents),
            "overlap_in_documents": pa.array(overlaps.in_documents),
            "overlap_read": pa.array(overlaps.last),
            "rows_read": pa.array(found.rows),
            "first_step": pa.array([_step_of(run, g) for g in begun], pa.int64()),
            "last_step": pa.array([_step_of(run, g) for g in last], pa.int64()),
            "first_checkpoint": pa.array(
                [None if point is None else point.name for point in after], pa.string()
            ),
        }
    )


def checkpoints_table(overlaps: Overlaps) -> pa.Table:
    """Return one row for each item and checkpoint at which some of it had been read."""
    items, points = np.nonzero(overlaps.read_by)
    return pa.table(
        {
            "item": pa.array(items, pa.int64()),
            "read_by": pa.array([overlaps.points[each].name for each in points], pa.string()),
            "step": pa.array([overlaps.points[each].step for each in points], pa.int64()),
            "overlap": pa.array(overlaps.read_by[items, points], pa.float64()),
        }
    )


@dataclass(frozen=True, kw_only=True)
class ShownItem:
    """An item as the page shows it."""

    name: str
    overlap: float
    in_documents: float
    documents: int
    rows: int
    first_step: int | None
    passages: list[list[tuple[str, str]]]
    """Words of each passage in runs of one kind: "read", "found" or "", and the text."""
    examples: list[str]


def page(run: RecordedRun, found: Contamination, overlaps: Overlaps, answer: Contaminated) -> str:
    """Return one self-contained HTML page with the items that overlap most."""
    environment = template_environment("queries")
    order = np.lexsort((-overlaps.in_documents, -overlaps.last))
    shown = [item for item in order[:SHOWN_ITEMS].tolist() if found.documents[item]]
    return environment.get_template(PAGE).render(
        answer=answer,
        shown=[_shown(run, found, overlaps, item) for item in shown],
        others=int((found.documents > 0).sum()) - len(shown),
    )


def _shown(run: RecordedRun, found: Contamination, overlaps: Overlaps, item: int) -> ShownItem:
    content, first = found.items[item], int(overlaps.first_g[item])
    return ShownItem(
        name=f"line {content.line}" + (f", id {content.id}" if content.id is not None else ""),
        overlap=float(overlaps.last[item]),
        in_documents=float(overlaps.in_documents[item]),
        documents=int(found.documents[item]),
        rows=int(found.rows[item]),
        first_step=_step_of(run, first if first < run.end_g else None),
        passages=[_marked(cover, run.end_g) for cover in found.cover(item)],
        examples=[
            f"{each.document.source}:{each.document.ordinal}" for each in found.examples[item]
        ],
    )


def _marked(cover: WordCover, end_g: int) -> list[tuple[str, str]]:
    """Return the words of a passage in stretches that were read, only found, or neither."""
    marked: list[tuple[str, str]] = []
    for word, in_document, g in zip(
        cover.words, cover.in_document.tolist(), cover.first_g.tolist(), strict=True
    ):
        kind = "read" if g < end_g else "found" if in_document else ""
        if marked and marked[-1][0] == kind:
            marked[-1] = (kind, f"{marked[-1][1]} {word}")
        else:
            marked.append((kind, word))
    return marked


def _step_of(run: RecordedRun, g: int | None) -> int | None:
    return None if g is None else int(run.steps_of_rows(np.array([g]))[0])


def _row_or_none(g: int) -> int | None:
    return None if g == NEVER else g


def _write_table(path: Path, table: pa.Table) -> None:
    with publishing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
