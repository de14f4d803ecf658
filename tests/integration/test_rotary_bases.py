"""A converted model keeps its RoPE bases when it is trained on, unless a phase names others."""

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_ettin import checkpoint
from megatron_ettin.config import ConfigError, RotaryBases, load_config, parse_args
from megatron_ettin.export.huggingface import from_huggingface
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.pretrain import pretrain
from tests.conftest import TinyCorpus
from tests.parity.references import make_reference

# What Megatron-Core says of its own calls while it trains; pretrain's command line silences it.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{category}")
    for category in ("UserWarning", "FutureWarning", "DeprecationWarning")
]

SHAPE = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
}
OF_THE_MODEL = RotaryBases(160_000.0, 10_000.0)
NAMES = ("short", "long")


def train(
    corpus: TinyCorpus,
    run_dir: Path,
    source: Path,
    bases: Sequence[dict[str, float]],
    *arguments: str,
) -> list[float]:
    """Train two phases of a few steps with `bases` each; return the losses."""
    phases: list[dict[str, Any]] = [
        {"name": name, "train_tokens": 2_000, "seq_length": 128, "global_batch_size": 8, **named}
        for name, named in zip(NAMES, bases, strict=True)
    ]
    path = corpus.write_config(run_dir.with_suffix(".yaml"), phases=phases, objective="MaskedLM")
    given = [f"--config={path}", f"--run_dir={run_dir}", *arguments]
    pretrain(parse_args([*given, f"--checkpoint.initialize_from={source}"]))
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if line["kind"] == "train"]


def named(bases: RotaryBases) -> dict[str, float]:
    return {"rotary_base_global": bases.base_global, "rotary_base_local": bases.base_local}


def bases_of(run_dir: Path) -> list[RotaryBases]:
    """Return the bases of each phase in config.yaml, then those in the newest checkpoint."""
    newest = RunFolder(run_dir).newest_checkpoint()
    assert newest is not None
    saved = checkpoint.read_model(newest)
    found = [phase.rotary_bases for phase in load_config(run_dir / "config.yaml").phases]
    return [*found, RotaryBases(saved.rotary_base_global, saved.rotary_base_local)]


@pytest.mark.slow
def test_bases_of_a_converted_model(
    tiny_corpus: TinyCorpus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    reference = make_reference(
        "encoder", {**SHAPE, "vocab_size": tiny_corpus.vocab_size}, local_attention=32
    )
    reference.save_pretrained(tmp_path / "hf")
    from_huggingface(tmp_path / "hf", tmp_path / "source")

    def changes() -> list[str]:
        found = [text for text in caplog.messages if "RoPE bases" in text]
        caplog.clear()
        return found

    kept = train(tiny_corpus, tmp_path / "kept", tmp_path / "source", [{}, {}])
    assert changes() == []
    assert bases_of(tmp_path / "kept") == [OF_THE_MODEL] * 3
    spelled = [named(OF_THE_MODEL)] * 2
    assert train(tiny_corpus, tmp_path / "same", tmp_path / "source", spelled) == kept
    assert changes() == []

    lower = RotaryBases(10_000.0, 10_000.0)
    other = train(tiny_corpus, tmp_path / "other", tmp_path / "source", [{}, named(lower)])
    assert changes() == [
        "phase long: RoPE bases 160000 (global) and 10000 (local) -> "
        "10000 (global) and 10000 (local)"
    ]
    assert bases_of(tmp_path / "other") == [OF_THE_MODEL, lower, lower]
    half = len(kept) // 2
    assert other[: half - 1] == kept[: half - 1]
    assert other[-1] != kept[-1]
    train(tiny_corpus, tmp_path / "lower", tmp_path / "source", [named(lower), {}])
    assert [line.partition(":")[0] for line in changes()] == ["phase short"]

    # The source may be gone: the run's own checkpoint says what its phases had.
    shutil.rmtree(tmp_path / "source")
    newest = RunFolder(tmp_path / "other").newest_checkpoint()
    assert newest is not None
    shutil.rmtree(newest)
    again = train(
        tiny_corpus, tmp_path / "other", tmp_path / "gone", [{}, {}], "--checkpoint.resume=true"
    )
    assert again == other
    assert bases_of(tmp_path / "other") == [OF_THE_MODEL, lower, lower]


def test_a_configuration_that_no_run_has_started_names_no_bases(
    tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    path = tiny_corpus.write_config(tmp_path / "run.yaml", objective="MaskedLM")
    config = parse_args([f"--config={path}", f"--run_dir={tmp_path / 'run'}"])
    assert config.phases[0].rotary_base_global is None
    with pytest.raises(ConfigError, match="rotary_base_global"):
        parse_args([f"--config={path}", "--run_dir=run", "--phases.long.rotary_base_global=high"])
