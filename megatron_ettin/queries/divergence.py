"""How many rows two orders have in common from the first on."""

from __future__ import annotations

import os

import numpy as np
from tqdm import tqdm

from megatron_ettin.order import SampleOrder
from megatron_ettin.queries.record import shared_boundaries, skipped_rows
from megatron_ettin.queries.recorded_run import RecordedRun

#: Rows whose pieces are compared at a time, and rows whose tokens are.
_ROWS, _ROWS_OF_TOKENS = 65_536, 512


def common_rows(one: RecordedRun, other: RecordedRun) -> int:
    """Return the largest g up to which both orders have the same tokens of the same documents.

    What equal phase ids and equal digests in both ledgers say needs no look at the rows; from there
    on their pieces are compared, and their tokens too where the runs' corpora are not the same.
    """
    begin = _known_to_be_common(one, other)
    end = min(one.order.num_rows, other.order.num_rows)
    with tqdm(
        total=end - begin, desc="comparing", unit="row", unit_scale=True, disable=None
    ) as bar:
        for first in range(begin, end, _ROWS):
            last = min(first + _ROWS, end)
            differing = _first_other_pieces(one, other, first, last)
            if not _same_corpora(one, other):
                differing = _first_other_tokens(one, other, first, differing)
            if differing < last:
                return differing
            bar.update(last - first)
    return end


def _known_to_be_common(one: RecordedRun, other: RecordedRun) -> int:
    """Return rows that are the same by their phase ids, or by their digests in both ledgers."""
    if not isinstance(one.order, SampleOrder) or not isinstance(other.order, SampleOrder):
        return 0
    common = 0
    ids = zip(one.order.spec.phase_ids(), other.order.spec.phase_ids(), strict=False)
    ends = zip(one.order.spec.phase_ends(), other.order.spec.phase_ends(), strict=False)
    for (first_id, second_id), (first_end, second_end) in zip(ids, ends, strict=False):
        if first_id != second_id:
            break
        common = min(first_end, second_end)
    if one.changes or other.changes or one.ledger is None or other.ledger is None:
        return common  # the ledgers tell of other files than today's
    shared = shared_boundaries(one.ledger, other.ledger)
    agree = shared.g[: len(shared.g) if shared.agree.all() else int(np.argmin(shared.agree))]
    for run in (one.ledger, other.ledger):  # digests say nothing of rows that were skipped
        skipped = skipped_rows(run, one.order.num_rows)
        agree = agree[agree <= skipped[0][0]] if skipped else agree
    return max(common, int(agree[-1]) if len(agree) else 0)


def _first_other_pieces(one: RecordedRun, other: RecordedRun, begin: int, end: int) -> int:
    """Return the first of the rows [begin, end) with other pieces, `end` if there is none."""
    first, second = (run.order.pieces(begin, end) for run in (one, other))
    names = [
        np.array(run.order.source_names)[p.source] for run, p in ((one, first), (other, second))
    ]
    count = min(len(first.g), len(second.g))
    same = names[0][:count] == names[1][:count]
    for field in ("g", "document", "offset", "length", "slots"):
        same &= getattr(first, field)[:count] == getattr(second, field)[:count]
    rows = [
        pieces.g[count:] if same.all() else pieces.g[np.argmin(same) :]
        for pieces in (first, second)
    ]
    return min([end, *(int(g[0]) for g in rows if len(g))])


def _first_other_tokens(one: RecordedRun, other: RecordedRun, begin: int, end: int) -> int:
    """Return the first of the rows [begin, end) with other tokens, `end` if there is none."""
    for first in range(begin, end, _ROWS_OF_TOKENS):
        last = min(first + _ROWS_OF_TOKENS, end)
        rows = zip(one.order.tokens(first, last), other.order.tokens(first, last), strict=True)
        for g, (tokens, others) in enumerate(rows, start=first):
            if not np.array_equal(tokens, others):
                return g
    return end


def _same_corpora(one: RecordedRun, other: RecordedRun) -> bool:
    """Tell whether sources of the same name hold the same tokens, as far as that is known."""
    known = [_contents(run) for run in (one, other)]
    return all(known[0][name] == known[1][name] for name in known[0].keys() & known[1].keys())


def _contents(run: RecordedRun) -> dict[str, str]:
    if isinstance(run.order, SampleOrder):
        return {p.source: p.tokens_sha256 for phase in run.order.spec.phases for p in phase.pools}
    return {name: os.path.realpath(run.order.prefix(name)) for name in run.order.source_names}
