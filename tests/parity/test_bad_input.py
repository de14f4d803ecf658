"""What does not convert says which file, field or tensor it is, and leaves nothing behind."""

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


def test_decoder_window_without_keys(cases: dict[str, Case], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(cases["nano-decoder"].huggingface, tmp_path / "hf"))
    document = json.loads((folder / "config.json").read_text())
    document["local_attention"] = 2
    (folder / "config.json").write_text(json.dumps(document))
    assert_refused(folder, tmp_path / "c", "local_attention", "2")


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
    ],
    ids=["missing", "headless", "unexpected", "norm of layer 0", "misshapen", "integer", "untied"],
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
