"""Compare the rows and tokens that today's files give with those that a ledger records."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_ettin import native
from megatron_ettin.order import Order
from megatron_ettin.order.digest import mask_digest, token_digest
from megatron_ettin.order.ledger import Ledger
from megatron_ettin.order.pieces import row_starts
from megatron_ettin.queries.answer import Check
from megatron_ettin.queries.masking_record import Masking, MaskingRecord
from megatron_ettin.queries.record import StepRecord, digest_hex, step_record

#: Rows whose pieces are looked up at a time; slots whose tokens are read at a time.
_ROWS, _SLOTS = 65_536, 4_194_304
#: Fewest steps in a sample.
SMALLEST_SAMPLE = 16
Unreadable = (ValueError, IndexError, OSError)


def check_order(order: Order, ledger: Ledger) -> Check:
    """Recompute the pieces of each recorded step from the rules of the order and document lengths.

    Reads no tokens. A fault names the record; it also names the row if the plan on disk differs
    there from what the lengths give, or if the record has only one row.
    """
    check = Check(name="order", items=len(ledger.steps))
    with tempfile.TemporaryDirectory() as folder:
        plans = _Plans(order, Path(folder))
        total = int((ledger.steps["g_end"] - ledger.steps["g_begin"]).sum())
        with tqdm(total=total, desc="order", unit="row", unit_scale=True, disable=None) as bar:
            for first, end in _groups(ledger.steps):
                _check_group(order, ledger, first, end, plans, check)
                records = ledger.steps[first:end]
                bar.update(int((records["g_end"] - records["g_begin"]).sum()))
    return check


def _groups(steps: NDArray[np.void]) -> Iterator[tuple[int, int]]:
    """Yield ranges of steps without gaps between their rows, of at most _ROWS rows if possible."""
    begins, ends = steps["g_begin"].astype(np.int64), steps["g_end"].astype(np.int64)
    first = 0
    while first < len(steps):
        end = max(first + 1, int(np.searchsorted(ends, begins[first] + _ROWS, side="right")))
        gaps = np.flatnonzero(begins[first + 1 : end] != ends[first : end - 1])
        end = first + 1 + int(gaps[0]) if len(gaps) else end
        yield first, end
        first = end


def _check_group(
    order: Order, ledger: Ledger, first: int, end: int, plans: _Plans, check: Check
) -> None:
    records = ledger.steps[first:end]
    begin, stop = int(records["g_begin"][0]), int(records["g_end"][-1])
    try:
        digests = order.order_digests(begin, stop)
        tokens = order.row_tokens(begin, stop).astype(np.uint64)
    except Unreadable as error:
        if end - first > 1:  # find the record that fails
            for index in range(first, end):
                _check_group(order, ledger, index, index + 1, plans, check)
            return
        record = step_record(ledger, first)
        row = _unreadable_row(order, begin, stop)
        _fail(check, record, f"its pieces cannot be looked up: {error}", row)
        return
    # Steps of a group are adjacent: step i has the rows from starts[i] to starts[i + 1].
    starts = (records["g_begin"] - records["g_begin"][0]).astype(np.int64)
    sums = np.add.reduceat(digests, starts, axis=0)
    counts = np.add.reduceat(tokens, starts)
    wrong = (sums != records["order_digest"]).any(axis=1)
    for index in np.flatnonzero(wrong).tolist():
        record = step_record(ledger, first + index)
        _fail(check, record, _order_fault(records[index], sums[index]), plans.wrong_row(record))
    # A wrong order explains a wrong number of tokens, so the latter is a fault only on its own.
    for index in np.flatnonzero(~wrong & (counts != records["n_tokens"])).tolist():
        said, today = int(records["n_tokens"][index]), int(counts[index])
        what = f"it counts {said} tokens, but its rows hold {today}"
        _fail(check, step_record(ledger, first + index), what)


def _order_fault(record: np.void, today: NDArray[np.uint64]) -> str:
    return (
        f"its rows were made of other pieces than today's files give (order digest "
        f"{digest_hex(record['order_digest'])}, today {digest_hex(today)})"
    )


def _fail(check: Check, record: StepRecord, what: str, row: int | None = None) -> None:
    rows = (record.g_begin, record.g_end)
    if row is None and rows[1] - rows[0] == 1:
        row = rows[0]
    check.fail(what, seq=record.seq, step=record.step, rows=rows, row=row)


def _unreadable_row(order: Order, begin: int, end: int) -> int | None:
    for g in range(begin, end):
        try:
            order.order_digests(g, g + 1)
        except Unreadable:
            return g
    return None


class _Plans:
    """Row plans rebuilt from the document lengths, to find the wrong row of a stored plan."""

    def __init__(self, order: Order, folder: Path) -> None:
        self._order = order
        self._folder = folder
        # A plan is built only once a step of its pool is wrong: most checks build none.
        self._built = cache(self._build)

    def wrong_row(self, record: StepRecord) -> int | None:
        """Return the first row of a record that differs between stored and rebuilt plan."""
        order = self._order
        phase = order.spec.phase_index(record.g_begin)
        pieces = order.pieces(record.g_begin, record.g_end)
        stored = {pool.source: plan for pool, plan in order.plans(phase)}
        for start in row_starts(pieces.g).tolist():
            source = order.source_names[int(pieces.source[start])]
            row = pieces.row[start : start + 1]
            if _pieces(stored[source], row) != _pieces(self._built(phase, source), row):
                return int(pieces.g[start])
        return None

    def _build(self, phase: int, source: str) -> native.RowPlan:
        pool, plan = next((p, plan) for p, plan in self._order.plans(phase) if p.source == source)
        path = self._folder / f"{phase}_{len(list(self._folder.iterdir()))}.plan"
        native.build_row_plan(
            self._order.corpus(source),
            path,
            first_document=plan.first_document,
            end_document=plan.end_document,
            seq_length=plan.seq_length,
            pack=plan.pack,
            specials=pool.specials,
            min_doc_tokens=pool.min_doc_tokens,
            max_segments_per_row=plan.max_segments_per_row,
        )
        return native.RowPlan(path, self._order.corpus(source))


def _pieces(plan: native.RowPlan, row: NDArray[np.int64]) -> list[list[int]]:
    pieces = plan.pieces(row)
    columns = (pieces.document, pieces.offset, pieces.length, pieces.cls, pieces.sep)
    return [column.tolist() for column in (*columns, pieces.ends_document)]


def sample_steps(ledger: Ledger, share: float, seed: int) -> NDArray[np.int64]:
    """Return the ascending indices of a share of the steps, at least SMALLEST_SAMPLE if there are.

    Steps are ranked by draw number `step` of the seed's counter. So anyone can repeat a sample, and
    a larger share contains every smaller one.
    """
    steps = ledger.steps["step"].astype(np.int64)
    if not len(steps):
        return steps
    key = native.counter_key(seed, native.Purpose.VERIFY, [])
    draws = native.counter_draws(key, int(steps[0]), int(steps[-1] - steps[0]) + 1)
    count = min(len(steps), max(SMALLEST_SAMPLE, int(np.ceil(share * len(steps)))))
    return np.sort(np.argsort(draws, kind="stable")[:count])


def check_tokens(
    order: Order,
    ledger: Ledger,
    *,
    share: float,
    seed: int,
) -> Check:
    """Rebuild the tokens and masks of a share of steps, and compare them with the ledger."""
    chosen = sample_steps(ledger, share, seed)
    check = Check(name="tokens", items=len(chosen))
    if len(chosen) < len(ledger.steps):
        check.notes.append(f"a sample of the {len(ledger.steps)} steps, with seed {seed}")
    maskings = MaskingRecord(ledger)
    for index in tqdm(chosen.tolist(), desc="tokens", unit="step", disable=None):
        record = step_record(ledger, index)
        try:
            tokens, mask = _digests(order, record, maskings.at(record.seq))
        except Unreadable as error:
            _fail(check, record, f"its tokens cannot be read: {error}")
            continue
        recorded = ledger.steps[index]
        if (tokens != recorded["token_digest"]).any():
            what = (
                f"its rows held other tokens than today's files do (token digest "
                f"{digest_hex(recorded['token_digest'])}, today {digest_hex(tokens)})"
            )
            _fail(check, record, what)
        elif mask != recorded["mask_digest"]:
            _fail(check, record, "its tokens are the same, but were masked or scored otherwise")
    return check


def _digests(
    order: Order, record: StepRecord, masking: Masking
) -> tuple[NDArray[np.uint64], np.uint64]:
    """Rebuild the rows of a record; return their token digest [2] and mask digest."""
    index = order.spec.phase_index(record.g_begin)
    phase = order.spec.phases[index]
    at_once = max(1, _SLOTS // phase.seq_length)
    tokens = np.zeros(2, dtype=np.uint64)
    mask = np.zeros(1, dtype=np.uint64)
    for begin in range(record.g_begin, record.g_end, at_once):
        g = np.arange(begin, min(begin + at_once, record.g_end), dtype=np.int64)
        rows = order.rows(index, g)
        tokens += token_digest(rows, rows.tokens)
        batch = masking.objective.make_batch(
            rows, phase=phase.name, mask_seed=masking.mask_seed, ids=order.ids
        )
        mask += mask_digest(batch)
    return tokens, mask[0]
