"""Masking of each step of a run, from the last START or RESUME record before the step."""

from __future__ import annotations

from bisect import bisect
from dataclasses import dataclass
from typing import Any

from megatron_ettin.objectives import Objective, read_description
from megatron_ettin.order.ledger import Ledger


@dataclass(frozen=True)
class Masking:
    """Objective and seed, which determine the masks of a row."""

    objective: Objective
    mask_seed: int


class MaskingRecord:
    """Masking of each record of a ledger."""

    def __init__(self, ledger: Ledger) -> None:
        """Read the objectives and seeds in START and RESUME records.

        Raises:
            ValueError: a record, which the message names, has an objective unknown to this version.
        """
        descriptions = {seq: entry for seq, entry in ledger.events.items() if "objective" in entry}
        self._seqs = list(descriptions)
        self._maskings = [_masking(seq, payload) for seq, payload in descriptions.items()]

    def at(self, seq: int) -> Masking:
        """Return the masking of record `seq`; after the last record, that of the next step."""
        return self._maskings[bisect(self._seqs, seq) - 1]


def _masking(seq: int, payload: dict[str, Any]) -> Masking:
    try:
        return Masking(read_description(payload["objective"]), payload["seeds"]["mask"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"record {seq} of the ledger names an objective that this version does not have, "
            f"{payload['objective']} ({error}): ask with the version that trained the run"
        ) from error
