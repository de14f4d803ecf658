"""Files that a conversion writes in either direction; nothing is lost (weights: test_sizes)."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from megatron_ettin import checkpoint
from megatron_ettin.checkpoint import RunState, SavedModel
from megatron_ettin.config import parse_args
from megatron_ettin.export import unmasking
from megatron_ettin.export.huggingface import from_huggingface, to_huggingface
from megatron_ettin.objectives import (
    ByPhase,
    CausalLM,
    MaskedDiffusion,
    MaskedLM,
    MaskedNextToken,
    Mixture,
)
from tests.parity.conftest import Case
from tests.parity.references import (
    KINDS,
    SIZES,
    TOLERANCE,
    difference,
    make_reference,
    reference_logits,
)
from tests.parity.runs import OBJECTIVES, load_parameters, make_run, save_run
from tools.convert import main

AUTO = {"encoder": AutoModelForMaskedLM, "decoder": AutoModelForCausalLM}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def computing_fields(folder: Path) -> dict[str, Any]:
    """Return the configuration as transformers reads it, but for names and special token ids."""
    fields: dict[str, Any] = AutoConfig.from_pretrained(folder).to_dict()
    assert fields.pop("_name_or_path") == str(folder)
    fields.pop("classifier_pooling", None)  # ours is the mean, whatever an imported model said
    fields.pop("global_attn_every_n_layers", None)  # of version 4; layer_types says it too
    return {name: fields[name] for name in fields if not name.endswith("_token_id")}


def test_round_trip_keeps_what_is_computed(nano: Case, tmp_path: Path) -> None:
    to_huggingface(nano.checkpoint, tmp_path / "hf")
    assert computing_fields(tmp_path / "hf") == computing_fields(nano.huggingface)


def test_loaded_by_plain_transformers(nano: Case, tmp_path: Path) -> None:
    to_huggingface(nano.checkpoint, tmp_path / "hf")
    model, report = AUTO[nano.kind].from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert {kind: names for kind, names in report.items() if names} == {}
    assert difference(reference_logits(model.eval(), nano.packed), nano.logits) <= TOLERANCE
    assert model.decoder.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("kind", KINDS)
def test_run_converts_and_comes_back(kind: str, tmp_path: Path) -> None:
    """An uneven pattern, a padded vocabulary, and the RoPE bases of the phase last trained."""
    config = make_run(
        kind, tmp_path / "none", vocab_size=1000, global_attention_every=2, sliding_window=16
    )
    parameters = save_run(tmp_path / "c", config, "extension", "")
    saved = to_huggingface(tmp_path / "c", tmp_path / "hf")
    found = AutoConfig.from_pretrained(tmp_path / "hf")
    assert found.local_attention == {"encoder": 32, "decoder": 34}[kind]
    assert found.layer_types == ["full_attention", "sliding_attention"] * 2
    assert found.rope_parameters["full_attention"]["rope_theta"] == 160_000.0
    assert found.rope_parameters["sliding_attention"]["rope_theta"] == 20_000.0
    assert found.max_position_embeddings == 512
    assert found.vocab_size == 1000
    assert getattr(found, "classifier_pooling", None) == {"encoder": "mean"}.get(kind)
    assert tensors(tmp_path / "hf")["decoder.bias"].shape == (1000,)
    again = from_huggingface(tmp_path / "hf", tmp_path / "again")
    assert again.model == saved.model
    assert_equal_bits(load_parameters(tmp_path / "again"), parameters)


@pytest.mark.parametrize(
    ("phase", "bases"), [("", (10_000.0, 10_000.0)), ("extension", (160_000.0, 20_000.0))]
)
def test_rotary_bases_are_those_of_the_phase(
    phase: str, bases: tuple[float, float], tmp_path: Path
) -> None:
    save_run(tmp_path / "c", make_run("encoder", tmp_path / "none"), phase, "")
    saved = checkpoint.read_model(tmp_path / "c")
    assert (saved.rotary_base_global, saved.rotary_base_local) == bases


def front_matter(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


@pytest.mark.parametrize(
    ("kind", "task"), [("encoder", "fill-mask"), ("decoder", "text-generation")]
)
def test_the_card_says_what_the_model_is(kind: str, task: str, tmp_path: Path) -> None:
    config = make_run(kind, tmp_path / "none", vocab_size=1000, sliding_window=16)
    parameters = save_run(tmp_path / "c", config, "extension", "")
    to_huggingface(tmp_path / "c", tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert front_matter(card)["library_name"] == "transformers"
    assert front_matter(card)["pipeline_tag"] == task
    # Our rows of the vocabulary are padded to 1,024.
    padding = (1024 - 1000) * (64 + 1)
    count = sum(tensor.numel() for tensor in parameters.values()) - padding
    local = {"encoder": "on each side, and their own (`local_attention: 32`"}.get(
        kind, "to the left, and their own (`local_attention: 34`"
    )
    for said in (
        f"| parameters | {count:,} ",
        f"| objective | {type(config.objective).__name__} |",
        f"| attention | {config.objective.attention}; a position predicts ",
        f"16 tokens {local}",
        "160000 in global layers, 20000 in local ones",
        "| step | 1 |",
        "| phase | extension (",
        "This folder holds no tokenizer",
    ):
        assert said in card
    assert "prediction_shift" not in card
    assert front_matter(card).keys().isdisjoint({"license", "language", "datasets", "base_model"})


def test_the_card_repeats_what_only_a_person_knows(tmp_path: Path) -> None:
    save_run(tmp_path / "c", make_run("encoder", tmp_path / "none"), "extension", "")
    given = ["--license=apache-2.0", "--language=en", "--language=de", "--dataset=a/b"]
    where = [f"--checkpoint={tmp_path / 'c'}", f"--output={tmp_path / 'hf'}"]
    main(["to-hf", *where, *given, "--base-model=c/d: e"])
    found = front_matter((tmp_path / "hf" / "README.md").read_text())
    assert found["license"] == "apache-2.0"
    assert found["language"] == ["en", "de"]
    assert found["datasets"] == ["a/b"]
    assert found["base_model"] == "c/d: e"
    assert found["library_name"] == "transformers"
    assert found["tags"] == ["modernbert", "megatron-ettin"]


def test_shifted_predictions_are_said_and_read_back(nano: Case, tmp_path: Path) -> None:
    if nano.kind == "decoder":
        with pytest.raises(ValueError, match=r"config\.json: prediction_shift: 1"):
            from_huggingface(nano.huggingface, tmp_path / "c", prediction_shift=1)
        return
    # The published models that come from decoders do not say it of themselves.
    saved = from_huggingface(nano.huggingface, tmp_path / "c", prediction_shift=1)
    to_huggingface(tmp_path / "c", tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert front_matter(card)["pipeline_tag"] == "feature-extraction"
    for said in (
        "| objective | not on record |",
        "a position predicts the token 1 further on",
        "`fill-mask` pipeline does not know",
        "no training of theirs",
    ):
        assert said in " ".join(card.split())
    assert AutoConfig.from_pretrained(tmp_path / "hf").prediction_shift == 1
    again = from_huggingface(tmp_path / "hf", tmp_path / "again")
    assert again == saved
    assert checkpoint.read_model(tmp_path / "again").prediction_shift == 1
    assert "MaskedNextToken" in (tmp_path / "again" / "config.yaml").read_text()


MIXTURE = Mixture(objectives=[MaskedNextToken(), CausalLM()], shares=[1, 1])


def test_a_mixture_is_exported_as_either_kind(tmp_path: Path) -> None:
    config = make_run("encoder", tmp_path / "none")
    save_run(tmp_path / "c", dataclasses.replace(config, objective=MIXTURE), "extension", "")
    where = [f"--checkpoint={tmp_path / 'c'}", f"--output={tmp_path / 'default'}"]
    main(["to-hf", *where])
    weights = {}
    for kind in KINDS:
        folder = tmp_path / kind
        main(["to-hf", where[0], f"--output={folder}", "--as", kind])
        found = AutoConfig.from_pretrained(folder)
        assert getattr(found, "prediction_shift", 0) == (1 if kind == "encoder" else 0)
        card = " ".join((folder / "README.md").read_text().split())
        name = {"encoder": "MaskedNextToken", "decoder": "CausalLM"}[kind]
        assert f"| objective | {name} |" in card
        other = {"encoder": "decoder", "decoder": "encoder"}[kind]
        assert f"MaskedNextToken and CausalLM at once, {'each on'}" in card
        assert f"--as {other}" in card
        from_huggingface(folder, tmp_path / f"{kind}-again")
        weights[kind] = load_parameters(tmp_path / f"{kind}-again")
    assert_equal_bits(weights["encoder"], weights["decoder"])
    assert tensors(tmp_path / "default").keys() == tensors(tmp_path / "encoder").keys()


def test_a_model_of_one_kind_is_not_exported_as_the_other(tmp_path: Path) -> None:
    save_run(tmp_path / "c", make_run("encoder", tmp_path / "none"), "extension", "")
    where = [f"--checkpoint={tmp_path / 'c'}", f"--output={tmp_path / 'hf'}"]
    with pytest.raises(SystemExit, match=r"/c: these weights .* bidirectional attention only"):
        main(["to-hf", *where, "--as", "decoder"])
    main(["to-hf", *where, "--as", "encoder"])


def test_the_last_phase_decides_the_kind(tmp_path: Path) -> None:
    config = make_run("encoder", tmp_path / "none")
    detour = ByPhase(objective=MaskedLM(), by_phase={"pretrain": CausalLM()})
    config = dataclasses.replace(config, objective=detour)
    for phase, attention, name in (
        ("pretrain", "causal", "CausalLM"),
        ("extension", "bidirectional", "MaskedLM"),
    ):
        saved = SavedModel.of_run(config, RunState(phase=phase))
        assert (saved.attention, saved.faces) == (attention, ())
        assert saved.objective is not None
        assert saved.objective.endswith(f".{name}")


def test_a_diffusion_model_comes_with_what_fills_its_masks(tmp_path: Path) -> None:
    config = make_run("encoder", tmp_path / "none")
    save_run(
        tmp_path / "c", dataclasses.replace(config, objective=MaskedDiffusion()), "extension", ""
    )
    to_huggingface(tmp_path / "c", tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| objective | MaskedDiffusion |" in card
    assert "from unmasking import Unmasking" in card
    assert (tmp_path / "hf" / "unmasking.py").read_text() == Path(unmasking.__file__).read_text()


class MaskedWords(MaskedLM):
    """Attends and predicts as MaskedLM does, and is another objective."""


def test_the_card_names_the_objective_that_trained_the_model(tmp_path: Path) -> None:
    config = dataclasses.replace(make_run("encoder", tmp_path / "none"), objective=MaskedWords())
    save_run(tmp_path / "c", config, "extension", "")
    to_huggingface(tmp_path / "c", tmp_path / "hf")
    assert "| objective | MaskedWords |" in (tmp_path / "hf" / "README.md").read_text()


def test_an_earlier_checkpoint_names_its_objective_in_its_configuration(tmp_path: Path) -> None:
    config = dataclasses.replace(make_run("encoder", tmp_path / "none"), objective=MaskedWords())
    save_run(tmp_path / "c", config, "extension", "")
    path = tmp_path / "c" / "model.json"
    saved = checkpoint.read_model(tmp_path / "c")
    path.write_text(
        json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "objective"})
    )
    assert checkpoint.read_model(tmp_path / "c") == saved
    (tmp_path / "c" / "config.yaml").write_text("model: {}\n")
    with pytest.raises(
        checkpoint.CheckpointError, match=r"config\.yaml: does not name the objective"
    ):
        checkpoint.read_model(tmp_path / "c")


def test_a_run_records_where_masks_are_predicted(tmp_path: Path) -> None:
    config = make_run("encoder", tmp_path / "none")
    config = dataclasses.replace(config, objective=MaskedNextToken())
    assert SavedModel.of_run(config, RunState()).prediction_shift == 1


def test_older_transformers_finds_its_names(nano: Case, tmp_path: Path) -> None:
    """Version 4 does not know rope_parameters and would take its defaults without a word."""
    to_huggingface(nano.checkpoint, tmp_path / "hf")
    text = yaml.safe_load((tmp_path / "hf" / "config.json").read_text())
    assert text["global_rope_theta"] == 160_000.0
    assert text["local_rope_theta"] == 10_000.0
    assert text["global_attn_every_n_layers"] == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_to_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    reference = make_reference("encoder", SIZES["nano"]).to(dtype)
    reference.save_pretrained(tmp_path / "hf")
    from_huggingface(tmp_path / "hf", tmp_path / "c")
    parameters = load_parameters(tmp_path / "c")
    expected = reference.model.final_norm.weight.float()
    assert parameters["decoder.final_layernorm.weight"].dtype == torch.float32
    assert torch.equal(parameters["decoder.final_layernorm.weight"], expected)


def test_bf16_run_is_written_as_float32(tmp_path: Path) -> None:
    config = make_run("decoder", tmp_path / "none")
    parameters = save_run(tmp_path / "c", config, "extension", "", precision="bf16")
    to_huggingface(tmp_path / "c", tmp_path / "hf")
    found = tensors(tmp_path / "hf")["model.embeddings.tok_embeddings.weight"]
    expected = parameters["embedding.word_embeddings.weight"]
    assert (found.dtype, expected.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(found, expected.float())


def test_sharded_folder_with_the_tied_output_written_out(nano: Case, tmp_path: Path) -> None:
    """Convert the form of older releases: several files, and the output beside the embedding."""
    weights = tensors(nano.huggingface)
    weights["decoder.weight"] = weights["model.embeddings.tok_embeddings.weight"].clone()
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_bytes((nano.huggingface / "config.json").read_bytes())
    names = sorted(weights)
    for part, some in enumerate((names[:9], names[9:]), start=1):
        chosen = {name: weights[name] for name in some}
        save_file(chosen, folder / f"model-{part:05d}-of-00002.safetensors")
    from_huggingface(folder, tmp_path / "c")
    assert_equal_bits(load_parameters(tmp_path / "c"), load_parameters(nano.checkpoint))


@pytest.mark.parametrize("kind", KINDS)
def test_run_continues_from_a_converted_model(
    kind: str, cases: dict[str, Case], tmp_path: Path
) -> None:
    """The written config.yaml is the part of a run's configuration that the weights decide."""
    case = cases[f"nano-{kind}"]
    from_huggingface(
        case.huggingface, tmp_path / "c", tensor_parallel_size=2, pipeline_parallel_size=4
    )
    rest = {
        "phases": [{"name": "a", "train_tokens": 9, "seq_length": 64, "global_batch_size": 1}],
        "data": {"tokenizer": "t", "sources": {"s": {"prefix": "p"}}, "blend": {"a": {"s": 1.0}}},
        "optimizer": {"lr": 1e-3, "weight_decay": 0.0},
        "run_dir": "r",
    }
    (tmp_path / "rest.yaml").write_text(yaml.safe_dump(rest))
    run = parse_args(
        ["--config", str(tmp_path / "c" / "config.yaml"), "--config", str(tmp_path / "rest.yaml")]
    )
    assert run.objective == OBJECTIVES[kind]
    assert run.model == checkpoint.read_model(tmp_path / "c").model
    assert run.hardware.tensor_parallel_size == 2
    assert run.hardware.pipeline_parallel_size == 4
