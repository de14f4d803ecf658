"""Page of runs over tokens: one HTML file with the figure, the marks and the numbers.

It needs no script and loads nothing: a checkbox hides a run, and the parts of the figure name
themselves under the pointer.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from markupsafe import Markup

from megatron_ettin.evaluation.curves_figure import draw_curves
from megatron_ettin.evaluation.run_curves import RunCurves
from megatron_ettin.evaluation.theme import DARK, LIGHT, MARKERS, Theme, as_svg
from megatron_ettin.templates import template_environment

#: Reports that a run's table shows at most.
MAX_ROWS = 200
SIGNS = dict(zip(MARKERS, "●■▲◆▼✚", strict=True))


def page_of_curves(runs: Sequence[RunCurves]) -> str:
    """Return the page; it follows the reader's light or dark setting."""
    environment = template_environment("evaluation")
    colours = len(LIGHT.series)
    return environment.get_template("curves.html.j2").render(
        runs=runs,
        figure=Markup(figure_in_page(runs)),
        light=_variables(LIGHT),
        dark=_variables(DARK),
        colours=[f"series-{index % colours}" for index, _ in enumerate(runs)],
        signs=[SIGNS[MARKERS[index % len(MARKERS)]] for index, _ in enumerate(runs)],
        summaries=[_summary(run) for run in runs],
        rows=[_thinned(run.training) for run in runs],
        max_rows=MAX_ROWS,
    )


def figure_in_page(runs: Sequence[RunCurves]) -> str:
    """Return the figure as SVG elements: colours from the page, a title and a class for each part.

    The class of a part is its run's, `run0` for the first one.
    """
    titles: dict[str, str] = {}
    draw = partial(draw_curves, runs, titles=titles, legend=False)
    text = as_svg(draw, LIGHT).decode()
    text = re.sub(r"<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)

    def named(match: re.Match[str]) -> str:
        identity = match[1]
        run = identity.partition("-")[0]
        return f'<g id="{identity}" class="{run}"><title>{html.escape(titles[identity])}</title>'

    text = re.sub(r'<g id="(run\d+-[\w-]+)">', named, text)
    for name, colour in _variables(LIGHT).items():
        text = re.sub(re.escape(colour), f"var(--{name})", text, flags=re.IGNORECASE)
    # As wide as the page, by its viewBox.
    opening, end, rest = text.partition(">")
    opening = re.sub(r' (?:width|height)="[^"]*"', "", opening)
    return opening + ' role="img" aria-label="Curves of the runs"' + end + rest


def _variables(theme: Theme) -> dict[str, str]:
    """Return the colours of a theme by the names that the page gives them."""
    colours = {f"series-{index}": colour for index, colour in enumerate(theme.series)}
    return {
        "background": theme.background,
        "text": theme.text,
        "grid": theme.grid,
        "phase": theme.phase,
        **colours,
    }


def _summary(run: RunCurves) -> list[str]:
    """Return a run's line of the first table."""
    last = run.validation[-1] if run.validation else None
    return [
        f"{run.tokens:,}",
        f"{run.seconds / 3600.0:.3g}",
        f"{run.tokens / run.seconds:,.0f}" if run.seconds else "",
        f"{run.training[-1]['loss']:.4f}",
        ""
        if last is None
        else f"{last['heldout_loss']:.4f} ± {last.get('heldout_standard_error', 0.0):.4f}",
        " → ".join(phase.name for phase in run.phases),
    ]


def _thinned(lines: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return every n-th report as cells of a table, and the last one."""
    every = -(-len(lines) // MAX_ROWS)
    return [
        [
            f"{line['step']:,}",
            f"{line['tokens']:,}",
            str(line["phase"]),
            f"{line['loss']:.4f}",
            *(_number(line, name, form) for name, form in FIELDS.items()),
        ]
        for line in lines[::-1][::every][::-1]
    ]


#: Further columns of a run's table, and the form of their numbers.
FIELDS = {"lr": ".3e", "grad_norm": ".3g", "tokens_per_second": ",.0f"}


def _number(line: Mapping[str, Any], name: str, form: str) -> str:
    return format(line[name], form) if name in line else ""
