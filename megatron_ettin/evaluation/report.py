"""report.html, report.png and summary.json of a pair of twins."""

from __future__ import annotations

import html
import json
from pathlib import Path

from megatron_ettin.evaluation import figure, table
from megatron_ettin.evaluation.theme import DARK, LIGHT, as_data_url
from megatron_ettin.evaluation.twins import Comparison, Twin
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
    publish_bytes(output / "report.png", figure.png(comparison))
    publish_text(output / "summary.json", json.dumps(table.summary(comparison), indent=2) + "\n")


def page(comparison: Comparison) -> str:
    """Return a self-contained HTML page, readable on light and dark screens."""
    title = "An encoder and its decoder twin"
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
<p class="lead">{html.escape(_lead(comparison))}</p>
{_figure(comparison)}
<h2>Numbers</h2>
{_table(comparison)}
<ul class="notes">{"".join(f"<li>{html.escape(note)}</li>" for note in table.NOTES)}</ul>
<h2>The same tokens?</h2>
{_digests(comparison)}
<h2>The encoder fills masks</h2>
{_samples(comparison.encoder)}
<h2>The decoder writes</h2>
{_samples(comparison.decoder)}
<h2>Versions</h2>
<p class="notes">{html.escape(", ".join(f"{n} {v}" for n, v in comparison.versions.items()))}</p>
</body>
</html>
"""


def _lead(comparison: Comparison) -> str:
    run = comparison.encoder.run
    model, phases = run.model.model, run.config.phases
    lengths = ", ".join(f"{phase.name} (rows of {phase.seq_length:,} tokens)" for phase in phases)
    return (
        f"{model.num_layers} layers of width {model.hidden_size}, a vocabulary of "
        f"{model.vocab_size:,}, {run.state.consumed_tokens:,} tokens in {len(phases)} phases: "
        f"{lengths}. What differs between the two runs: {', '.join(comparison.differing)}."
    )


def _figure(comparison: Comparison) -> str:
    light, dark = (as_data_url(figure.svg(comparison, theme)) for theme in (LIGHT, DARK))
    return f"""<figure>
<picture>
<source media="(prefers-color-scheme: dark)" srcset="{dark}">
<img src="{light}" alt="Loss of both twins and learning rate over the tokens trained on">
</picture>
<figcaption>The training loss is over the blend of the phase at hand, the held-out loss over a fixed
set of rows, with equal shares of every held-out corpus.</figcaption>
</figure>"""


def _table(comparison: Comparison) -> str:
    lines = "\n".join(
        f'<tr><th scope="row">{html.escape(row.name)}</th><td>{html.escape(row.encoder)}</td>'
        f"<td>{html.escape(row.decoder)}</td></tr>"
        for row in table.rows(comparison)
    )
    return f"""<div class="scroll"><table>
<thead><tr><th></th><th scope="col">encoder</th><th scope="col">decoder</th></tr></thead>
<tbody>
{lines}
</tbody>
</table></div>"""


def _digests(comparison: Comparison) -> str:
    encoder, decoder, verdict = table.token_digests(comparison)
    return f"""<p>The digest is over every row as it was consumed, before masking:
<span class="verdict">{verdict}</span>.</p>
<table>
<tr><th scope="row">encoder</th><td><code>{encoder}</code></td></tr>
<tr><th scope="row">decoder</th><td><code>{decoder}</code></td></tr>
</table>"""


def _samples(twin: Twin) -> str:
    pairs = "\n".join(
        f"<dt>{html.escape(sample.given)}</dt><dd>{html.escape(sample.answer)}</dd>"
        for sample in twin.samples
    )
    return f"<dl>\n{pairs}\n</dl>"
