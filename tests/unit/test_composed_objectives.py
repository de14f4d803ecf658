"""Objectives by phase and by row: which row gets which, and what its batch then says."""

import dataclasses

import numpy as np
import pytest

from megatron_ettin.config import parse_args, to_yaml
from megatron_ettin.objectives import (
    Batch,
    ByPhase,
    CausalLM,
    MaskedDiffusion,
    MaskedLM,
    MaskedNextToken,
    Mixture,
    Objective,
    attentions,
    describe,
    read_description,
)
from megatron_ettin.order import mask_digest
from megatron_ettin.rows import Rows
from tests.conftest import TinyCorpus
from tests.native import reference
from tests.runs import tiny_config
from tests.unit.made_rows import IDS, make_rows

PARTS: list[Objective] = [MaskedNextToken(mask_rate=0.5), CausalLM(), MaskedDiffusion()]
SHARES = [0.5, 0.3, 0.2]
MIXTURE = Mixture(objectives=PARTS, shares=SHARES)
DETOUR = ByPhase(objective=MaskedLM(mask_rate=0.5), by_phase={"pretrain": CausalLM()})


def batch_of(objective: Objective, rows: Rows, phase: str = "pretrain") -> Batch:
    return objective.make_batch(rows, phase=phase, mask_seed=3, ids=IDS)


