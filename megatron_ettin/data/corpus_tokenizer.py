"""The tokenizer of each corpus, as recorded, compared with that of a run and of its first weights.

Ids of one vocabulary mean nothing in another, and no loss curve shows that they were mixed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_ettin.config import RunConfig
from megatron_ettin.data.tokenize import load_tokenizer
from megatron_ettin.order.shard_list import list_shards

logger = logging.getLogger(__name__)

#: Key of the SHA-256 of tokenizer.json in the metadata of a corpus' parquet file.
METADATA_KEY = "tokenizer_sha256"
#: Suffixes of the files that hold it: tools/preprocess_data.py and `order.py import-ettin` write
#: them.
RECORDS = (".docs.parquet", ".steps.parquet")
OPTION = "data.allow_other_tokenizers"


class MixedTokenizersError(ValueError):
    """Corpora, weights and tokenizer of a run do not belong together; the message names them."""


@dataclass(frozen=True, kw_only=True)
class CorpusTokenizers:
    """The corpora of a run, compared with its tokenizer."""

    mixed: list[str]
    """A sentence for each corpus that was made with another tokenizer."""
    unrecorded: list[str]
    """Prefixes of the corpora that do not say which tokenizer made them."""


def recorded_tokenizer(prefix: str) -> str | None:
    """Return the SHA-256 of the tokenizer.json that a corpus was made with; None if unrecorded.

    Raises:
        ValueError: the record beside the corpus is no parquet file.
    """
    for suffix in RECORDS:
        path = Path(f"{prefix}{suffix}")
        if not path.is_file():
            continue
        try:
            metadata = pq.read_metadata(path).metadata or {}
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}: damaged ({error}); make the corpus again") from error
        sha256 = metadata.get(METADATA_KEY.encode())
        if sha256 is not None:
            return str(sha256.decode())
    return None


def corpora(config: RunConfig) -> dict[str, str]:
    """Return the prefixes that a run reads, by the field of the configuration that names each.

    Raises:
        ValueError, OSError: as `list_shards`.
    """
    drawn = {name for phase in config.phases for name in config.data.blend[phase.name]}
    trained_on = {
        f"data.sources.{name}": source.prefix
        for name, source in config.data.sources.items()
        if name in drawn
    }
    held_out = {
        f"data.validation[{index}]": prefix for index, prefix in enumerate(config.data.validation)
    }
    prefixes = {}
    for field, prefix in (trained_on | held_out).items():
        shards = list_shards(prefix)
        for number, shard in enumerate(shards):
            prefixes[field if len(shards) == 1 else f"{field}, shard {number}"] = shard
    return prefixes


def compare_tokenizers(prefixes: Mapping[str, str], tokenizer_sha256: str) -> CorpusTokenizers:
    """Compare the recorded tokenizers of corpora, whose fields are the keys, with one digest."""
    mixed, unrecorded = [], []
    for field, prefix in prefixes.items():
        recorded = recorded_tokenizer(prefix)
        if recorded is None:
            unrecorded.append(prefix)
        elif recorded != tokenizer_sha256:
            mixed.append(
                f"{field}: {prefix} was made with the tokenizer of SHA-256 {recorded}, not with "
                f"{tokenizer_sha256}"
            )
    return CorpusTokenizers(mixed=mixed, unrecorded=unrecorded)


def require_one_tokenizer(config: RunConfig) -> None:
    """Warn of corpora that do not say which tokenizer made them, and refuse those of another one.

    Raises:
        MixedTokenizersError: a corpus was made with another tokenizer than the run's, and
            `data.allow_other_tokenizers` is not given.
    """
    tokenizer = load_tokenizer(Path(config.data.tokenizer))
    compared = compare_tokenizers(corpora(config), tokenizer.digest)
    if compared.mixed and not config.data.allow_other_tokenizers:
        raise MixedTokenizersError(
            f"{'; '.join(compared.mixed)}, that of data.tokenizer "
            f"({config.data.tokenizer}/tokenizer.json). Make the corpus again with it, name the "
            f"tokenizer that the corpora have, or give --{OPTION} true"
        )
    if compared.unrecorded:
        logger.warning(
            "no record of the tokenizer that made %s: tools/preprocess_data.py writes one; make "
            "sure that it was %s",
            ", ".join(compared.unrecorded),
            config.data.tokenizer,
        )


def require_tokenizer_of_weights(
    config: RunConfig, weights_sha256: str, tokenizer_sha256: str
) -> None:
    """Raise MixedTokenizersError if the weights to start from had another tokenizer than the run.

    An empty `weights_sha256` is unknown: the weights were converted from a folder without one.
    """
    if config.data.allow_other_tokenizers or weights_sha256 in ("", tokenizer_sha256):
        return
    raise MixedTokenizersError(
        f"checkpoint.initialize_from: {config.checkpoint.initialize_from} was trained with the "
        f"tokenizer of SHA-256 {weights_sha256}, but data.tokenizer "
        f"({config.data.tokenizer}/tokenizer.json) has {tokenizer_sha256}. Name the tokenizer that "
        f"the weights have, or give --{OPTION} true"
    )
