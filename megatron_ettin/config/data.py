"""The `phases` and `data` sections: how long, in which rows, from which documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, assert_never

from megatron_ettin.config.checks import require_positive
from megatron_ettin.rows import Specials

Packing = Literal["bfd", "concat", "none"]
Decay = Literal["linear", "one_minus_sqrt"]

#: A bfd row may hold one piece for each this many slots, unless max_segments_per_row is given.
SLOTS_PER_SEGMENT = 16


class RotaryBases(NamedTuple):
    """RoPE bases of the global and the local layers."""

    base_global: float
    base_local: float

    def __str__(self) -> str:
        """Name both, for a line of a log."""
        return f"{self.base_global:g} (global) and {self.base_local:g} (local)"


#: Bases of the first phase if it names none and the weights are new.
FIRST_ROTARY_BASES = RotaryBases(10_000.0, 10_000.0)


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """One phase of training: tokens, row length, learning rates, RoPE bases."""

    name: str
    """Name by which `data.blend`, `data.pools` and `mask_rate_by_phase` refer to the phase."""
    train_tokens: int
    """Tokens to train on: special tokens counted, padding not."""
    seq_length: int
    """Slots of a row (L)."""
    global_batch_size: int
    """Rows of an optimizer step."""
    batch_ramp_start: int | None = None
    """Rows of the phase's first step, if the batch grows; Ettin's released runs did not ramp."""
    batch_ramp_tokens: int | None = None
    """Tokens of the phase over which the batch grows linearly to global_batch_size."""
    train_rows: int | None = None
    """Length of the phase in rows, in place of that which follows from train_tokens. It can end a
    phase at the row that a checkpoint has reached. train_tokens still sets the learning rate."""
    pack: Packing = "bfd"
    """Packing of documents into rows. bfd: best-fit decreasing. concat: one stream, cut into rows
    as Megatron does. none: one piece in each row."""
    max_segments_per_row: int | None = None
    """Largest number of pieces in a bfd row; seq_length / 16 if not given."""
    lr_start: float = 1.0
    """Learning rate at the start of the phase, as a share of `optimizer.lr`."""
    lr_end: float = 1.0
    """Learning rate at the end of the phase, as a share of `optimizer.lr`."""
    lr_decay: Decay = "one_minus_sqrt"
    """Shape of the curve from lr_start to lr_end."""
    lr_decay_tokens: int | None = None
    """Length of that curve in tokens, at the end of the phase; the whole phase if not given."""
    rotary_base_global: float | None = None
    """RoPE base of the global layers. If not given, the phase keeps the base of the weights that it
    starts from: of the phase before, or of `checkpoint.initialize_from`; new weights have 10,000.
    """
    rotary_base_local: float | None = None
    """RoPE base of the local layers, with the same default."""
    allow_repeats: bool = False
    """Let the phase draw documents that a phase with another row length draws too."""

    def __post_init__(self) -> None:
        """Refuse phases that cannot be run."""
        for name in ("train_tokens", "seq_length", "global_batch_size"):
            require_positive(f"phase {self.name!r}", name, getattr(self, name))
        if self.train_rows is not None:
            require_positive(f"phase {self.name!r}", "train_rows", self.train_rows)
        self._check_ramp()
        if not self._fits_best and self.max_segments_per_row is not None:
            raise ValueError(
                f"phase {self.name!r}: max_segments_per_row goes with pack: bfd, not {self.pack}"
            )
        if self.segments_per_row < 1:
            raise ValueError(f"phase {self.name!r}: max_segments_per_row must be at least 1")
        if self.lr_decay_tokens is not None and not 0 < self.lr_decay_tokens <= self.train_tokens:
            raise ValueError(
                f"phase {self.name!r}: lr_decay_tokens {self.lr_decay_tokens} is not between 1 and "
                f"train_tokens {self.train_tokens}"
            )

    def _check_ramp(self) -> None:
        start, tokens = self.batch_ramp_start, self.batch_ramp_tokens
        if start is None and tokens is None:
            return
        if start is None or tokens is None:
            raise ValueError(
                f"phase {self.name!r}: batch_ramp_start and batch_ramp_tokens go together"
            )
        require_positive(f"phase {self.name!r}", "batch_ramp_tokens", tokens)
        if not 1 <= start <= self.global_batch_size:
            raise ValueError(
                f"phase {self.name!r}: batch_ramp_start {start} is not between 1 and "
                f"global_batch_size {self.global_batch_size}"
            )

    def batch_rows(self, phase_tokens: int) -> int:
        """Return the rows of a step that begins after `phase_tokens` tokens of the phase."""
        start, tokens = self.batch_ramp_start, self.batch_ramp_tokens
        if start is None or tokens is None or phase_tokens >= tokens:
            return self.global_batch_size
        return start + (self.global_batch_size - start) * phase_tokens // tokens

    def scaled(self, factor: float) -> PhaseConfig:
        """Return the phase with all counts of tokens and rows times `factor`, but at least 1."""
        counts = {
            name: max(1, round(count * factor))
            for name in ("train_tokens", "train_rows", "lr_decay_tokens", "batch_ramp_tokens")
            if (count := getattr(self, name)) is not None
        }
        return replace(self, **counts)

    @property
    def rotary_bases(self) -> RotaryBases:
        """RoPE bases of a phase that names both; every phase of a run that has started does.

        Raises:
            ValueError: one of them is not given (`with_rotary_bases` fills them in).
        """
        if self.rotary_base_global is None or self.rotary_base_local is None:
            raise ValueError(
                f"phase {self.name!r}: rotary_base_global and rotary_base_local are not both given"
            )
        return RotaryBases(self.rotary_base_global, self.rotary_base_local)

    @property
    def _fits_best(self) -> bool:
        """Tell whether a row may hold several pieces, chosen to fit."""
        match self.pack:
            case "bfd":
                return True
            case "concat" | "none":
                return False
            case _:
                assert_never(self.pack)

    @property
    def segments_per_row(self) -> int:
        """Segments of tokens that a row may have (default seq_length / 16, at least 1)."""
        if not self._fits_best:
            return 1
        if self.max_segments_per_row is not None:
            return self.max_segments_per_row
        return max(1, self.seq_length // SLOTS_PER_SEGMENT)


def with_rotary_bases(
    phases: Sequence[PhaseConfig], start: RotaryBases, recorded: Mapping[str, RotaryBases]
) -> list[PhaseConfig]:
    """Return the phases with both RoPE bases in each.

    A phase that does not name a base takes it from `recorded`, by the phase's name; then from the
    phase before it; the first phase takes it from `start`.
    """
    filled = []
    for phase in phases:
        known = recorded.get(phase.name, start)
        named = phase.rotary_base_global, phase.rotary_base_local
        bases = (other if base is None else base for base, other in zip(named, known, strict=True))
        start = RotaryBases(*bases)
        filled.append(
            replace(phase, rotary_base_global=start.base_global, rotary_base_local=start.base_local)
        )
    return filled


@dataclass(frozen=True, kw_only=True)
class RawSourceConfig:
    """Raw files of a source, from which tools/preprocess_data.py makes its corpus."""

    inputs: list[str]
    """Raw files, globs, URLs and manifests (`@FILE`), in the order of their documents."""
    json_key: str = "text"
    """Field that holds the text; `prefix` must end with `_FIELD_document`."""
    id_key: str | None = None
    """Field with a document's id, kept beside the corpus; `id`, where there is one, if not
    given."""
    url_key: str | None = None
    """Field with a document's address; `url`, where there is one, if not given."""
    shards: bool = False
    """Make one shard of each input."""
    validation_share: float = 0.0
    """Share of documents, by hash of their text, that go to a validation corpus."""
    min_tokens: int = 1
    """Fewest tokens of a document that is stored."""
    max_tokens: int | None = None
    """Most tokens of a document that is stored; no limit if not given."""
    deduplicate: Literal["exact"] | None = None
    """Store only the first of documents with the same text."""
    on_error: Literal["stop", "quarantine"] = "stop"
    """End the run at a record that cannot be read, or set it aside."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One tokenised corpus."""

    prefix: str | list[str]
    """Path of the `.bin` and `.idx` without the suffix; or several paths, or a folder: the shards
    of the corpus, in this order, those of a folder by name."""
    specials: Specials = "add"
    """Special tokens. add: each piece gets [CLS] and [SEP]. present: the corpus holds them."""
    min_doc_tokens: int = 1
    """Shortest document that is kept; shorter ones are dropped and counted."""
    max_epochs: float | None = None
    """Largest number of epochs over the rows of each pool of this source in the whole run; no limit
    if not given. A run that would draw more is refused before it starts."""
    raw: RawSourceConfig | None = None
    """Raw files that the corpus is made from; a training run does not read them."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Corpora, their blend by phase, and the tokenizer that made them."""

    tokenizer: str
    """Tokenizer folder (tokenizer.json)."""
    sources: dict[str, SourceConfig]
    """Training corpora by name."""
    blend: dict[str, dict[str, float]]
    """Share of the rows that each source gives, by phase."""
    pools: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Documents that a phase may draw: a range [from, to) of every source, as shares of 1, by phase
    name. A phase without an entry draws from all documents."""
    validation: list[str | list[str]] = field(default_factory=list)
    """Held-out corpora, each named as the `prefix` of a source is; the held-out rows are drawn
    equally from each."""
    plans: Literal["stored", "recomputed"] = "stored"
    """Storage of row plans. stored: keep on disk which documents make up each row (about 4 bytes a
    row). recomputed: keep a table of blocks of 65,536 documents, and pack a block again when it is
    needed."""
    plan_dir: str | None = None
    """Folder of the plans and of the corpora's identities; beside each corpus if not given."""
    skip_rows: list[tuple[int, int]] = field(default_factory=list)
    """Ranges [first, end) of rows that are never trained on; the ledger records them as skipped."""
    allow_duplicates: bool = False
    """Accept two sources with the same documents."""
    allow_other_tokenizers: bool = False
    """Accept corpora and starting weights of another tokenizer.json, for files that differ in their
    bytes but give the same ids."""

    def __post_init__(self) -> None:
        """Refuse blends of unknown sources and pools that are not shares."""
        for phase, blend in self.blend.items():
            for name in blend:
                if name not in self.sources:
                    raise ValueError(
                        f"data.blend.{phase}: unknown source {name!r}; "
                        f"data.sources has {sorted(self.sources)}"
                    )
        for phase, (low, high) in self.pools.items():
            if not 0.0 <= low < high <= 1.0:
                raise ValueError(f"data.pools.{phase}: [{low}, {high}) is no range within [0, 1]")
        last = 0
        for first, end in self.skip_rows:
            if not last <= first < end:
                raise ValueError(
                    f"data.skip_rows: [{first}, {end}) is empty, or begins before the range ahead "
                    f"of it ends"
                )
            last = end
