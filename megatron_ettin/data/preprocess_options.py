"""Options of preprocessing, and the outputs that follow from them."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, assert_never

from megatron_ettin.data.encoding import PARTS, SelectionRules
from megatron_ettin.data.raw_files import OriginFields, RawFile

#: Part of the settings of each corpus: raise it when the same inputs would give other files.
FORMAT_VERSION = 4
#: Shards have five digits, so that their names sort as their numbers.
MAX_SHARDS = 100_000


@dataclass(frozen=True)
class Shard:
    """An output that is committed as one: a shard of the corpora, or all of them."""

    index: int | None
    """Number of the shard and of its input; None if everything is one output."""
    inputs: tuple[RawFile, ...]
    stamps: list[list[str | int]]
    """Path, size and time of each input."""
    before: str | None = None
    """Digest of the stamps of the inputs before, which decide what is a duplicate; None if nothing
    is dropped for that."""

    @classmethod
    def of(cls, index: int | None, inputs: tuple[RawFile, ...], before: str | None = None) -> Self:
        """Return the shard of some inputs as they are now."""
        return cls(index, inputs, [[file.path, file.size, file.stamp] for file in inputs], before)

    @property
    def number(self) -> int:
        """Number of the shard, 0 if everything is one output."""
        return self.index or 0

    @property
    def raw_bytes(self) -> int:
        """Bytes of the inputs."""
        return sum(file.size for file in self.inputs)


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """Inputs, output, tokenizer and options of one preprocessing run."""

    inputs: tuple[RawFile, ...]
    """Raw files, in the order of their documents in the corpus."""
    output_prefix: Path
    """Start of the corpora's paths: field `text` gives OUTPUT_PREFIX_text_document.bin, .idx and
    .docs.parquet."""
    tokenizer: Path
    """Tokenizer folder."""
    store: str | None = None
    """URL of the folder that OUTPUT_PREFIX is relative to; None: a folder of this machine."""
    json_keys: tuple[str, ...] = ("text",)
    """Fields of a record; each gives one corpus."""
    id_key: str | None = None
    """Field with a document's id, kept beside the corpus; None: `id`, where a record has one."""
    url_key: str | None = None
    """Field with a document's address; None: `url`, where a record has one."""
    shards: bool = False
    """Make one shard of each input: OUTPUT_PREFIX_text_document/00000.bin and so on. Shards are
    committed one by one, so that an interrupted run goes on after the last one."""
    workers: int = 1
    """Processes that make shards side by side; this one and its threads if 1."""
    rules: SelectionRules = field(default_factory=SelectionRules)
    """Rules that say which documents are stored, and in which corpus."""
    deduplicate: Literal["exact"] | None = None
    """Store only the first of documents with the same text; this reads all inputs twice."""
    on_error: Literal["stop", "quarantine"] = "stop"
    """Handling of a record that cannot be read. stop: end the run. quarantine: write it with file,
    line and reason to OUTPUT_PREFIX.bad.jsonl, and go on."""
    max_bad_share: float = 0.001
    """Largest share of the records of an output that quarantine accepts."""
    library: Literal["auto", "tokenizers"] = "auto"
    """Library that tokenises. auto: gigatoken where it gives the same ids, else tokenizers."""

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant; the message names the option."""
        if self.workers < 1:
            raise ValueError(f"workers {self.workers}: at least 1 is needed")
        if len(set(self.json_keys)) < len(self.json_keys):
            raise ValueError(f"json-keys {list(self.json_keys)}: a field is named twice")
        for key in self.json_keys:
            if "/" in key:
                raise ValueError(f"json-keys {key!r}: becomes part of a file name, so no '/'")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max-bad-share {self.max_bad_share}: must be in [0, 1]")
        if self.shards and len(self.inputs) > MAX_SHARDS:
            raise ValueError(f"shards: {len(self.inputs)} inputs, more than {MAX_SHARDS}")

    @property
    def quarantines(self) -> bool:
        """Tell whether a record that cannot be read is set aside and does not end the run."""
        match self.on_error:
            case "stop":
                return False
            case "quarantine":
                return True
            case _:
                assert_never(self.on_error)

    @property
    def parts(self) -> tuple[str, ...]:
        """The corpora that each field gives."""
        return PARTS if self.rules.validation_share else PARTS[:1]

    @property
    def origin(self) -> OriginFields:
        """Fields that say where a document came from."""
        return OriginFields(self.id_key, self.url_key)

    def corpus(self, json_key: str, part: str) -> Path:
        """Return the path of a corpus: a prefix, or the folder of its shards."""
        return Path(f"{self.output_prefix}_{json_key}_{part}")

    def outputs(self) -> list[Shard]:
        """Return what is committed at a time: each shard, or everything."""
        if not self.shards:
            return [Shard.of(None, self.inputs)]
        shards = []
        before = hashlib.sha256() if self.deduplicate else None
        for index, file in enumerate(self.inputs):
            digest = None if before is None else before.hexdigest()
            shards.append(Shard.of(index, (file,), digest))
            if before is not None:
                before.update(json.dumps(shards[-1].stamps).encode())
        return shards

    def prefix(self, json_key: str, part: str, shard: Shard) -> Path:
        """Return the path of a .bin without its suffix."""
        corpus = self.corpus(json_key, part)
        return corpus if shard.index is None else corpus / f"{shard.index:05d}"

    def bad_records(self, shard: Shard) -> Path:
        """Return the file that takes the records of a shard that cannot be read."""
        if shard.index is None:
            return Path(f"{self.output_prefix}.bad.jsonl")
        return Path(f"{self.output_prefix}.bad", f"{shard.index:05d}.jsonl")

    def settings(self, json_key: str) -> dict[str, Any]:
        """Return all that decides the content of a field's corpus, apart from the inputs.

        The number of workers, the library and the output's name are no part of it, and where no
        record was bad, neither is what should have happened then.
        """
        return {
            "version": FORMAT_VERSION,
            "json_key": json_key,
            "id_key": self.id_key,
            "url_key": self.url_key,
            **asdict(self.rules),
            "deduplicate": self.deduplicate,
        }
