"""A step's rows are the same for any number of ranks and any micro-batch."""

import numpy as np
import pytest

from megatron_ettin.objectives import (
    CausalLM,
    MaskedDiffusion,
    MaskedLM,
    MaskedNextToken,
    Objective,
)
from megatron_ettin.order import token_digest
from tests.conftest import TinyCorpus
from tests.orders import FIRST, SECOND, make_loader, make_order

BEGIN, END = 3, 40


def consumed(
    corpus: TinyCorpus, objective: Objective, *, ranks: int, micro_batch_rows: int
) -> tuple[dict[int, bytes], list[int], int]:
    """Return each row's tokens, labels and mask by g, the digest, and micro-batches per rank."""
    order = make_order(corpus, FIRST)
    rows: dict[int, bytes] = {}
    digest = np.zeros(2, dtype=np.uint64)
    counts = set()
    for rank in range(ranks):
        slots = micro_batch_rows * FIRST.seq_length
        loader = make_loader(order, objective, micro_batch_tokens=slots, rank=rank, ranks=ranks)
        batches = list(loader.micro_batches(BEGIN, END))
        counts.add(len(batches))
        assert len(batches) == loader.num_micro_batches(BEGIN, END)
        for batch in batches:
            digest += token_digest(batch.rows, objective.original_tokens(batch))
            for slot, g in enumerate(batch.rows.g.tolist()):
                part = slice(slot * FIRST.seq_length, (slot + 1) * FIRST.seq_length)
                if g < 0:
                    assert not batch.loss_mask[part].any()
                    continue
                assert g not in rows
                rows[g] = b"".join(
                    bytes(x[part]) for x in (batch.tokens, batch.labels * batch.loss_mask)
                )
    (count,) = counts
    return rows, digest.tolist(), count


@pytest.mark.parametrize(
    "objective", [MaskedLM(), CausalLM(), MaskedNextToken(), MaskedDiffusion()]
)
@pytest.mark.parametrize(("ranks", "micro_batch_rows"), [(1, 4), (2, 1), (3, 2), (8, 8)])
def test_layout_changes_nothing(
    tiny_corpus: TinyCorpus, objective: Objective, ranks: int, micro_batch_rows: int
) -> None:
    reference, digest, _ = consumed(tiny_corpus, objective, ranks=1, micro_batch_rows=1)
    rows, same_digest, count = consumed(
        tiny_corpus, objective, ranks=ranks, micro_batch_rows=micro_batch_rows
    )
    assert sorted(rows) == list(range(BEGIN, END))
    assert rows == reference
    assert same_digest == digest
    assert count == -(-(END - BEGIN) // (ranks * micro_batch_rows))


def test_twins_consume_the_same_tokens(tiny_corpus: TinyCorpus) -> None:
    _, encoder, _ = consumed(tiny_corpus, MaskedLM(), ranks=1, micro_batch_rows=4)
    _, decoder, _ = consumed(tiny_corpus, CausalLM(), ranks=2, micro_batch_rows=2)
    assert encoder == decoder


def test_the_micro_batch_keeps_its_slots_when_rows_get_longer(tiny_corpus: TinyCorpus) -> None:
    order = make_order(tiny_corpus, FIRST, SECOND)
    loader = make_loader(order, CausalLM(), micro_batch_tokens=512)
    begin = order.spec.phases[1].start_g
    shapes = [next(loader.micro_batches(g, g + 2)).tokens.shape for g in (0, begin)]
    assert shapes == [(512,), (512,)]