def many_rows(count: int = 24) -> Rows:
    """Return the hand-made rows again and again, one of them idle, in one stream."""
    two = make_rows()
    slots = len(two.tokens)
    return dataclasses.replace(
        two,
        g=np.array([*range(5, 5 + count - 1), -1]),
        tokens=np.tile(two.tokens, count // 2),
        position_ids=np.tile(two.position_ids, count // 2),
        cu_seqlens=np.concatenate(
            [[0], *(two.cu_seqlens[1:] + slots * i for i in range(count // 2))]
        ).astype(np.int32),
        segment_kind=np.tile(two.segment_kind, count // 2),
        num_tokens=np.tile(two.num_tokens, count // 2),
    )


def expected_choice(g: int, mask_seed: int) -> int:
    """Return the number of the objective of a row, as docs/order.md says."""
    place = reference.draw(reference.counter_key(mask_seed, reference.MIXTURE, [g]), 0) // 2**11
    return sum(place * 2.0**-53 >= bound for bound in (0.5, 0.8))


def test_a_row_is_that_of_the_objective_its_number_draws() -> None:
    rows = many_rows()
    batch = batch_of(MIXTURE, rows)
    alone = [batch_of(objective, rows) for objective in PARTS]
    assert batch.weights is not None
    assert batch.counted is not None
    assert isinstance(batch.is_causal, np.ndarray)
    seen = set()
    for r, g in enumerate(rows.g.tolist()):
        chosen = expected_choice(max(g, 0), 3)
        seen.add(chosen)
        theirs, row = alone[chosen], slice(r * rows.seq_length, (r + 1) * rows.seq_length)
        scored = batch.loss_mask[row]
        if g >= 0:
            assert np.array_equal(scored, theirs.loss_mask[row])
            assert np.array_equal(batch.tokens[row], theirs.tokens[row])
            assert np.array_equal(batch.labels[row][scored], theirs.labels[row][scored])
            assert np.array_equal(batch.averaged[row], theirs.averaged[row])
            weights = np.ones(len(scored)) if theirs.weights is None else theirs.weights[row]
            assert np.array_equal(batch.weights[row][scored], weights[scored])
        assert batch.is_causal[r] == (PARTS[chosen].attention == "causal")
    assert seen == {0, 1, 2}
    assert np.array_equal(MIXTURE.original_tokens(batch), rows.tokens)


def test_shares_hold_over_many_rows_and_are_relative() -> None:
    g = np.arange(20_000)
    found = np.bincount(MIXTURE.choose(g, 7)) / len(g)
    assert np.abs(found - SHARES).max() < 4 * (0.25 / len(g)) ** 0.5
    tenfold = Mixture(objectives=PARTS, shares=[5.0, 3.0, 2.0])
    assert np.array_equal(tenfold.choose(g[:2000], 7), MIXTURE.choose(g[:2000], 7))
    assert not np.array_equal(MIXTURE.choose(g[:2000], 8), MIXTURE.choose(g[:2000], 7))


def test_the_digest_tells_what_each_row_was_shown() -> None:
    rows = many_rows()
    whole = mask_digest(batch_of(MIXTURE, rows))
    choice = MIXTURE.choose(rows.g, 3)
    parts = np.zeros(1, dtype=np.uint64)
    for index, objective in enumerate(PARTS):
        own = dataclasses.replace(rows, g=np.where(choice == index, rows.g, -1))
        parts += mask_digest(batch_of(objective, own))
    assert whole == parts


def test_a_phase_has_its_own_objective_and_direction() -> None:
    rows = make_rows()
    for phase, objective in (("pretrain", CausalLM()), ("decay", MaskedLM(mask_rate=0.5))):
        batch, alone = batch_of(DETOUR, rows, phase), batch_of(objective, rows, phase)
        assert DETOUR.for_phase(phase) == objective
        assert np.array_equal(batch.tokens, alone.tokens)
        assert np.array_equal(batch.loss_mask, alone.loss_mask)
        assert batch.is_causal == (phase == "pretrain")
        assert DETOUR.scored_share(phase) == objective.scored_share(phase)
        assert np.array_equal(DETOUR.original_tokens(batch), rows.tokens)
    assert attentions(DETOUR, ["pretrain", "decay"]) == ("causal", "bidirectional")
    assert attentions(DETOUR, ["decay"]) == ("bidirectional",)


def test_a_mixture_may_be_the_objective_of_a_phase() -> None:
    both = ByPhase(objective=MaskedLM(), by_phase={"pretrain": MIXTURE})
    rows = many_rows()
    batch, alone = batch_of(both, rows), batch_of(MIXTURE, rows)
    assert np.array_equal(batch.tokens, alone.tokens)
    assert np.array_equal(batch.is_causal, alone.is_causal)  # type: ignore[arg-type]
    assert both.largest_scored_share("pretrain") == 1.0
    assert both.scored_share("pretrain") == pytest.approx(0.5 * 0.5 + 0.3 + 0.2 * 0.5)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"objectives": [CausalLM()], "shares": [1.0]}, "two objectives or more"),
        ({"objectives": PARTS, "shares": [1.0, 1.0]}, "2 shares for 3 objectives"),
        ({"objectives": PARTS, "shares": [1.0, 0.0, 1.0]}, "must be above 0"),
        ({"objectives": PARTS, "shares": [1.0, float("nan"), 1.0]}, "must be above 0"),
        ({"objectives": [CausalLM(), DETOUR], "shares": [1, 1]}, "ByPhase consists of others"),
        ({"objectives": [CausalLM(), MIXTURE], "shares": [1, 1]}, "Mixture consists of others"),
    ],
)
def test_what_is_no_mixture_is_refused(parts: dict[str, list[object]], message: str) -> None:
    with pytest.raises(ValueError, match=f"objective.*{message}"):
        Mixture(**parts)  # type: ignore[arg-type]


def test_phases_within_phases_are_refused() -> None:
    with pytest.raises(ValueError, match=r"objective\.pretrain: ByPhase holds no further"):
        ByPhase(objective=CausalLM(), by_phase={"pretrain": DETOUR})


@pytest.mark.parametrize(
    "objective",
    [
        MIXTURE,
        DETOUR,
        ByPhase(objective=MIXTURE, by_phase={"name": MaskedLM(mask_rate_by_phase={"name": 0.2})}),
    ],
)
def test_the_record_names_every_part(objective: Objective) -> None:
    assert read_description(describe(objective)) == objective


@pytest.mark.parametrize("name", ["detour", "diffusion", "gpt_bert"])
def test_an_example_reads_back(
    name: str, tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp(name)
    run = to_yaml(tiny_config(tiny_corpus, folder / "run"))
    (folder / "run.yaml").write_text(run)
    files = [f"--config={folder / 'run.yaml'}", f"--config=examples/objective/{name}.yaml"]
    config = parse_args(files)
    (folder / "written.yaml").write_text(to_yaml(config))
    assert parse_args([f"--config={folder / 'written.yaml'}"]) == config
    assert config.objective != MaskedLM()
