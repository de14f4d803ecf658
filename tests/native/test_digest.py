"""Digests of rows: against the reference's bytes, additive, and different for different rows."""

import random
from typing import Any

import numpy as np
import pytest

from megatron_ettin import native
from tests.native import reference
from tests.native.corpora import SEGMENTS, SEQ_LENGTH, plan_short_rows


def reference_rows(lengths: list[int], specials: str, pack: str) -> list[list[reference.Piece]]:
    return reference.plan_rows(
        lengths,
        0,
        len(lengths),
        SEQ_LENGTH,
        pack=pack,
        specials=specials,
        min_doc_tokens=1,
        max_segments=SEGMENTS if pack == "bfd" else 1,
    )


@pytest.mark.parametrize("pack", ["bfd", "concat", "none"])
def test_order_digests_equal_the_reference(pack: str) -> None:
    chance = random.Random(5)
    ids = [2**64 - 1, 12345]
    rules = ["add", "present"]
    corpora = [[chance.randrange(60) for _ in range(200)] for _ in ids]
    plans = [plan_short_rows(*each, pack) for each in zip(corpora, rules, strict=True)]
    rows = [reference_rows(*each, pack) for each in zip(corpora, rules, strict=True)]
    picks = [(s, e, r) for s in (0, 1) for e in (0, 2**40) for r in range(plans[s].num_rows)]
    chance.shuffle(picks)
    index, epoch, row = (np.array(column) for column in zip(*picks, strict=True))
    g = np.array([chance.randrange(2**60) for _ in picks])
    values = native.order_digests(
        plans, g, np.array(ids, np.uint64), index.astype(np.int32), epoch, row
    )
    assert values.shape == (len(picks), 2)
    for i, (s, e, r) in enumerate(picks):
        content = reference.order_row_bytes(int(g[i]), ids[s], e, r, rows[s][r])
        assert values[i].tolist() == reference.hash_lanes(content)


def make_stream(seed: int = 0) -> dict[str, Any]:
    """Return four rows: one full piece, two pieces and padding, idle, three pieces without."""
    rng = np.random.default_rng(seed)
    pieces = [[SEQ_LENGTH], [5, 9], [], [10, 8, 6]]
    lengths = [
        length
        for row in pieces
        for length in [*row, SEQ_LENGTH - sum(row), *[0] * (SEGMENTS - len(row))]
    ]
    return {
        "g": np.array([7, 2**40, -1, 9]),
        "tokens": rng.integers(0, 2**32, 4 * SEQ_LENGTH),
        "cu_seqlens": np.cumsum([0, *lengths]).astype(np.int32),
        "num_tokens": np.array([sum(row) for row in pieces]),
        "seq_length": SEQ_LENGTH,
    }


def test_token_digests_equal_the_reference() -> None:
    stream = make_stream()
    values = native.token_digests(**stream)
    for r, cuts in enumerate(([], [5], None, [10, 18])):
        if cuts is None:
            assert values[r].tolist() == [0, 0]
            continue
        used = int(stream["num_tokens"][r])
        row = stream["tokens"][r * SEQ_LENGTH :][:used]
        pieces = [piece.tolist() for piece in np.split(row, cuts)]
        content = reference.token_row_bytes(int(stream["g"][r]), pieces)
        assert values[r].tolist() == reference.hash_lanes(content)


def make_scored(seed: int = 0) -> dict[str, Any]:
    stream = make_stream(seed)
    rng = np.random.default_rng(seed + 1)
    return {
        "g": stream["g"],
        "inputs": stream["tokens"],
        "labels": rng.integers(0, 2**32 - 1, 4 * SEQ_LENGTH),
        "loss_mask": rng.random(4 * SEQ_LENGTH) < 0.3,
        "num_tokens": stream["num_tokens"],
        "seq_length": SEQ_LENGTH,
    }


@pytest.mark.parametrize("weight", [None, 1.0, 3.25])
def test_mask_digests_equal_the_reference(weight: float | None) -> None:
    scored = make_scored()
    weights = None
    if weight is not None:
        # Where nothing is scored a weight says nothing.
        weights = np.where(scored["loss_mask"], weight, 7.0).astype(np.float32)
    values = native.mask_digests(**scored, weights=weights)
    for r, g in enumerate(scored["g"].tolist()):
        if g < 0:
            assert values[r] == 0
            continue
        part = slice(r * SEQ_LENGTH, r * SEQ_LENGTH + int(scored["num_tokens"][r]))
        labels = [
            label if is_scored else None
            for label, is_scored in zip(
                scored["labels"][part].tolist(), scored["loss_mask"][part].tolist(), strict=True
            )
        ]
        content = reference.mask_row_bytes(
            g,
            scored["inputs"][part].tolist(),
            labels,
            None if weights is None else weights[part].tolist(),
        )
        assert values[r] == reference.hash_lanes(content)[0]


