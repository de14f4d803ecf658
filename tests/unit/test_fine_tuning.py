"""Fine-tuning and the linear probe on toy data: what can be learned, resumed, refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import f1_score, matthews_corrcoef

from megatron_ettin.evaluation import classifier_training
from megatron_ettin.evaluation.labelled_data import LabelledData
from megatron_ettin.evaluation.model import Model, open_model
from megatron_ettin.evaluation.task_file import read_tasks
from megatron_ettin.evaluation.tasks import fine_tuning
from megatron_ettin.evaluation.tasks.fine_tuning import FineTuning, Intermediate
from megatron_ettin.evaluation.tasks.linear_probe import LinearProbe
from tests.conftest import TinyCorpus
from tests.labelled_texts import write_reviews
from tests.models import write_random_model


def tuning(data: LabelledData, **fields: Any) -> FineTuning:
    settings = {
        "learning_rates": (3e-3,),
        "weight_decays": (1e-5,),
        "num_epochs": (4,),
        "batch_size": 16,
        "max_length": 64,
    }
    return FineTuning(data=data, **settings | fields)  # type: ignore[arg-type]


@pytest.fixture(params=["encoder", "decoder"])
def model(request: pytest.FixtureRequest, tiny_corpus: TinyCorpus, tmp_path: Path) -> Model:
    folder = tmp_path / request.param
    write_random_model(folder, request.param, tiny_corpus.folder / "tokenizer")
    return open_model(str(folder))


@pytest.fixture
def encoder(tiny_corpus: TinyCorpus, tmp_path: Path) -> Model:
    folder = tmp_path / "model"
    write_random_model(folder, "encoder", tiny_corpus.folder / "tokenizer")
    return open_model(str(folder))


SIZES = {"train": 192, "validation": 48, "test": 60}


def test_separable_texts_are_learned(
    model: Model, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    task = tuning(write_reviews(tmp_path / "data", SIZES), metrics=("accuracy", "F1"))
    task.check()
    capfd.readouterr()
    found = task.measure(model, seed=0, scratch=tmp_path)
    assert found.scores["accuracy"].value > 0.9
    assert found.scores["accuracy"].chance == pytest.approx(2 / 3)
    assert found.scores["F1"].value > 0.9
    assert found.scores["accuracy"].items[:2] == ("test:1", "test:2")
    assert found.notes["texts"] == SIZES
    assert "optimistic" not in found.notes
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_interruption_changes_nothing(
    encoder: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second trial is interrupted; going on keeps the first one and gives the same bits."""
    data = write_reviews(tmp_path / "data", {"train": 64, "validation": 32})
    task = tuning(data, learning_rates=(1e-4, 1e-3), num_epochs=(1,), metrics=("F1",))
    (tmp_path / "whole").mkdir()
    whole = task.measure(encoder, seed=3, scratch=tmp_path / "whole")
    calls: list[float] = []

    def interrupted(classifier: Any, recipe: Any, **others: Any) -> Any:
        calls.append(recipe.learning_rate)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return classifier_training.train(classifier, recipe, **others)

    monkeypatch.setattr(fine_tuning, "train", interrupted)
    (tmp_path / "parts").mkdir()
    with pytest.raises(KeyboardInterrupt):
        task.measure(encoder, seed=3, scratch=tmp_path / "parts")
    resumed = task.measure(encoder, seed=3, scratch=tmp_path / "parts")
    assert calls == [1e-4, 1e-3, 1e-3]
    for number in range(2):
        parts = [tmp_path / name / f"trial_{number}.json" for name in ("whole", "parts")]
        assert parts[0].read_bytes() == parts[1].read_bytes()
    assert resumed.notes == whole.notes
    assert resumed.notes["optimistic"].startswith("chosen and reported on the same documents")
    other = task.measure(encoder, seed=4, scratch=tmp_path)
    assert other.notes["trials"] != whole.notes["trials"]


@pytest.mark.slow
def test_training_may_start_from_another_data_set(encoder: Model, tmp_path: Path) -> None:
    """Two steps on few texts learn nothing, unless the model has learned the marks before."""
    few = write_reviews(tmp_path / "few", {"train": 32, "validation": 48})
    many = write_reviews(tmp_path / "many", {"train": 192, "validation": 48}, good=1, bad=0)
    start = Intermediate(data=many, learning_rate=3e-3, num_epochs=4, batch_size=16)
    short = {"learning_rates": (1e-3,), "num_epochs": (2,)}
    values = []
    for name, starts_from in (("with", start), ("without", None)):
        (tmp_path / name).mkdir()
        task = tuning(few, starts_from=starts_from, **short)
        task.check()
        found = task.measure(encoder, seed=0, scratch=tmp_path / name)
        values.append(found.scores["accuracy"].value)
    assert values[0] > 0.9 > values[1]
    assert (tmp_path / "with" / "intermediate.safetensors").is_file()
    with_start = tuning(few, starts_from=start, **short)
    assert len(with_start.files()) == 4
    more = with_start.work(encoder).trained_tokens
    assert more > tuning(few, **short).work(encoder).trained_tokens * 5


