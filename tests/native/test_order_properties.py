"""Properties of permutations, of phases and of digests, for random sizes, blends and cuts."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from megatron_ettin import native
from tests.native import reference
from tests.native.corpora import SEED, make_order, plan_short_rows
from tests.native.reference import Source
from tests.properties import cases, check_all

WORDS = st.integers(0, 2**64 - 1)
NEAR_POWERS = st.builds(
    lambda exponent, step: 2**exponent + step, st.integers(2, 40), st.sampled_from((-1, 0, 1))
)
SIZES = st.one_of(st.integers(1, 5000), NEAR_POWERS, st.integers(65_537, 2**62))


# Permutations


@st.composite
def places_of_a_permutation(draw: st.DrawFn) -> tuple[int, int, list[int]]:
    n = draw(SIZES)
    inside = st.integers(0, n - 1)
    return n, draw(WORDS), [0, n - 1, *draw(st.lists(inside, max_size=20))]


@cases(200)
def test_a_permutation_and_its_inverse(count: int) -> None:
    def check(case: tuple[int, int, list[int]]) -> None:
        n, key, places = case
        index = np.array(places)
        values = native.permute(n, key, index)
        assert 0 <= values.min() <= values.max() < n
        assert len(set(values.tolist())) == len(set(places))
        assert native.unpermute(n, key, values).tolist() == places
        assert native.permute(n, key, native.unpermute(n, key, index)).tolist() == places
        if n <= 5000:
            whole = native.permute(n, key, np.arange(n))
            assert np.bincount(whole, minlength=n).tolist() == [1] * n

    check_all(check, count, places_of_a_permutation())


@cases(100)
def test_a_permutation_equals_the_reference(count: int) -> None:
    def check(case: tuple[int, int, list[int]]) -> None:
        n, key, places = case
        if 1000 < n <= 65_536:
            n, places = n % 1000 + 1, [0]  # the reference fills a table for every place
        values = native.permute(n, key, np.array(places)).tolist()
        assert values[:4] == [reference.permute(n, key, place) for place in places[:4]]

    check_all(check, count, places_of_a_permutation())


# Phases


def quotas(count: int) -> st.SearchStrategy[list[int]]:
    """Draw `count` quotas >= 1 that sum to a power of two."""

    def split(exponent: int, data: list[int]) -> list[int]:
        period = 2**exponent
        cuts = sorted({1 + value % (period - 1) for value in data}) if period > 1 else []
        borders = [0, *cuts, period]
        parts = [end - begin for begin, end in pairwise(borders)]
        while len(parts) < count:  # equal cuts: divide the largest part
            largest = parts.index(max(parts))
            parts[largest : largest + 1] = [1, parts[largest] - 1]
        return parts

    smallest = (count - 1).bit_length()
    values = st.lists(st.integers(0, 2**20), min_size=count - 1, max_size=count - 1)
    return st.builds(split, st.integers(smallest, 7), values)


@st.composite
def sources(draw: st.DrawFn, largest: int = 10**9) -> list[Source]:
    ids = draw(st.lists(WORDS, min_size=1, max_size=4, unique=True))
    rows = st.one_of(st.integers(1, 30), st.integers(1, largest))
    drawn = st.one_of(st.just(0), st.integers(0, 100), st.integers(0, 3 * largest))
    return [
        Source(id=number, quota=quota, rows=draw(rows), drawn=draw(drawn))
        for number, quota in zip(ids, draw(quotas(len(ids))), strict=True)
    ]


@cases(60)
def test_a_phase_equals_the_reference(count: int) -> None:
    def check(case: list[Source], number: int) -> None:
        # The reference fills a table for every row it locates.
        case = [s if s.rows > 65_536 else replace(s, rows=s.rows % 200 + 1) for s in case]
        found = [column.tolist() for column in make_order(case).locate(np.arange(number + 1))]
        for n in {0, number // 2, number}:
            assert tuple(column[n] for column in found) == reference.locate(SEED, case, n)

    check_all(check, count, sources(), st.integers(0, 400))


@cases(100)
def test_find_undoes_locate(count: int) -> None:
    def check(case: list[Source], numbers: list[int]) -> None:
        order = make_order(case)
        assert order.find(*order.locate(np.array(numbers))).tolist() == numbers

    numbers = st.lists(st.one_of(st.integers(0, 1000), st.integers(0, 2**40)), min_size=1)
    check_all(check, count, sources(), numbers)


@cases(100)
def test_locate_undoes_find(count: int) -> None:
    def check(case: list[Source], epoch: int, row: int) -> None:
        order = make_order(case)
        index = np.arange(len(case), dtype=np.int32)
        epochs = np.full(len(case), epoch)
        rows = np.array([row % source.rows for source in case])
        n = order.find(index, epochs, rows)
        for s, source in enumerate(case):
            if n[s] < 0:  # drawn before the phase began
                place = native.unpermute(
                    source.rows, native.permutation_key(SEED, source.id, epoch), rows[s : s + 1]
                )
                assert epoch * source.rows + place[0] < source.drawn
                continue
            assert [int(c[0]) for c in order.locate(n[s : s + 1])] == [s, epoch, rows[s]]

    check_all(check, count, sources(), st.integers(0, 1000), st.integers(0, 2**40))


@st.composite
def phases(draw: st.DrawFn) -> tuple[list[int], list[tuple[int, dict[int, int]]]]:
    """Draw the rows of pools, and phases: a length, and a quota for each pool that is used."""
    rows = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    pools = st.lists(st.sampled_from(range(len(rows))), min_size=1, unique=True)
    result = []
    for _ in range(draw(st.integers(1, 4))):
        used = draw(pools)
        shares = dict(zip(used, draw(quotas(len(used))), strict=True))
        result.append((draw(st.integers(0, 150)), shares))
    return rows, result


def open_phases(
    rows: list[int], parts: list[tuple[int, dict[int, int]]]
) -> list[tuple[native.PhaseOrder, list[int], int]]:
    """Return each phase's order, its pools by source, and its length; draws are carried over."""
    drawn = [0] * len(rows)
    opened = []
    for length, shares in parts:
        used = list(shares)
        order = make_order(
            [Source(id=s, quota=shares[s], rows=rows[s], drawn=drawn[s]) for s in used]
        )
        for s, value in zip(used, order.drawn_after(length).tolist(), strict=True):
            drawn[s] = value
        opened.append((order, used, length))
    return opened


