"""Summaries: what a corpus was made from and holds, in `PREFIX.json` beside it.

A second file, `PREFIX.inputs.json`, keeps sizes and times of the raw files. So the next run need
not read them again to find that nothing changed.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_ettin.data.raw_files import RawFile
from megatron_ettin.publication import publish_text

FORMAT = "megatron-ettin-corpus/1"


class OtherSettingsError(ValueError):
    """A corpus of other settings is in the way; the message names them."""


@dataclass(frozen=True, kw_only=True)
class CorpusSummary:
    """Inputs, settings and contents of one corpus, or of one shard of it."""

    settings: dict[str, Any]
    """All options that decide the content, by name."""
    documents: int
    tokens: int
    """Tokens stored, with the [SEP] of --append-eod."""
    validation_documents: int
    validation_tokens: int
    dropped: dict[str, int]
    """Documents that are not stored, by reason; `bad` are those in quarantine."""
    tokenizer_digest: str
    inputs: list[dict[str, Any]]
    """`path` as it was given, `format`, `bytes` and `sha256` of each input, in order."""
    sizes: dict[str, int]
    """Bytes of each .bin, .idx and .docs.parquet, by path from the summary's folder."""

    def publish(self, prefix: Path) -> None:
        """Write PREFIX.json, which completes the corpus."""
        publish_text(summary_path(prefix), to_json({"format": FORMAT, **asdict(self)}))

    def require_settings(
        self, prefix: Path, settings: dict[str, Any], tokenizer: Path, digest: str
    ) -> None:
        """Raise OtherSettingsError unless the corpus was made with these settings and tokenizer."""
        if self.tokenizer_digest != digest:
            raise OtherSettingsError(
                f"{prefix}: is a corpus of another tokenizer (SHA-256 {self.tokenizer_digest}; "
                f"{tokenizer}/tokenizer.json has {digest}); choose another --output-prefix, or "
                f"remove {summary_path(prefix)} and make the corpus anew"
            )
        names = sorted(settings.keys() | self.settings.keys())
        other = [name for name in names if settings.get(name) != self.settings.get(name)]
        if other:
            was, now = ({name: of.get(name) for name in other} for of in (self.settings, settings))
            raise OtherSettingsError(
                f"{prefix}: was made with {_spelled(was)}, not with {_spelled(now)}; choose another"
                f" --output-prefix, or remove {summary_path(prefix)} and make the corpus anew"
            )

    def is_of(self, prefix: Path, inputs: Sequence[RawFile], stamps: list[Any]) -> bool:
        """Tell whether the corpus was made from files of the same content, in the same order.

        The names of the files do not matter. The files are hashed unless `stamps`, their paths,
        sizes and times, are those of the time when they were read.
        """
        kinds = [[entry["format"], entry["bytes"]] for entry in self.inputs]
        if kinds != [[file.format, file.size] for file in inputs]:
            return False
        try:
            known = json.loads(_stamps_path(prefix).read_bytes())
        except (FileNotFoundError, ValueError):
            known = None
        if known == stamps:
            return True
        hashes = [entry["sha256"] for entry in self.inputs]
        return not self.settings["deduplicate"] and hashes == [
            file.digest().sha256 for file in inputs
        ]


def read_summary(prefix: Path) -> CorpusSummary | None:
    """Return the summary of a complete corpus; None if it is missing or a file has another size."""
    try:
        content = json.loads(summary_path(prefix).read_bytes())
        if content.pop("format") != FORMAT:
            return None
        summary = CorpusSummary(**content)
        sizes = {name: (prefix.parent / name).stat().st_size for name in summary.sizes}
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return summary if sizes == summary.sizes else None


def publish_stamps(prefix: Path, stamps: list[Any]) -> None:
    """Write PREFIX.inputs.json: paths, sizes and times of the files that a corpus was made from."""
    publish_text(_stamps_path(prefix), to_json(stamps))


def forget_summary(prefix: Path) -> None:
    """Remove the summary of a corpus that is about to be replaced.

    The sizes and times go too: with the next summary they would speak of other inputs.
    """
    summary_path(prefix).unlink(missing_ok=True)
    _stamps_path(prefix).unlink(missing_ok=True)


def summary_path(prefix: Path) -> Path:
    """Return the path of a corpus' summary."""
    return Path(f"{prefix}.json")


def add_up(summaries: Sequence[CorpusSummary]) -> Counter[str]:
    """Return the counts of all shards together, by name; of what was dropped, by reason."""
    counts: Counter[str] = Counter()
    for summary in summaries:
        for name in ("documents", "tokens", "validation_documents", "validation_tokens"):
            counts[name] += getattr(summary, name)
        counts.update(summary.dropped)
    return counts


def to_json(content: object) -> str:
    """Return the text of a JSON file that a person can read."""
    return json.dumps(content, indent=2) + "\n"


def _stamps_path(prefix: Path) -> Path:
    return Path(f"{prefix}.inputs.json")


def _spelled(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())
