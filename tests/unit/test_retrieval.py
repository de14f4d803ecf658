"""Retrieval on tiny collections: padding, pooling, MaxSim, training, resuming, mteb."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ettin.evaluation import contrastive
from megatron_ettin.evaluation.beir import Collection, ranking_scores, read_collection
from megatron_ettin.evaluation.contrastive import ContrastiveRecipe, train
from megatron_ettin.evaluation.model import Model, open_model
from megatron_ettin.evaluation.randomness import seeded
from megatron_ettin.evaluation.search import search
from megatron_ettin.evaluation.task_file import read_tasks
from megatron_ettin.evaluation.tasks.retrieval import BiEncoder, LateInteraction, Retrieval
from megatron_ettin.evaluation.training_pairs import hold_out, read_pairs
from tests.conftest import TinyCorpus
from tests.models import CLASSES, Kind, write_random_model

NUM_TOPICS = 24


def texts(topic: int, rng: random.Random) -> tuple[str, str]:
    """Return a query and a document that share the words of their topic."""
    words = random.Random(topic).sample("abcdefghijklmnopqrstuvwxyz", 6)
    return " ".join(rng.sample(words, 3)), " ".join(rng.sample(words * 3, rng.randint(4, 12)))


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in BEIR form, with train.jsonl beside."""
    folder = tmp_path_factory.mktemp("letters")
    rng = random.Random(0)
    train = [texts(topic, rng) for topic in range(NUM_TOPICS) for _ in range(8)]
    write_lines(folder / "train.jsonl", [{"anchor": a, "positive": p} for a, p in train])
    test = [texts(topic, rng) for topic in range(NUM_TOPICS)]
    write_lines(
        folder / "queries.jsonl", [{"_id": f"q{n}", "text": q} for n, (q, _) in enumerate(test)]
    )
    write_lines(
        folder / "corpus.jsonl",
        [{"_id": f"d{n}", "title": "", "text": d} for n, (_, d) in enumerate(test)],
    )
    (folder / "qrels").mkdir()
    lines = [f"q{n}\td{n}\t1\n" for n in range(NUM_TOPICS)]
    (folder / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return folder


@pytest.fixture(scope="module")
def models(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Model]:
    folder = tmp_path_factory.mktemp("models")
    tokenizer = tiny_corpus.folder / "tokenizer"
    return {
        kind: open_model(str(write_random_model(folder / kind, kind, tokenizer)))
        for kind in CLASSES
    }


def settings(data: Path) -> dict[str, Any]:
    return {
        "train": str(data / "train.jsonl"),
        "test": [data],
        "held_out_queries": 20,
        "learning_rates": (1e-3,),
        "batch_size": 24,
        "chunk_size": 64,
    }


@pytest.fixture
def bi_encoder(data: Path) -> BiEncoder:
    return BiEncoder(**settings(data))


@pytest.mark.parametrize(
    ("kind", "pooling", "append_sep"),
    [
        ("encoder", "mean", False),
        ("decoder", "lasttoken", False),
        ("decoder", "lasttoken", True),
        ("decoder", "weightedmean", True),
        ("decoder", "mean", False),
    ],
)
def test_pooling_equals_its_formula_and_ignores_padding(
    kind: Kind, pooling: Any, append_sep: bool, bi_encoder: BiEncoder, models: dict[Kind, Model]
) -> None:
    model = models[kind]
    task = replace(bi_encoder, decoder_pooling=pooling, append_sep=append_sep)
    mixed = ["a b", "c " * 90, "d e f " * 8, "g"]
    together = task.encoder(model).encode(mixed, batch_size=4)
    tokenizer, base = model.tokenizer(), model.base_model()
    for text, embedding in zip(mixed, together, strict=True):
        ids = tokenizer(text)["input_ids"]
        if append_sep:
            ids = [*ids, tokenizer.sep_token_id]
        with torch.inference_mode():
            tokens = base(input_ids=torch.tensor([ids])).last_hidden_state[0].double()
        weights = {
            "mean": torch.ones(len(ids)),
            "weightedmean": torch.arange(1, len(ids) + 1),
            "lasttoken": torch.eye(len(ids))[-1],
        }[pooling].double()
        expected = (tokens * weights[:, None]).sum(0) / weights.sum()
        np.testing.assert_allclose(embedding, expected, atol=1e-5)


def test_embeddings_of_a_batch_are_those_of_each_text(
    bi_encoder: BiEncoder, models: dict[Kind, Model]
) -> None:
    mixed = ["a b", "c " * 90, "d e f " * 8, "g"]
    for model in models.values():
        encoder = bi_encoder.encoder(model)
        together = encoder.encode(mixed, batch_size=4)
        alone = np.stack([encoder.encode(text) for text in mixed])
        np.testing.assert_allclose(together, alone, atol=1e-5)


def test_a_search_equals_a_slow_maxsim(data: Path, models: dict[Kind, Model]) -> None:
    collection = read_collection(data)
    torch.manual_seed(0)
    encoder = LateInteraction(**settings(data)).encoder(models["decoder"])
    ranking = search(encoder, collection, batch_size=16)
    documents = {name: encoder.encode_document(text) for name, text in collection.documents.items()}
    for query, text in list(collection.queries.items())[:5]:
        vectors = encoder.encode_query(text)
        assert np.allclose(vectors.norm(dim=1), 1.0, atol=1e-5)
        for document, found in ranking[query].items():
            expected = 0.0
            for vector in vectors:
                expected += max(float(vector @ other) for other in documents[document])
            assert found == pytest.approx(expected, abs=1e-4)


def test_blocks_of_documents_join(
    data: Path,
    bi_encoder: BiEncoder,
    models: dict[Kind, Model],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    collection = read_collection(data)
    encoder = bi_encoder.encoder(models["encoder"])
    whole = search(encoder, collection, batch_size=64)
    monkeypatch.setattr("megatron_ettin.evaluation.search.BLOCK_DOCUMENTS", 7)
    monkeypatch.setattr("megatron_ettin.evaluation.search.DEPTH", 9)
    for query, found in search(encoder, collection, batch_size=64).items():
        assert list(found) == sorted(whole[query], key=lambda name: -whole[query][name])[:9]


@pytest.mark.parametrize("task_class", [BiEncoder, LateInteraction])
def test_training_improves_and_repeats(
    task_class: type[Retrieval], data: Path, models: dict[Kind, Model], tmp_path: Path
) -> None:
    task = task_class(**settings(data), epochs=2)
    task.check()
    state = random.getstate(), torch.get_rng_state()
    first = task.measure(models["encoder"], seed=1, scratch=tmp_path / "first")
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])
    torch.rand(5)
    again = task.measure(models["encoder"], seed=1, scratch=tmp_path / "again")
    for name, score in first.scores.items():
        np.testing.assert_array_equal(score.predictions, again.scores[name].predictions)
    untrained = search(task.encoder(models["encoder"]), read_collection(data), batch_size=64)
    before = ranking_scores(read_collection(data).relevance, untrained)["nDCG@10"]
    assert first.scores[f"{data.name} nDCG@10"].value > before.value + 0.1


