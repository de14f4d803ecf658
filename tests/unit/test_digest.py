"""Digests as a run uses them: sums that wrap, equal for any grouping, read back from text."""

import dataclasses

import numpy as np
import pytest

from megatron_ettin import native
from megatron_ettin.objectives import (
    Batch,
    CausalLM,
    MaskedDiffusion,
    MaskedLM,
    MaskedNextToken,
    Objective,
)
from megatron_ettin.order.digest import format_digest, mask_digest, token_digest
from megatron_ettin.rows import Rows
from tests.unit.made_rows import IDS, SEQ_LENGTH, make_rows


def make_batch(objective: Objective, rows: Rows) -> Batch:
    return objective.make_batch(rows, phase="pretrain", mask_seed=3, ids=IDS)


def row_values(rows: Rows) -> list[int]:
    """Return the rows' token digests as 128-bit integers, from the lanes."""
    values = native.token_digests(rows.g, rows.tokens, rows.cu_seqlens, rows.num_tokens, SEQ_LENGTH)
    return [int(low) + (int(high) << 64) for low, high in values]


def test_lanes_are_summed_apart_and_wrap_around() -> None:
    wrapped = 0
    for first_g in range(20):
        rows = make_rows(first_g)
        values = row_values(rows)
        lanes = [sum(v % 2**64 for v in values), sum(v >> 64 for v in values)]
        wrapped += sum(lane >= 2**64 for lane in lanes)
        assert token_digest(rows, rows.tokens).tolist() == [lane % 2**64 for lane in lanes]
    assert wrapped > 5  # or the sums above never left 64 bits


@pytest.mark.parametrize(
    "objective",
    [MaskedLM(mask_rate=0.5), CausalLM(), MaskedNextToken(mask_rate=0.5), MaskedDiffusion()],
)
def test_the_mask_digest_is_the_sum_of_its_rows(objective: Objective) -> None:
    rows = make_rows()
    whole = mask_digest(make_batch(objective, rows))
    parts = np.zeros(1, np.uint64)
    for idle in (0, 1):
        g = rows.g.copy()
        g[idle] = -1
        parts += mask_digest(make_batch(objective, dataclasses.replace(rows, g=g)))
    assert whole.dtype == np.uint64
    assert whole.shape == (1,)
    assert np.array_equal(parts, whole)


def test_twins_share_tokens_but_not_masks() -> None:
    rows = make_rows()
    masked, causal = (make_batch(o, rows) for o in (MaskedLM(mask_rate=0.5), CausalLM()))
    assert mask_digest(masked) != mask_digest(causal)


def test_a_digest_is_written_high_lane_first() -> None:
    assert format_digest((0xABC, 2**64 - 1)) == "ffffffffffffffff0000000000000abc"