@cases(100)
def test_phases_cut_anywhere_draw_every_row_once_an_epoch(count: int) -> None:
    def check(case: tuple[list[int], list[tuple[int, dict[int, int]]]]) -> None:
        rows, parts = case
        seen: dict[int, list[tuple[int, int]]] = {s: [] for s in range(len(rows))}
        for order, used, length in open_phases(rows, parts):
            for index, epoch, row in zip(
                *(column.tolist() for column in order.locate(np.arange(length))), strict=True
            ):
                seen[used[index]].append((epoch, row))
        for s, draws in seen.items():
            epochs = [epoch for epoch, _ in draws]
            assert epochs == [i // rows[s] for i in range(len(draws))]
            for epoch in set(epochs):
                held = [row for e, row in draws if e == epoch]
                assert len(set(held)) == len(held)
                assert len(held) == rows[s] or epoch == epochs[-1]

    check_all(check, count, phases())


@cases(60)
def test_a_row_is_found_in_the_phase_that_drew_it_and_in_no_other(count: int) -> None:
    def check(case: tuple[list[int], list[tuple[int, dict[int, int]]]]) -> None:
        opened = open_phases(*case)
        for drawn_in, (order, used, length) in enumerate(opened):
            index, epoch, row = order.locate(np.arange(length))
            for phase, (other, pools, end) in enumerate(opened):
                for s, pool in enumerate(used):
                    mine = np.flatnonzero(index == s)
                    if pool not in pools:
                        continue
                    indices = np.full(len(mine), pools.index(pool), np.int32)
                    n = other.find(indices, epoch[mine], row[mine])
                    if phase == drawn_in:
                        assert n.tolist() == mine.tolist()
                    elif phase > drawn_in:
                        assert (n == -1).all()
                    else:
                        assert (n >= end).all()

    check_all(check, count, phases())


# Digests


@st.composite
def streams(draw: st.DrawFn) -> dict[str, Any]:
    """Draw rows of at most three documents each, no two of them equal, as token_digests takes."""
    length, segments = 12, 4
    g = draw(st.lists(st.integers(0, 2**62), min_size=2, max_size=6, unique=True))
    tokens, borders, used = [], [0], []
    for r in range(len(g)):
        pieces = draw(st.lists(st.integers(1, 4), min_size=2, max_size=3))
        ids = draw(st.lists(st.integers(0, 2**32 - 1), min_size=length, max_size=length))
        tokens += ids
        used.append(sum(pieces))
        ends = np.cumsum(pieces).tolist()
        borders += [r * length + end for end in ends + [length] * (segments - len(ends))]
    return {
        "g": np.array(g),
        "tokens": np.array(tokens),
        "cu_seqlens": np.array(borders, np.int32),
        "num_tokens": np.array(used),
        "seq_length": length,
    }


def total(stream: dict[str, Any]) -> list[int]:
    return native.token_digests(**stream).sum(axis=0, dtype=np.uint64).tolist()


@cases(100)
def test_token_digests_add_up_over_any_grouping(count: int) -> None:
    def check(stream: dict[str, Any], order: list[int], cut: int) -> None:
        rows = len(stream["g"])
        picks = sorted(range(rows), key=lambda r: order[r])
        length = stream["seq_length"]
        segments = (len(stream["cu_seqlens"]) - 1) // rows
        summed = np.zeros(2, np.uint64)
        for part in (picks[: cut % rows], picks[cut % rows :]):
            borders = [0]
            for place, r in enumerate(part):
                ends = stream["cu_seqlens"][r * segments + 1 : (r + 1) * segments + 1]
                borders += (ends + (place - r) * length).tolist()
            summed += native.token_digests(
                g=stream["g"][part],
                tokens=stream["tokens"].reshape(rows, length)[part].ravel(),
                cu_seqlens=np.array(borders, np.int32),
                num_tokens=stream["num_tokens"][part],
                seq_length=length,
            ).sum(axis=0, dtype=np.uint64)
        assert summed.tolist() == total(stream)

    order = st.lists(st.integers(0, 100), min_size=6, max_size=6)
    check_all(check, count, streams(), order, st.integers(0, 6))


@cases(100)
def test_one_token_changes_the_token_digest_unless_it_is_padding(count: int) -> None:
    def check(stream: dict[str, Any], place: int, change: int) -> None:
        place %= len(stream["tokens"])
        row, slot = divmod(place, stream["seq_length"])
        tokens = stream["tokens"].copy()
        tokens[place] ^= change
        changed = total({**stream, "tokens": tokens}) != total(stream)
        assert changed == (slot < stream["num_tokens"][row])

    check_all(check, count, streams(), st.integers(0, 100), st.integers(1, 2**32 - 1))


@cases(100)
def test_swapped_rows_and_documents_change_the_token_digest(count: int) -> None:
    def check(stream: dict[str, Any]) -> None:
        length, rows = stream["seq_length"], len(stream["g"])
        segments = (len(stream["cu_seqlens"]) - 1) // rows
        # The first two rows under each other's g.
        g = stream["g"].copy()
        g[:2] = g[1::-1]
        same = stream["num_tokens"][0] == stream["num_tokens"][1] and np.array_equal(
            stream["cu_seqlens"][:segments],
            stream["cu_seqlens"][segments : 2 * segments] - length,
        )
        used = int(stream["num_tokens"][0])
        same = same and np.array_equal(
            stream["tokens"][:used], stream["tokens"][length : length + used]
        )
        assert (total({**stream, "g": g}) != total(stream)) == (not same)
        # The first two documents of the first row change places.
        one, two = (int(border) for border in stream["cu_seqlens"][1:3])
        tokens, borders = stream["tokens"].copy(), stream["cu_seqlens"].copy()
        tokens[:two] = np.roll(tokens[:two], two - one)
        borders[1] = two - one
        same = np.array_equal(tokens, stream["tokens"]) and one == borders[1]
        swapped = {**stream, "tokens": tokens, "cu_seqlens": borders}
        assert (total(swapped) != total(stream)) == (not same)
        # The same tokens, cut into documents one slot later.
        if two - one > 1:
            borders = stream["cu_seqlens"].copy()
            borders[1] += 1
            assert total({**stream, "cu_seqlens": borders}) != total(stream)

    check_all(check, count, streams())


def order_total(plan: native.RowPlan, rows: list[int], g: list[int]) -> list[int]:
    picked = np.array(rows)
    values = native.order_digests(
        [plan],
        np.array(g),
        np.array([77], np.uint64),
        np.zeros(len(rows), np.int32),
        np.zeros(len(rows), np.int64),
        picked,
    )
    return values.sum(axis=0, dtype=np.uint64).tolist()


@cases(100)
def test_swapped_rows_and_documents_change_the_order_digest(count: int) -> None:
    def check(lengths: list[int], specials: str, one: int, two: int) -> None:
        plan = plan_short_rows(lengths, specials)
        number = plan.num_rows
        rows = list(range(number))
        before = order_total(plan, rows, rows)
        assert order_total(plan, rows[::-1], rows[::-1]) == before
        one, two = one % number, two % number
        swapped = rows.copy()
        swapped[one], swapped[two] = two, one
        assert (order_total(plan, swapped, rows) != before) == (one != two)
        # Two documents of unequal length change places in the corpus.
        a, b = one % len(lengths), two % len(lengths)
        other = lengths.copy()
        other[a], other[b] = lengths[b], lengths[a]
        other_plan = plan_short_rows(other, specials)
        rows = list(range(other_plan.num_rows))
        after = order_total(other_plan, rows, rows)
        assert (after != before) == (lengths[a] != lengths[b])

    lengths = st.lists(st.integers(1, 60), min_size=2, max_size=30)
    place = st.integers(0, 1000)
    check_all(check, count, lengths, st.sampled_from(("add", "present")), place, place)


def test_a_property_that_does_not_hold_is_noticed() -> None:
    def check(n: int) -> None:
        assert n < 1000

    with pytest.raises(AssertionError, match="1000"):
        check_all(check, 100, st.integers(0, 10_000))
