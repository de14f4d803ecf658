"""Retrieval: models are trained to embed texts, then search the documents of test collections."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from megatron_ettin.evaluation.beir import (
    Collection,
    collection_files,
    ranking_scores,
    read_collection,
)
from megatron_ettin.evaluation.contrastive import ContrastiveRecipe, Trial, run_trials
from megatron_ettin.evaluation.model import Model
from megatron_ettin.evaluation.mteb_tasks import mteb_scores, mteb_task
from megatron_ettin.evaluation.randomness import seeded
from megatron_ettin.evaluation.scores import Score
from megatron_ettin.evaluation.search import search
from megatron_ettin.evaluation.tasks.task import Family, Task, TaskScores, TaskWork
from megatron_ettin.evaluation.text_encoders import (
    Pooling,
    multi_vector_encoder,
    read_encoder,
    single_vector_encoder,
)
from megatron_ettin.evaluation.training_pairs import hold_out, local_file, read_pairs

#: Texts whose tokens are counted to estimate the mean.
SAMPLE_TEXTS = 256
#: Seconds a training run takes beside its passes, and once for all of them.
TRIAL_SECONDS = 1.0
FIXED_SECONDS = 3.0


@dataclass(frozen=True, kw_only=True)
class Retrieval(Task):
    """Settings of training and search that all kinds of encoders share.

    The defaults are the Ettin paper's (retrieval_eval/train_st.py of its repository). Its learning
    rates are not published; these are the ones that ModernBERT was tuned with.
    """

    family: ClassVar[Family] = "retrieval"
    library_class: ClassVar[str]
    """Class of sentence-transformers that reads the trained encoder."""

    train: str = "sentence-transformers/msmarco-co-condenser-margin-mse-sym-mnrl-mean-v1"
    """File (.jsonl or .parquet) with the fields `anchor`, `positive` and perhaps `negative`, or a
    data set of the Hugging Face Hub, which is downloaded when the task is checked."""
    train_config: str | None = "triplet-hard"
    """Configuration of the data set, if it is of the Hub."""
    train_split: str = "train"
    """Split of the data set, if it is of the Hub."""
    max_pairs: int = 1_250_000
    """Rows to train on at most."""
    held_out_queries: int = 1000
    """Queries whose rows are not trained on; they choose the learning rate if `dev` is None."""
    dev: Path | None = None
    """Folder in BEIR form with qrels/dev.tsv, to choose the learning rate by nDCG@10."""
    test: Sequence[Path] = ()
    """Folders in BEIR form with qrels/test.tsv, to score."""
    mteb_tasks: Sequence[str] = ()
    """Retrieval tasks of mteb to score, as NAME or NAME/SUBSET; their data must be at hand."""
    learning_rates: Sequence[float] = (1e-5, 2e-5, 3e-5, 5e-5, 8e-5, 1e-4)
    """Learning rates to try: the trained encoder of each stays on disk until it loses."""
    epochs: int = 1
    batch_size: int = 1024
    """Pairs in a batch; the documents of the others are a query's negatives."""
    chunk_size: int = 256
    """Texts in a forward pass, in training (GradCache) and in search."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises; then it falls linearly to zero."""
    scale: float = 20.0
    """Factor of similarities in the softmax."""
    max_tokens: int | None = None
    """Longest text, special tokens counted; longer ones are cut. None: the model's longest."""
    append_sep: bool = False
    """Let a decoder's texts end with [SEP], as an encoder's do."""

    @abstractmethod
    def encoder(self, model: Model) -> Any:
        """Build the encoder that is trained, on the model's device."""

    def files(self) -> list[Path]:
        """Return the training file and the files of the collections, as far as they are local."""
        train = local_file(self.train)
        dev = collection_files(self.dev, "dev") if self.dev else []
        tests = [path for folder in self.test for path in collection_files(folder)]
        return [*([train] if train else []), *dev, *tests]

    def check(self) -> None:
        """Read all local data, and look the tasks of mteb up.

        Raises:
            ValueError, OSError: as `read_pairs`, `read_collection` and `mteb_task` raise them, or
                there is nothing to train with or to score.
        """
        if not self.test and not self.mteb_tasks:
            raise ValueError("test, mteb_tasks: give at least one folder or task to score")
        if len({folder.name for folder in self.test}) < len(self.test):
            raise ValueError("test: two folders have the same name, and so would their scores")
        if not self.learning_rates:
            raise ValueError("learning_rates: give at least one")
        if self.dev is None and self.held_out_queries < 1:
            raise ValueError("held_out_queries: at least 1 must choose the rate where dev is None")
        self._data()
        for folder in self.test:
            read_collection(folder)
        for name in self.mteb_tasks:
            mteb_task(name)

    def work(self, model: Model) -> TaskWork:
        """Estimate tokens from the first texts of each kind; tasks of mteb are not counted."""
        pairs, dev = self._data()
        texts = [text for row in pairs.select(range(min(len(pairs), 100))) for text in row.values()]
        per_pair = self._tokens(model, texts) / min(len(pairs), 100)
        trained = self.epochs * len(pairs) * per_pair
        searched = self._collection_tokens(model, dev)
        cached = trained if self.batch_size > self.chunk_size else 0
        num_rates = len(self.learning_rates)
        tests = sum(self._collection_tokens(model, read_collection(folder)) for folder in self.test)
        return TaskWork(
            trained_tokens=int(num_rates * trained),
            forward_tokens=int(num_rates * (cached + searched) + tests),
            fixed_seconds=FIXED_SECONDS + num_rates * TRIAL_SECONDS,
        )

    def measure(self, model: Model, *, seed: int, scratch: Path) -> TaskScores:
        """Train with each learning rate, search the test collections with the best encoder."""
        pairs, dev = self._data()
        best, trials = run_trials(
            lambda: self.encoder(model),
            pairs,
            dev,
            recipe=ContrastiveRecipe(
                epochs=self.epochs,
                batch_size=self.batch_size,
                chunk_size=self.chunk_size,
                warmup=self.warmup,
                scale=self.scale,
            ),
            learning_rates=self.learning_rates,
            seed=seed,
            scratch=scratch,
        )
        with seeded(seed):
            encoder = read_encoder(self.library_class, best.folder, model)
            scores, cut = self._scores(encoder)
        notes = {**_notes(best, trials), "pairs": len(pairs), "texts cut": cut}
        return TaskScores(scores=scores, notes=notes)

    def _data(self) -> tuple[Any, Collection]:
        """Return the rows to train on, and the collection that chooses the learning rate."""
        pairs, held_out = hold_out(
            read_pairs(self.train, self.train_config, self.train_split),
            max_pairs=self.max_pairs,
            num_queries=self.held_out_queries,
        )
        return pairs, read_collection(self.dev, "dev") if self.dev else held_out

    def _scores(self, encoder: Any) -> tuple[dict[str, Score], dict[str, int]]:
        """Return the scores on the test collections, and how many of their texts are cut."""
        scores: dict[str, Score] = {}
        cut: dict[str, int] = {}
        for folder in self.test:
            collection = read_collection(folder)
            ranking = search(encoder, collection, batch_size=self.chunk_size)
            for measure, score in ranking_scores(collection.relevance, ranking).items():
                scores[f"{folder.name} {measure}"] = score
            cut[folder.name] = _num_longer(encoder, collection)
        for name in self.mteb_tasks:
            for measure, score in mteb_scores(encoder, name, batch_size=self.chunk_size).items():
                scores[f"{name} {measure}"] = score
        return scores, cut

    def _max_tokens(self, model: Model) -> int:
        return min(self.max_tokens or model.max_tokens, model.max_tokens)

    def _tokens(self, model: Model, texts: Sequence[str]) -> int:
        if not texts:
            return 0
        encoded = model.tokenizer()(
            list(texts), truncation=True, max_length=self._max_tokens(model)
        )
        return sum(map(len, encoded["input_ids"]))

    def _collection_tokens(self, model: Model, collection: Collection) -> float:
        total = 0.0
        for texts in (list(collection.queries.values()), list(collection.documents.values())):
            sample = texts[:SAMPLE_TEXTS]
            total += self._tokens(model, sample) * len(texts) / max(1, len(sample))
        return total