def test_what_is_not_scored_and_padding_do_not_count() -> None:
    scored = make_scored()
    free = ~scored["loss_mask"]
    free[SEQ_LENGTH + 14 : 3 * SEQ_LENGTH] = True  # the padding of row 1, and row 2, which is idle
    mask = scored["loss_mask"] & ~free
    other = {**scored, "loss_mask": mask, "labels": np.where(free, -100, scored["labels"])}
    other["inputs"] = scored["inputs"].copy()
    other["inputs"][SEQ_LENGTH + 14 : 3 * SEQ_LENGTH] = 0
    np.testing.assert_array_equal(native.mask_digests(**other), native.mask_digests(**scored))


def test_every_part_of_a_masked_row_counts() -> None:
    scored = make_scored()
    before = native.mask_digests(**scored)
    position = int(np.flatnonzero(scored["loss_mask"])[0])
    scored["weights"] = np.ones(len(scored["inputs"]), np.float32)
    np.testing.assert_array_equal(native.mask_digests(**scored), before)
    changes = {
        "inputs": scored["inputs"][position] ^ 1,
        "labels": scored["labels"][position] ^ 1,
        "loss_mask": False,
        "weights": 1.5,
    }
    for name, value in changes.items():
        values = scored[name].copy()
        values[position] = value
        after = native.mask_digests(**{**scored, name: values})
        assert after[0] != before[0], name
        np.testing.assert_array_equal(after[1:], before[1:])


def test_no_rows_have_no_digests() -> None:
    none = np.zeros(0, np.int64)
    borders = np.zeros(1, np.int32)
    assert native.token_digests(none, none, borders, none, 8).shape == (0, 2)
    assert native.mask_digests(none, none, none, none.astype(bool), none, 8).shape == (0,)
    ids = none.astype(np.uint64)
    assert native.order_digests([], none, ids, none.astype(np.int32), none, none).shape == (0, 2)


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("tokens", 30, -1, r"row 1 \(g = 1099511627776\): token -1 in slot 6 is no token id"),
        ("tokens", 30, 2**32, "token 4294967296 in slot 6 is no token id"),
        ("num_tokens", 1, 13, "row 1.* do not end where its 13 tokens"),
        ("num_tokens", 1, 25, "row 1.* 25 tokens in a row of 24 slots"),
        ("num_tokens", 0, -1, "row 0.* -1 tokens in a row of 24 slots"),
        ("cu_seqlens", 5, 23, "row 1.* segments in cu_seqlens do not end"),
        ("cu_seqlens", 16, 95, "row 3.* segments in cu_seqlens do not end"),
        ("cu_seqlens", 8, 50, "row 1.* segments in cu_seqlens do not end"),
    ],
)
def test_a_bad_stream_is_refused(name: str, index: int, value: int, message: str) -> None:
    stream = make_stream()
    stream[name] = stream[name].copy()
    stream[name][index] = value
    with pytest.raises(ValueError, match=message):
        native.token_digests(**stream)


def test_segments_that_are_no_multiple_of_the_rows_are_refused() -> None:
    stream = make_stream()
    with pytest.raises(ValueError, match="cu_seqlens has 15 segments for 4 rows"):
        native.token_digests(**{**stream, "cu_seqlens": stream["cu_seqlens"][:-1]})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("inputs", 2**32, "row 0 .*: input 4294967296 in slot"),
        ("labels", -100, "row 0 .*: label -100 in slot"),
        ("labels", 2**32 - 1, "row 0 .*: label 4294967295 in slot"),
    ],
)
def test_a_bad_label_or_input_is_refused(name: str, value: int, message: str) -> None:
    scored = make_scored()
    values = scored[name].copy()
    values[np.flatnonzero(scored["loss_mask"])[0]] = value
    with pytest.raises(ValueError, match=message):
        native.mask_digests(**{**scored, name: values})


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("source_index", 1, ValueError, r"row 0 \(g = 5\): no source index 1"),
        ("source_index", -1, ValueError, "no source index -1"),
        ("epoch", -1, ValueError, "epoch -1 is < 0"),
        ("row", 10**6, IndexError, "row 1000000 of a plan"),
    ],
)
def test_a_bad_origin_is_refused(
    name: str, value: int, error: type[Exception], message: str
) -> None:
    origin = {"source_index": np.zeros(1, np.int32), "epoch": np.zeros(1, np.int64)}
    origin["row"] = np.zeros(1, np.int64)
    origin[name][0] = value
    plan = plan_short_rows([10, 20, 30], "add")
    with pytest.raises(error, match=message):
        native.order_digests([plan], np.array([5]), np.array([1], np.uint64), **origin)
    if name != "row":
        with pytest.raises(ValueError, match="source_ids has 2 values, expected 1"):
            native.order_digests([plan], np.array([5]), np.array([1, 2], np.uint64), **origin)


def test_an_idle_row_comes_from_nowhere() -> None:
    nowhere = np.array([-1])
    plan = plan_short_rows([10, 20, 30], "add")
    values = native.order_digests(
        [plan], nowhere, np.array([1], np.uint64), nowhere.astype(np.int32), nowhere, nowhere
    )
    assert values.tolist() == [[0, 0]]
