"""Errors of conversion name the file, field or tensor, and leave nothing behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ettin.checkpoint_files import CheckpointError
from megatron_ettin.export.huggingface import from_huggingface, to_huggingface
from tests.parity.conftest import Case
from tools.convert import main

QKV = "model.layers.1.attn.Wqkv.weight"
EMBEDDING = "model.embeddings.tok_embeddings.weight"
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}


@pytest.fixture
def folder(cases: dict[str, Case], tmp_path: Path) -> Path:
    """Return a good Hugging Face encoder to spoil."""
    return Path(shutil.copytree(cases["nano-encoder"].huggingface, tmp_path / "hf"))


def assert_refused(folder: Path, output: Path, *parts: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=r"\S") as caught:
        from_huggingface(folder, output, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert [part for part in parts if part not in message] == [], message
    assert not output.exists()
    assert list(output.parent.glob("*.unfinished")) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "bert"),
        ("hidden_activation", "silu"),
        ("classifier_activation", "relu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("norm_bias", True),
        ("classifier_bias", True),
        ("decoder_bias", False),
        ("is_causal", True),
        ("tie_word_embeddings", False),
        ("layer_types", ["sliding_attention"] * 4),
        ("layer_types", ["full_attention", "full_attention", "sliding_attention"]),
        ("local_attention", 1),
        ("hidden_size", "wide"),
        ("num_attention_heads", 3),
    ],
)
def test_field_that_does_not_convert(field: str, value: Any, folder: Path, tmp_path: Path) -> None:
    document = json.loads((folder / "config.json").read_text())
    document[field] = value
    (folder / "config.json").write_text(json.dumps(document))
    assert_refused(folder, tmp_path / "c", "config.json", field)


def test_scaled_rope(folder: Path, tmp_path: Path) -> None:
    document = json.loads((folder / "config.json").read_text())
    document["rope_parameters"]["sliding_attention"] = LINEAR
    (folder / "config.json").write_text(json.dumps(document))
    assert_refused(folder, tmp_path / "c", "rope_parameters.sliding_attention.rope_type", "linear")


def test_a_missing_local_base_is_the_global_one(folder: Path, tmp_path: Path) -> None:
    """Version 4 of transformers computes it so; 5 fails."""
    document = json.loads((folder / "config.json").read_text())
    del document["rope_parameters"]
    document |= {"global_rope_theta": 80_000.0, "local_rope_theta": None}
    (folder / "config.json").write_text(json.dumps(document))
    saved = from_huggingface(folder, tmp_path / "c")
    assert (saved.rotary_base_global, saved.rotary_base_local) == (80_000.0, 80_000.0)
    document["global_rope_theta"] = None
    (folder / "config.json").write_text(json.dumps(document))
    assert_refused(folder, tmp_path / "d", "config.json", "rope_theta")


def test_decoder_window_without_keys(cases: dict[str, Case], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(cases["nano-decoder"].huggingface, tmp_path / "hf"))
    document = json.loads((folder / "config.json").read_text())
    # The first one decides where it is there.
    for field, value in (("sliding_window", 1), ("local_attention", 2)):
        document[field] = value
        (folder / "config.json").write_text(json.dumps(document))
        assert_refused(folder, tmp_path / "c", f"{field}: {value}")
        del document[field]


def test_no_config(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").unlink()
    assert_refused(folder, tmp_path / "c", str(folder), "config.json")
    assert_refused(tmp_path / "nowhere", tmp_path / "c", "nowhere")


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_config_that_is_no_object(text: str, folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").write_text(text)
    assert_refused(folder, tmp_path / "c", "config.json")


def without(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.pop(name) is None


def replaced(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (without(QKV), ("missing", QKV)),
        (without("decoder.bias"), ("missing", "decoder.bias")),
        (replaced("classifier.weight", torch.ones(2)), ("unexpected", "classifier.weight")),
        (
            replaced("model.layers.0.attn_norm.weight", torch.ones(128)),
            ("unexpected", "model.layers.0.attn_norm.weight"),
        ),
        (replaced(QKV, torch.ones(128, 384)), (QKV, "(128, 384)", "(384, 128)")),
        (replaced(QKV, torch.ones(384, 128, dtype=torch.int8)), (QKV, "I8")),
        (replaced("decoder.weight", torch.ones(8192, 128)), ("decoder.weight", "untied")),
        (
            replaced("head.norm.weight", torch.full((128,), torch.nan)),
            ("head.norm", "128 of"),
        ),
        (replaced("decoder.bias", torch.full((8192,), torch.inf)), ("decoder.bias", "infinite")),
        (
            replaced("decoder.bias", torch.full((8192,), 1e300, dtype=torch.float64)),
            ("decoder.bias", "infinite in float32"),
        ),
    ],
    ids=[
        "missing",
        "headless",
        "unexpected",
        "norm of layer 0",
        "misshapen",
        "integer",
        "untied",
        "NaN",
        "infinite",
        "beyond float32",
    ],
)
def test_tensor_that_does_not_fit(
    spoil: Callable[[dict[str, torch.Tensor]], None],
    parts: tuple[str, ...],
    folder: Path,
    tmp_path: Path,
) -> None:
    tensors = load_file(folder / "model.safetensors")
    spoil(tensors)
    save_file(tensors, folder / "model.safetensors")
    assert_refused(folder, tmp_path / "c", *parts)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_backbone_or_classifier_has_no_head(prefix: str, folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    backbone = {
        name.replace("model.", prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith("model.")
    }
    if prefix:
        backbone |= {name: tensors[name] for name in ("head.dense.weight", "head.norm.weight")}
        backbone |= {"classifier.weight": torch.ones(2, 128), "classifier.bias": torch.ones(2)}
    save_file(backbone, folder / "model.safetensors")
    assert_refused(folder, tmp_path / "c", "has no language-model head", "decoder.bias")


def shards(folder: Path, stem: str) -> list[Path]:
    """Split the folder's weights into two files."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    paths = [folder / f"{stem}-{part:05d}-of-00002.safetensors" for part in (1, 2)]
    for path, some in zip(paths, (names[:9], names[9:]), strict=True):
        save_file({name: tensors[name] for name in some}, path)
    return paths