@dataclass(frozen=True, kw_only=True)
class BiEncoder(Retrieval):
    """One vector a text, compared by cosine similarity."""

    library_class: ClassVar[str] = "SentenceTransformer"

    encoder_pooling: Pooling = "mean"
    """Way from token embeddings to a vector in models that attend in both directions."""
    decoder_pooling: Pooling = "lasttoken"
    """Way from token embeddings to a vector in causal models."""

    def encoder(self, model: Model) -> Any:
        """Build a model with pooling."""
        is_causal = model.attention == "causal"
        return single_vector_encoder(
            model,
            self.decoder_pooling if is_causal else self.encoder_pooling,
            max_tokens=self._max_tokens(model),
            append_sep=self.append_sep,
        )


@dataclass(frozen=True, kw_only=True)
class LateInteraction(Retrieval):
    """One vector a token, compared by MaxSim: each query token counts its most similar one.

    The paper has no such task. As in ColBERT, the score is a sum over query tokens, so the factor
    in the softmax is 1.
    """

    library_class: ClassVar[str] = "MultiVectorEncoder"

    scale: float = 1.0
    """Factor of similarities in the softmax."""
    embedding_size: int = 128
    """Size of a token's vector."""

    def encoder(self, model: Model) -> Any:
        """Build a model with a projection of its token embeddings."""
        return multi_vector_encoder(
            model,
            self.embedding_size,
            max_tokens=self._max_tokens(model),
            append_sep=self.append_sep,
        )


def _num_longer(encoder: Any, collection: Collection) -> int:
    """Count the texts that are longer than the encoder reads."""
    texts = [*collection.queries.values(), *collection.documents.values()]
    encoded = encoder.tokenizer(texts, truncation=False, verbose=False)
    return sum(len(ids) > encoder.max_seq_length for ids in encoded["input_ids"])


def _notes(best: Trial, trials: Sequence[Trial]) -> dict[str, Any]:
    return {
        "learning rate": best.learning_rate,
        "dev nDCG@10 by learning rate": {f"{t.learning_rate:g}": t.dev_score for t in trials},
        "training loss by learning rate": {f"{t.learning_rate:g}": t.loss for t in trials},
    }
