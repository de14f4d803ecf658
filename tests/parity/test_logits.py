"""Logits beyond test_sizes.py: other windows show, and shapes that no size has fit too."""

from pathlib import Path

import pytest

from megatron_ettin import checkpoint
from megatron_ettin.export.huggingface import from_huggingface
from tests.parity.conftest import Case
from tests.parity.references import (
    KINDS,
    SIZES,
    TOLERANCE,
    Packed,
    difference,
    make_reference,
    reference_logits,
)
from tests.parity.stages import checkpoint_logits

#: What an error of one key in a window amounts to here, at the least.
VISIBLE = 100 * TOLERANCE


@pytest.mark.parametrize("window", [63, 65])
def test_a_key_more_or_less_shows(nano: Case, window: int, tmp_path: Path) -> None:
    """The window is what the numbers say, and these inputs would show another one."""
    assert checkpoint.read_model(nano.checkpoint).model.sliding_window == 64
    from_huggingface(nano.huggingface, tmp_path / "c", sliding_window=window)
    found = checkpoint_logits(tmp_path / "c", nano.packed)
    lengths = nano.packed.cu_seqlens.diff().tolist()
    for length, ours, theirs in zip(
        lengths, found.split(lengths), nano.logits.split(lengths), strict=True
    ):
        # The first key that only one of the windows sees is min(window, 64) + 1 slots away.
        if length > min(window, 64) + 1:
            assert difference(ours, theirs) > VISIBLE
        else:
            assert difference(ours, theirs) <= TOLERANCE


def test_published_decoder_is_read_as_transformers_computes_it(tmp_path: Path) -> None:
    reference = make_reference("decoder", SIZES["nano"], local_attention=128)
    reference.save_pretrained(tmp_path / "hf")
    saved = from_huggingface(tmp_path / "hf", tmp_path / "c")
    assert saved.model.sliding_window == 63
    packed = Packed.random(SIZES["nano"]["vocab_size"])
    expected = reference_logits(reference, packed)
    assert difference(checkpoint_logits(tmp_path / "c", packed), expected) <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_shape_that_no_published_size_has(kind: str, tmp_path: Path) -> None:
    """Heads of 32, global layers 0, 2, 4, a vocabulary that is padded, other bases and epsilon."""
    shape = {
        "num_hidden_layers": 5,
        "hidden_size": 96,
        "intermediate_size": 80,
        "num_attention_heads": 3,
        "vocab_size": 1000,
    }
    reference = make_reference(
        kind,
        shape,
        global_attn_every_n_layers=2,
        local_attention=34,
        norm_eps=1e-3,
        global_rope_theta=500.0,
        local_rope_theta=50_000.0,
    )
    reference.save_pretrained(tmp_path / "hf")
    saved = from_huggingface(tmp_path / "hf", tmp_path / "c")
    assert saved.model.padded_vocab_size == 1024
    packed = Packed.random(1000)
    expected = reference_logits(reference, packed)
    assert difference(checkpoint_logits(tmp_path / "c", packed), expected) <= TOLERANCE