def test_another_seed_and_the_estimate(
    bi_encoder: BiEncoder, models: dict[Kind, Model], tmp_path: Path
) -> None:
    one, other = (
        bi_encoder.measure(models["decoder"], seed=seed, scratch=tmp_path / str(seed))
        for seed in (1, 2)
    )
    assert (
        one.notes["training loss by learning rate"] != other.notes["training loss by learning rate"]
    )
    tokenizer = models["decoder"].tokenizer()
    pairs = read_pairs(bi_encoder.train, None, "train").to_list()
    tokens = sum(len(tokenizer(text)["input_ids"]) for pair in pairs for text in pair.values())
    trained = one.notes["pairs"] / len(pairs) * tokens
    work = replace(bi_encoder, learning_rates=(1e-4, 1e-3)).work(models["decoder"])
    assert work.trained_tokens == pytest.approx(2 * trained, rel=0.1)
    cached = replace(bi_encoder, chunk_size=8).work(models["decoder"])
    extra = cached.forward_tokens - bi_encoder.work(models["decoder"]).forward_tokens
    assert extra == cached.trained_tokens


def test_a_killed_measurement_goes_on(
    bi_encoder: BiEncoder,
    models: dict[Kind, Model],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = replace(bi_encoder, learning_rates=(1e-12, 1e-3, 1e30), decoder_pooling="mean")
    whole = task.measure(models["decoder"], seed=0, scratch=tmp_path / "whole")
    assert whole.notes["learning rate"] == 1e-3
    assert whole.notes["dev nDCG@10 by learning rate"]["1e+30"] is None, "diverged"

    rates = []

    def killed(*args: Any) -> float:
        rates.append(args[3])
        if len(rates) == 3:
            raise KeyboardInterrupt
        return train(*args)

    monkeypatch.setattr(contrastive, "train", killed)
    scratch = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        task.measure(models["decoder"], seed=0, scratch=scratch)
    kept = sorted(path.parent.name for path in scratch.glob("rate_*/model"))
    assert kept == ["rate_0.001"]
    resumed = task.measure(models["decoder"], seed=0, scratch=scratch)
    assert rates == [1e-12, 1e-3, 1e30, 1e30]
    assert resumed.notes == whole.notes
    for name, score in whole.scores.items():
        np.testing.assert_array_equal(score.predictions, resumed.scores[name].predictions)


@pytest.mark.parametrize("task_class", [BiEncoder, LateInteraction])
def test_gradcache_gives_the_loss_of_the_whole_batch(
    task_class: type[Retrieval], data: Path, models: dict[Kind, Model], tmp_path: Path
) -> None:
    pairs = read_pairs(str(data / "train.jsonl"), None, "train").select(range(0, 48))
    losses = []
    for chunk_size in (64, 7):
        recipe = ContrastiveRecipe(
            epochs=1, batch_size=24, chunk_size=chunk_size, warmup=0.0, scale=5.0
        )
        with seeded(0):
            encoder = task_class(**settings(data)).encoder(models["encoder"])
            losses.append(train(encoder, pairs, recipe, 1e-3, 0, tmp_path))
    # The second step's loss depends on the first step's gradients.
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_held_out_queries_are_not_trained_on(data: Path) -> None:
    pairs = read_pairs(str(data / "train.jsonl"), None, "train")
    train, held_out = hold_out(pairs, max_pairs=50, num_queries=30)
    assert len(train) == 50
    assert len(held_out.queries) == 30
    assert not set(train["anchor"]) & set(held_out.queries.values())
    reversed_pairs = pairs.select(range(len(pairs) - 1, -1, -1))
    again = hold_out(reversed_pairs, max_pairs=50, num_queries=30)[1]
    assert dict(again.queries) == dict(held_out.queries)
    with pytest.raises(ValueError, match="lower held_out_queries"):
        hold_out(pairs, max_pairs=50, num_queries=10_000)


def test_pairs_and_triplets_of_both_formats(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [{"anchor": "a", "positive": "p", "negative": "n", "other": 1}]
    write_lines(tmp_path / "train.jsonl", rows)
    Dataset.from_list(rows).to_parquet(str(tmp_path / "train.parquet"))
    for suffix in ("jsonl", "parquet"):
        pairs = read_pairs(str(tmp_path / f"train.{suffix}"), None, "train")
        assert pairs.to_list() == [{"anchor": "a", "positive": "p", "negative": "n"}]
    write_lines(tmp_path / "train.jsonl", [*rows, {"anchor": "a", "positive": "p"}])
    with pytest.raises(ValueError, match=r'train\.jsonl:2: no field "negative"'):
        read_pairs(str(tmp_path / "train.jsonl"), None, "train")
    Dataset.from_list([{"anchor": "a"}]).to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(ValueError, match=r"train\.parquet: no field positive"):
        read_pairs(str(tmp_path / "train.parquet"), None, "train")


def test_faults_of_settings_are_named(bi_encoder: BiEncoder, data: Path) -> None:
    with pytest.raises(ValueError, match="at least one folder or task"):
        replace(bi_encoder, test=()).check()
    with pytest.raises(ValueError, match="same name"):
        replace(bi_encoder, test=(data, data)).check()
    with pytest.raises(FileNotFoundError, match=r"dev\.tsv"):
        replace(bi_encoder, dev=data).check()


def test_the_examples_are_read() -> None:
    folder = Path(__file__).parents[2] / "examples/evaluation"
    nano = read_tasks(folder / "nano.yaml")
    assert isinstance(nano["wikipedia"], BiEncoder)
    assert isinstance(nano["wikipedia_late"], LateInteraction)
    published = read_tasks(folder / "published.yaml")["msmarco"]
    assert isinstance(published, BiEncoder)
    assert published.batch_size == 1024
    assert published.decoder_pooling == "lasttoken"


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:The fill_missing parameter is deprecated:DeprecationWarning",
    "ignore:The `get_sentence_embedding_dimension` method:FutureWarning",
)
def test_mteb_gives_the_same_values(
    data: Path,
    bi_encoder: BiEncoder,
    models: dict[Kind, Model],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    collection = read_collection(data)
    register(collection, "LettersRetrieval", monkeypatch)
    task = replace(bi_encoder, mteb_tasks=("LettersRetrieval",))
    task.check()
    scores = task.measure(models["encoder"], seed=0, scratch=tmp_path).scores
    assert scores["LettersRetrieval nDCG@10"].items[0] == "default/test/q0"
    for measure in ("nDCG@10", "Recall@100"):
        ours, theirs = scores[f"{data.name} {measure}"], scores[f"LettersRetrieval {measure}"]
        np.testing.assert_allclose(ours.predictions, theirs.predictions, atol=1e-6)
    with pytest.raises(ValueError, match="Did you mean: 'LettersRetrieval'"):
        replace(task, mteb_tasks=("LetterRetrieval",)).check()
    with pytest.raises(ValueError, match="of Classification, not of retrieval"):
        replace(task, mteb_tasks=("Banking77Classification",)).check()


def register(collection: Collection, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let mteb know a task with the texts of a collection."""
    from datasets import Dataset
    from mteb.abstasks import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.get_tasks import _TASKS_REGISTRY

    class Letters(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=name,
            description="Letters",
            dataset={"path": "none/none", "revision": "1"},
            type="Retrieval",
            category="t2t",
            modalities=["text"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )

        def load_data(self, *args: Any, **options: Any) -> None:
            def table(named: Any) -> Any:
                return Dataset.from_list([{"id": i, "text": text} for i, text in named.items()])

            split = {
                "corpus": table(collection.documents),
                "queries": table(collection.queries),
                "relevant_docs": {query: dict(d) for query, d in collection.relevance.items()},
                "top_ranked": None,
            }
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    monkeypatch.setitem(_TASKS_REGISTRY, name, Letters)
