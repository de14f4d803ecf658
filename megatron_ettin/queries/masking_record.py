"""Masking at each step of a run, as the START or RESUME before the step says it."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_ettin.objectives import Objective
from megatron_ettin.order.ledger import Ledger


@dataclass(frozen=True)
class Masking:
    """Objective and seed, from which the masks of a row follow."""

    objective: Objective
    mask_seed: int


class MaskingRecord:
    """The masking of each of a ledger's records."""

    def __init__(self, ledger: Ledger) -> None:
        """Take what START and RESUME say.

        Raises:
            ValueError: naming the record, if it names an objective that this version does not have.
        """
        told = {seq: entry for seq, entry in ledger.events.items() if "objective" in entry}
        self._seqs = list(told)
        self._found = [_masking(seq, payload) for seq, payload in told.items()]

    def at(self, seq: int) -> Masking:
        """Return the masking that governs record `seq`; beyond the last, what a next step has."""
        return self._found[bisect(self._seqs, seq) - 1]


def _masking(seq: int, payload: dict[str, Any]) -> Masking:
    fields = dict(payload["objective"])
    name = fields.pop("name")
    kinds = {kind.__name__: kind for kind in _kinds(Objective)}
    try:
        return Masking(kinds[name](**fields), payload["seeds"]["mask"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"record {seq} of the ledger names an objective that this version does not have, "
            f"{payload['objective']} ({error}): ask with the version that trained the run"
        ) from error


def _kinds(kind: type) -> Iterator[type]:
    below: type
    for below in kind.__subclasses__():
        yield below
        yield from _kinds(below)
