"""Comparison of the tokenizer that each corpus records with the run's."""

from __future__ import annotations

from megatron_ettin.config import RunConfig
from megatron_ettin.data.corpus_tokenizer import OPTION, compare_tokenizers, corpora
from megatron_ettin.queries.faults import Check


def check_tokenizers(config: RunConfig, tokenizer_sha256: str) -> Check:
    """Compare the records of all corpora with the tokenizer that order.json names."""
    check = Check(name="tokenizers")
    prefixes = corpora(config)
    found = compare_tokenizers(prefixes, tokenizer_sha256)
    check.items = len(prefixes) - len(found.unrecorded)
    for what in found.mixed:
        if config.data.allow_other_tokenizers:
            check.notes.append(f"{what}; {OPTION} accepted it")
        else:
            check.fail(what)
    if found.unrecorded:
        check.notes.append(f"no record of their tokenizer: {', '.join(found.unrecorded)}")
    return check
