"""Models are opened, measured, found again on disk; failures are named and stop nothing else."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_ettin.evaluation.measure import Outcome, measure_all, units
from megatron_ettin.evaluation.model import Model, open_model, open_models
from megatron_ettin.evaluation.results import ResultStore, read_result, result_key
from megatron_ettin.evaluation.score_table import score_table
from megatron_ettin.evaluation.scores import Score
from megatron_ettin.evaluation.tasks.task import Family, Task, TaskScores, TaskWork
from tests.conftest import TinyCorpus
from tests.models import CLASSES, Kind, write_random_model


@dataclass(frozen=True, kw_only=True)
class TokenLoss(Task):
    """Causal loss of every line of a file: a task as small as one can be."""

    family: ClassVar[Family] = "generation"
    path: Path
    raises: str = ""
    measured: ClassVar[list[str]] = []

    def files(self) -> list[Path]:
        return [self.path]

    def check(self) -> None:
        if not self.path.read_text():
            raise ValueError(f"{self.path}: no lines")

    def refusal(self, model: Model) -> str | None:
        return None if model.attention == "causal" else "predicts no next token"

    def work(self, model: Model) -> TaskWork:
        return TaskWork(forward_tokens=self.path.stat().st_size // 4)

    def measure(self, model: Model, *, seed: int, scratch: Path) -> TaskScores:
        self.measured.append(f"{model.name} {seed}")
        if self.raises == "memory":
            raise torch.OutOfMemoryError
        if self.raises:
            raise RuntimeError(self.raises)
        tokenizer, language_model = model.tokenizer(), model.language_model()
        losses = []
        for line in self.path.read_text().splitlines():
            ids = torch.tensor([tokenizer(line)["input_ids"]])
            with torch.inference_mode():
                losses.append(float(language_model(input_ids=ids, labels=ids).loss))
        items = tuple(map(str, range(len(losses))))
        score = Score(metric="loss", items=items, predictions=np.array([losses]))
        return TaskScores(scores={"loss": score}, notes={"<b>": "lines"})


@pytest.fixture
def models(tiny_corpus: TinyCorpus, tmp_path: Path) -> dict[Kind, Path]:
    tokenizer = tiny_corpus.folder / "tokenizer"
    return {kind: write_random_model(tmp_path / kind, kind, tokenizer) for kind in CLASSES}


@pytest.fixture
def task(tmp_path: Path) -> TokenLoss:
    TokenLoss.measured.clear()
    path = tmp_path / "lines.txt"
    path.write_text("abc def\nghi jkl mno\n")
    return TokenLoss(path=path)


def outcomes(folders: list[str], task: Task, store: ResultStore) -> list[Outcome]:
    return list(measure_all(units(open_models(folders), {"lines": task}), store))


def test_a_result_is_measured_once(
    models: dict[Kind, Path], task: TokenLoss, tmp_path: Path
) -> None:
    store = ResultStore(tmp_path / "results")
    folders = [str(models["encoder"]), str(models["decoder"])]
    first = outcomes(folders, task, store)
    assert [outcome.refusal for outcome in first] == ["predicts no next token", None]
    again = outcomes(folders, task, store)
    assert [outcome.was_on_disk for outcome in again] == [False, True]
    assert task.measured == ["decoder 0"]
    measured, read = first[1].result, again[1].result
    assert measured is not None
    assert read is not None
    assert read.scores["loss"].predictions.tolist() == measured.scores["loss"].predictions.tolist()
    assert read.notes == {"<b>": "lines"}
    assert read.seconds == measured.seconds
    assert [path.name for path in (tmp_path / "results/decoder/lines").iterdir()] == ["seed_0.json"]
    table = list(score_table([read]))
    assert f"{measured.scores['loss'].value:.4f}" in table[-1]


def test_another_model_setting_or_text_is_measured_anew(
    models: dict[Kind, Path], task: TokenLoss, tmp_path: Path
) -> None:
    model = open_model(str(models["decoder"]))
    keys = {result_key(model, task, 0), result_key(model, task, 1)}
    keys.add(result_key(model, replace(task, raises="x"), 0))
    # Which seeds are measured beside it does not change a result.
    assert result_key(model, replace(task, seeds=(0, 1, 2)), 0) in keys
    task.path.write_text("other words\n")
    keys.add(result_key(model, task, 0))
    weights = AutoModelForCausalLM.from_pretrained(models["decoder"])
    weights.get_input_embeddings().weight.data[7] += 1.0
    weights.save_pretrained(models["decoder"])
    keys.add(result_key(open_model(str(models["decoder"])), task, 0))
    assert len(keys) == 5


@pytest.mark.parametrize(("raises", "said"), [("memory", "out of GPU memory"), ("bad", "bad")])
def test_a_failure_is_named_and_the_others_go_on(
    raises: str, said: str, models: dict[Kind, Path], task: TokenLoss, tmp_path: Path
) -> None:
    (model,) = open_models([str(models["decoder"])])
    tasks = {"broken": replace(task, raises=raises), "lines": task}
    failed, good = measure_all(units([model], tasks), ResultStore(tmp_path / "results"))
    assert said in str(failed.failure)
    assert f"decoder, broken, seed 0: FAILED: {failed.failure}" == str(failed)
    assert good.result is not None


def test_a_damaged_result_names_its_file(
    models: dict[Kind, Path], task: TokenLoss, tmp_path: Path
) -> None:
    store = ResultStore(tmp_path / "results")
    outcomes([str(models["decoder"])], task, store)
    path = store.path("decoder", "lines", 0)
    path.write_text(path.read_text()[:-200])
    with pytest.raises(ValueError, match=r"seed_0\.json: not a result"):
        read_result(path)
    (outcome,) = outcomes([str(models["decoder"])], task, store)
    assert "remove it to measure anew" in str(outcome.failure)


@pytest.mark.parametrize("shift", [0, 1])
def test_the_shift_of_a_masked_model_is_read(
    shift: int, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    folder = write_random_model(
        tmp_path / "m", "encoder", tiny_corpus.folder / "tokenizer", prediction_shift=shift
    )
    assert open_model(str(folder)).prediction_shift == shift


def test_a_decoder_predicts_the_next_position(models: dict[Kind, Path]) -> None:
    model = open_model(str(models["decoder"]))
    assert (model.attention, model.prediction_shift, model.name) == ("causal", 1, "decoder")
    ids = torch.tensor([AutoTokenizer.from_pretrained(model.folder)("abc def ghi")["input_ids"]])
    with torch.inference_mode():
        output = model.language_model()(input_ids=ids, labels=ids)
    logits = output.logits[0, : -model.prediction_shift].log_softmax(-1)
    loss = -logits.gather(1, ids[0, 1:, None]).mean()
    assert float(loss) == pytest.approx(float(output.loss), rel=1e-6)


def test_what_is_no_model_says_what_to_do(models: dict[Kind, Path], tmp_path: Path) -> None:
    folder = models["encoder"]
    with pytest.raises(ValueError, match="several models are called encoder; give NAME=FOLDER"):
        open_models([str(folder), str(folder)])
    assert [m.name for m in open_models([str(folder), f"b={folder}"])] == ["encoder", "b"]
    with pytest.raises(ValueError, match="neither a folder nor a repository"):
        open_model(str(tmp_path / "absent/folder/here"))
    config = json.loads((folder / "config.json").read_text())
    for message, change in {
        "tokenizer": (folder / "tokenizer.json").unlink,
        "weights": (folder / "model.safetensors").unlink,
        "only language models": lambda: (folder / "config.json").write_text(
            json.dumps({**config, "architectures": ["ModernBertModel"]})
        ),
        "not JSON": lambda: (folder / "config.json").write_text("{"),
        "config.json is missing": (folder / "config.json").unlink,
    }.items():
        saved = {path: path.read_bytes() for path in folder.iterdir()}
        change()
        with pytest.raises(ValueError, match=message):
            open_model(str(folder))
        for path, content in saved.items():
            path.write_bytes(content)
