"""Files as the original training code saved them compute the same here as their models there.

The names are spelled out below, by hand, from FlexBertForMaskedLM and FlexBertForCausalLM; nothing
goes through the importer's own table.
"""

import datetime
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from megatron_ettin import checkpoint
from megatron_ettin.export.composer import from_composer
from tests.conftest import TinyCorpus
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
from tools.convert import main

OUTSIDE_LAYERS = {
    "bert.embeddings.tok_embeddings.weight": "model.embeddings.tok_embeddings.weight",
    "bert.embeddings.norm.weight": "model.embeddings.norm.weight",
    "bert.final_norm.weight": "model.final_norm.weight",
    "decoder.weight": "decoder.weight",
    "decoder.bias": "decoder.bias",
}
HEADS = {
    "encoder": {"head.dense.weight": "head.dense.weight", "head.norm.weight": "head.norm.weight"},
    "decoder": {
        "lm_head.dense.weight": "lm_head.dense.weight",
        "lm_head.norm.weight": "lm_head.norm.weight",
    },
}
IN_LAYERS = ("attn.Wo", "mlp_norm", "mlp.Wi", "mlp.Wo")


def original_weights(kind: str, model: Any) -> dict[str, torch.Tensor]:
    """Return a reference's weights under the names of the original code."""
    theirs = model.state_dict()
    found = {name: theirs[theirs_name] for name, theirs_name in OUTSIDE_LAYERS.items()}
    found |= {name: theirs[theirs_name] for name, theirs_name in HEADS[kind].items()}
    for i in range(SIZES["nano"]["num_hidden_layers"]):
        ours, hf = f"bert.encoder.layers.{i}.", f"model.layers.{i}."
        for name in IN_LAYERS:
            found[f"{ours}{name}.weight"] = theirs[f"{hf}{name}.weight"]
        if i > 0:
            found[f"{ours}attn_norm.weight"] = theirs[f"{hf}attn_norm.weight"]
        found[f"{ours}attn.Wqkv.weight"] = (
            theirs[f"{hf}attn.Wqkv.weight"]
            if kind == "encoder"
            else torch.cat([theirs[f"{hf}attn.{x}_proj.weight"] for x in "qkv"])
        )
    return found


def settings(kind: str) -> dict[str, Any]:
    """Return a `model_config` as in the released training files."""
    return {
        **SIZES["nano"],
        "activation_function": "gelu",
        "attention_layer": "rope",
        "attention_probs_dropout_prob": 0.0,
        "attn_out_bias": False,
        "attn_out_dropout_prob": 0.1,
        "attn_qkv_bias": False,
        "bert_layer": "prenorm",
        "embed_norm": True,
        "embedding_layer": "sans_pos",
        "final_norm": True,
        "global_attn_every_n_layers": 3,
        "head_pred_act": "gelu",
        "hidden_act": "gelu",
        "local_attn_rotary_emb_base": 10_000.0,
        "mlp_in_bias": False,
        "mlp_layer": "glu",
        "mlp_out_bias": False,
        "norm_kwargs": {"eps": "1e-5", "bias": False},
        "normalization": "layernorm",
        "rotary_emb_base": 160_000.0,
        "rotary_emb_dim": None,
        "rotary_emb_interleaved": False,
        "skip_first_prenorm": True,
        "sliding_window": 128,
        **({"causal_mask": True} if kind == "decoder" else {}),
    }


