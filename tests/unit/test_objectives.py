"""Objectives against slow references, on hand-made rows."""

import numpy as np
import pytest

from megatron_ettin.objectives import CausalLM, MaskedLM, Objective, Rows, TokenIds
from megatron_ettin.objectives.base import CUT_PIECE, LAST_PIECE, PADDING
from megatron_ettin.order import token_digest

IDS = TokenIds(vocab_size=100, unk=95, cls=96, sep=97, pad=98, mask=99)
SEQ_LENGTH, SEGMENTS = 16, 3


def make_rows(first_g: int = 5) -> Rows:
    """Return two rows: a cut piece that fills its row; two whole documents and padding."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 95, 2 * SEQ_LENGTH)
    for cls, sep in ((0, 15), (16, 20), (21, 27)):
        tokens[[cls, sep]] = IDS.cls, IDS.sep
    tokens[28:] = IDS.pad
    lengths = [16, 0, 0, 0, 5, 7, 4, 0]
    return Rows(
        g=np.array([first_g, first_g + 1]),
        tokens=tokens,
        position_ids=np.concatenate([np.arange(n) for n in lengths]),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        segment_kind=np.array([CUT_PIECE, 0, 0, 0, LAST_PIECE, LAST_PIECE, PADDING, 0], np.uint8),
        num_tokens=np.array([16, 12]),
        seq_length=SEQ_LENGTH,
        specials="add",
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


@pytest.mark.parametrize("objective", [MaskedLM(), CausalLM()])
def test_a_batch_is_a_function_of_rows_and_seed(objective: Objective) -> None:
    one, two = batch_of(objective, make_rows()), batch_of(objective, make_rows())
    for name in ("tokens", "labels", "loss_mask"):
        assert np.array_equal(getattr(one, name), getattr(two, name))


@pytest.mark.parametrize("objective", [MaskedLM(mask_rate=0.9), CausalLM()])
def test_padding_is_never_scored_and_shapes_and_types_are_constant(objective: Objective) -> None:
    rows = make_rows()
    batch = batch_of(objective, rows)
    assert not batch.loss_mask[28:].any()
    assert batch.tokens.shape == batch.labels.shape == batch.loss_mask.shape == (32,)
    assert (batch.tokens.dtype, batch.labels.dtype) == (np.int64, np.int64)
    assert batch.loss_mask.dtype == np.bool_


def test_twins_have_one_digest_and_a_changed_token_another() -> None:
    rows = make_rows()
    digests = [
        token_digest(rows, objective.original_tokens(batch_of(objective, rows)))
        for objective in (MaskedLM(mask_rate=0.9), CausalLM())
    ]
    assert np.array_equal(*digests)
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
