"""The last stage of a study: its page."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_ettin.evaluation.tasks.task import Task
from megatron_ettin.publication import publish_text
from megatron_ettin.study.costs import Cost, Costs
from megatron_ettin.study.page import write_page
from megatron_ettin.study.stages import Stage

#: Time to read all results, resample them and draw the figures, on one core.
PAGE_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class PageStage(Stage):
    """Page of whatever the study has measured; it needs no other stage."""

    tasks: Mapping[str, Task]
    config_file: Path
    """File of the study, for the commands on the page."""

    @property
    def name(self) -> str:
        """Name: page."""
        return "page"

    @property
    def _inputs(self) -> Path:
        return self.study.page / "inputs.sha256"

    @property
    def runs_alone(self) -> bool:
        """True: it reads all results."""
        return True

    def cost(self, costs: Costs) -> Cost:
        """Return a constant: how long it takes depends little on a study."""
        return Cost(seconds=PAGE_SECONDS)

    def is_done(self) -> bool:
        """Tell whether the page was drawn from the results that are there now."""
        return self._inputs.is_file() and self._inputs.read_text() == self._digest()

    def run(self) -> None:
        """Draw it."""
        digest = self._digest()
        write_page(self.study, self.tasks, self.config_file)
        publish_text(self._inputs, digest)

    def _digest(self) -> str:
        """Return the SHA-256 of all that the page shows: results, series, metrics, the proof."""
        output = self.study.output
        paths = [
            *output.glob("results/*/*/*.json"),
            *output.glob("series/**/*.json"),
            *output.glob("runs/*/*/*/metrics.jsonl"),
            self.config_file,
            *([self.study.proof] if self.study.proof.is_file() else []),
        ]
        digest = hashlib.sha256(repr(sorted(self.tasks.items())).encode())
        for path in sorted(paths):
            digest.update(f"{path}\n".encode())
            digest.update(path.read_bytes())
        return digest.hexdigest()
