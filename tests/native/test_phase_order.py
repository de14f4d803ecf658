"""Rows of a phase: against the reference, inverse, and no repeats across phases."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from megatron_ettin import native
from tests.native import reference
from tests.native.corpora import SEED, make_order

SOURCES = [
    reference.Source(id=2**64 - 1, quota=20, rows=100, drawn=0),
    reference.Source(id=5, quota=9, rows=7, drawn=3),
    reference.Source(id=0, quota=3, rows=1_000_000, drawn=999_990),
]


def test_locate_equals_the_reference() -> None:
    source, epoch, row = make_order(SOURCES).locate(np.arange(300))
    found = list(zip(source.tolist(), epoch.tolist(), row.tolist(), strict=True))
    assert found == [reference.locate(SEED, SOURCES, n) for n in range(300)]
    assert epoch.max() > 1  # the test reaches later epochs


def test_locate_depends_on_n_alone() -> None:
    order = make_order(SOURCES)
    n = np.arange(2000)
    source, epoch, row = order.locate(n)
    shuffled = np.random.default_rng(0).permutation(n)
    for values, at_once in zip(order.locate(shuffled), (source, epoch, row), strict=True):
        np.testing.assert_array_equal(values, np.asarray(at_once)[shuffled])


def test_find_undoes_locate() -> None:
    order = make_order(SOURCES)
    n = np.concatenate([np.arange(5000), [2**40, 2**40 + 12345]])
    np.testing.assert_array_equal(order.find(*order.locate(n)), n)


def test_find_knows_what_was_drawn_before() -> None:
    order = make_order(SOURCES)
    before = native.permute(7, native.permutation_key(SEED, 5, 0), np.array([0, 2, 3]))
    n = order.find(np.ones(3, np.int32), np.zeros(3, np.int64), before)
    assert n.tolist()[:2] == [-1, -1]
    assert n[2] == np.flatnonzero(order.locate(np.arange(32))[0] == 1)[0]


def test_threads_that_jump_between_epochs_share_one_order() -> None:
    """More epochs of a small pool than permutations are kept, in another order on every thread."""
    shared = make_order([*SOURCES[:1], reference.Source(id=5, quota=12, rows=7, drawn=3)])
    n = np.arange(30_000)
    index, epoch, row = shared.locate(n)
    assert len({*zip(index.tolist(), epoch.tolist(), strict=True)}) > 200

    def jump(seed: int) -> None:
        for picks in np.split(np.random.default_rng(seed).permutation(n), 30):
            np.testing.assert_array_equal(shared.locate(picks)[2], row[picks])
            np.testing.assert_array_equal(
                shared.find(index[picks], epoch[picks], row[picks]), picks
            )

    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(jump, seed) for seed in range(8)]:
            done.result()


def test_drawn_after_counts_the_located_rows() -> None:
    order = make_order(SOURCES)
    source, _, _ = order.locate(np.arange(200))
    for n in range(200):
        counted = np.bincount(source[:n], minlength=3) + [s.drawn for s in SOURCES]
        assert order.drawn_after(n).tolist() == counted.tolist()


def test_phases_cut_anywhere_neither_repeat_nor_skip_rows() -> None:
    rows = [100, 37, 50]
    drawn = [0, 0, 0]
    seen: list[list[tuple[int, int]]] = [[], [], []]
    # Lengths that are no multiple of the period; the blend changes, a source pauses and returns.
    for length, quotas in [(53, [4, 2, 2]), (91, [8, 0, 8]), (33, [1, 14, 1]), (200, [4, 2, 2])]:
        active = [s for s in range(3) if quotas[s]]
        order = native.PhaseOrder(
            seed=SEED,
            source_ids=active,
            quotas=[quotas[s] for s in active],
            rows=[rows[s] for s in active],
            drawn=[drawn[s] for s in active],
        )
        for index, epoch, row in zip(*order.locate(np.arange(length)), strict=True):
            seen[active[index]].append((int(epoch), int(row)))
        for index, count in enumerate(order.drawn_after(length).tolist()):
            drawn[active[index]] = count
    for s in range(3):
        assert len(seen[s]) == drawn[s] == len(set(seen[s]))
        full_epochs = drawn[s] // rows[s]
        expected = {(epoch, row) for epoch in range(full_epochs) for row in range(rows[s])}
        assert expected <= set(seen[s])


def test_epochs_have_different_orders() -> None:
    order = native.PhaseOrder(seed=1, source_ids=[1], quotas=[1], rows=[500], drawn=[0])
    _, _, row = order.locate(np.arange(1000))
    assert (row[:500] == row[500:]).sum() < 10


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rows", [0], r"rows\[0\] is 0"),
        ("drawn", [-1], r"drawn\[0\] is -1"),
        ("quotas", [3], "power of two"),
        ("quotas", [1, 1], "one value per source"),
    ],
)
def test_bad_source_is_refused(field: str, value: list[int], message: str) -> None:
    fields = {"source_ids": [1], "quotas": [1], "rows": [5], "drawn": [0], field: value}
    with pytest.raises(ValueError, match=message):
        native.PhaseOrder(seed=0, **fields)


def test_bad_entries_are_named() -> None:
    order = make_order(SOURCES)
    with pytest.raises(ValueError, match=r"n\[1\] is -1"):
        order.locate(np.array([0, -1]))
    with pytest.raises(ValueError, match=r"row\[0\] is 100"):
        order.find(np.array([0], np.int32), np.array([0]), np.array([100]))
    with pytest.raises(ValueError, match=r"source_index\[0\] is 3"):
        order.find(np.array([3], np.int32), np.array([0]), np.array([0]))
    with pytest.raises(ValueError, match="n is -1"):
        order.drawn_after(-1)
