"""A study's configuration: refusals that name file and field, its models, and its runs."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_ettin.config import ConfigError, parse_args
from megatron_ettin.study.arms import Study
from megatron_ettin.study.config import load_study
from megatron_ettin.study.training import training_arguments, training_config

NANO = Path("examples/study/nano.yaml")
STUDIES = sorted(Path("examples/study").glob("*.yaml"))


def write_study(folder: Path, **changes: Any) -> Path:
    document = {**yaml.safe_load(NANO.read_text()), **changes}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizs": {}}, "sizs: no such name; did you mean sizes"),
        ({"arms": {"a": {}}}, "has either an objective or published models"),
        ({"arms": {"a": {"objective": "x", "starts_from": "b"}}}, r"arms\.a\.starts_from: 'b'"),
        (
            {"arms": {"a": {"objective": "x", "starts_from": "b"}, "b": {"objective": "x"}}},
            "'b' must come before 'a'",
        ),
        ({"arms": {"a/b": {"objective": "x"}}}, "'a/b' is no name"),
        ({"seeds": [0, 0]}, r"seeds: \[0, 0\]"),
        ({"checkpoints": 0}, "checkpoints: 0 is not positive"),
        ({"train_tokens": "many"}, "train_tokens"),
        ({"launch": []}, "launch: is empty"),
        ({"device": "tpu"}, "device: 'tpu'"),
        (
            {"sizes": {"nano": {"run": ["x"]}}},
            r"sizes\.nano\.cross: no files, but arms\.encoder-from-decoder needs them",
        ),
    ],
)
def test_refusal_names_file_and_field(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write_study(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message) as caught:
        load_study(path)
    assert str(path) in str(caught.value)


def test_models_by_size_arm_and_seed(tmp_path: Path) -> None:
    arms = {
        "decoder": {"objective": "examples/objective/clm.yaml"},
        "ettin": {"published": {"150m": "hub/name", "nano": "folder"}},
        "crossed": {"objective": "examples/objective/mntp.yaml", "starts_from": "decoder"},
    }
    path = write_study(tmp_path, arms=arms, seeds=[0, 3], output=str(tmp_path))
    models = Study(load_study(path)).models()
    assert [model.name for model in models] == [
        "nano-decoder-seed_0",
        "nano-decoder-seed_3",
        "nano-ettin",
        "nano-crossed-seed_0",
        "nano-crossed-seed_3",
        "150m-ettin",
    ]
    assert [model.is_series for model in models] == [True, True, False, False, False, False]
    assert models[4].start == models[1]
    assert (models[5].source, models[5].run, models[5].seed) == ("hub/name", None, None)


def test_budget_and_seed_reach_the_runs() -> None:
    """Phases keep their shares, those of a crossing are scaled alike, twins share all seeds."""
    study = Study(load_study(NANO, train_tokens=1_900_000, seeds=[0, 2]))
    configs = {model.name: training_config(study, model) for model in study.models()}
    first = configs["nano-encoder-seed_0"]
    assert [phase.train_tokens for phase in first.phases] == [1_100_000, 400_000, 400_000]
    assert first.checkpoint.save_every_tokens == 237_500
    assert first.checkpoint.resume
    (crossing,) = configs["nano-encoder-from-decoder-seed_2"].phases
    assert (crossing.train_tokens, crossing.lr_decay_tokens) == (400_000, 80_000)
    for seed in (0, 2):
        twins = [configs[f"nano-{arm}-seed_{seed}"] for arm in ("encoder", "decoder")]
        assert twins[0].seeds == twins[1].seeds
        assert twins[0].seeds.order == twins[0].seeds.mask == twins[0].seeds.init == 21 + seed
        assert twins[0].phases == twins[1].phases
        assert twins[0].objective != twins[1].objective


def test_runs_without_a_budget_are_as_their_files_say() -> None:
    study = Study(load_study(NANO, train_tokens=None, output="elsewhere"))
    model = study.models()[0]
    plain = parse_args(
        [
            *(argument for argument in training_arguments(study, model) if "--config" in argument),
            "--run_dir=x",
        ]
    )
    assert training_config(study, model).phases == plain.phases
    assert training_config(study, model).run_dir == "elsewhere/runs/nano/encoder/seed_0"


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_examples_parse(path: Path) -> None:
    study = Study(load_study(path))
    models = study.models()
    assert len(models) == 6
    for model in models[2:]:  # two crossings, the detour, diffusion
        assert training_config(study, model).model.num_layers >= 4
