"""Retrieval tasks of mteb, by name, with mteb's own values of each query."""

from __future__ import annotations

import sys
from typing import Any

from megatron_ettin.evaluation.beir import TREC_MEASURES, query_scores
from megatron_ettin.evaluation.scores import Score


def mteb_task(name: str) -> Any:
    """Return a retrieval task, `NAME` or `NAME/SUBSET` where it has subsets such as languages.

    Raises:
        ValueError: mteb has no such task or subset, or it is no retrieval task.
    """
    import mteb
    from mteb.abstasks import AbsTaskRetrieval

    task_name, _, subset = name.partition("/")
    try:
        task = mteb.get_task(task_name, hf_subsets=[subset] if subset else None)
    except (KeyError, ValueError) as error:
        raise ValueError(f"mteb_tasks: {name}: {error.args[0]}") from None
    if not isinstance(task, AbsTaskRetrieval):
        raise ValueError(f"mteb_tasks: {name} is a task of {task.metadata.type}, not of retrieval")
    return task


def mteb_scores(encoder: Any, name: str, *, batch_size: int) -> dict[str, Score]:
    """Run a task of mteb with an encoder of sentence-transformers; return its measures by query.

    The data is downloaded if need be. A query is named SUBSET/SPLIT/QUERY.

    Raises:
        ValueError: mteb cannot run the task; the message has its reason.
    """
    import mteb

    task = mteb_task(name)
    values: dict[str, dict[str, float]] = {}
    task_specific_scores = task.task_specific_scores

    # mteb publishes means only; this method of a task is handed the values of each query.
    def record(
        scores: Any, qrels: Any, results: Any, *, hf_split: str, hf_subset: str
    ) -> dict[str, float]:
        for query, measures in scores.items():
            values[f"{hf_subset}/{hf_split}/{query}"] = measures
        specific: dict[str, float] = task_specific_scores(
            scores, qrels, results, hf_split=hf_split, hf_subset=hf_subset
        )
        return specific

    task.task_specific_scores = record
    try:
        mteb.evaluate(
            encoder,
            task,
            cache=None,
            encode_kwargs={"batch_size": batch_size},
            show_progress_bar=sys.stderr.isatty(),
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"mteb_tasks: {name}: {error}") from error
    return query_scores(values, TREC_MEASURES)
