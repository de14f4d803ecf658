"""What CONTRIBUTING promises of an objective, for every class that is in `objectives/`.

A new objective needs no line here: its module is imported, its class is collected, and its batches
are made as the file in examples/objective/ that names it says.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_ettin import objectives
from megatron_ettin.objectives import Objective, attentions
from megatron_ettin.order import mask_digest, token_digest
from tests.unit.objective_batches import (
    CLASSES,
    IDS,
    NUM_ROWS,
    SEQ_LENGTH,
    example,
    fingerprint,
    make,
    one_row,
    rows,
    seen,
)

ROOT = Path(__file__).parents[2]
#: A process on another rank, in which strings hash otherwise.
OTHER_RANK = {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4", "PYTHONHASHSEED": "77"}


def test_the_known_objectives_are_found() -> None:
    assert {"CausalLM", "MaskedLM", "MaskedNextToken"} <= {found.__name__ for found in CLASSES}


@pytest.mark.parametrize("wanted", CLASSES)
def test_it_is_exported_and_has_an_example(wanted: type[Objective]) -> None:
    assert wanted.__name__ in objectives.__all__, "import it in objectives/__init__.py"
    directions = attentions(example(wanted), ["pretrain", "decay"])
    assert {"bidirectional", "causal"} >= set(directions) != set()
    assert example(wanted) == example(wanted)


@pytest.mark.parametrize("wanted", CLASSES)
def test_shapes_and_types_of_a_batch_are_those_of_its_rows(wanted: type[Objective]) -> None:
    objective, given = example(wanted), rows()
    before = given.tokens.copy()
    batch = make(objective, given)
    shape = (NUM_ROWS * SEQ_LENGTH,)
    assert batch.tokens.shape == batch.labels.shape == batch.loss_mask.shape == shape
    assert (batch.tokens.dtype, batch.labels.dtype) == (np.int64, np.int64)
    assert batch.loss_mask.dtype == np.bool_
    assert np.array_equal(given.tokens, before), "the rows were written to"
    for ids in (batch.tokens, batch.labels[batch.loss_mask]):
        assert 0 <= ids.min() <= ids.max() < IDS.vocab_size


@pytest.mark.parametrize("wanted", CLASSES)
def test_padding_is_never_scored_and_never_a_label(wanted: type[Objective]) -> None:
    for specials in ("add", "present"):
        given = rows(specials=specials)
        batch = make(example(wanted), given)
        slots = np.arange(len(given.tokens)) % SEQ_LENGTH
        is_padding = slots >= np.repeat(given.num_tokens, SEQ_LENGTH)
        assert batch.loss_mask.any()
        assert not batch.loss_mask[is_padding].any(), "padding is scored"
        assert not (batch.labels[batch.loss_mask] == IDS.pad).any(), "padding is predicted"
        assert np.array_equal(batch.tokens[is_padding], given.tokens[is_padding])


@pytest.mark.parametrize("wanted", CLASSES)
def test_the_same_rows_and_seed_give_the_same_batch_after_any_history(
    wanted: type[Objective],
) -> None:
    objective, given = example(wanted), rows()
    first = seen(make(objective, given))
    for other_g, seed in ((90, 3), (40, 8)):
        make(objective, rows(other_g), seed=seed)
        assert seen(make(objective, given)) == first, "a batch depends on those before it"
    assert seen(make(example(wanted), rows())) == first, "a batch depends on the object"


@pytest.mark.parametrize("wanted", CLASSES)
def test_a_row_is_the_same_in_any_micro_batch(wanted: type[Objective]) -> None:
    """So that the micro-batch size, and how ranks share the rows, change nothing."""
    objective, given = example(wanted), rows()
    whole = seen(make(objective, given))
    for row in reversed(range(NUM_ROWS)):
        alone = seen(make(objective, one_row(given, row)))
        slots = slice(row * SEQ_LENGTH, (row + 1) * SEQ_LENGTH)
        assert alone == {name: values[slots] for name, values in whole.items()}, f"row {row}"


@pytest.fixture(scope="module")
def fingerprints_of_another_rank() -> dict[str, str]:
    """Compute every objective's batches in another process, on another rank."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.objective_batches"],
        cwd=ROOT,
        env={**os.environ, **OTHER_RANK},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("wanted", CLASSES)
def test_the_same_rows_and_seed_give_the_same_batch_on_any_rank(
    wanted: type[Objective], fingerprints_of_another_rank: dict[str, str]
) -> None:
    assert fingerprints_of_another_rank[wanted.__name__] == fingerprint(example(wanted))


@pytest.mark.parametrize("wanted", CLASSES)
def test_the_mask_digest_tells_batches_apart(wanted: type[Objective]) -> None:
    objective, given = example(wanted), rows()
    batch = make(objective, given)
    assert np.array_equal(mask_digest(batch), mask_digest(make(objective, rows())))
    other = make(objective, given, seed=4)
    assert (seen(batch) == seen(other)) == np.array_equal(mask_digest(batch), mask_digest(other))
    place = int(np.flatnonzero(batch.loss_mask)[5])
    for name, value in (("loss_mask", False), ("labels", batch.labels[place] ^ 1)):
        changed = getattr(batch, name).copy()
        changed[place] = value
        changed_batch = dataclasses.replace(batch, **{name: changed})
        assert not np.array_equal(mask_digest(changed_batch), mask_digest(batch)), name


@pytest.mark.parametrize("wanted", CLASSES)
def test_its_batches_hold_the_tokens_of_any_twin(wanted: type[Objective]) -> None:
    """Rebuilt from the batch alone, so a run's token digest is that of every other objective."""
    objective = example(wanted)
    for specials in ("add", "present"):
        given = rows(specials=specials)
        rebuilt = objective.original_tokens(make(objective, given))
        assert np.array_equal(token_digest(given, rebuilt), token_digest(given, given.tokens))


@pytest.mark.parametrize("wanted", CLASSES)
def test_no_more_is_scored_than_it_says(wanted: type[Objective]) -> None:
    """Capacities on a GPU and `tools/estimate.py` follow `scored_share`."""
    objective = example(wanted)
    for phase in ("pretrain", "decay"):
        share = objective.scored_share(phase)
        scored = [make(objective, rows(g), phase=phase).loss_mask.sum() for g in range(8)]
        slots = len(scored) * NUM_ROWS * SEQ_LENGTH
        assert 0.0 < share <= 1.0
        assert sum(scored) <= share * slots + 6 * (slots * share * (1 - share)) ** 0.5
