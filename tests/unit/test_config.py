"""Every example parses, twins differ in the objective alone, and errors name the field."""

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ettin.config import ConfigError, RunConfig, load_config, parse_args, to_yaml

EXAMPLES = Path(__file__).parents[2] / "examples"
MODELS = sorted(path.stem for path in (EXAMPLES / "model").glob("*.yaml"))
PHASES = {"": ("pretrain", "extension", "decay"), "nano/": ("pretrain", "extension", "decay")}
HARDWARE = sorted(path.stem for path in (EXAMPLES / "hardware").glob("*.yaml"))


def arguments(model: str, objective: str, phases: str, hardware: str = "1xh100") -> list[str]:
    files = [f"model/{model}", f"objective/{objective}", "data/quickstart", f"hardware/{hardware}"]
    files += [f"phase/{phases}{name}" for name in PHASES[phases]]
    flags = [f"--config={EXAMPLES / name}.yaml" for name in files]
    return [*flags, "--run_dir=run"]


def nano(*overrides: str) -> RunConfig:
    return parse_args([*arguments("nano", "mlm", "nano/", "cpu"), *overrides])


@pytest.mark.parametrize(("model", "phases"), list(itertools.product(MODELS, PHASES)))
def test_twins_differ_in_the_objective_alone(model: str, phases: str) -> None:
    encoder = parse_args(arguments(model, "mlm", phases))
    decoder = parse_args(arguments(model, "clm", phases))
    differing = [
        field.name
        for field in dataclasses.fields(RunConfig)
        if getattr(encoder, field.name) != getattr(decoder, field.name)
    ]
    assert differing == ["objective"]
    assert (encoder.objective.attention, decoder.objective.attention) == ("bidirectional", "causal")


@pytest.mark.parametrize("hardware", HARDWARE)
def test_every_hardware_file_fits_the_published_phases_or_the_small_ones(hardware: str) -> None:
    phases = "nano/" if hardware == "cpu" else ""
    assert parse_args(arguments("17m", "mlm", phases, hardware)).hardware.micro_batch_tokens > 0


def test_phase_files_append_in_order() -> None:
    assert [phase.name for phase in nano().phases] == ["pretrain", "extension", "decay"]


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_a_saved_configuration_reads_back_identically(objective: str, tmp_path: Path) -> None:
    config = parse_args(arguments("nano", objective, "nano/", "cpu"))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


def test_an_overridden_objective_reads_back_identically(tmp_path: Path) -> None:
    config = nano("--objective.mask_rate=0.4", "--seeds.mask=5")
    assert config.objective.mask_rate == 0.4  # type: ignore[attr-defined]
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("--model.hiden_size=3", "hiden_size"),
        ("--optimizer.lr=fast", "optimizer.lr"),
        ("--hardware.precision=fp7", "hardware.precision"),
        ("--hardware.tensor_parallel_size=3", "hardware.tensor_parallel_size"),
        ("--hardware.tensor_parallel_size=0", "hardware.tensor_parallel_size"),
        ("--hardware.pipeline_parallel_size=5", "model.num_layers: 4"),
        ("--hardware.micro_batch_tokens=1000", "hardware.micro_batch_tokens"),
        ("--hardware.sequence_parallel=true", "hardware.sequence_parallel"),
        ("--hardware.context_parallel_size=3", "hardware.context_parallel_size"),
        ("--hardware.recompute=some", "hardware.recompute"),
        ("--model.hidden_size=129", "model.hidden_size"),
        ("--objective.mask_rate=1.5", "objective.mask_rate"),
        ("--data.blend={pretrain: {nowhere: 1.0}}", "nowhere"),
        ("--data.blend={}", "data.blend"),
        ("--data.pools={pretrain: [0.5, 0.2]}", "data.pools.pretrain"),
        ("--phases=[]", "phases"),
        ("--config=nowhere.yaml", "nowhere.yaml"),
    ],
)
def test_a_wrong_field_is_named(override: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named.replace(".", r"\.")):
        nano(override)


def test_a_typo_in_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "typo.yaml").write_text("modle: {hidden_size: 3}\n")
    with pytest.raises(ConfigError, match="modle"):
        nano(f"--config={tmp_path / 'typo.yaml'}")


def test_a_damaged_saved_configuration_names_file_and_field(tmp_path: Path) -> None:
    text = to_yaml(nano()).replace("hidden_size: 128", "hidden_size: wide")
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml.*hidden_size"):
        load_config(tmp_path / "config.yaml")


def test_parsing_does_not_import_torch() -> None:
    """So that help and typos answer at once, on every rank."""
    program = (
        "import sys, megatron_ettin.pretrain as p\n"
        "sys.argv = ['pretrain', '--help']\n"
        "try:\n    p.main()\nexcept SystemExit as e:\n    assert e.code == 0\n"
        "assert 'torch' not in sys.modules and 'megatron.core' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--hardware.tensor_parallel_size" in done.stdout
