"""Comparison of a run with its start: held-out losses and accuracy, before and after, as a page."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from matplotlib.figure import Figure

from megatron_ettin import checkpoint
from megatron_ettin.config import RunConfig
from megatron_ettin.evaluation.held_out import TokenLosses, token_losses
from megatron_ettin.evaluation.model import Model, open_model, quiet_transformers
from megatron_ettin.evaluation.probe import (
    Accuracy,
    LabelledTexts,
    linear_probe,
    majority_label,
    mean_hidden_states,
    read_labelled_texts,
)
from megatron_ettin.evaluation.report import STYLE
from megatron_ettin.evaluation.theme import DARK, LIGHT, MARKERS, Theme, as_data_url, as_png, as_svg
from megatron_ettin.evaluation.trained_on import trained_on
from megatron_ettin.export.huggingface import to_huggingface
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.publication import publish_bytes, publish_text
from megatron_ettin.text_table import text_table

WIDTH_INCHES, HEIGHT_INCHES = 9.0, 4.2
HEADINGS = ("held-out text", "positions", "tokens", "before", "after", "change")


@dataclass(frozen=True, kw_only=True)
class HeldOutPair:
    """Losses of the same held-out tokens before and after."""

    before: TokenLosses
    after: TokenLosses


@dataclass(frozen=True, kw_only=True)
class AccuracyPair:
    """Accuracies of a linear probe before and after, and what they are measured against."""

    before: Accuracy
    after: Accuracy
    majority: Accuracy
    num_left_out: int
    """Documents of the file that are left out because the run was trained on them."""


@dataclass(frozen=True, kw_only=True)
class BeforeAfter:
    """A run and the weights that it began from, measured alike."""

    before: Path
    after: Path
    """Checkpoints."""
    corpora: Mapping[str, HeldOutPair]
    """By the name of the held-out corpus."""
    accuracy: AccuracyPair | None = None


@dataclass(frozen=True, kw_only=True)
class LossLine:
    """Mean losses, in nats per token, of a held-out corpus at the positions [begin, end)."""

    corpus: str
    is_whole: bool
    """Tells the line of all positions."""
    begin: int
    end: int
    tokens: int
    before: float
    after: float
    change: float
    standard_error: float
    """Standard error of the change, over rows."""

    def cells(self) -> tuple[str, ...]:
        """Return the line of a table with the columns HEADINGS."""
        return (
            self.corpus if self.is_whole else "",
            "all" if self.is_whole else f"{self.begin:,} to {self.end - 1:,}",
            f"{self.tokens:,}",
            f"{self.before:.3f}",
            f"{self.after:.3f}",
            f"{self.change:+.3f} ± {self.standard_error:.3f}",
        )


def measure(
    run: Path,
    *,
    before: Path | None = None,
    original: Path | None = None,
    labels: Path | None = None,
    num_rows: int | None = None,
    seq_length: int | None = None,
) -> BeforeAfter:
    """Measure the newest checkpoint of a run, and the one that it was initialised from.

    `before` is another checkpoint to compare with. `labels` is a file with fields text and label;
    `original` is the Hugging Face folder whose accuracy is that before. Rows are those of the run's
    `validation` unless they are given.

    Raises:
        ValueError, OSError: the run has no checkpoint or held-out corpus, or nothing to compare
            with; or a file cannot be read.
    """
    folder = RunFolder(run)
    after = folder.newest_checkpoint()
    if after is None:
        raise ValueError(f"{run}: no checkpoint; give the run_dir of a run that has saved one")
    config = checkpoint.read_config(after)
    before = before or _start(run, config)
    if not config.data.validation:
        raise ValueError(f"{after}: the run has no held-out corpora (data.validation)")
    texts = None if labels is None else _unseen(run, labels)
    corpora = {}
    for corpus in config.data.validation:
        losses = [
            token_losses(
                each,
                config,
                corpus,
                num_rows=num_rows or config.validation.num_rows,
                seq_length=seq_length or config.validation.seq_length,
            )
            for each in (before, after)
        ]
        corpora[_name(corpus)] = HeldOutPair(before=losses[0], after=losses[1])
    accuracy = None
    if texts is not None:
        accuracy = _accuracies(*texts, original=original, before=before, after=after)
    return BeforeAfter(before=before, after=after, corpora=corpora, accuracy=accuracy)


def _start(run: Path, config: RunConfig) -> Path:
    if config.checkpoint.initialize_from is None:
        raise ValueError(
            f"{run}: began from random weights; name the checkpoint to compare with (--before)"
        )
    return Path(config.checkpoint.initialize_from)


def _name(corpus: str | list[str]) -> str:
    return Path(corpus if isinstance(corpus, str) else corpus[0]).name


def _unseen(run: Path, labels: Path) -> tuple[LabelledTexts, int]:
    """Return the labelled documents that the run was not trained on, and how many are left out."""
    every = read_labelled_texts(labels)
    seen = trained_on(run, every.texts).is_seen
    return every.kept(~seen, labels), int(seen.sum())


def _accuracies(
    texts: LabelledTexts, num_left_out: int, *, original: Path | None, before: Path, after: Path
) -> AccuracyPair:
    with TemporaryDirectory() as temporary, quiet_transformers():
        folders = [original or Path(temporary, "before"), Path(temporary, "after")]
        for source, folder in zip((before, after), folders, strict=True):
            if folder != original:
                to_huggingface(source, folder)
        pair = [_probe(open_model(str(folder)), texts) for folder in folders]
    return AccuracyPair(
        before=pair[0],
        after=pair[1],
        majority=majority_label(texts),
        num_left_out=num_left_out,
    )


def _probe(model: Model, texts: LabelledTexts) -> Accuracy:
    return linear_probe(
        mean_hidden_states(model.base_model(), model.tokenizer(), texts.texts), texts
    )


def loss_lines(measured: BeforeAfter) -> Iterator[LossLine]:
    """Yield a line for each corpus, then for ranges of its positions if there are several."""
    for name, pair in measured.corpora.items():
        ranges = list(pair.before.ranges())
        whole = (0, ranges[-1][1])
        for begin, end in [whole, *(ranges if len(ranges) > 1 else [])]:
            before, after = (each.between(begin, end) for each in (pair.before, pair.after))
            change = after.minus(before)
            yield LossLine(
                corpus=name,
                is_whole=(begin, end) == whole,
                begin=begin,
                end=end,
                tokens=change.scored_tokens,
                before=before.mean().loss,
                after=after.mean().loss,
                change=change.loss,
                standard_error=change.standard_error,
            )


def accuracy_lines(measured: BeforeAfter) -> Iterator[str]:
    """Yield what the labels say, if there are any."""
    pair = measured.accuracy
    if pair is None:
        return
    change, error = pair.after.minus(pair.before)
    yield (
        f"accuracy of a linear probe on {len(pair.after.correct):,} test documents: "
        f"{pair.before.value:.3f} before, {pair.after.value:.3f} after "
        f"({change:+.3f} ± {error:.3f}); the most frequent label: {pair.majority.value:.3f}"
    )
    if pair.num_left_out:
        yield f"{pair.num_left_out:,} labelled documents are left out: the run was trained on them"


def as_text(measured: BeforeAfter) -> str:
    """Return the tables for a console."""
    rows = [line.cells() for line in loss_lines(measured)]
    lines = text_table(HEADINGS, rows, numbers=HEADINGS[2:])
    return "\n".join([*lines, *accuracy_lines(measured)])


def write_page(measured: BeforeAfter, output: Path) -> None:
    """Write before_after.html, its figure as a PNG, and before_after.json to a folder."""
    output.mkdir(parents=True, exist_ok=True)
    publish_bytes(output / "before_after.png", as_png(partial(_draw, measured)))
    publish_text(output / "before_after.html", page(measured))
    publish_text(output / "before_after.json", json.dumps(summary(measured), indent=2) + "\n")


def summary(measured: BeforeAfter) -> dict[str, Any]:
    """Return the numbers as JSON values."""
    pair = measured.accuracy
    return {
        "before": str(measured.before),
        "after": str(measured.after),
        "held_out": [vars(line) for line in loss_lines(measured)],
        "accuracy": pair and {"before": pair.before.value, "after": pair.after.value},
    }


def page(measured: BeforeAfter) -> str:
    """Return a self-contained HTML page."""
    draw = partial(_draw, measured)
    light, dark = (as_data_url(as_svg(draw, theme)) for theme in (LIGHT, DARK))
    head = "".join(f"<th>{heading}</th>" for heading in HEADINGS)
    body = "".join(_table_row(line.cells()) for line in loss_lines(measured))
    accuracy = "".join(f"<p>{html.escape(line)}</p>" for line in accuracy_lines(measured))
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Before and after</title><style>{STYLE}</style></head>
<body>
<h1>Before and after continued training</h1>
<p class="lead">From <code>{html.escape(str(measured.before))}</code>
to <code>{html.escape(str(measured.after))}</code></p>
<figure><picture><source srcset="{dark}" media="(prefers-color-scheme: dark)">
<img src="{light}" alt="Held-out loss by position in the text"></picture></figure>
<h2>Held-out loss</h2>
<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>
<p class="notes">Nats per scored token, over the same tokens and masks. The error of a change is its
standard error over rows. Position 0 is the beginning of a text.</p>
{"<h2>Accuracy</h2>" if accuracy else ""}{accuracy}
</body>
</html>
"""


def _table_row(line: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>"


def _draw(measured: BeforeAfter, theme: Theme) -> Figure:
    """Draw held-out loss over the position, a panel for each corpus."""
    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), layout="constrained")
    panels = figure.subplots(1, len(measured.corpora), squeeze=False)[0]
    for axes, (name, pair) in zip(panels, measured.corpora.items(), strict=True):
        ranges = list(pair.before.ranges())
        places = range(len(ranges))
        for index, (label, losses) in enumerate((("before", pair.before), ("after", pair.after))):
            means = [losses.between(*each).mean() for each in ranges]
            axes.errorbar(
                places,
                [mean.loss for mean in means],
                yerr=[2 * mean.standard_error for mean in means],
                label=label,
                color=theme.series[index],
                marker=MARKERS[index],
                linewidth=1.4,
                markersize=4,
            )
        axes.set_xticks(places, [f"{begin:,}" for begin, _ in ranges])
        axes.set_title(name, loc="left", fontsize=10)
        axes.set_xlabel("position in the text, from")
        axes.grid(axis="y")
    panels[0].set_ylabel("held-out loss, nats per token (± 2 standard errors)")
    panels[0].legend()
    return figure
