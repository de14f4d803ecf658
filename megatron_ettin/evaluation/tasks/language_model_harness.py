"""Generative tasks through lm-eval (EleutherAI's language model evaluation harness), zero-shot."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jinja2
import numpy as np
import pyarrow.parquet as pq

from megatron_ettin.evaluation.model import Model
from megatron_ettin.evaluation.readings import LoadedModel, load
from megatron_ettin.evaluation.scores import Score
from megatron_ettin.evaluation.scoring import (
    NUM_BOUND_SAMPLES,
    RuleChoice,
    estimated_tokens,
    forward_tokens,
    refusal,
    resolve,
)
from megatron_ettin.evaluation.tasks.task import Family, Task, TaskScores, TaskWork

#: The Ettin paper's ten tasks by their names in lm-eval, in the order of its table 4.
PAPER_TASKS = (
    "arc_challenge",
    "hellaswag",
    "lambada_openai",
    "openbookqa",
    "piqa",
    "sciq",
    "social_iqa",
    "triviaqa",
    "winogrande",
    "wsc273",
)
#: Metric of a task: the first one that its definition has.
METRICS = ("acc_norm", "acc", "exact_match")
SPLITS = ("test", "validation")
#: Texts that lm-eval's `HFLM` reads at a time.
BATCH_SIZE = 16
#: Errors of lm-eval where a name is no task, or a row lacks a column.
DATA_FAULTS = (LookupError, TypeError, AttributeError, jinja2.TemplateError)
#: Seconds for lm-eval's imports and the definitions of the tasks.
IMPORT_SECONDS = 15.0


@dataclass(frozen=True, kw_only=True)
class Harness(Task):
    """Tasks of lm-eval, each with equal weight in the average.

    Decoders go through lm-eval's own `HFLM` with `add_bos_token=True`, as in the Ettin paper; other
    models through `MaskedLanguageModel`. A task's metric is acc_norm where its definition has one,
    else acc or exact_match.
    """

    family: ClassVar[Family] = "generation"

    tasks: Sequence[str] = PAPER_TASKS
    """Names of tasks in lm-eval; the default is the Ettin paper's ten."""
    limit: int | None = None
    """First questions of each task that are asked; null for all."""
    data_folder: str | None = None
    """Folder with NAME/validation.parquet or NAME/test.parquet for each task, with the columns of
    its data set on the Hub; null to use the Hub."""
    rule: RuleChoice = "auto"
    """Scoring rule; auto is causal for decoders and mask_filling for models that fill masks."""
    bound_samples: int = NUM_BOUND_SAMPLES
    """Masks drawn for a continuation by the rule `bound`."""
    max_new_tokens: int = 32
    """Longest answer, in tokens, where a task has the model write one (triviaqa)."""

    def files(self) -> list[Path]:
        """Return the local file of each task."""
        return [] if self.data_folder is None else [self._local(name) for name in self.tasks]

    def check(self) -> None:
        """See that each local file is there and has rows."""
        if not self.tasks or (self.limit is not None and self.limit < 2):
            raise ValueError("a harness needs at least one task, and two questions of each")
        for path in self.files():
            try:
                num_rows = pq.read_metadata(path).num_rows
            except (OSError, ValueError) as error:
                raise ValueError(f"{path}: not a Parquet file: {error}") from error
            if num_rows < 2:
                raise ValueError(f"{path}: {num_rows} rows; a score needs two or more")

    def refusal(self, model: Model) -> str | None:
        """Return why the rule does not suit the model, or None."""
        return refusal(self.rule, model)

    def work(self, model: Model) -> TaskWork:
        """Estimate tokens from the local text of four choices a question; 200 tokens without it."""
        rule = resolve(self.rule, model, masked="mask_filling")
        tokens = 0
        for lengths in self._question_tokens(model):
            tokens += sum(
                4 * forward_tokens(rule, n // 2, max(1, n // 8), self.bound_samples)
                for n in lengths
            )
        return TaskWork(forward_tokens=tokens, fixed_seconds=IMPORT_SECONDS)

    def measure(self, model: Model, *, seed: int, scratch: Path) -> TaskScores:
        """Ask all questions in one call of lm-eval; the bound alone depends on the seed."""
        loaded = load(model)
        with _quiet():
            from lm_eval.evaluator import evaluate

            definitions = {name: self._definition(name) for name in self.tasks}
            language_model = self._language_model(loaded, seed)
            try:
                found = evaluate(
                    lm=language_model,
                    task_dict={"tasks": definitions, "groups": {}, "group_map": {}},
                    limit=self.limit,
                    bootstrap_iters=0,
                    log_samples=True,
                )
            except DATA_FAULTS as error:
                raise ValueError(f"lm-eval cannot read a row of its data: {error!r}") from error
        scores = {
            name: _score(name, definitions[name], found["samples"][name]) for name in self.tasks
        }
        notes = {"rule": resolve(self.rule, model, masked="mask_filling")}
        if hasattr(language_model, "num_cut_contexts"):
            notes["contexts cut to fit the model"] = language_model.num_cut_contexts
        return TaskScores(scores={"average": _average(scores), **scores}, notes=notes)

    def _local(self, name: str) -> Path:
        folder = Path(self.data_folder or "") / name
        for split in SPLITS:
            if (path := folder / f"{split}.parquet").is_file():
                return path
        raise ValueError(
            f"{folder}: no {' or '.join(f'{split}.parquet' for split in SPLITS)}; "
            f"docs/evaluation.md says how to get the tasks' data"
        )

    def _question_tokens(self, model: Model) -> Iterator[list[int]]:
        for name in self.tasks:
            if self.data_folder is None:
                yield (self.limit or 2000) * [min(200, model.max_tokens)]
            else:
                rows = pq.read_table(self._local(name)).slice(0, self.limit).to_pylist()
                yield [min(estimated_tokens(_text(row)), model.max_tokens) for row in rows]

    def _definition(self, name: str) -> Any:
        """Return lm-eval's definition of a task, zero-shot, with the local data in its place."""
        task: Any = name
        if self.data_folder is not None:
            # lm-eval takes changes of a task that it knows inside a group alone.
            task = {"group": f"local {name}", "task": [{"task": name, **self._local_fields(name)}]}
        try:
            loaded = _task_manager(tuple(self.tasks)).load([task])["tasks"]
        except DATA_FAULTS as error:
            raise ValueError(f"lm-eval cannot make the task {name}: {error!r}") from error
        if list(loaded) != [name]:
            raise ValueError(f"{name}: not one task of lm-eval, but {', '.join(loaded)}")
        definition = loaded[name]
        definition.set_config("num_fewshot", 0)
        definition.set_fewshot_seed(0)
        if definition.OUTPUT_TYPE == "generate_until":
            length = {"max_gen_toks": self.max_new_tokens}
            definition.set_config("generation_kwargs", length, update=True)
        return definition

    def _local_fields(self, name: str) -> dict[str, Any]:
        """Return the fields of a task's definition that name its data, for its local file."""
        path = self._local(name)

        def read(**_: Any) -> Any:
            from datasets import Dataset, DatasetDict

            return DatasetDict({path.stem: Dataset(pq.read_table(path).slice(0, self.limit))})

        splits = {f"{split}_split": None for split in ("training", "fewshot", *SPLITS)}
        return {"custom_dataset": read, **splits, f"{path.stem}_split": path.stem}

    def _language_model(self, loaded: LoadedModel, seed: int) -> Any:
        if loaded.model.attention == "bidirectional":
            from megatron_ettin.evaluation.lm_eval_model import MaskedLanguageModel

            return MaskedLanguageModel(loaded, self.rule, seed, self.bound_samples)
        from lm_eval.models.huggingface import HFLM

        # lm-eval takes the tokens after those of the context as the continuation.
        if loaded.tokenizer("a")["input_ids"][-1] in loaded.tokenizer.all_special_ids:
            raise ValueError(
                f"{loaded.model.folder}: the tokenizer ends a text with a special token, so "
                f"likelihoods of continuations would be wrong; write the model anew with "
                f"tools/convert.py to-hf"
            )
        return HFLM(
            pretrained=loaded.language_model,
            tokenizer=loaded.tokenizer,
            add_bos_token=True,
            prefix_token_id=loaded.start_id,
            batch_size=BATCH_SIZE,
            max_length=loaded.model.max_tokens,
        )


@functools.cache
def _task_manager(names: tuple[str, ...]) -> Any:
    """Return lm-eval's index of the folders that define the tasks.

    Its index of all 14,000 files takes 20 seconds.
    """
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    any_name = "|".join(map(re.escape, names))
    line = re.compile(rf"^task: *[\"']?(?:{any_name})[\"']?\s*$".encode(), re.MULTILINE)
    folders = {path.parent for path in root.rglob("*.yaml") if line.search(path.read_bytes())}
    return lm_eval.tasks.TaskManager(include_path=sorted(folders), include_defaults=False)


def _text(row: Any) -> str:
    """Return all strings of a row but its answers, which can be many."""
    if isinstance(row, Mapping):
        return " ".join(_text(value) for key, value in row.items() if key != "answer")
    if isinstance(row, list):
        return " ".join(map(_text, row))
    return row if isinstance(row, str) else ""


def _score(name: str, definition: Any, samples: Sequence[Mapping[str, Any]]) -> Score:
    """Return a task's score; the chance level follows from the number of choices."""
    metric = next((one for one in METRICS if one in samples[0]), None)
    if metric is None:
        raise ValueError(f"{name}: lm-eval gives none of {', '.join(METRICS)}")
    has_choices = definition.OUTPUT_TYPE == "multiple_choice"
    chance = np.mean([1 / len(one["arguments"]) for one in samples]) if has_choices else 0.0
    return Score(
        metric=metric,
        items=tuple(f"{name}:{one['doc_id']}" for one in samples),
        predictions=np.array([[one[metric] for one in samples]], dtype=np.float64),
        chance=float(chance),
    )


def _average(scores: Mapping[str, Score]) -> Score:
    return Score(
        metric="mean over tasks",
        items=tuple(item for score in scores.values() for item in score.items),
        predictions=np.concatenate([score.predictions for score in scores.values()], axis=1),
        groups=tuple(name for name, score in scores.items() for _ in score.items),
        chance=float(np.mean([score.chance for score in scores.values()])),
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the notices of lm-eval and its libraries, and their bars where no terminal is."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    is_terminal = sys.stderr.isatty()
    silence = contextlib.nullcontext() if is_terminal else contextlib.redirect_stderr(io.StringIO())
    try:
        with silence:
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
