"""Stages without models, for tests of the runner; its child process can import them from here."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from megatron_ettin.study.costs import Cost, Costs
from megatron_ettin.study.stages import Stage

#: Far above the start of a process.
MEETING_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class Deed(Stage):
    """Stage that writes a file, or ends in another way."""

    title: str
    after: tuple[str, ...] = ()
    ending: Literal["good", "meets", "nothing", "error", "fault", "memory", "killed"] = "good"
    meets: str = ""
    """Stage whose file must appear while this one runs, for the ending of that name."""
    alone: bool = False

    @property
    def name(self) -> str:
        return f"deed/{self.title}"

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(f"deed/{title}" for title in self.after)

    @property
    def runs_alone(self) -> bool:
        return self.alone

    @property
    def _file(self) -> Path:
        return self.study.output / f"{self.title}.txt"

    def cost(self, costs: Costs) -> Cost:
        return Cost(seconds=1.0)

    def is_done(self) -> bool:
        return self._file.is_file()

    def run(self) -> None:
        print(f"{self.title} in process {os.getpid()}")
        match self.ending:
            case "good" if self.alone:
                self._file.write_text(str(len(list(self.study.output.glob("* has met")))))
            case "good":
                self._file.write_text(str(os.getpid()))
            case "meets":
                self._file.write_text(f"{os.getpid()} {torch.get_num_threads()}")
                deadline = time.monotonic() + MEETING_SECONDS
                while not (self.study.output / f"{self.meets}.txt").is_file():
                    assert time.monotonic() < deadline, f"{self.meets} does not run beside this"
                    time.sleep(0.05)
                (self.study.output / f"{self.title} has met").touch()
            case "error":
                raise ValueError("data.txt:3: no number")
            case "fault":
                raise KeyError("weights")
            case "memory":
                raise MemoryError
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
