"""Kill runs at random moments until they end all the same, and compare each with one left alone.

    python -m tests.reliability.kill_runs --output FOLDER --torchrun 100 --forked 900

A run is started with one command until it ends by itself. FOLDER/kills.jsonl gets a line for each
run that has ended; the same command goes on after the last of them. A run that is not as the one
that nobody killed stays in FOLDER, with its output, and ends the program.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_ettin.order.ledger.format import RECORD_BYTES
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.publication import TEMPORARY_MARK, is_unfinished
from tests.conftest import TinyCorpus, make_tiny_corpus
from tests.reliability.launches import Launch, forked_agent, kill, torchrun
from tests.reliability.outcomes import COPIES, faults_of, outcome_of

PHASES = [
    {"name": "short", "train_tokens": 20_000, "seq_length": 128, "global_batch_size": 16},
    {"name": "long", "train_tokens": 8_000, "seq_length": 256, "global_batch_size": 8},
]
#: Relative paths, so that every file of a run has the same bytes in every folder.
ARGUMENTS = (
    *("--config=run.yaml", "--run_dir=run", "--checkpoint.resume=true"),
    *("--checkpoint.save_every_tokens=5000", f"--checkpoint.copy_to={COPIES}"),
)
Starter = Callable[[Sequence[str], Path, Path], AbstractContextManager[Launch]]
STARTERS: dict[str, Starter] = {"torchrun": torchrun, "forked": forked_agent}
#: Seconds of a start that are imports.
IMPORT_SECONDS = {"torchrun": 8.0, "forked": 0.0}
VICTIMS = ("everything", "a rank", "the agent")
ANY_TIME, START = "any time", "start"
#: Moments of a kill; half of the kills come at any time.
MOMENTS = ("save", "publish", "copy", "ledger", "report", "fork", "temporary file", START)
#: Kills of one run, after which it is left alone.
MOST_KILLS = 5
#: Far above what a start, a step or a save takes.
IDLE_SECONDS = 120.0


@dataclass(frozen=True)
class Kill:
    """A kill: who, when it was to come, and what it left in the folder."""

    victim: str
    moment: str
    left: list[str]


@dataclass(frozen=True)
class Moments:
    """The moments at which a run can be killed, seen in its folder."""

    folder: Path
    seconds: float
    """Time that an undisturbed run takes, from its start to its end."""

    def wait(self, moment: str, launch: Launch, chance: random.Random) -> str | None:
        """Return the moment that has come, which is any time if `moment` does not come.

        None if the launch ends before it.
        """
        longest = self.seconds / 3 if moment == START else self.seconds
        if moment in (START, ANY_TIME):
            return (
                moment if self._lives(launch, lambda: False, chance.uniform(0, longest)) else None
            )
        before = self._signs(moment)
        if not self._lives(launch, lambda: bool(self._signs(moment) - before), longest):
            return None
        came = moment if self._signs(moment) - before else ANY_TIME
        # A save takes longer than the other moments.
        rest = chance.uniform(0, 0.3 if moment == "save" else 0.01)
        return came if self._lives(launch, lambda: False, rest) else None

    @staticmethod
    def _lives(launch: Launch, has_come: Callable[[], bool], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while launch.exit_code() is None:
            if has_come() or time.monotonic() >= deadline:
                return True
            time.sleep(0.001)
        return False

    def _signs(self, moment: str) -> set[object]:
        """Return what is there; something new in it says that the moment has come."""
        run = RunFolder(self.folder / "run")
        ledger = run.ledger
        match moment:
            case "save":
                signs = _inodes(path for path in run.checkpoints.glob("*") if is_unfinished(path))
            case "publish":
                signs = _inodes(run.checkpoints.glob("*/state.json"))
            case "copy":
                signs = _inodes((self.folder / COPIES / "checkpoints").glob("*/*"))
            case "ledger":
                signs = {_size(ledger / "records.led"), _size(ledger / "events.jsonl")}
            case "report":
                signs = {_size(run.metrics)}
            case "fork":
                signs = _inodes((ledger / "forks").glob("*"))
            case "temporary file":
                signs = _inodes(self.folder.rglob(f"*{TEMPORARY_MARK}*"))
            case _:
                raise ValueError(moment)
        return signs

    def left(self) -> list[str]:
        """Name what a kill has left that the next start must clear."""
        run = RunFolder(self.folder / "run")
        left = []
        for path in run.checkpoints.glob("*"):
            if is_unfinished(path):
                has_state = (path / "state.json").exists()
                left.append("a checkpoint to be named" if has_state else "half a checkpoint")
        copies = self.folder / COPIES / "checkpoints"
        if any(not (path / "state.json").exists() for path in copies.glob("*")):
            left.append("half a copy")
        if any(self.folder.rglob(f"*{TEMPORARY_MARK}*")):
            left.append("a temporary file")
        if (run.ledger / "forks" / "pending.json").exists():
            left.append("half a fork")
        if _size(run.ledger / "records.led") % RECORD_BYTES:
            left.append("part of a record")
        if not (run.ledger / "records.led").exists():
            left.append("no ledger yet")
        return left


def _inodes(paths: Iterator[Path]) -> set[object]:
    found: set[object] = set()
    try:
        for path in paths:
            found.add((str(path), path.stat().st_ino))
    except OSError:  # it got its name, or is gone, while this looked
        return found
    return found


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


class OrphanError(Exception):
    """Processes outlive those that they belong to."""


def run_and_kill(
    folder: Path, starter: Starter, moments: Moments, chance: random.Random, most: int
) -> list[Kill]:
    """Start the same command until the run ends by itself; kill it up to `most` times meanwhile."""
    kills: list[Kill] = []
    log = folder / "output.log"
    for _ in range(2 * most + 2):  # a launch whose ranks wait for ever counts too
        with starter(ARGUMENTS, folder, log) as launch:
            while len(kills) < most:
                victim = chance.choice(VICTIMS)
                wanted = ANY_TIME if chance.random() < 0.5 else chance.choice(MOMENTS)
                moment = moments.wait(wanted, launch, chance)
                if moment is None or not strike(victim, launch, chance):
                    break
                if victim != "a rank":
                    launch.wait_until_gone()
                kills.append(Kill(victim, moment, moments.left()))
                if victim != "a rank":
                    break
            code = _wait_for_the_end(launch, folder)
            if left := launch.wait_until_gone():
                raise OrphanError(f"{kills[-1:]}: after the end processes {left} are alive")
        if code == 0:
            return kills
    raise AssertionError(f"the run never ended:\n{log.read_text()[-4000:]}")


def _wait_for_the_end(launch: Launch, folder: Path) -> int:
    """Return a launch's exit code; kill one that does nothing for long, as its user would."""
    metrics = RunFolder(folder / "run").metrics
    size, deadline = -1, 0.0
    while (code := launch.exit_code()) is None:
        if _size(metrics) != size:
            size, deadline = _size(metrics), time.monotonic() + IDLE_SECONDS
        elif time.monotonic() > deadline:
            print(f"{folder}: does nothing for {IDLE_SECONDS} s", file=sys.stderr, flush=True)
            kill(launch.alive())
            deadline += IDLE_SECONDS
        time.sleep(0.02)
    return code


