"""Console of a run: a line for each report, or a bar on a terminal, with the time that is left."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TextIO

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from megatron_ettin.checkpoint import RunState
from megatron_ettin.config import PhaseConfig
from megatron_ettin.order import PhaseSpec

logger = logging.getLogger(__name__)

#: Reports whose mean rate is the recent one.
RECENT_REPORTS = 20
BAR = "{desc} {percentage:.1f}%|{bar:16}| {n_fmt} of {total_fmt} tokens{postfix}"


class RunProgress:
    """Tokens that are left, and the time that they take at the recent rate.

    The rate is tokens over wall time, so validation and checkpoints between reports count. A phase
    has its own rate: the mean of its last `RECENT_REPORTS` reports.
    """

    def __init__(self, phases: Sequence[PhaseConfig], rows: Sequence[PhaseSpec]) -> None:
        """Take the phases, and the rows of each."""
        self.total_tokens = sum(phase.train_tokens for phase in phases)
        self._phases = [
            (row.name, row.end_g, phase.train_tokens / max(row.num_rows, 1))
            for phase, row in zip(phases, rows, strict=True)
        ]
        self._marks: deque[tuple[int, float]] = deque(maxlen=RECENT_REPORTS + 1)
        self._phase = ""

    def add(self, state: RunState, tokens: int, *, started: float, now: float) -> None:
        """Add a report: `tokens` since it started, both times in seconds of one clock."""
        if state.phase != self._phase:
            self._phase = state.phase
            self._marks.clear()
        if not self._marks:
            self._marks.append((state.consumed_tokens - tokens, started))
        self._marks.append((state.consumed_tokens, now))

    def tokens_left(self, state: RunState) -> tuple[float, float]:
        """Return the tokens that are left of the phase and of the run, by their rows."""
        lefts, begin = [], 0
        for name, end, tokens_per_row in self._phases:
            lefts.append((name, max(end - max(state.g, begin), 0) * tokens_per_row))
            begin = end
        return dict(lefts).get(state.phase, 0.0), sum(left for _, left in lefts)

    def seconds_left(self, state: RunState) -> tuple[float, float] | None:
        """Return the time that is left of the phase and of the run; None before a report."""
        if len(self._marks) < 2:
            return None
        (first, began), (last, ended) = self._marks[0], self._marks[-1]
        if last <= first or ended <= began:
            return None
        seconds_per_token = (ended - began) / (last - first)
        phase, run = self.tokens_left(state)
        return phase * seconds_per_token, run * seconds_per_token


@dataclass(kw_only=True)
class Totals:
    """Totals of a run over the lines of metrics.jsonl, those of earlier sessions too."""

    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    """Time of the steps, without validation and checkpoints."""
    loss: float = math.nan
    """Loss of the last line."""

    def add(self, record: Mapping[str, Any]) -> None:
        """Add a line of training; the others do not count."""
        if record["kind"] == "train":
            self.tokens, self.steps = record["tokens"], record["step"]
            self.loss = record["loss"]
            self.seconds += record["seconds"]

    def __str__(self) -> str:
        """Return them in words."""
        rate = self.tokens / self.seconds if self.seconds else 0.0
        return (
            f"{self.tokens:,} tokens, {self.steps:,} steps in {duration(self.seconds)}, "
            f"{rate:,.0f} tok/s on average, last loss {self.loss:.4f}"
        )


class Console:
    """Rank 0's console: a bar where `stream` is a terminal, else a line for each report."""

    def __init__(
        self, progress: RunProgress, consumed_tokens: int, *, stream: TextIO | None = None
    ) -> None:
        """Begin at the tokens consumed; `stream` is the bar's, stderr if None."""
        self._progress = progress
        self._bar: tqdm[Any] = tqdm(
            total=progress.total_tokens,
            initial=consumed_tokens,
            unit_scale=True,
            disable=None,  # where there is no terminal
            dynamic_ncols=True,
            bar_format=BAR,
            desc="training",
            file=stream,
        )
        self._stack = ExitStack()
        if not self._bar.disable:
            # Lines of the log then go above the bar.
            self._stack.enter_context(logging_redirect_tqdm())

    def advance(self, tokens: int) -> None:
        """Move the bar by a step's tokens."""
        self._bar.update(tokens)

    def report_steps(
        self, state: RunState, record: Mapping[str, Any], *, tokens: int, started: float, now: float
    ) -> None:
        """Show the record of an interval with `tokens`, which began at `started` and ends now."""
        self._progress.add(state, tokens, started=started, now=now)
        numbers = [*_numbers(record), *self._times(state)]
        if self._bar.disable:
            logger.info("%s", " · ".join([self.place(state), *numbers]))
        else:
            self._bar.set_description_str(f"{record['phase']} step {record['step']}")
            self._bar.set_postfix_str(" · ".join(numbers))

    def report(self, state: RunState, text: str) -> None:
        """Log an event at `state` with its place in the run and the time that is left."""
        logger.info("%s", " · ".join([self.place(state), text, *self._times(state)]))

    def place(self, state: RunState) -> str:
        """Return phase, step and tokens of a state, with the share of the run that is done.

        Rows differ in fill, so a run may end with a few tokens more or fewer than planned. The
        share is that of the tokens in the rows.
        """
        tokens = state.consumed_tokens
        _, left = self._progress.tokens_left(state)
        return (
            f"{state.phase} step {state.step} · {tokens / 1e6:,.2f}M of "
            f"{self._progress.total_tokens / 1e6:,.2f}M tokens ({tokens / (tokens + left):.1%})"
        )

    def _times(self, state: RunState) -> list[str]:
        left = self._progress.seconds_left(state)
        if left is None:
            return []
        return [f"left: phase {duration(left[0])}, run {duration(left[1])}"]

    def close(self) -> None:
        """End the bar."""
        self._bar.close()
        self._stack.close()


def _numbers(record: Mapping[str, Any]) -> list[str]:
    numbers = [
        f"loss {record['loss']:.4f}",
        f"lr {record['lr']:.3e}",
        f"gradient norm {record['grad_norm']:.3g}",
        f"{record['tokens_per_second']:,.0f} tok/s",
    ]
    if "mfu" in record:
        numbers.append(f"MFU {record['mfu']:.1%}")
    return [*numbers, f"{record['peak_memory_bytes'] / 2**30:.2f} GiB"]


def duration(seconds: float) -> str:
    """Return a time in its two largest units: `2 d 03 h`, `1 h 05 m`, `4 m 09 s`, `12 s`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour:02} h"
    if hours:
        return f"{hours} h {minute:02} m"
    return f"{minutes} m {second:02} s" if minutes else f"{second} s"