def write_index(folder: Path, paths: list[Path]) -> dict[str, str]:
    placed = {name: path.name for path in paths for name in load_file(path)}
    index = {"metadata": {}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return placed


def test_an_index_decides_which_shards_are_the_model(folder: Path, tmp_path: Path) -> None:
    expected = load_file(folder / "model.safetensors")[QKV]
    placed = write_index(folder, shards(folder, "weights"))
    for stem in ("model", "weights"):  # left over from an earlier model: read by nobody
        save_file({QKV: torch.zeros(384, 128)}, folder / f"{stem}-00001-of-00001.safetensors")
    from_huggingface(folder, tmp_path / "c")
    to_huggingface(tmp_path / "c", tmp_path / "again")
    assert torch.equal(load_file(tmp_path / "again" / "model.safetensors")[QKV], expected)
    (folder / placed[QKV]).unlink()
    assert_refused(folder, tmp_path / "d", placed[QKV], "missing")
    (folder / "model.safetensors.index.json").write_text("[]")
    assert_refused(folder, tmp_path / "d", "index.json")


def test_shards_without_an_index(folder: Path, tmp_path: Path) -> None:
    first, second = shards(folder, "pytorch_model")
    from_huggingface(folder, tmp_path / "c")
    other = folder / "model-00001-of-00001.safetensors"
    save_file({QKV: torch.zeros(384, 128)}, other)
    assert_refused(folder, tmp_path / "d", "2 sets", "index.json")
    other.unlink()
    save_file({**load_file(first), **load_file(second)}, second)
    assert_refused(folder, tmp_path / "d", first.name, second.name, "is in")
    second.unlink()
    assert_refused(folder, tmp_path / "d", second.name, "2 shards")


def test_damaged_or_missing_file(folder: Path, tmp_path: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])
    assert_refused(folder, tmp_path / "c", "model.safetensors", "damaged")
    path.rename(folder / "pytorch_model.bin")
    assert_refused(folder, tmp_path / "c", "no model.safetensors")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (
            {"tensor_parallel_size": 3},
            ("hardware.tensor_parallel_size: 3", "num_attention_heads: 2"),
        ),
        ({"pipeline_parallel_size": 5}, ("pipeline_parallel_size: 5", "num_layers: 4")),
        ({"tensor_parallel_size": 0}, ("tensor_parallel_size", "0")),
        ({"sliding_window": 0}, ("sliding_window", "0")),
    ],
)
def test_size_that_does_not_fit(
    options: dict[str, int], parts: tuple[str, ...], folder: Path, tmp_path: Path
) -> None:
    assert_refused(folder, tmp_path / "c", *parts, **options)


