"""report.html, report.png and summary.json of any runs, one or many."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from megatron_ettin.evaluation import table
from megatron_ettin.evaluation.comparison import Comparison, is_causal
from megatron_ettin.evaluation.curves_figure import draw_curves
from megatron_ettin.evaluation.reported_run import ReportedRun
from megatron_ettin.evaluation.theme import DARK, LIGHT, as_data_url, as_png, as_svg
from megatron_ettin.publication import publish_bytes, publish_text

STYLE = """
:root { color-scheme: light dark; --text: #24292f; --faint: #59636e; --line: #d8dee4;
  --background: #ffffff; --raised: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --text: #d5dbe3; --faint: #949fac;
  --line: #363e49; --background: #15191f; --raised: #1e242c; } }
body { margin: 0 auto; max-width: 50rem; padding: 2.5rem 1.25rem 4rem; color: var(--text);
  background: var(--background); font: 1rem/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
.lead, figcaption, .notes { color: var(--faint); }
figcaption, .notes { font-size: .9rem; }
figure { margin: 1.6rem 0; }
img { display: block; width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem .35rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
thead th { border-bottom-width: 2px; }
tbody th { font-weight: 400; }
.scroll { overflow-x: auto; }
code { font: .88em ui-monospace, monospace; overflow-wrap: anywhere; }
.verdict { font-weight: 600; }
dl { margin: 0; } dt { margin-top: .9rem; color: var(--faint); }
dd { margin: .15rem 0 0; padding: .5rem .8rem; background: var(--raised); border-radius: .4rem; }
"""


def write_report(comparison: Comparison, output: Path) -> None:
    """Write the three files to a folder, each of which appears when it is complete."""
    output.mkdir(parents=True, exist_ok=True)
    publish_text(output / "report.html", page(comparison))
    draw = partial(draw_curves, [run.curves for run in comparison.runs])
    publish_bytes(output / "report.png", as_png(draw))
    publish_text(output / "summary.json", json.dumps(table.summary(comparison), indent=2) + "\n")


def page(comparison: Comparison) -> str:
    """Return a self-contained HTML page, readable on light and dark screens."""
    title = html.escape(", ".join(_names(comparison)))
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in table.notes(comparison))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{title}</h1>
{_figure(comparison)}
<h2>Numbers</h2>
{_numbers(comparison)}
<ul class="notes">{notes}</ul>
{_differences(comparison)}
{_digests(comparison)}
{"".join(_samples(run) for run in comparison.runs)}
<h2>Versions</h2>
<p class="notes">{html.escape(", ".join(f"{n} {v}" for n, v in comparison.versions.items()))}</p>
</body>
</html>
"""


def _figure(comparison: Comparison) -> str:
    draw = partial(draw_curves, [run.curves for run in comparison.runs])
    light, dark = (as_data_url(as_svg(draw, theme)) for theme in (LIGHT, DARK))
    return f"""<figure>
<picture>
<source media="(prefers-color-scheme: dark)" srcset="{dark}">
<img src="{light}" alt="Losses, learning rate and throughput over the tokens trained on">
</picture>
<figcaption>The training loss is over the blend of the phase at hand, thin as reported and bold as a
mean over neighbours. The held-out loss is over a fixed set of rows, with equal shares of every
held-out corpus; bars are two standard errors.</figcaption>
</figure>"""


def _table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a table whose first column names the lines."""
    columns = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in headings)
    body = "\n".join(
        f'<tr><th scope="row">{html.escape(name)}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, *cells in lines
    )
    return f"""<div class="scroll"><table>
<thead><tr><th></th>{columns}</tr></thead>
<tbody>
{body}
</tbody>
</table></div>"""


def _names(comparison: Comparison) -> list[str]:
    return [run.name for run in comparison.runs]


def _numbers(comparison: Comparison) -> str:
    lines = [(row.name, *row.cells) for row in table.rows(comparison)]
    return _table(_names(comparison), lines)


def _differences(comparison: Comparison) -> str:
    if len(comparison.runs) == 1:
        return ""
    lines = [(each.key, *each.values) for each in comparison.differences]
    found = _table(_names(comparison), lines) if lines else "<p>Nothing.</p>"
    return f"<h2>What differs in their configurations</h2>\n{found}"


def _digests(comparison: Comparison) -> str:
    digests, verdict = table.token_digests(comparison)
    said = "" if verdict is None else f': <span class="verdict">{verdict}</span>'
    lines = "\n".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td><code>{digest}</code></td></tr>'
        for name, digest in digests.items()
    )
    return f"""<h2>The tokens consumed</h2>
<p>The digest is over every row as it was consumed, before masking{said}.</p>
<table>
{lines}
</table>"""


def _samples(run: ReportedRun) -> str:
    if run.measured is None or not run.measured.samples:
        return ""
    pairs = "\n".join(
        f"<dt>{html.escape(sample.given)}</dt><dd>{html.escape(sample.answer)}</dd>"
        for sample in run.measured.samples
    )
    does = "continues" if is_causal(run) else "fills masks"
    heading = html.escape(f"{run.name} {does}, step {run.measured.step:,}")
    return f"<h2>{heading}</h2>\n<dl>\n{pairs}\n</dl>\n"
