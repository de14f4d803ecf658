"""The benchmark of a change of domain finds where one curve reaches the end of another."""

import json

from benchmarks.domain_change import DomainChange, as_json, compare, table
from megatron_ettin.evaluation.run_curves import RunCurves


def curves(name: str, losses: list[float]) -> RunCurves:
    tokens = range(100, 100 * len(losses) + 1, 100)
    return RunCurves(
        name=name,
        training=[{"tokens": 100 * len(losses)}],
        validation=[
            {"tokens": place, "heldout_loss": loss}
            for place, loss in zip(tokens, losses, strict=True)
        ],
        marks=(),
    )


def test_the_share_is_that_of_the_first_point_as_good_as_the_random_end() -> None:
    random = curves("random", [9.0, 7.0, 6.0, 5.0])
    reached = compare("clm", 1, random, curves("changed", [6.0, 5.0, 4.0, 3.0]))
    assert (reached.random_loss, reached.changed_loss, reached.first_loss) == (5.0, 3.0, 6.0)
    assert (reached.tokens, reached.tokens_to_random, reached.share) == (400, 200, 0.5)
    never = compare("clm", 2, random, curves("changed", [9.0, 8.0, 7.0, 6.0]))
    assert never.share is None
    assert table([reached, never])[-1].endswith("| not reached |")


def test_the_table_has_every_seed_and_their_spread() -> None:
    made = [
        DomainChange(
            objective="mlm", seed=seed, random_loss=5.0, changed_loss=4.0, first_loss=6.0,
            tokens=100, tokens_to_random=30 + 10 * seed,
        )
        for seed in (1, 2, 3)
    ]  # fmt: skip
    assert table(made)[2] == "| mlm | 1 | 5.000 | 6.000 | 4.000 | 40% |"
    assert table(made)[-1] == "| mlm | all | | | | 50% ± 10% |"
    assert [one["share"] for one in json.loads(as_json(made))] == [0.4, 0.5, 0.6]
