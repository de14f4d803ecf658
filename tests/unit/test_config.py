"""Every example parses, twins differ in the objective alone, and errors name the field."""

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_ettin.config import (
    ConfigError,
    PhaseConfig,
    RotaryBases,
    RunConfig,
    load_config,
    parse_args,
    to_yaml,
    with_rotary_bases,
)

EXAMPLES = Path(__file__).parents[2] / "examples"
MODELS = sorted(path.stem for path in (EXAMPLES / "model").glob("*.yaml"))
PHASES = dict.fromkeys(("", "nano/", "third/"), ("pretrain", "extension", "decay"))
OBJECTIVES = sorted(path.stem for path in (EXAMPLES / "objective").glob("*.yaml"))
#: Sizes that have a file to go on with another objective; a new size may do without.
CROSSED = sorted(path.stem for path in (EXAMPLES / "cross").glob("*.yaml"))
#: Peak rate, weight decay and warm-up tokens of the released pre-training runs.
PRETRAINING = {
    "17m": (3e-3, 3e-4, 4e9),
    "32m": (3e-3, 3e-4, 4e9),
    "68m": (3e-3, 3e-4, 3e9),
    "150m": (8e-4, 1e-5, 3e9),
    "400m": (5e-4, 1e-5, 2e9),
    "1b": (5e-4, 5e-5, 2e9),
}
#: Peak rate, weight decay, warm-up, tokens and decaying tokens of the released cross-training runs.
CROSS = {
    "17m": (1.5e-3, 3e-4, 3e9, 50e9, 10e9),
    "32m": (1.5e-3, 3e-4, 3e9, 50e9, 10e9),
    "68m": (1.5e-3, 3e-4, 3e9, 50e9, 10e9),
    "150m": (4e-4, 1e-5, 3e9, 50e9, 10e9),
    "400m": (2.5e-4, 1e-5, 3e9, 50e9, 10e9),
    "1b": (2.5e-4, 5e-5, 1e9, 16.667e9, 3.333e9),
}
#: Whole rows of a micro-batch, by phase.
MICRO_BATCH_ROWS = {"1xh100": [64, 8, 8], "8xh100": [64, 8, 8], "cpu": [4, 1, 1]}
HARDWARE = sorted(path.stem for path in (EXAMPLES / "hardware").glob("*.yaml"))


def arguments(model: str, objective: str, phases: str, hardware: str = "1xh100") -> list[str]:
    files = [f"model/{model}", f"objective/{objective}", "data/quickstart", f"hardware/{hardware}"]
    files += [f"phase/{phases}{name}" for name in PHASES[phases]]
    flags = [f"--config={EXAMPLES / name}.yaml" for name in files]
    return [*flags, "--run_dir=run"]


def nano(*overrides: str) -> RunConfig:
    return parse_args([*arguments("nano", "mlm", "nano/", "cpu"), *overrides])


@pytest.mark.parametrize(
    ("model", "phases"), [*itertools.product(MODELS, ("", "nano/")), ("1b", "third/")]
)
def test_twins_differ_in_the_objective_alone(model: str, phases: str) -> None:
    encoder = parse_args(arguments(model, "mlm", phases))
    for objective in set(OBJECTIVES) - {"mlm"}:
        other = parse_args(arguments(model, objective, phases))
        differing = [
            field.name
            for field in dataclasses.fields(RunConfig)
            if getattr(encoder, field.name) != getattr(other, field.name)
        ]
        assert differing == ["objective"]


def cross_arguments(size: str, objective: str) -> list[str]:
    files = [f"model/{size}", f"cross/{size}", f"objective/{objective}", "data/quickstart"]
    files.append("hardware/cpu" if size == "nano" else "hardware/1xh100")
    flags = [f"--config={EXAMPLES / name}.yaml" for name in files]
    return [*flags, "--run_dir=run", "--checkpoint.initialize_from=other"]


@pytest.mark.parametrize("size", sorted(PRETRAINING))
def test_published_hyperparameters(size: str) -> None:
    run = parse_args(arguments(size, "mlm", ""))
    assert PRETRAINING[size] == (
        run.optimizer.lr,
        run.optimizer.weight_decay,
        run.optimizer.warmup_tokens,
    )
    tokens = [phase.train_tokens for phase in run.phases]
    rates = [(phase.lr_start, phase.lr_end) for phase in run.phases]
    assert tokens == [1_700_000_000_000, 250_000_000_000, 50_000_000_000]
    assert rates == [(1.0, 1.0), (1.0, 0.5), (0.5, 0.02)]
    assert run.optimizer.clip_grad == 0.0
    assert (run.optimizer.beta1, run.optimizer.beta2, run.optimizer.epsilon) == (0.9, 0.98, 1e-6)


