"""Results on disk: a JSON file for each model, task and seed, found again by all it depends on."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ettin.evaluation.model import Model
from megatron_ettin.evaluation.scores import Score
from megatron_ettin.evaluation.tasks.task import Task
from megatron_ettin.file_digests import FileDigest
from megatron_ettin.publication import publish_text

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Result:
    """Scores of a model in a task with one seed, and what they depend on."""

    model: str
    task: str
    seed: int
    key: str
    """SHA-256 over the model's digest, the task's settings, its data and the seed."""
    settings: Mapping[str, Any]
    scores: Mapping[str, Score]
    notes: Mapping[str, Any] = field(default_factory=dict)
    seconds: float
    """Wall time of the measurement."""
    versions: Mapping[str, str]
    """Versions of the packages that decide the numbers."""


def result_key(model: Model, task: Task, seed: int) -> str:
    """Return the identity of a result: equal keys mean equal numbers, but for package versions."""
    document = {
        "format": FORMAT,
        "model": model.digest,
        "settings": task.settings(),
        "files": {str(path): FileDigest.of_file(path).sha256 for path in sorted(task.files())},
        "seed": seed,
    }
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class ResultStore:
    """Results below a folder: MODEL/TASK/seed_N.json."""

    folder: Path

    def path(self, model: str, task: str, seed: int) -> Path:
        """Return the place of a result."""
        return self.folder / file_name(model) / file_name(task) / f"seed_{seed}.json"

    def scratch(self, model: str, task: str, seed: int, key: str) -> Path:
        """Return the folder for unfinished parts of a result with this key."""
        return self.path(model, task, seed).with_suffix(f".{key[:12]}.unfinished")

    def read(self, model: str, task: str, seed: int, key: str) -> Result | None:
        """Return the result with this key, or None if there is none or it has another key.

        Raises:
            ValueError: the file there is no result.
        """
        path = self.path(model, task, seed)
        if not path.is_file():
            return None
        result = read_result(path)
        return result if result.key == key else None

    def write(self, result: Result) -> None:
        """Publish a result in its place."""
        path = self.path(result.model, result.task, result.seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        publish_text(path, json.dumps(_to_document(result), indent=1) + "\n")


def file_name(name: str) -> str:
    """Return a name of a model or a task as a name of a file."""
    return re.sub(r"[^\w.=+-]", "_", name)


def read_result(path: Path) -> Result:
    """Read the file of a result; raise ValueError if it holds none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.pop("format") != FORMAT:
            raise ValueError(f"the format is not {FORMAT}")
        scores = {name: _score(fields) for name, fields in document.pop("scores").items()}
        return Result(scores=scores, **document)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a result ({error}); remove it to measure anew") from error


def _to_document(result: Result) -> dict[str, Any]:
    return {
        "format": FORMAT,
        **{name: getattr(result, name) for name in ("model", "task", "seed", "key", "settings")},
        "scores": {
            name: {
                "metric": score.metric,
                "value": score.value,
                "chance": score.chance,
                "items": score.items,
                "predictions": score.predictions.tolist(),
                "references": None if score.references is None else score.references.tolist(),
                "groups": score.groups,
            }
            for name, score in result.scores.items()
        },
        "notes": result.notes,
        "seconds": result.seconds,
        "versions": result.versions,
    }


def _score(fields: dict[str, Any]) -> Score:
    references = fields["references"]
    return Score(
        metric=fields["metric"],
        items=tuple(fields["items"]),
        predictions=np.array(fields["predictions"], dtype=np.float64),
        references=None if references is None else np.array(references, dtype=np.float64),
        groups=None if fields["groups"] is None else tuple(fields["groups"]),
        chance=fields["chance"],
    )
