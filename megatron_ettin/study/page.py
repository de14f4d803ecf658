"""The page of a study: page.html with all that was found, its first figures, results as tables."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from megatron_ettin.evaluation.tasks.task import Task
from megatron_ettin.evaluation.theme import DARK, LIGHT, Draw, as_data_url, as_png, as_svg
from megatron_ettin.publication import publish_bytes, publish_text
from megatron_ettin.study import tables
from megatron_ettin.study.arms import Study
from megatron_ettin.study.comparison import (
    Number,
    StudyComparison,
    compare_arms,
    notes_of,
    versions_of,
)
from megatron_ettin.study.figures import (
    draw_checkpoints,
    draw_held_out,
    draw_losses,
    draw_scores,
)
from megatron_ettin.study.history import CheckpointScore, History, read_checkpoints, read_histories
from megatron_ettin.templates import template_environment

TEMPLATE = "page.html.j2"


def write_page(study: Study, tasks: Mapping[str, Task], config_file: Path) -> None:
    """Read all that a study has on disk, and write its files into its folder `page`.

    `config_file` is the study's YAML, for the commands that repeat a number.

    Raises:
        ValueError: no result is there yet, a file is damaged, or arms were measured on other items.
    """
    comparison = compare_arms(study.models(), tasks, study.results)
    if not comparison.numbers:
        raise ValueError(f"{study.results.folder}: no results yet; the page needs one at least")
    histories = read_histories(study.models())
    checkpoints = read_checkpoints(study, tasks)
    html = (
        _environment()
        .get_template(TEMPLATE)
        .render(
            **_scores(comparison),
            **_over_tokens(comparison, histories, checkpoints),
            **_provenance(study, comparison, config_file),
        )
    )
    study.page.mkdir(parents=True, exist_ok=True)
    publish_bytes(study.page / "page.png", as_png(partial(draw_scores, comparison)))
    if any(history.validation for history in histories):
        draw = partial(draw_held_out, histories, comparison.arms)
        publish_bytes(study.page / "held_out.png", as_png(draw))
    publish_text(study.page / "results.csv", tables.as_csv(comparison))
    publish_text(study.page / "results.md", tables.as_markdown(comparison))
    publish_text(study.page / "page.html", html)


def _environment() -> Environment:
    """Return Jinja's environment: every text is escaped, a missing name is an error."""
    environment = template_environment("study")
    environment.filters["show"] = tables.show
    environment.filters["difference"] = tables.show_difference
    environment.filters["interval"] = tables.show_interval
    environment.filters["picture"] = _picture
    return environment


def _picture(draw: Draw, description: str) -> Markup:
    """Return a figure for both themes as HTML; the description is escaped."""
    light, dark = (as_data_url(as_svg(draw, theme)) for theme in (LIGHT, DARK))
    return Markup(
        '<picture><source media="(prefers-color-scheme: dark)" srcset="{}">'
        '<img src="{}" alt="{}"></picture>'
    ).format(dark, light, description)


def _scores(comparison: StudyComparison) -> dict[str, Any]:
    return {
        "comparison": comparison,
        "draw_scores": partial(draw_scores, comparison),
        "families": [(family, _summary(comparison, family)) for family in comparison.families],
        "findings": tables.findings(comparison),
        "intervals": [*tables.INTERVALS, tables.multiplicity(comparison)],
    }


def _summary(comparison: StudyComparison, family: str) -> list[tuple[Any, list[Number | None]]]:
    """Return each task's first score with the numbers of all arms, None where one has none."""
    return [
        (quantity, [numbers.get(arm) for arm in comparison.arms])
        for quantity, numbers in comparison.by_quantity.items()
        if quantity.is_first and quantity.family == family
    ]


def _over_tokens(
    comparison: StudyComparison,
    histories: Sequence[History],
    checkpoints: Sequence[CheckpointScore],
) -> dict[str, Any]:
    arms, held_out = comparison.arms, tables.held_out_rows(histories)
    return {
        "draw_losses": partial(draw_losses, histories, arms) if histories else None,
        "draw_checkpoints": partial(draw_checkpoints, checkpoints, arms) if checkpoints else None,
        "draw_held_out": partial(draw_held_out, histories, arms) if held_out else None,
        "held_out_columns": tables.HELD_OUT_COLUMNS,
        "held_out": held_out,
        "cost_columns": tables.COST_COLUMNS,
        "costs": tables.cost_rows(histories),
        "evaluation_hours": sum(result.seconds for result in comparison.results) / 3600.0,
    }


def _provenance(study: Study, comparison: StudyComparison, config_file: Path) -> dict[str, Any]:
    settings = {result.task: result.settings for result in comparison.results}
    groups = json.loads(study.proof.read_text())["groups"] if study.proof.is_file() else []
    return {
        "proofs": groups,
        "settings": settings,
        "notes": [(result, notes) for result in comparison.results if (notes := notes_of(result))],
        "versions": versions_of(comparison.results),
        "study_command": _study_command(study, config_file),
        "trainings": [
            (model.name, "train" if model.start is None else "cross", model)
            for model in study.models()
            if model.run is not None
        ],
        "evaluations": [
            (model.name, task, _evaluate_command(study, f"{model.name}={model.source}", task))
            for task in settings
            for model in study.models()
            if any((r.model, r.task) == (model.name, task) for r in comparison.results)
        ],
    }


def _study_command(study: Study, config_file: Path) -> str:
    budget = study.config.train_tokens
    words = ["python", "tools/study.py", "--config", str(config_file)]
    words += ["--output", study.config.output]
    words += [] if budget is None else ["--budget", str(budget)]
    return shlex.join(words)


def _evaluate_command(study: Study, model: str, task: str) -> str:
    words = ["python", "tools/evaluate.py", model, "--config", study.config.evaluation]
    return shlex.join([*words, "--tasks", task, "--output", f"{study.config.output}-again"])