@pytest.mark.parametrize("size", CROSSED)
def test_every_size_goes_on_with_another_objective(size: str) -> None:
    run, *others = (parse_args(cross_arguments(size, objective)) for objective in OBJECTIVES)
    assert len(others) >= 2
    assert {dataclasses.replace(other, objective=run.objective) == run for other in others} == {
        True
    }
    (phase,) = run.phases
    assert (phase.name, phase.lr_start, phase.lr_end) == ("cross", 1.0, 0.02)
    assert (phase.rotary_base_global, phase.rotary_base_local) == (160_000.0, 160_000.0)
    assert phase.lr_decay == "linear"
    pretraining = parse_args(arguments(size, "mlm", "")).optimizer
    assert run.optimizer.lr == pretraining.lr / 2
    assert run.optimizer.weight_decay == pretraining.weight_decay
    if size in CROSS:
        found = run.optimizer.lr, run.optimizer.weight_decay, run.optimizer.warmup_tokens
        assert (*found, phase.train_tokens, phase.lr_decay_tokens) == CROSS[size]
        assert phase.seq_length * phase.global_batch_size == pytest.approx(1024 * 2770, rel=1e-3)


def test_the_published_sizes_are_all_there() -> None:
    assert {*CROSS, "nano"} <= set(MODELS)
    assert {*CROSS, "nano"} <= set(CROSSED) <= set(MODELS)


def test_thirds_are_thirds() -> None:
    whole, third = (parse_args(arguments("1b", "mlm", folder)).phases for folder in ("", "third/"))
    for one, other in zip(whole, third, strict=True):
        assert other.train_tokens == pytest.approx(one.train_tokens / 3, rel=1e-4)
        assert dataclasses.replace(other, train_tokens=one.train_tokens) == one


@pytest.mark.parametrize("name", ["extension", "decay"])
def test_published_local_bases_differ_in_the_base_alone(name: str) -> None:
    def phase(folder: str) -> PhaseConfig:
        flag = f"--config={EXAMPLES / 'phase' / folder / name}.yaml"
        *_, last = parse_args([*arguments("17m", "clm", ""), "--phases=[]", flag]).phases
        return last

    odd, plain = phase("local_10k"), phase("")
    assert (odd.rotary_base_global, odd.rotary_base_local) == (160_000.0, 10_000.0)
    assert dataclasses.replace(odd, rotary_base_local=160_000.0) == plain


@pytest.mark.parametrize("hardware", HARDWARE)
def test_every_hardware_file_fits_the_published_phases_or_the_small_ones(hardware: str) -> None:
    run = parse_args(arguments("17m", "mlm", "nano/" if hardware == "cpu" else "", hardware))
    rows = [run.hardware.micro_batch_rows(phase.seq_length) for phase in run.phases]
    assert rows == MICRO_BATCH_ROWS[hardware]


def test_mask_rates_are_those_of_the_released_runs() -> None:
    def rates(file: str) -> list[float]:
        objective = parse_args(arguments("17m", file, "")).objective
        return [
            objective.scored_share(name) for name in ("pretrain", "extension", "decay", "cross")
        ]

    assert rates("mlm") == [0.3, 0.3, 0.15, 0.15]
    assert rates("mntp") == [0.15] * 4


def test_phase_files_append_in_order() -> None:
    assert [phase.name for phase in nano().phases] == ["pretrain", "extension", "decay"]


@pytest.mark.parametrize("objective", OBJECTIVES)
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
        ("--optimizer.name=muon", "--hardware.use_distributed_optimizer false"),
        ("--hardware.precision=fp7", "hardware.precision"),
        ("--hardware.fp8_recipe=mxfp8", "hardware.fp8_recipe"),
        ("--model.backend=apex", "model.backend"),
        ("--model.backend=transformer_engine", "model.backend: transformer_engine"),
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


def phase_tokens(*overrides: str) -> dict[str, int]:
    return {phase.name: phase.train_tokens for phase in nano(*overrides).phases}