def strike(victim: str, launch: Launch, chance: random.Random) -> bool:
    """Kill, unless there is nobody to kill any more."""
    chosen = {
        "everything": launch.alive,
        "a rank": lambda: [chance.choice(ranks)] if (ranks := launch.ranks()) else [],
        "the agent": lambda: [launch.agent],
    }[victim]()
    kill(chosen)
    return bool(chosen)


def prepare(folder: Path, corpus: TinyCorpus) -> Path:
    """Make the folder of a run: corpora without plans, and a configuration of relative paths."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    corpus.copy_to(folder / "corpus")
    relative = TinyCorpus(Path("corpus"), corpus.vocab_size)
    logging = {"log_every_steps": 1, "row_losses": True}
    relative.write_config(folder / "run.yaml", objective="MaskedLM", phases=PHASES, logging=logging)
    return folder


class Campaign:
    """Runs that are killed, in one folder, each compared with the one that nobody kills."""

    def __init__(self, output: Path, corpus: TinyCorpus) -> None:
        """Run the one that nobody kills."""
        self._output = output
        self._corpus = corpus
        self._record = output / "kills.jsonl"
        alone = prepare(output / "alone", corpus)
        began = time.monotonic()
        run_and_kill(alone, forked_agent, Moments(alone, 0.0), random.Random(0), 0)
        self._seconds = time.monotonic() - began
        self._expected = outcome_of(alone)
        assert len(self._expected.steps) >= 10
        assert not faults_of(alone, self._expected)

    def kills(self, start: str) -> list[Kill]:
        """Return the kills of all runs that have ended, those of earlier calls included."""
        return [Kill(**each) for run in self._runs(start) for each in run["kills"]]

    def _runs(self, start: str) -> list[dict[str, Any]]:
        lines = self._record.read_text().splitlines() if self._record.exists() else []
        return [run for run in map(json.loads, lines) if run["start"] == start]

    def go_on(self, start: str, kills: int) -> None:
        """Kill runs until there were `kills` kills.

        Raises:
            AssertionError, OrphanError: a run is not as it must be; its folder stays.
        """
        while (done := len(self.kills(start))) < kills:
            number = len(self._runs(start))
            folder = prepare(self._output / f"{start}_{number}", self._corpus)
            moments = Moments(folder, self._seconds + IMPORT_SECONDS[start])
            chance = random.Random(f"{start} {number}")
            most = min(MOST_KILLS, kills - done)
            made = run_and_kill(folder, STARTERS[start], moments, chance, most)
            faults = faults_of(folder, self._expected)
            assert not faults, f"{folder}: {made}: " + "\n".join(faults)
            shutil.rmtree(folder)
            run = {"start": start, "kills": [asdict(each) for each in made]}
            with self._record.open("a") as file:
                file.write(json.dumps(run) + "\n")
            print(
                f"{start}: {done + len(made)} kills, {number + 1} runs", file=sys.stderr, flush=True
            )


def summary(kills: Sequence[Kill]) -> dict[str, Any]:
    """Count kills by victim, by moment, and by what they left."""
    return {
        "kills": len(kills),
        "victim": dict(collections.Counter(each.victim for each in kills)),
        "moment": dict(collections.Counter(each.moment for each in kills)),
        "left": dict(collections.Counter(what for each in kills for what in each.left)),
    }


def main() -> None:
    """Run the campaign of the command line, and print its summary as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the campaign")
    parser.add_argument("--torchrun", type=int, default=0, help="kills of runs under torchrun")
    parser.add_argument("--forked", type=int, default=0, help="kills under its agent, ranks forked")
    arguments = parser.parse_args()
    (arguments.output / "corpus").mkdir(parents=True, exist_ok=True)
    campaign = Campaign(arguments.output, make_tiny_corpus(arguments.output / "corpus"))
    for start in STARTERS:
        campaign.go_on(start, getattr(arguments, start))
        print(json.dumps({start: summary(campaign.kills(start))}, indent=1))


if __name__ == "__main__":
    main()
