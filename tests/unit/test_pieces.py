"""Pieces of several sources become one table, which is cut by row; against a slow list."""

from collections import defaultdict

import numpy as np
import pytest

from megatron_ettin.order.pieces import Pieces, in_row_order, pieces_of_source, row_starts


@pytest.fixture
def rows() -> dict[int, list[tuple[int, int, int]]]:
    """Return (source, document, slots) of the pieces of rows 40 to 69, by row."""
    rng = np.random.default_rng(7)
    return {
        g: [
            (source, int(rng.integers(100)), int(rng.integers(1, 9)))
            for _ in range(int(rng.integers(1, 6)))
        ]
        for g, source in enumerate(rng.integers(3, size=30).tolist(), start=40)
    }


def assemble(rows: dict[int, list[tuple[int, int, int]]], *, descending: bool) -> Pieces:
    by_source = defaultdict(list)
    for g in sorted(rows, reverse=descending):
        by_source[rows[g][0][0]] += [(g, document, slots) for _, document, slots in rows[g]]
    parts = []
    for source, listed in by_source.items():
        g, document, slots = np.array(listed, dtype=np.int64).T
        parts.append(
            pieces_of_source(
                g=g,
                source=source,
                epoch=np.zeros_like(g),
                row=g * 10,
                document=document,
                offset=np.zeros_like(g),
                length=slots - 1,
                slots=slots,
                ends_document=slots > 4,
            )
        )
    return in_row_order(parts)


@pytest.mark.parametrize("descending", [False, True])
def test_pieces_stand_in_row_and_slot_order(
    rows: dict[int, list[tuple[int, int, int]]], descending: bool
) -> None:
    pieces = assemble(rows, descending=descending)
    splits = pieces.row_splits(40, 70)
    assert splits[0] == 0
    assert splits[-1] == len(pieces.g)
    assert row_starts(pieces.g).tolist() == splits[:-1].tolist()
    for g, listed in rows.items():
        here = slice(*splits[g - 40 : g - 38].tolist())
        assert pieces.g[here].tolist() == [g] * len(listed)
        assert pieces.source[here].tolist() == [source for source, _, _ in listed]
        assert pieces.document[here].tolist() == [document for _, document, _ in listed]
        slots = [slots for _, _, slots in listed]
        assert pieces.position[here].tolist() == [sum(slots[:i]) for i in range(len(slots))]


def test_rows_without_pieces_have_empty_splits() -> None:
    rows = {40: [(0, 1, 2)], 42: [(0, 3, 4), (0, 5, 6)]}
    pieces = assemble(rows, descending=False)
    assert pieces.row_splits(39, 44).tolist() == [0, 0, 1, 1, 3, 3]
    assert row_starts(pieces.g).tolist() == [0, 1]


def test_a_source_without_rows_adds_nothing() -> None:
    nothing = np.empty(0, dtype=np.int64)
    empty = pieces_of_source(
        g=nothing,
        source=1,
        epoch=nothing,
        row=nothing,
        document=nothing,
        offset=nothing,
        length=nothing,
        slots=nothing,
        ends_document=nothing.astype(np.bool_),
    )
    pieces = assemble({40: [(0, 1, 2)]}, descending=False)
    assert [c.tolist() for c in in_row_order([empty, pieces])] == [c.tolist() for c in pieces]