def composer_state(kind: str, model: Any, **changes: Any) -> dict[str, Any]:
    """Return what Composer saves: weights and settings, and much that is not asked for."""
    weights = original_weights(kind, model)
    config = {"model_type": "bert", **settings(kind), "rotary_emb_dim": 64, **changes}
    return {
        "state": {
            "model": {f"model.{name}": tensor for name, tensor in weights.items()},
            "integrations": {
                "huggingface": {
                    "model": {"config": {"file_extension": ".json", "content": config}},
                    "tokenizer": {},
                }
            },
            "timestamp": {"batch": 5, "total_wct": datetime.timedelta(seconds=3)},
            "metadata": {"torch_version": torch.__version__},
            "optimizers": {"DecoupledStableAdamW": {"state": {}, "param_groups": []}},
        },
        "rng": [{"python": random.getstate(), "numpy": np.random.get_state()}],
    }


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {kind: make_reference(kind, SIZES["nano"]) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_composer_checkpoint_computes_the_same(
    kind: str, models: dict[str, Any], tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    torch.save(composer_state(kind, models[kind]), tmp_path / "ep0.pt")
    arguments = ["from-composer", "--input", str(tmp_path / "ep0.pt"), "--max-seq-length", "512"]
    arguments += ["--tokenizer", str(tiny_corpus.folder / "tokenizer")]
    main([*arguments, "--output", str(tmp_path / "c")])
    saved = checkpoint.read_model(tmp_path / "c")
    assert saved.model.sliding_window == 64
    assert (saved.rotary_base_global, saved.rotary_base_local) == (160_000.0, 10_000.0)
    assert (saved.max_seq_length, saved.prediction_shift) == (512, 0)
    assert saved.tokenizer == str(tiny_corpus.folder / "tokenizer")
    packed = Packed.random(SIZES["nano"]["vocab_size"])
    expected = reference_logits(models[kind], packed)
    assert difference(checkpoint_logits(tmp_path / "c", packed), expected) <= TOLERANCE


def test_weights_alone_need_the_training_file(models: dict[str, Any], tmp_path: Path) -> None:
    """Convert a `pytorch_model.bin` whose local layers take the global base."""
    torch.save(original_weights("encoder", models["encoder"]), tmp_path / "pytorch_model.bin")
    config = settings("encoder")
    del config["local_attn_rotary_emb_base"]
    document = {"max_seq_len": 7999, "model": {"name": "flex_bert", "model_config": config}}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: .*give --config"):
        from_composer(tmp_path / "pytorch_model.bin", tmp_path / "c")
    saved = from_composer(
        tmp_path / "pytorch_model.bin", tmp_path / "c", config=tmp_path / "train.yaml"
    )
    assert saved.max_seq_length == 7999
    assert saved.rotary_base_local == 160_000.0
    assert saved.model.layernorm_epsilon == 1e-5


def test_what_the_file_does_not_say_must_be_said(models: dict[str, Any], tmp_path: Path) -> None:
    """A decoder's names with bidirectional attention: a model that was turned into an encoder."""
    path = tmp_path / "cross.pt"
    torch.save(composer_state("decoder", models["decoder"], causal_mask=False), path)
    with pytest.raises(ValueError, match="--max-seq-length"):
        from_composer(path, tmp_path / "c", prediction_shift=1)
    with pytest.raises(ValueError, match="--prediction-shift 1"):
        from_composer(path, tmp_path / "c", max_seq_length=512)
    saved = from_composer(path, tmp_path / "c", max_seq_length=512, prediction_shift=1)
    assert (saved.attention, saved.prediction_shift) == ("bidirectional", 1)
    assert "MaskedNextToken" in (tmp_path / "c" / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attention_layer", "base"),
        ("normalization", "rmsnorm"),
        ("hidden_act", "silu"),
        ("norm_kwargs", {"eps": 1e-5}),
        ("sliding_window", -1),
        ("num_attention_heads", None),
        ("num_attention_heads", 3),
        ("rotary_emb_dim", 32),
        ("rotary_emb_base", "high"),
        ("initial_mlp_layer", "mlp"),
        ("tie_word_embeddings", False),
        ("intermediate_size", 64),
    ],
)
def test_setting_without_an_equivalent(
    field: str, value: Any, models: dict[str, Any], tmp_path: Path
) -> None:
    torch.save(composer_state("encoder", models["encoder"], **{field: value}), tmp_path / "m.pt")
    # Rows of a tensor tell the width of the MLP; nothing else does.
    message = "shape" if field == "intermediate_size" else field
    with pytest.raises(ValueError, match=message) as caught:
        from_composer(tmp_path / "m.pt", tmp_path / "c", max_seq_length=512)
    assert str(tmp_path / "m.pt") in str(caught.value)
    assert not (tmp_path / "c").exists()


def test_tensor_that_does_not_fit(models: dict[str, Any], tmp_path: Path) -> None:
    norm = "bert.encoder.layers.1.attn_norm.weight"
    for change, message in (
        ({norm: None}, f"missing tensor {norm}"),
        ({norm: torch.ones(128, dtype=torch.int32)}, f"{norm} has type int32"),
        ({"bert.pooler.weight": torch.ones(1)}, r"unexpected tensor bert\.pooler\.weight"),
        ({"decoder.weight": torch.ones(8192, 128)}, "untied"),
    ):
        state = composer_state("encoder", models["encoder"])
        for name, tensor in change.items():
            state["state"]["model"][f"model.{name}"] = tensor
        if change.get(norm, ...) is None:
            del state["state"]["model"][f"model.{norm}"]
        torch.save(state, tmp_path / "m.pt")
        with pytest.raises(ValueError, match=message):
            from_composer(tmp_path / "m.pt", tmp_path / "c", max_seq_length=512)


def test_random_states_of_older_numpy_are_read(tmp_path: Path) -> None:
    """Version 1 wrote the name of a module that version 2 has renamed."""
    torch.save({"state": {"model": 5}, "rng": np.random.get_state()}, tmp_path / "new.pt")
    with zipfile.ZipFile(tmp_path / "new.pt") as new:
        parts = {name: new.read(name) for name in new.namelist()}
    assert b"cnumpy._core.multiarray\n" in parts["new/data.pkl"]
    with zipfile.ZipFile(tmp_path / "old.pt", "w", zipfile.ZIP_STORED) as old:
        for name, content in parts.items():
            old.writestr(name, content.replace(b"cnumpy._core.", b"cnumpy.core."))
    for name in ("new.pt", "old.pt"):
        with pytest.raises(ValueError, match="no weights here"):
            from_composer(tmp_path / name, tmp_path / "c")


class Foreign:
    """A type that only the code which saved it knows."""


def test_no_code_of_a_file_is_run(models: dict[str, Any], tmp_path: Path) -> None:
    state = composer_state("encoder", models["encoder"])
    torch.save({**state, "callbacks": Foreign()}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"holds a pickled \S*Foreign.*torch\.save"):
        from_composer(tmp_path / "m.pt", tmp_path / "c")
    (tmp_path / "m.pt").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"m\.pt: .*torch\.save"):
        from_composer(tmp_path / "m.pt", tmp_path / "c")
    torch.save({"state": {"model": {"a": 1}}}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"m\.pt: no weights here"):
        from_composer(tmp_path / "m.pt", tmp_path / "c")
