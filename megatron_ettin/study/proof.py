"""Proof that the arms of one size and seed saw the same rows, from their ledgers (docs/proof.md).

`proof.json` holds an object with `groups`, a list. A group is the arms of one size and seed that
were trained in the same phases: those with new weights, and those that start from another arm. It
has `size`, `seed`, `stage` ("train" or "cross"), `models` (names), `verdict` ("PASS" or "FAIL")
and `proofs`: one `queries.twins.TwinsProof` for the first arm beside each other one.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

from megatron_ettin import checkpoint
from megatron_ettin.publication import publish_text
from megatron_ettin.queries.answer import FAIL, PASS
from megatron_ettin.queries.twins import prove_twins
from megatron_ettin.study.arms import StudyModel
from megatron_ettin.study.costs import Cost, Costs
from megatron_ettin.study.stages import Stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProofStage(Stage):
    """Proof for all arms that have been trained, complete or not."""

    @property
    def name(self) -> str:
        """Name."""
        return "proof"

    @property
    def runs_alone(self) -> bool:
        """True: it reads the records of all trainings."""
        return True

    def cost(self, costs: Costs) -> Cost:
        """Return the seconds of reading ledgers."""
        return Cost(seconds=2.0)

    def is_done(self) -> bool:
        """Tell whether the proof is there, of the runs' present records."""
        path = self.study.proof
        return path.is_file() and json.loads(path.read_text())["records"] == self._records()

    def run(self) -> None:
        """Compare the ledgers."""
        groups = []
        trained = [model for model in self.study.models() if model.run is not None]
        for (size, seed, stage), group in itertools.groupby(
            sorted(trained, key=_place), key=_place
        ):
            begun = [model for model in group if model.run and model.run.has_ledger()]
            proofs = [_compare(begun[0], other) for other in begun[1:]]
            groups.append(
                {
                    "size": size,
                    "seed": seed,
                    "stage": stage,
                    "models": [model.name for model in begun],
                    "verdict": PASS if all(p["verdict"] == PASS for p in proofs) else FAIL,
                    "proofs": proofs,
                }
            )
        document = {"records": self._records(), "groups": groups}
        publish_text(self.study.proof, json.dumps(document, indent=1) + "\n")

    def _records(self) -> dict[str, str]:
        """Return the chain hash of each run's last checkpoint by its model's name."""
        newest = {
            model.name: model.run.newest_checkpoint()
            for model in self.study.models()
            if model.run is not None
        }
        return {
            name: checkpoint.read_state(path).ledger_chain
            for name, path in newest.items()
            if path is not None
        }


def _place(model: StudyModel) -> tuple[str, int, str]:
    return model.size, model.seed or 0, "train" if model.start is None else "cross"


def _compare(first: StudyModel, other: StudyModel) -> dict[str, Any]:
    assert first.run is not None, "only trained models are compared"
    assert other.run is not None, "only trained models are compared"
    return dataclasses.asdict(prove_twins(first.run.path, other.run.path))
