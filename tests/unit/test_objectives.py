"""Objectives against slow references, on hand-made rows."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from megatron_ettin.objectives import (
    CausalLM,
    MaskedDiffusion,
    MaskedLM,
    MaskedNextToken,
    Objective,
)
from megatron_ettin.objectives.masked_diffusion import noise_levels
from megatron_ettin.order import mask_digest, token_digest
from megatron_ettin.rows import LAST_PIECE, PADDING, Rows
from tests.native import reference
from tests.properties import cases, check_all
from tests.unit.made_rows import IDS, make_rows

OBJECTIVES = (
    MaskedLM(mask_rate=0.9),
    CausalLM(),
    MaskedNextToken(mask_rate=0.9),
    MaskedDiffusion(),
)


def batch_of(objective: Objective, rows: Rows, phase: str = "pretrain"):  # type: ignore[no-untyped-def]
    return objective.make_batch(rows, phase=phase, mask_seed=3, ids=IDS)


def test_causal_labels_are_the_next_token_of_the_same_piece() -> None:
    rows = make_rows()
    batch = batch_of(CausalLM(), rows)
    scored = {}
    for begin, end, is_cut in ((0, 16, True), (16, 21, False), (21, 28, False)):
        for p in range(begin, end - 1):
            if not (is_cut and p + 1 == end - 1):  # a cut piece's [SEP] ends no document
                scored[p] = rows.tokens[p + 1]
    assert np.flatnonzero(batch.loss_mask).tolist() == sorted(scored)
    assert batch.labels[batch.loss_mask].tolist() == [scored[p] for p in sorted(scored)]
    assert np.array_equal(batch.tokens, rows.tokens)


def test_specials_that_are_present_in_the_corpus_are_scored_as_they_are() -> None:
    rows = make_rows()
    present = Rows(**{**vars(rows), "specials": "present"})
    assert (
        batch_of(CausalLM(), present).loss_mask.sum()
        == batch_of(CausalLM(), rows).loss_mask.sum() + 1
    )


def test_masked_labels_are_the_originals_and_specials_are_left_alone() -> None:
    rows = make_rows()
    batch = batch_of(MaskedLM(mask_rate=0.9), rows)
    assert batch.loss_mask.sum() > 10
    assert np.array_equal(batch.labels[batch.loss_mask], rows.tokens[batch.loss_mask])
    assert np.array_equal(batch.tokens[~batch.loss_mask], rows.tokens[~batch.loss_mask])
    assert not batch.loss_mask[np.isin(rows.tokens, IDS.special)].any()


def test_the_mask_rate_of_a_phase_replaces_the_general_one() -> None:
    objective = MaskedLM(mask_rate=0.01, mask_rate_by_phase={"decay": 0.9})
    rows = make_rows()
    assert batch_of(objective, rows, "decay").loss_mask.sum() > 10
    assert batch_of(objective, rows, "pretrain").loss_mask.sum() < 5


def random_rows(lengths: list[int], idle: bool, seed: int) -> Rows:
    """Return a row of segments of these lengths, padding after them, and an idle row before it.

    As with `pack: concat`, a segment may begin with any token, special or not.
    """
    rng = np.random.default_rng(seed)
    used, seq_length = sum(lengths), sum(lengths) + 3
    tokens = np.full(2 * seq_length, IDS.pad)
    tokens[seq_length : seq_length + used] = rng.integers(0, 100, used)
    segments = [seq_length, *[0] * len(lengths), *lengths, 3]
    return Rows(
        g=np.array([-1, 3 if not idle else -1]),
        tokens=tokens,
        position_ids=np.concatenate([np.arange(n) for n in segments]),
        cu_seqlens=np.concatenate([[0], np.cumsum(segments)]).astype(np.int32),
        segment_kind=np.array(
            [PADDING] * (len(lengths) + 1) + [LAST_PIECE] * len(lengths) + [PADDING], np.uint8
        ),
        num_tokens=np.array([0, used]),
        seq_length=seq_length,
        specials="present",
    )


def expected_next_token(rows: Rows, rate: float) -> tuple[list[int], dict[int, int]]:
    """Return the inputs, and the label of each scored position, slot by slot."""
    inputs, labels = rows.tokens.tolist(), {}
    for r, g in enumerate(rows.g.tolist()):
        row = slice(r * rows.seq_length, (r + 1) * rows.seq_length)
        masked, selected = reference.mask_row(
            rows.tokens[row].tolist(),
            g,
            mask_seed=3,
            mask_rate=rate,
            mask_id=IDS.mask,
            vocab_size=IDS.vocab_size,
            special_ids=IDS.special,
        )
        for p in range(rows.seq_length):
            slot = row.start + p
            if selected[p] and rows.position_ids[slot] > 0:
                inputs[slot] = masked[p]
                labels[slot - 1] = int(rows.tokens[slot])
    return inputs, labels


@cases(60)
def test_masked_tokens_are_predicted_from_the_position_before(count: int) -> None:
    def check(lengths: list[int], idle: bool, seed: int, rate: float) -> None:
        rows = random_rows(lengths, idle, seed)
        objective = MaskedNextToken(mask_rate=rate)
        batch = batch_of(objective, rows)
        inputs, labels = expected_next_token(rows, rate)
        assert batch.tokens.tolist() == inputs
        scored = np.flatnonzero(batch.loss_mask)
        assert dict(zip(scored.tolist(), batch.labels[scored].tolist(), strict=True)) == labels
        assert np.array_equal(objective.original_tokens(batch), rows.tokens)

    lengths = st.lists(st.integers(1, 40), max_size=8)
    rates = st.sampled_from((0.15, 0.5, 0.999))
    check_all(check, count, lengths, st.booleans(), st.integers(0, 2**32), rates)


def test_a_segment_without_special_tokens_keeps_its_first_token() -> None:
    rows = random_rows([1, 30, 1, 30], idle=False, seed=1)
    batch = batch_of(MaskedNextToken(mask_rate=0.999), rows)
    firsts = rows.position_ids == 0
    assert np.array_equal(batch.tokens[firsts], rows.tokens[firsts])
    assert batch_of(MaskedLM(mask_rate=0.999), rows).loss_mask[firsts].any()


def test_masks_are_those_of_masked_language_modelling() -> None:
    """One step to the left; [CLS] begins each piece, so nothing is left out."""
    rows = make_rows()
    masked, shifted = (batch_of(o, rows) for o in (OBJECTIVES[0], OBJECTIVES[2]))
    assert np.array_equal(masked.tokens, shifted.tokens)
    assert np.array_equal(masked.loss_mask[1:], shifted.loss_mask[:-1])
    assert mask_digest(masked) != mask_digest(shifted)


@cases(60)
def test_diffusion_masks_and_weighs_each_row_by_its_level(count: int) -> None:
    def check(lengths: list[int], idle: bool, seed: int) -> None:
        rows = random_rows(lengths, idle, seed)
        batch = batch_of(MaskedDiffusion(), rows)
        assert batch.weights is not None
        assert batch.counted is not None
        for r, g in enumerate(rows.g.tolist()):
            row = slice(r * rows.seq_length, (r + 1) * rows.seq_length)
            tokens = rows.tokens[row].tolist()
            inputs, labels = reference.diffused_labels(
                tokens,
                g,
                mask_seed=3,
                mask_id=IDS.mask,
                vocab_size=IDS.vocab_size,
                special_ids=IDS.special,
            )
            assert batch.tokens[row].tolist() == inputs
            scored = [label is not None for label in labels]
            assert batch.loss_mask[row].tolist() == scored
            assert batch.labels[row][scored].tolist() == [x for x in labels if x is not None]
            level = float(reference.noise_level(max(g, 0), mask_seed=3))
            assert set(batch.weights[row][scored].tolist()) <= {float(np.float32(1 / level))}
            assert batch.counted[row].tolist() == [t not in IDS.special for t in tokens]
        assert np.array_equal(MaskedDiffusion().original_tokens(batch), rows.tokens)

    lengths = st.lists(st.integers(1, 40), max_size=8)
    check_all(check, count, lengths, st.booleans(), st.integers(0, 2**32))


@pytest.mark.parametrize("begin", [0, 77, 10**12])
@pytest.mark.parametrize("rows", [4, 31, 512])
def test_the_levels_of_any_consecutive_rows_are_spread_evenly(begin: int, rows: int) -> None:
    levels = np.sort(noise_levels(np.arange(begin, begin + rows), 3))
    assert levels[0] > 0.0
    assert levels[-1] <= 1.0
    gaps = np.diff([*levels, levels[0] + 1.0])
    assert gaps.max() < 1.9 / rows
    assert noise_levels(np.arange(4), 4).tolist() != noise_levels(np.arange(4), 3).tolist()


def test_weights_make_each_token_count_once_on_average() -> None:
    """A loss of 1 nat at every masked token is 1 nat per token: the estimate has no bias."""
    seq_length, rows = 64, 4096
    tokens = np.random.default_rng(0).integers(0, 95, rows * seq_length)
    batch = batch_of(
        MaskedDiffusion(),
        Rows(
            g=np.arange(rows),
            tokens=tokens,
            position_ids=np.tile(np.arange(seq_length), rows),
            cu_seqlens=np.arange(0, rows * seq_length + 1, seq_length, dtype=np.int32),
            segment_kind=np.full(rows, LAST_PIECE, np.uint8),
            num_tokens=np.full(rows, seq_length),
            seq_length=seq_length,
            specials="present",
        ),
    )
    assert batch.weights is not None
    total = batch.weights[batch.loss_mask].sum(dtype=np.float64)
    # At level t a row's mean weight has the variance (1 - t) / t / seq_length: 0.13 over all rows.
    assert abs(total / batch.averaged.sum() - 1.0) < 4 * (0.13 / rows) ** 0.5
    assert abs(batch.loss_mask.mean() - 0.5) < 0.01


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_batch_is_a_function_of_rows_and_seed(objective: Objective) -> None:
    def arrays(rows: Rows, mask_seed: int) -> list[Any]:
        batch = objective.make_batch(rows, phase="pretrain", mask_seed=mask_seed, ids=IDS)
        return [batch.tokens.tolist(), batch.labels.tolist(), batch.loss_mask.tolist()]

    batch = arrays(make_rows(), 3)
    assert arrays(make_rows(), 3) == batch
    draws_masks = not isinstance(objective, CausalLM)
    assert (arrays(make_rows(), 4) != batch) == draws_masks
    assert (arrays(make_rows(first_g=6), 3) != batch) == draws_masks
    tokens = make_rows().tokens
    tokens[3] ^= 1
    assert arrays(dataclasses.replace(make_rows(), tokens=tokens), 3) != batch


def test_twins_have_one_digest_and_a_changed_token_another() -> None:
    rows = make_rows()
    digests = [
        token_digest(rows, objective.original_tokens(batch_of(objective, rows)))
        for objective in OBJECTIVES
    ]
    assert len({tuple(digest.tolist()) for digest in digests}) == 1
    changed = rows.tokens.copy()
    changed[3] ^= 1
    assert not np.array_equal(token_digest(rows, changed), digests[0])
    assert not np.array_equal(token_digest(make_rows(first_g=6), rows.tokens), digests[0])


def test_the_digest_ignores_padding_and_idle_rows_and_adds_up() -> None:
    rows = make_rows()
    padded = rows.tokens.copy()
    padded[28:] = 1
    assert np.array_equal(token_digest(rows, padded), token_digest(rows, rows.tokens))
    parts = []
    for idle in (0, 1):
        g = rows.g.copy()
        g[idle] = -1
        parts.append(token_digest(Rows(**{**vars(rows), "g": g}), rows.tokens))
    assert np.array_equal(parts[0] + parts[1], token_digest(rows, rows.tokens))
