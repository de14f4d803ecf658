"""Run a case on a loader: to the stop, on from there with other settings, and what came of it."""

from __future__ import annotations

import errno
from contextlib import closing

from benchmarks.loaders.cases import ResumeCase, RunSetting
from benchmarks.loaders.outcomes import DrawnSample, ResumeOutcome, count_outcome
from benchmarks.loaders.rival import Rival, RivalStream, RunPlan


def run_case(rival: Rival, case: ResumeCase) -> ResumeOutcome:
    """Return the outcome of a case; an error after the restart is an outcome too."""
    old = RunPlan(sizes=case.sizes, seed=case.seed, present=case.before)
    with closing(rival.open(old, None)) as stream:
        before = _samples(stream, case.before, case.consumed)
        state = stream.state()
    plan = RunPlan(
        sizes=case.sizes,
        seed=case.seed,
        present=case.after,
        earlier=((case.before, case.consumed),),
    )
    is_resumed = False
    try:
        with closing(rival.open(plan, state)) as stream:
            after = _samples(stream, case.after, 1)
            is_resumed = True
            left = case.after.horizon - case.consumed - len(after)
            after += _samples(stream, case.after, left)
        with closing(rival.open(plan, None)) as stream:
            past = _samples(stream, case.after, case.consumed)
    except Exception as error:  # any error of any library is what a user would see
        if isinstance(error, OSError) and error.errno == errno.EMFILE:
            raise  # thousands of runs in one process are the benchmark's doing
        message = f"{type(error).__name__}: {error}"
        return ResumeOutcome(verdict="failed" if is_resumed else "refused", message=message[:300])
    return count_outcome(case.sizes, before, after, past)


def _samples(stream: RivalStream, setting: RunSetting, count: int) -> list[DrawnSample]:
    """Return the samples of the fewest whole steps that make up `count`.

    A step is never cut, because the samples of its ranks have no order among themselves.
    """
    samples: list[DrawnSample] = []
    while len(samples) < count:
        step = stream.step()
        if not 0 < len(step) <= setting.batch:
            raise RuntimeError(f"a step of {len(step)} samples, not 1 to {setting.batch}")
        samples += step
    return samples
