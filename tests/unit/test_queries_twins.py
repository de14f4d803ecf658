"""Twins: equal data is proven whatever the batches were, and anything else is named."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megatron_ettin.queries.twins import TwinsProof, prove_twins
from tests.conftest import TinyCorpus
from tests.runs import record_run, tiny_config

PHASES: list[dict[str, Any]] = [
    {"name": "short", "train_tokens": 20_000, "seq_length": 128, "global_batch_size": 16},
    {"name": "long", "train_tokens": 10_000, "seq_length": 256, "global_batch_size": 8},
]


def other_batches() -> list[dict[str, Any]]:
    """The same rows in other steps, with a ramp in the first phase."""
    ramp = {"global_batch_size": 24, "batch_ramp_start": 4, "batch_ramp_tokens": 12_000}
    return [{**PHASES[0], **ramp}, {**PHASES[1], "global_batch_size": 12}]


def make(corpus: TinyCorpus, folder: Path, *, steps: int | None = None, **sections: Any) -> Path:
    config = tiny_config(corpus, folder, **{"phases": PHASES, **sections})
    return record_run(config, steps=steps)


def compare(
    corpus: TinyCorpus, folder: Path, *, steps: int | None = None, **sections: Any
) -> TwinsProof:
    encoder = make(corpus, folder / "encoder")
    decoder = make(corpus, folder / "decoder", steps=steps, **{"objective": "CausalLM", **sections})
    return prove_twins(encoder, decoder)


def test_other_batches_and_a_ramp_do_not_matter(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    proof = compare(tiny_corpus, tmp_path, phases=other_batches())
    encoder, decoder = proof.runs
    assert proof.passed, proof.reasons
    assert encoder.steps != decoder.steps
    assert (encoder.objective, decoder.objective) == ("MaskedLM", "CausalLM")
    assert proof.last_shared_g == encoder.end_g == decoder.end_g
    assert encoder.tokens == decoder.tokens == encoder.compared_tokens
    assert encoder.token_digest == decoder.token_digest
    assert 1 < proof.shared_boundaries < min(encoder.steps, decoder.steps)
    assert proof.notes == []
