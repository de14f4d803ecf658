"""Steps and sums of a ledger, and comparisons of two ledgers or two orders; no corpus is opened."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ettin.order.digest import format_digest
from megatron_ettin.order.ledger import Kind, Ledger


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """STEP record number `seq` of a ledger; the step consumed rows [g_begin, g_end)."""

    seq: int
    step: int
    g_begin: int
    g_end: int


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Field in which two orders differ, with the value of each."""

    where: str
    field: str
    first: Any
    second: Any


@dataclass(frozen=True, kw_only=True)
class SharedBoundaries:
    """Rows g at which a step ends in both of two ledgers; all arrays are [n]."""

    g: NDArray[np.int64]
    first: NDArray[np.int64]
    """Index of that step among the first ledger's steps."""
    second: NDArray[np.int64]
    same_tokens: NDArray[np.bool_]
    """True if both have consumed the same number of tokens by then."""
    same_order: NDArray[np.bool_]
    """True if the cumulative order digests are equal."""
    same_token_digest: NDArray[np.bool_]
    """True if the cumulative token digests are equal."""

    @property
    def agree(self) -> NDArray[np.bool_]:
        """True [n] where all three are equal."""
        return self.same_tokens & self.same_order & self.same_token_digest


def skipped_rows(ledger: Ledger, end: int) -> list[tuple[int, int]]:
    """Return the skipped rows below `end` as ascending ranges; adjacent ranges are joined."""
    ranges: list[tuple[int, int]] = []
    for record in ledger.records[ledger.records["kind"] == Kind.SKIP]:
        first, last = int(record["g_begin"]), min(int(record["g_end"]), end)
        if first >= last:
            continue
        if ranges and ranges[-1][1] == first:
            first = ranges.pop()[0]
        ranges.append((first, last))
    return ranges


def step_record(ledger: Ledger, index: int) -> StepRecord:
    """Return STEP record number `index`, from 0, counting steps only."""
    record = ledger.steps[index]
    return StepRecord(**{f.name: int(record[f.name]) for f in dataclasses.fields(StepRecord)})


def digest_hex(lanes: NDArray[np.uint64]) -> str:
    """Return a digest [2] (low, high) as 32 hexadecimal digits."""
    low, high = lanes.tolist()
    return format_digest((low, high))


def digests_at(ledger: Ledger, g: int) -> dict[str, Any]:
    """Return the tokens and digests of all rows below `g`, the end of a step."""
    count = int(np.searchsorted(ledger.step_ends, np.uint64(g), side="right"))
    if count == 0:
        return {"tokens": 0, "order_digest": "0" * 32, "token_digest": "0" * 32}
    return {
        "tokens": int(ledger.cumulative("n_tokens")[count - 1]),
        "order_digest": digest_hex(ledger.cumulative("order_digest")[count - 1]),
        "token_digest": digest_hex(ledger.cumulative("token_digest")[count - 1]),
    }


def shared_boundaries(first: Ledger, second: Ledger) -> SharedBoundaries:
    """Return the rows at which a step of both ledgers ends, and whether they agree there."""
    ends, others = (ledger.steps["g_end"].astype(np.int64) for ledger in (first, second))
    g, in_first, in_second = np.intersect1d(ends, others, assume_unique=True, return_indices=True)

    def same(field: str) -> NDArray[np.bool_]:
        equal = first.cumulative(field)[in_first] == second.cumulative(field)[in_second]
        return equal if equal.ndim == 1 else equal.all(axis=1)

    return SharedBoundaries(
        g=g,
        first=in_first,
        second=in_second,
        same_tokens=same("n_tokens"),
        same_order=same("order_digest"),
        same_token_digest=same("token_digest"),
    )


def spec_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Difference]:
    """Return the fields in which two orders differ, phase by phase and source by source.

    Takes what `OrderSpec.to_dict` returns, or the like of another format. Orders of two formats
    have no other field in common. Shards are not compared: the pools have hashes of them.
    """
    if first["format"] != second["format"]:
        return _field_differences("order", first, second, lambda name: name == "format")
    differences = _field_differences(
        "order", first, second, lambda name: name not in ("phases", "shards")
    )
    phases = zip_longest(first.get("phases", ()), second.get("phases", ()))
    for index, (one, other) in enumerate(phases):
        name = (one or other)["name"]
        where = f"phase {index} ({name})"
        if one is None or other is None:
            differences.append(_lacking(where, "phase", one, other))
            continue
        differences += _field_differences(where, one, other, lambda name: name != "pools")
        pools = [{pool["source"]: pool for pool in phase["pools"]} for phase in (one, other)]
        for source in dict.fromkeys([*pools[0], *pools[1]]):
            of_first, of_second = pools[0].get(source), pools[1].get(source)
            inside = f"{where}, source {source}"
            if of_first is None or of_second is None:
                differences.append(_lacking(inside, "source", of_first, of_second))
            else:
                differences += _field_differences(inside, of_first, of_second, lambda _: True)
    return differences


def _field_differences(
    where: str, first: Mapping[str, Any], second: Mapping[str, Any], counts: Callable[[str], bool]
) -> list[Difference]:
    return [
        Difference(where=where, field=name, first=first[name], second=second[name])
        for name in first
        if counts(name) and first[name] != second[name]
    ]


def _lacking(where: str, field: str, first: object, second: object) -> Difference:
    presence = ["absent" if side is None else "present" for side in (first, second)]
    return Difference(where=where, field=field, first=presence[0], second=presence[1])
