"""Tasks of lm-eval: our rules and its own agree, local data, and faults.

The one file of the unit tests that imports lm-eval, which takes seconds.
"""

import string
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_ettin.evaluation.model import Model, open_model
from megatron_ettin.evaluation.readings import load
from megatron_ettin.evaluation.scoring import Continuation, fill_masks, log_likelihoods
from megatron_ettin.evaluation.tasks.language_model_harness import PAPER_TASKS, Harness
from tests.conftest import TinyCorpus
from tests.models import Kind, write_random_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of lm-eval's own imports
]

WORDS = ["one", "two", "a cat", "the end of it", "xyz", "some more words", "q", "ab cd ef"]


def write_table(folder: Path, rows: list[dict[str, Any]], split: str = "validation") -> None:
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return made-up questions with the columns of lm-eval's data sets."""
    folder = tmp_path_factory.mktemp("lm_eval")
    rng = np.random.default_rng(0)

    def word() -> str:
        return str(rng.choice(WORDS))

    write_table(
        folder / "arc_easy",
        [
            {
                "question": f"{word()} {word()}?",
                "choices": {"text": [word() for _ in range(n)], "label": list("ABCDE"[:n])},
                "answerKey": "B",
            }
            for n in (4, 4, 5, 3, 4, 4)
        ],
    )
    write_table(
        folder / "winogrande",
        [
            {
                "sentence": f"{word()} and _ {word()} {word()}",
                "option1": word(),
                "option2": word(),
                "answer": str(1 + n % 2),
            }
            for n in range(4)
        ],
    )
    write_table(folder / "lambada_openai", [{"text": f"{word()} {word()} z"}] * 4, "test")
    write_table(
        folder / "triviaqa",
        [
            {"question": f"{word()} {word()}", "answer": {"aliases": [word(), word()]}}
            for _ in range(3)
        ],
    )
    return folder


