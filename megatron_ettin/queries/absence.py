"""The reason why no row of a run holds a document, in words of the order (docs/order.md)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_ettin import native
from megatron_ettin.order import NotRecordedError, OrderSpec, PhaseSpec, PoolSpec
from megatron_ettin.order.pools import Pool
from megatron_ettin.queries.documents import Document
from megatron_ettin.queries.recorded_run import RecordedRun


def reason_without_places(run: RecordedRun, document: Document) -> str:
    """Return why no row of the run holds a document: it was left out, or it is never drawn."""
    order = run.order
    tokens = order.corpus(document.source).length(document.ordinal)
    shortest = order.shortest_document(document.source)
    if tokens < shortest:
        return f"left out: it has {tokens} tokens, fewer than {shortest} (min_doc_tokens)"
    try:
        return _reason_of_rule(order.spec, run, document)
    except NotRecordedError:
        return f"never drawn: none of the run's {order.num_rows:,} rows holds a token of it"


def _reason_of_rule(spec: OrderSpec, run: RecordedRun, document: Document) -> str:
    ranges, missed = [], []
    for index, phase in enumerate(spec.phases):
        for place, (pool, plan) in enumerate(run.order.plans(index)):
            if pool.source != document.source:
                continue
            ranges.append(f"{phase.name}: {pool.first_document:,} to {pool.end_document - 1:,}")
            if pool.first_document <= document.ordinal < pool.end_document:
                rows = plan.find(document.ordinal)
                missed.append((phase, phase.start_g + _first_draw(spec, phase, place, rows)))
    if not ranges:
        return f"left out: no phase draws from source {document.source!r} (data.blend)"
    if not missed:
        return f"left out: the phases draw other documents (data.pools; {', '.join(ranges)})"
    phase, g = min(missed, key=lambda each: each[1] - each[0].end_g)
    ended = "the run" if phase is spec.phases[-1] else f"phase {phase.name!r}"
    # Rows count on through the next phase, so the number alone would name a row of that one.
    return (
        f"never drawn: {ended} ends with row {phase.end_g - 1:,}; "
        f"had it gone on, the first draw would be row {g:,}"
    )


def _first_draw(spec: OrderSpec, phase: PhaseSpec, place: int, rows: NDArray[np.int64]) -> int:
    """Return when a phase without end would first draw one of the rows of its pool `place`."""
    order = native.PhaseOrder(
        seed=spec.seed,
        source_ids=[_pool(phase, pool).source_id for pool in phase.pools],
        quotas=[pool.quota for pool in phase.pools],
        rows=[pool.rows for pool in phase.pools],
        drawn=[pool.drawn for pool in phase.pools],
    )
    pool = phase.pools[place]
    # An earlier phase may have drawn the row in the epoch at hand; then it comes in the next one.
    epochs = np.arange(2, dtype=np.int64) + pool.drawn // pool.rows
    every_row = np.tile(rows, len(epochs))
    places = np.full(len(every_row), place, dtype=np.int32)
    n = order.find(places, np.repeat(epochs, len(rows)), every_row)
    return int(n[n >= 0].min())


def _pool(phase: PhaseSpec, pool: PoolSpec) -> Pool:
    return Pool(
        source=pool.source,
        first_document=pool.first_document,
        end_document=pool.end_document,
        seq_length=phase.seq_length,
        pack=phase.pack,
        max_segments_per_row=phase.max_segments_per_row,
    )
