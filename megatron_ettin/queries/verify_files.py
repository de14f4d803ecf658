"""Compare corpora and tokenizers with order.json, by hashing them anew.

All other commands trust a corpus's identity file if it names size, times and inode of the files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_ettin.config import RunConfig
from megatron_ettin.data.corpus_tokenizer import OPTION, compare_tokenizers, corpora
from megatron_ettin.data.tokenize import load_tokenizer
from megatron_ettin.order import OrderSpec, PoolSpec
from megatron_ettin.order.corpus_identity import hash_corpus
from megatron_ettin.order.shard_list import list_shards
from megatron_ettin.order.spec import ShardSpec
from megatron_ettin.queries.answer import Check

#: Fields of a pool that identify its corpus, and their names in a CorpusIdentity.
FIELDS = {
    "documents_in_file": "documents",
    "tokens_in_file": "tokens",
    "lengths_sha256": "lengths_sha256",
    "tokens_sha256": "tokens_sha256",
}


def check_files(spec: OrderSpec, config: RunConfig) -> Check:
    """Hash every corpus and the tokenizer, and compare them with a run's order.json.

    Writes nothing; on a terminal, a bar shows the progress through each corpus.
    """
    check = Check(name="files")
    _check_tokenizer(spec, Path(config.data.tokenizer), check)
    pools = {pool.source: pool for phase in spec.phases for pool in phase.pools}
    for name, pool in pools.items():
        source = config.data.sources.get(name)
        if source is None:
            check.fail(f"source {name!r}: config.yaml does not name its corpus")
            continue
        _check_corpus(pool, source.prefix, spec.shards.get(name, ()), check)
    return check


def _check_tokenizer(spec: OrderSpec, folder: Path, check: Check) -> None:
    check.items += 1
    try:
        tokenizer_sha256 = load_tokenizer(folder).digest
    except (ValueError, OSError) as error:
        check.fail(str(error))
        return
    if tokenizer_sha256 != spec.tokenizer_sha256:
        check.fail(
            f"{folder / 'tokenizer.json'}: its SHA-256 is {tokenizer_sha256}, but order.json says "
            f"{spec.tokenizer_sha256}"
        )


def _check_corpus(
    pool: PoolSpec, prefix: str | list[str], shards: Sequence[ShardSpec], check: Check
) -> None:
    """Check each shard that a source had in the recorded order; it may have got more since."""
    try:
        prefixes = list_shards(prefix)
    except (ValueError, OSError) as error:
        check.fail(f"source {pool.source!r}: {error}")
        return
    # A corpus of one pair is not listed by shards: its pool has the hashes of the pair itself.
    recorded = [asdict(shard) for shard in shards] or [
        {name: getattr(pool, field) for field, name in FIELDS.items()}
    ]
    check.items += 2 * len(recorded)
    for shard, said in zip(prefixes, recorded, strict=False):
        _check_pair(pool.source, shard, said, check)
    for number in range(len(prefixes), len(recorded)):
        check.fail(f"source {pool.source!r}: shard {number} is not there any more")
    if len(prefixes) > len(recorded):
        more = len(prefixes) - len(recorded)
        check.notes.append(f"source {pool.source!r}: {more} shards are no part of the order")


def _check_pair(source: str, prefix: str, said: Mapping[str, Any], check: Check) -> None:
    try:
        identity = hash_corpus(prefix)
    except (ValueError, OSError) as error:
        check.fail(f"source {source!r}: {error}")
        return
    for field, name in FIELDS.items():
        today = getattr(identity, name)
        if said[name] != today:
            file = "bin" if field == "tokens_sha256" else "idx"
            what = f"{field} is {today}, but order.json says {said[name]}"
            check.fail(f"{prefix}.{file} (source {source!r}): {what}")


def check_tokenizers(config: RunConfig, tokenizer_sha256: str) -> Check:
    """Compare the tokenizer that each corpus records with the tokenizer in order.json."""
    check = Check(name="tokenizers")
    prefixes = corpora(config)
    comparison = compare_tokenizers(prefixes, tokenizer_sha256)
    check.items = len(prefixes) - len(comparison.unrecorded)
    for what in comparison.mixed:
        if config.data.allow_other_tokenizers:
            check.notes.append(f"{what}; {OPTION} accepted it")
        else:
            check.fail(what)
    if comparison.unrecorded:
        check.notes.append(f"no record of their tokenizer: {', '.join(comparison.unrecorded)}")
    return check