@pytest.fixture(scope="module")
def models(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    root = tmp_path_factory.mktemp("models")
    kinds: list[Kind] = ["encoder", "decoder"]
    return {
        kind: open_model(
            str(write_random_model(root / kind, kind, tiny_corpus.folder / "tokenizer"))
        )
        for kind in kinds
    }


def harness(data: Path, *tasks: str, **fields: Any) -> Harness:
    return Harness(tasks=tasks, data_folder=str(data), max_new_tokens=5, **fields)


def test_decoders_score_as_lm_eval_says(data: Path, models: dict[str, Model]) -> None:
    """The causal rule gives the log-likelihoods of lm-eval's HFLM, read through its own task."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    loaded = load(models["decoder"])
    pairs = [(f"Question: {a}\nAnswer:", f" {b}") for a in WORDS for b in WORDS[:3]]
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=n)
        for n, pair in enumerate([*pairs, ("", "one two")])
    ]
    harness_model = HFLM(
        pretrained=str(models["decoder"].folder), device="cpu", add_bos_token=True, batch_size=4
    )
    theirs = harness_model.loglikelihood(requests, disable_tqdm=True)
    encoded = [
        Continuation(loaded.encode(a), loaded.encode(a + b)[len(loaded.encode(a)) :])
        for a, b in [*pairs, ("", "one two")]
    ]
    ours = log_likelihoods(loaded, encoded, "causal")
    np.testing.assert_allclose([o.log_likelihood for o in ours], [t[0] for t in theirs], rtol=1e-5)
    assert [o.is_greedy for o in ours] == [t[1] for t in theirs]


def choices(data: Path, task: str) -> list[tuple[list[tuple[str, str]], int]]:
    """Return (context, continuation) of each choice and the right one, made by hand."""
    rows = pq.read_table(next((data / task).glob("*.parquet"))).to_pylist()
    if task == "arc_easy":
        return [
            (
                [
                    (f"Question: {row['question']}\nAnswer:", f" {c}")
                    for c in row["choices"]["text"]
                ],
                row["choices"]["label"].index(row["answerKey"]),
            )
            for row in rows
        ]
    asked = []
    for row in rows:
        before, after = row["sentence"].split("_")
        options = (row["option1"], row["option2"])
        asked.append(([(before + o, f" {after.strip()}") for o in options], int(row["answer"]) - 1))
    return asked


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_all_tasks_of_a_model(
    kind: Kind, data: Path, models: dict[str, Model], tmp_path: Path
) -> None:
    tasks = ("arc_easy", "winogrande", "lambada_openai", "triviaqa")
    task = harness(data, *tasks)
    task.check()
    found = task.measure(models[kind], seed=0, scratch=tmp_path)
    scores = found.scores
    assert list(scores) == ["average", *tasks]
    loaded = load(models[kind])
    rule = "causal" if kind == "decoder" else "mask_filling"
    assert found.notes["rule"] == rule
    for name in ("arc_easy", "winogrande"):
        right = []
        for pairs, answer in choices(data, name):
            given = [
                Continuation(loaded.encode(a), loaded.encode(a + b)[len(loaded.encode(a)) :])
                for a, b in pairs
            ]
            values = [one.log_likelihood for one in log_likelihoods(loaded, given, rule)]
            if name == "arc_easy":  # acc_norm: by the length of the choice in characters
                values = [v / len(b[1:]) for v, (_, b) in zip(values, pairs, strict=True)]
            right.append(float(np.argmax(values) == answer))
        assert scores[name].predictions[0].tolist() == right
    metrics = [score.metric for score in scores.values()]
    assert metrics == ["mean over tasks", "acc_norm", "acc", "acc", "exact_match"]
    chances = [score.chance for score in scores.values()]
    arc = np.mean([1 / 4, 1 / 4, 1 / 5, 1 / 3, 1 / 4, 1 / 4])
    assert chances == pytest.approx([(arc + 0.5) / 4, arc, 0.5, 0.0, 0.0])
    average = np.mean([scores[name].value for name in tasks])
    assert scores["average"].value == pytest.approx(average)
    assert scores["average"].items[-1] == "triviaqa:2"


def test_a_limit_takes_the_first_questions(
    data: Path, models: dict[str, Model], tmp_path: Path
) -> None:
    whole, part = (
        harness(data, "arc_easy", limit=limit).measure(models["decoder"], seed=0, scratch=tmp_path)
        for limit in (None, 3)
    )
    assert part.scores["arc_easy"].items == ("arc_easy:0", "arc_easy:1", "arc_easy:2")
    first = whole.scores["arc_easy"].predictions[:, :3]
    assert part.scores["arc_easy"].predictions.tolist() == first.tolist()


def test_encoders_generate_and_roll(models: dict[str, Model]) -> None:
    from lm_eval.api.instance import Instance

    from megatron_ettin.evaluation.lm_eval_model import MaskedLanguageModel

    language_model = MaskedLanguageModel(str(models["encoder"].folder))
    loaded = language_model.loaded
    (new,) = fill_masks(
        loaded, [loaded.encode("a cat")], max_new_tokens=6, is_finished=lambda _: False
    )
    text = loaded.tokenizer.decode(new)
    stop = text[len(text) // 2 :][:1]
    asked = [
        ("a cat", {"until": [], "max_gen_toks": 6}),
        ("a cat", {"until": [stop], "max_gen_toks": 6}),
    ]
    requests = [
        Instance(request_type="generate_until", doc={}, arguments=pair, idx=n)
        for n, pair in enumerate(asked)
    ]
    assert language_model.generate_until(requests) == [text, text.split(stop)[0]]
    sampled = Instance(
        request_type="generate_until", doc={}, arguments=("a", {"do_sample": True}), idx=0
    )
    with pytest.raises(ValueError, match="never sampled"):
        language_model.generate_until([sampled])

    # Windows of 128 tokens, less four of the rule's frame and one of context.
    long = " ".join(string.ascii_lowercase * 8)
    ids = loaded.encode(long)
    rolling = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(long,), idx=0)
    windows = [Continuation([], ids[:123])]
    windows += [Continuation(ids[n - 1 : n], ids[n : n + 123]) for n in range(123, len(ids), 123)]
    assert len(windows) > 1
    expected = [one.log_likelihood for one in log_likelihoods(loaded, windows, "mask_filling")]
    (total,) = language_model.loglikelihood_rolling([rolling])
    # lm-eval fills the last window with more context.
    assert total == pytest.approx(sum(expected), rel=0.05)


def test_faults_are_named(data: Path, models: dict[str, Model], tmp_path: Path) -> None:
    assert len(PAPER_TASKS) == 10
    with pytest.raises(ValueError, match=r"piqa: no test\.parquet or validation\.parquet"):
        harness(data, "piqa").check()
    write_table(tmp_path / "sciq", [{"question": "x"}, {"question": "y"}])
    with pytest.raises(ValueError, match="lm-eval cannot make the task sciq"):
        harness(tmp_path, "sciq").measure(models["decoder"], seed=0, scratch=tmp_path)
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "test.parquet").write_text("nothing")
    with pytest.raises(ValueError, match="not a Parquet file"):
        harness(tmp_path, "piqa").check()
    write_table(tmp_path / "no_such_task", [{"a": 1}, {"a": 2}])
    with pytest.raises(ValueError, match="no_such_task"):
        harness(tmp_path, "no_such_task").measure(models["decoder"], seed=0, scratch=tmp_path)
    refused = harness(data, "arc_easy", rule="mask_filling").refusal(models["decoder"])
    assert "needs a model that fills masks" in str(refused)