def test_numbers_are_predicted(encoder: Model, tmp_path: Path) -> None:
    data = write_reviews(tmp_path / "data", {"train": 192, "validation": 48}, good=4.5, bad=0.5)
    task = tuning(data, metrics=("Spearman correlation",))
    task.check()
    score = task.measure(encoder, seed=0, scratch=tmp_path).scores["Spearman correlation"]
    assert score.value > 0.8
    assert score.references is not None
    assert set(score.references) == {4.5, 0.5}


def test_scores_are_the_metrics() -> None:
    rng = np.random.default_rng(0)
    labels, answers = rng.integers(0, 2, 50).astype(float), rng.integers(0, 2, 50).astype(float)
    items = tuple(map(str, range(50)))
    metrics: Any = ("accuracy", "F1", "Matthews correlation")
    found = dict(fine_tuning._scores(metrics, items, answers, labels))
    assert found["accuracy"].value == (answers == labels).mean()
    assert found["F1"].value == pytest.approx(f1_score(labels, answers))
    assert found["Matthews correlation"].value == pytest.approx(matthews_corrcoef(labels, answers))


def test_work_counts_tokens(encoder: Model, tmp_path: Path) -> None:
    data = write_reviews(tmp_path / "data", SIZES)
    task = tuning(data, learning_rates=(1e-3, 1e-4), num_epochs=(2, 3))
    tokenizer = encoder.tokenizer()
    tokens = {
        split: sum(len(tokenizer(example.texts[0])["input_ids"]) for example in data.read(split))
        for split in SIZES
    }
    work = task.work(encoder)
    assert work.trained_tokens == 10 * tokens["train"]
    assert work.forward_tokens == 10 * tokens["validation"] + 4 * tokens["test"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metrics": ("Spearman correlation",)}, r"train\.jsonl:1: label bad is no number"),
        ({"metrics": ("Spearman correlation", "F1")}, "is of numbers, the others are of classes"),
        ({"learning_rates": ()}, "need a value each"),
    ],
)
def test_bad_settings_are_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    data = write_reviews(tmp_path / "data", {"train": 8, "validation": 8})
    with pytest.raises(ValueError, match=message):
        tuning(data, **fields).check()


@pytest.mark.parametrize("task_class", [FineTuning, LinearProbe])
def test_unknown_labels_are_refused(task_class: Any, tmp_path: Path) -> None:
    data = write_reviews(tmp_path / "data", {"train": 8, "validation": 8})
    with (tmp_path / "data" / "validation.jsonl").open("a") as file:
        file.write('{"sentence": "One more.", "label": "mixed"}\n')
    with pytest.raises(
        ValueError, match=r"validation\.jsonl:9: label mixed is none of .*bad, good"
    ):
        task_class(data=data).check()


def test_probe_reads_labels_off(model: Model, tmp_path: Path) -> None:
    data = write_reviews(tmp_path / "data", SIZES)
    task = LinearProbe(data=data)
    task.check()
    found = task.measure(model, seed=0, scratch=tmp_path)
    assert found.scores["accuracy"].value > 0.9
    assert found.scores["accuracy"].items == tuple(f"test:{n}" for n in range(1, 61))
    assert found.notes["bag of words"] == 1.0
    assert found.notes["texts"] == {"fitted": 192, "scored": 60}
    assert found.notes["texts cut"] == 0
    tokenizer = model.tokenizer()
    texts = [example.texts[0] for split in ("train", "test") for example in data.read(split)]
    expected = sum(len(ids) for ids in tokenizer(texts)["input_ids"])
    assert task.work(model).forward_tokens == pytest.approx(expected, rel=0.05)


def test_probe_refuses_pairs() -> None:
    with pytest.raises(ValueError, match="pairs need FineTuning"):
        LinearProbe(data=LabelledData(path="x", text_fields=("a", "b"))).check()


def test_example_files_are_read() -> None:
    tasks = read_tasks(Path("examples/evaluation/published.yaml"))
    glue = {name: task for name, task in tasks.items() if isinstance(task, FineTuning)}
    assert set(glue) == {"mnli", "sst2", "rte", "mrpc", "stsb", "qnli", "qqp", "cola"}
    assert {len(task.recipes) for task in glue.values()} == {48}
    assert {name for name, task in glue.items() if task.starts_from} == {"rte", "mrpc", "stsb"}
    assert glue["mnli"].data.validation == "validation_matched"
    nano = read_tasks(Path("examples/evaluation/nano.yaml"))
    assert isinstance(nano["reviews"], FineTuning)
    assert (len(nano["reviews"].recipes), len(nano["reviews"].seeds)) == (3, 3)
    assert isinstance(nano["reviews_probe"], LinearProbe)
