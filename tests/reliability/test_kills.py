"""kill -9 at random moments of whole runs; tests/reliability/kill_runs.py says how."""

from pathlib import Path

import pytest

from tests.conftest import TinyCorpus
from tests.reliability.kill_runs import Campaign, summary

#: Kills by the way in which a run is started: by torchrun, or by its agent with forked ranks.
KILLS = {"torchrun": 1, "forked": 9}
MANY_KILLS = {"torchrun": 100, "forked": 900}


def kill_until(campaign: Campaign, kills: dict[str, int]) -> dict[str, int]:
    """Kill runs, each of which must end equal; return the kills by the way of starting."""
    for start, count in kills.items():
        campaign.go_on(start, count)
        print(start, summary(campaign.kills(start)))
    return {start: len(campaign.kills(start)) for start in kills}


@pytest.mark.slow
def test_killed_runs_end_as_if_nothing_had_happened(
    tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    # A run that ends otherwise than the one that was left alone raises.
    assert kill_until(Campaign(tmp_path, tiny_corpus), KILLS) == KILLS


@pytest.mark.long
def test_a_thousand_kills(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    campaign = Campaign(tmp_path, tiny_corpus)
    assert kill_until(campaign, MANY_KILLS) == MANY_KILLS
    every = [kill for start in MANY_KILLS for kill in campaign.kills(start)]
    left = summary(every)["left"]
    for what in (
        "half a checkpoint",
        "a checkpoint to be named",
        "half a copy",
        "no ledger yet",
    ):
        assert left[what] >= 10, "the kills did not meet what they are for"