def test_a_phase_is_changed_by_its_name() -> None:
    unchanged = phase_tokens()
    assert phase_tokens("--phases.pretrain.train_tokens=12345") == unchanged | {"pretrain": 12345}
    assert phase_tokens("--phases.decay.train_tokens", "7") == unchanged | {"decay": 7}
    changed = nano("--phases.decay.lr_end=1e-05", "--phases.pretrain.lr_end=0.5")
    assert [phase.lr_end for phase in changed.phases] == [0.5, 0.5, 1e-05]
    only = f"--config={EXAMPLES / 'phase/nano/decay.yaml'}"
    assert phase_tokens("--phases=[]", only, "--phases.train_tokens=7") == {"decay": 7}


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("--phases.train_tokens=7", "which phase is meant; give --phases.pretrain.train_tokens or"),
        ("--phases.dekay.train_tokens=7", "no phase is called 'dekay'; give .*phases.decay.train"),
        ("--phases.decay.train_token=7", "phases.decay: .*train_token=7"),
        ("--phases.decay.train_tokens=many", "phases.decay: .*train_tokens.*\n.*many"),
        ("--phases.decay.train_tokens", "phases.decay: .*train_tokens"),
        ("--phases.decay.train_tokens=-1", "phase 'decay'.train_tokens: -1"),
    ],
)
def test_a_phase_that_is_not_meant_is_never_changed(override: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        nano(override)


def test_the_printed_configuration_has_the_changed_phase(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        nano("--print_config", "--phases.extension.train_tokens=777")
    printed = yaml.safe_load(capsys.readouterr().out)
    assert [phase["train_tokens"] for phase in printed["phases"]] == [550_000, 777, 200_000]


def test_mappings_of_further_files_are_merged_by_name(tmp_path: Path) -> None:
    further = {"sources": {"mine": {"prefix": "a"}}, "blend": {"decay": {"mine": 1.0}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"data": further}))
    before, after = nano().data, nano(f"--config={tmp_path / 'mine.yaml'}").data
    assert set(after.sources) == {*before.sources, "mine"}
    assert after.blend == before.blend | {"decay": {"mine": 1.0}}
    assert after.pools == before.pools


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("modle: {}", "modle: no such name; did you mean model"),
        ("data: {souces: {}}", "data.souces: no such name; did you mean sources"),
        ("data: {sources: {reviews: {prefx: {}}}}", "data.sources.reviews.prefx: .*mean prefix"),
        ("phases+: [{name: x, train_tokns: {}}]", "phases.*train_tokns: .*mean train_tokens"),
    ],
)
def test_an_unknown_name_with_nothing_in_it_is_refused(
    text: str, named: str, tmp_path: Path
) -> None:
    (tmp_path / "typo.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"typo.yaml: {named}"):
        nano(f"--config={tmp_path / 'typo.yaml'}")
    with pytest.raises(ConfigError, match=f"typo.yaml: {named}"):
        load_config(tmp_path / "typo.yaml")


def test_fp8_is_checked_against_backend_and_shapes() -> None:
    fp8 = "--hardware.precision=fp8"
    assert nano(fp8).hardware.parameter_precision == "bf16"
    with pytest.raises(ConfigError, match=r"hardware\.precision: fp8.*model\.backend is local"):
        nano(fp8, "--model.backend=local")
    with pytest.raises(ConfigError, match=r"model\.ffn_hidden_size.*multiple of 16"):
        nano(fp8, "--model.ffn_hidden_size=200")


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


def test_a_phase_without_rotary_bases_keeps_those_before_it() -> None:
    def phase(name: str, **bases: float) -> PhaseConfig:
        return PhaseConfig(
            name=name,
            train_tokens=1,
            seq_length=8,
            global_batch_size=1,
            **bases,  # type: ignore[arg-type]
        )

    phases = [
        phase("one"),
        phase("two", rotary_base_global=500.0),
        phase("three", rotary_base_local=30.0),
        phase("four"),
    ]
    filled = with_rotary_bases(phases, RotaryBases(20.0, 10.0), {})
    bases = [tuple(phase.rotary_bases) for phase in filled]
    assert bases == [(20.0, 10.0), (500.0, 10.0), (500.0, 30.0), (500.0, 30.0)]
    # What a checkpoint's config.yaml says of a phase comes before what the phase ahead has.
    kept = with_rotary_bases(phases, RotaryBases(20.0, 10.0), {"two": RotaryBases(1.0, 2.0)})
    assert kept[1].rotary_bases == (500.0, 2.0)
    with pytest.raises(ValueError, match="phase 'two': rotary_base_global and rotary_base_local"):
        _ = phases[1].rotary_bases
