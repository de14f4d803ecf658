"""`order.json`: the identity of a sample order, phase by phase.

It holds no objective, mask seed or code version, so twins share it. Each phase's id also hashes the
id before it; `order_id` is the last one. A phase's id covers its rule and its first row, not its
end. So ids stay valid if a phase is appended or the last one is trained longer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from megatron_ettin.config.data import Packing
    from megatron_ettin.rows import Specials

FORMAT = "order/1"


@dataclass(frozen=True, kw_only=True)
class ShardSpec:
    """One of several .bin/.idx pairs that together are a corpus."""

    documents: int
    tokens: int
    lengths_sha256: str
    tokens_sha256: str


@dataclass(frozen=True, kw_only=True)
class PoolSpec:
    """The documents of one source that a phase may draw, and their packing into rows."""

    source: str
    documents_in_file: int
    tokens_in_file: int
    lengths_sha256: str
    tokens_sha256: str
    first_document: int
    end_document: int
    specials: Specials
    min_doc_tokens: int
    quota: int
    """Rows of the source in one period of the blend table."""
    rows: int
    """Rows of one epoch."""
    tokens: int
    """Tokens of one epoch, special tokens counted."""
    drawn: int
    """Rows that earlier phases drew from the same pool and packing."""


@dataclass(frozen=True, kw_only=True)
class PhaseSpec:
    """Rows [start_g, start_g + num_rows)."""

    name: str
    start_g: int
    num_rows: int
    seq_length: int
    max_segments_per_row: int
    pack: Packing
    pools: tuple[PoolSpec, ...]

    @property
    def end_g(self) -> int:
        """First row after the phase."""
        return self.start_g + self.num_rows


@dataclass(frozen=True, kw_only=True)
class OrderSpec:
    """All fields of an order: seed, tokenizer and phases."""

    seed: int
    tokenizer_sha256: str
    phases: tuple[PhaseSpec, ...]
    shards: Mapping[str, tuple[ShardSpec, ...]] = field(default_factory=dict)
    """Shards by source, where there are several; no id covers them but through their hashes."""

    def phase_ids(self) -> list[str]:
        """Return the chained id of each phase: a hash of the previous id and of its rule."""
        link = _sha256({"format": FORMAT, "seed": self.seed, "tokenizer": self.tokenizer_sha256})
        ids = []
        for phase in self.phases:
            rule = dataclasses.asdict(phase)
            # A phase may still be trained longer. Its end counts only as the next one's start_g.
            del rule["num_rows"]
            link = _sha256({"previous": link, "phase": rule})
            ids.append(link)
        return ids

    @property
    def order_id(self) -> str:
        """Identity of the whole order."""
        return self.phase_ids()[-1]

    @property
    def num_rows(self) -> int:
        """Rows of all phases."""
        return self.phases[-1].end_g

    def phase_ends(self) -> list[int]:
        """Return the first row after each phase."""
        return [phase.end_g for phase in self.phases]

    def phase_index(self, g: int) -> int:
        """Return the phase that row `g` belongs to; the last one for g == num_rows."""
        for index, phase in enumerate(self.phases):
            if g < phase.end_g:
                return index
        if g == self.num_rows:
            return len(self.phases) - 1
        raise ValueError(f"row {g} is beyond the order's {self.num_rows} rows")

    def to_json(self) -> str:
        """Return the text of `order.json`."""
        ids = {"format": FORMAT, "order_id": self.order_id, "phase_ids": self.phase_ids()}
        return json.dumps(ids | self.to_dict(), indent=2) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Return the format's name and all fields, phases and pools as dictionaries."""
        fields = {"format": FORMAT, **dataclasses.asdict(self)}
        if not self.shards:
            del fields["shards"]
        return fields

    @classmethod
    def from_json(cls, text: str | bytes, *, check_ids: bool = True) -> Self:
        """Read the text of `order.json`.

        Raises:
            ValueError: not the text of an order; with `check_ids`, also ids that do not follow from
                the content, or phases that leave a gap or overlap.
        """
        try:
            document = json.loads(text)
            phases = tuple(
                PhaseSpec(**{**phase, "pools": tuple(PoolSpec(**pool) for pool in phase["pools"])})
                for phase in document["phases"]
            )
            spec = cls(
                seed=document["seed"],
                tokenizer_sha256=document["tokenizer_sha256"],
                phases=phases,
                shards={
                    source: tuple(ShardSpec(**shard) for shard in shards)
                    for source, shards in document.get("shards", {}).items()
                },
            )
            phase_ids, order_id = document["phase_ids"], document["order_id"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not the order of a run ({error}); restore it") from error
        if check_ids:
            spec._check_ids(phase_ids, order_id)
        return spec

    def _check_ids(self, phase_ids: Sequence[str], order_id: str) -> None:
        """Raise ValueError unless these are the ids of an order whose phases follow one another."""
        if not self.phases:
            raise ValueError("was altered: it has no phases")
        for index, (was, now) in enumerate(zip_longest(phase_ids, self.phase_ids())):
            if was != now:
                raise ValueError(
                    f"was altered: phase_ids[{index}] is {was}, but the content's is {now}"
                )
        if order_id != self.order_id:
            raise ValueError(
                f"was altered: order_id is {order_id}, but the content's is {self.order_id}"
            )
        # No id covers num_rows (a phase may be extended), so a changed one shows only here.
        start = 0
        for index, phase in enumerate(self.phases):
            if phase.start_g != start:
                before = self.phases[index - 1].num_rows if index else 0
                raise ValueError(
                    f"was altered: phases[{index}].start_g is {phase.start_g}, but the phase "
                    f"before ends at row {start} (its num_rows is {before})"
                )
            start = phase.end_g
        self._check_shards()

    def _check_shards(self) -> None:
        """Raise ValueError unless every pool of a source with shards is made of the first ones."""
        for phase in self.phases:
            for pool in phase.pools:
                shards = self.shards.get(pool.source, ())
                if shards and not any(
                    _is_made_of(pool, shards[:count]) for count in range(1, len(shards) + 1)
                ):
                    raise ValueError(
                        f"was altered: the hashes of source {pool.source!r} in phase "
                        f"{phase.name!r} do not follow from its shards"
                    )


def combined_sha256(hashes: Iterable[str]) -> str:
    """Return the hash of a corpus, given those of its shards: the one, or that of the JSON list."""
    of_shards = list(hashes)
    if len(of_shards) == 1:
        return of_shards[0]
    return hashlib.sha256(json.dumps(of_shards, separators=(",", ":")).encode()).hexdigest()


def _is_made_of(pool: PoolSpec, shards: Sequence[ShardSpec]) -> bool:
    return (
        pool.documents_in_file == sum(shard.documents for shard in shards)
        and pool.lengths_sha256 == combined_sha256(shard.lengths_sha256 for shard in shards)
        and pool.tokens_sha256 == combined_sha256(shard.tokens_sha256 for shard in shards)
    )


def find_first_difference(recorded: Any, now: Any, where: str = "") -> str | None:
    """Return the first place at which two JSON documents differ; None where they are equal."""
    if recorded == now:
        return None
    parts: list[tuple[str, Any, Any]] = []
    if isinstance(recorded, dict) and isinstance(now, dict):
        if recorded.keys() != now.keys():
            return f"{where or 'it'} has the fields {sorted(recorded)}, not {sorted(now)}"
        parts = [(f"{where}.{key}" if where else key, recorded[key], now[key]) for key in now]
    elif isinstance(recorded, list) and isinstance(now, list):
        if len(recorded) != len(now):
            return f"{where} has {len(recorded)} entries, not {len(now)}"
        pairs = enumerate(zip(recorded, now, strict=True))
        parts = [(f"{where}[{index}]", *pair) for index, pair in pairs]
    differences = (find_first_difference(was, is_, name) for name, was, is_ in parts)
    return next(
        (difference for difference in differences if difference),
        f"{where} is {recorded}, not {now}",
    )


def _sha256(value: dict[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
