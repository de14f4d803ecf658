"""Retrieval collections in the form of the BEIR benchmark, and the measures of a ranking.

A folder holds `corpus.jsonl` (fields `_id`, `text` and perhaps `title`), `queries.jsonl` (`_id`,
`text`) and `qrels/SPLIT.tsv` (a header, then query, document and relevance, separated by tabs).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ettin.data.json_lines import read_json_lines
from megatron_ettin.data.lines import read_lines
from megatron_ettin.evaluation.scores import Score

#: Relevance of documents by query and document.
Relevance = Mapping[str, Mapping[str, int]]
#: Documents that a search found for each query, with their scores.
Ranking = Mapping[str, Mapping[str, float]]
#: Deepest rank that a measure reads.
DEPTH = 100
#: Names in trec_eval of the measures of a query.
TREC_MEASURES = {"nDCG@10": "ndcg_cut_10", "Recall@100": "recall_100"}


@dataclass(frozen=True, kw_only=True)
class Collection:
    """Documents, queries, and which documents are relevant to which query."""

    documents: Mapping[str, str]
    """Text by identity, with the title before it where there is one."""
    queries: Mapping[str, str]
    """Text by identity of the queries that have relevance judgements."""
    relevance: Relevance


def collection_files(folder: Path, split: str = "test") -> list[Path]:
    """Return the files that `read_collection` reads."""
    return [folder / "corpus.jsonl", folder / "queries.jsonl", folder / "qrels" / f"{split}.tsv"]


def read_collection(folder: Path, split: str = "test") -> Collection:
    """Read a folder in BEIR form.

    Raises:
        ValueError: a line is malformed, an identity comes twice, or a judgement names an unknown
            query or document; the message names file and line.
        OSError: a file is missing.
    """
    corpus, queries, judgements = collection_files(folder, split)
    documents = _read_texts(corpus)
    texts = _read_texts(queries)
    relevance = _read_judgements(judgements)
    known: dict[str, dict[str, int]] = {}
    for where, query, document, value in relevance:
        if query not in texts:
            raise ValueError(f"{where}: query {query!r} is not in {queries}")
        if document not in documents:
            raise ValueError(f"{where}: document {document!r} is not in {corpus}")
        if document in known.setdefault(query, {}):
            raise ValueError(f"{where}: query {query!r} and document {document!r} were judged")
        known[query][document] = value
    if not known:
        raise ValueError(f"{judgements}: no judgements")
    return Collection(
        documents=documents, queries={query: texts[query] for query in known}, relevance=known
    )


def ranking_scores(relevance: Relevance, ranking: Ranking) -> dict[str, Score]:
    """Return the measures of TREC_MEASURES of each query, computed by trec_eval.

    Every judged query must be in `ranking`. Equal scores are ordered by the document's identity,
    the last one first, as trec_eval does.
    """
    import pytrec_eval

    evaluator = pytrec_eval.RelevanceEvaluator(
        {query: dict(documents) for query, documents in relevance.items()},
        {"ndcg_cut.10", "recall.100"},
    )
    return query_scores(
        evaluator.evaluate({query: dict(ranking[query]) for query in relevance}), TREC_MEASURES
    )


def query_scores(
    values: Mapping[str, Mapping[str, float]], trec_measures: Mapping[str, str]
) -> dict[str, Score]:
    """Return one score for each measure from trec_eval's values by query and measure."""
    queries = tuple(sorted(values))
    return {
        name: Score(
            metric=name,
            items=queries,
            predictions=np.array([[values[query][measure] for query in queries]]),
        )
        for name, measure in trec_measures.items()
    }


def _read_texts(path: Path) -> dict[str, str]:
    texts: dict[str, str] = {}
    for line in read_json_lines(path):
        identity = line.text("_id")
        if identity in texts:
            raise ValueError(f"{line.where}: _id {identity!r} comes twice")
        title = line.text("title") if line.fields.get("title") else ""
        texts[identity] = f"{title} {line.text('text')}".strip()
    if not texts:
        raise ValueError(f"{path}: no texts")
    return texts


def _read_judgements(path: Path) -> Iterator[tuple[str, str, str, int]]:
    """Yield file and line, query, document and relevance of each judgement."""
    with path.open("rb") as file:
        lines = read_lines(path, file)
        next(lines, None)  # the header: query-id, corpus-id, score
        for number, line in lines:
            where = f"{path}:{number}"
            columns = line.rstrip("\r\n").split("\t")
            if len(columns) != 3:
                raise ValueError(
                    f"{where}: {len(columns)} columns; expected query, document and relevance, "
                    f"separated by tabs"
                )
            try:
                yield where, columns[0], columns[1], int(columns[2])
            except ValueError:
                raise ValueError(f"{where}: relevance {columns[2]!r} is no whole number") from None