def test_output_that_exists(nano: Case, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "theirs").touch()
    for output in (tmp_path / "full", tmp_path / "full" / "theirs"):
        with pytest.raises(ValueError, match="exists already"):
            from_huggingface(nano.huggingface, output)
        with pytest.raises(ValueError, match="exists already"):
            to_huggingface(nano.checkpoint, output)
    (tmp_path / "empty").mkdir()
    to_huggingface(nano.checkpoint, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()


@pytest.mark.parametrize(
    "missing", ["model.json", "state.json", "metadata.json", ".metadata", "__0_0.distcp"]
)
def test_incomplete_checkpoint(missing: str, nano: Case, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(nano.checkpoint, tmp_path / "c"))
    (folder / missing).unlink()
    with pytest.raises(CheckpointError, match=f"{missing}.*") as caught:
        to_huggingface(folder, tmp_path / "hf")
    assert str(folder) in str(caught.value)
    assert not (tmp_path / "hf").exists()


def test_checkpoint_of_another_architecture(nano: Case, tmp_path: Path) -> None:
    """Without digests, the shards are checked against what model.json says they are."""
    folder = Path(shutil.copytree(nano.checkpoint, tmp_path / "c"))
    document = json.loads((folder / "model.json").read_text())
    document["model"]["num_layers"] = 5
    (folder / "model.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"decoder\.layers\.4"):
        to_huggingface(folder, tmp_path / "hf", check_files=False)
    document["model"]["depth"] = 5
    (folder / "model.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="depth"):
        to_huggingface(folder, tmp_path / "hf", check_files=False)


@pytest.mark.parametrize(
    "arguments", [["to-hf", "--checkpoint", "{}/no"], ["from-hf", "--input", "{}/no"]]
)
def test_tool_ends_with_one_line(arguments: list[str], tmp_path: Path) -> None:
    filled = [argument.format(tmp_path) for argument in arguments]
    with pytest.raises(SystemExit) as caught:
        main([*filled, "--output", str(tmp_path / "out")])
    message = str(caught.value.code)
    assert message.startswith(f"error: {tmp_path / 'no'}: ")
    assert "\n" not in message


def test_tool_converts_there_and_back(
    nano: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["to-hf", "--checkpoint", str(nano.checkpoint), "--output", str(tmp_path / "hf")])
    assert "window 64, RoPE bases 160000 (global) and 10000 (local)" in capsys.readouterr().out
    back = ["from-hf", "--input", str(tmp_path / "hf"), "--output", str(tmp_path / "c")]
    main([*back, "--tensor-parallel-size", "2", "--sliding-window", "32"])
    assert "window 32" in capsys.readouterr().out
    assert "tensor_parallel_size: 2" in (tmp_path / "c" / "config.yaml").read_text()
