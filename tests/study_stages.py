"""Stages without models, for tests of the runner; its child process can import them from here."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_ettin.study.costs import Cost, Costs
from megatron_ettin.study.stages import Stage


@dataclass(frozen=True, kw_only=True)
class Deed(Stage):
    """Stage that writes a file, or ends in another way."""

    title: str
    after: tuple[str, ...] = ()
    ending: Literal["good", "nothing", "error", "fault", "memory", "killed"] = "good"

    @property
    def name(self) -> str:
        return f"deed/{self.title}"

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(f"deed/{title}" for title in self.after)

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
            case "good":
                self._file.write_text(str(os.getpid()))
            case "error":
                raise ValueError("data.txt:3: no number")
            case "fault":
                raise KeyError("weights")
            case "memory":
                raise MemoryError
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
