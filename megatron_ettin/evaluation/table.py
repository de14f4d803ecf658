"""The numbers of a comparison with their uncertainties: as a table, as text, as summary.json."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from megatron_ettin.evaluation.comparison import Comparison, ProbeDocuments
from megatron_ettin.evaluation.probe import MAX_TOKENS, Accuracy
from megatron_ettin.evaluation.reported_run import Measured, ReportedRun
from megatron_ettin.text_table import text_table
from megatron_ettin.training.validation import HeldOutLoss

UNKNOWN = "-"


class Row(NamedTuple):
    """A line of the table, with a cell for each run."""

    name: str
    cells: tuple[str, ...]


def rows(comparison: Comparison) -> list[Row]:
    """Return the table of a comparison, without its headings and without lines of unknowns."""
    columns = [{**_cells(run), **_probe_cells(run, comparison.probe)} for run in comparison.runs]
    table = [Row(name, tuple(cells[name] for cells in columns)) for name in columns[0]]
    return [row for row in table if set(row.cells) != {UNKNOWN}]


def notes(comparison: Comparison) -> Iterator[str]:
    """Yield what a reader must know of the numbers that are there."""
    probe, runs = comparison.probe, comparison.runs
    measured = probe is not None or any(run.held_out for run in runs)
    if measured:
        yield (
            "± is one standard error: of a loss over rows of held-out text, of an accuracy over "
            "test documents (binomial), of a difference over the same documents."
        )
    if any(run.held_out for run in runs):
        yield (
            "The unigram loss is what the training text's token frequencies alone give on the "
            "same held-out tokens."
        )
    if len({type(run.objective) for run in runs}) > 1:
        yield from _loss_notes(runs)
    if probe is not None:
        yield from _probe_notes(probe)


def token_digests(comparison: Comparison) -> tuple[dict[str, str], str | None]:
    """Return the digest of the tokens that each run consumed, and how they compare.

    None for a single run.
    """
    digests = {run.name: run.token_digest for run in comparison.runs}
    if len(digests) == 1:
        return digests, None
    return digests, "equal" if len(set(digests.values())) == 1 else "different"


def as_text(comparison: Comparison) -> str:
    """Return the tables, the digests and the notes as lines for a console."""
    names = [run.name for run in comparison.runs]
    digests, verdict = token_digests(comparison)
    width = max(map(len, names))
    lines = [*text_table(("", *names), [(row.name, *row.cells) for row in rows(comparison)]), ""]
    if comparison.differences:
        differences = [(each.key, *each.values) for each in comparison.differences]
        lines += [*text_table(("differs in the configurations", *names), differences), ""]
    elif len(names) > 1:
        lines += ["the configurations are equal", ""]
    lines += [f"digest of the tokens consumed{'' if verdict is None else f': {verdict}'}"]
    lines += [f"  {name:{width}} {digest}" for name, digest in digests.items()]
    return "\n".join([*lines, "", *notes(comparison)]).rstrip()


def summary(comparison: Comparison) -> dict[str, Any]:
    """Return the content of summary.json."""
    probe, names = comparison.probe, [run.name for run in comparison.runs]
    return {
        "runs": {run.name: _numbers(run) for run in comparison.runs},
        "differences": {
            each.key: dict(zip(names, each.values, strict=True)) for each in comparison.differences
        },
        "probe": None
        if probe is None
        else {
            "documents": probe.num_documents,
            "left_out": probe.left_out,
            "trained_on": dict(probe.seen),
            "unknown": list(probe.unknown),
            "words_accuracy": probe.words.value,
            "majority_accuracy": probe.majority.value,
        },
        "versions": dict(comparison.versions),
    }


def _numbers(run: ReportedRun) -> dict[str, Any]:
    held_out, measured = run.held_out, run.measured
    probes = {"probe_accuracy": measured and measured.probe,
              "untrained_probe_accuracy": measured and measured.untrained_probe}  # fmt: skip
    return {
        "first_loss": run.curves.training[0]["loss"],
        "last_loss": run.last["loss"],
        "heldout_loss": held_out.loss if held_out else None,
        "unigram_loss": run.unigram.loss if run.unigram else None,
        **{name: probe.value if probe else None for name, probe in probes.items()},
        "token_digest": run.token_digest,
        "tokens": run.curves.tokens,
        "rows": run.last["g"],
        "rows_of_run": run.num_rows,
        "seconds": run.curves.seconds,
        "tokens_per_s": run.tokens_per_second,
    }


def _cells(run: ReportedRun) -> dict[str, str]:
    rows_done = int(run.last["g"])
    part = "" if rows_done == run.num_rows else f" ({rows_done / run.num_rows:.0%} of the rows)"
    return {
        "objective": _objective(run),
        "parameters": f"{run.num_parameters:,}",
        "tokens trained on": f"{run.curves.tokens:,}{part}",
        "seconds": f"{run.curves.seconds:.0f}",
        "tokens per second": f"{run.tokens_per_second:,.0f}",
        "training loss: first report": f"{run.curves.training[0]['loss']:.3f}",
        "training loss: last report": f"{run.last['loss']:.3f}",
        "held-out loss": _loss(run.held_out),
        "held-out loss: unigram": _loss(run.unigram),
    }


def _probe_cells(run: ReportedRun, probe: ProbeDocuments | None) -> dict[str, str]:
    if probe is None:
        return {}
    measured = run.measured or Measured(step=0)
    gained = UNKNOWN
    if measured.probe is not None and measured.untrained_probe is not None:
        difference, error = measured.probe.minus(measured.untrained_probe)
        gained = f"{difference:+.3f} ± {error:.3f}"
    return {
        "probe accuracy": _accuracy(measured.probe),
        "probe: before training": _accuracy(measured.untrained_probe),
        "probe: gained by training": gained,
        "probe: bag of words (TF-IDF)": _accuracy(probe.words),
        "probe: most frequent label": _accuracy(probe.majority),
        "probe: documents trained on": f"{probe.seen[run.name]:,} of {probe.num_documents:,}",
    }


def _loss_notes(runs: Sequence[ReportedRun]) -> Iterator[str]:
    """Yield which losses of runs with different objectives measure the same quantity."""
    alike = [run for run in runs if run.measures_text]
    if len({type(run.objective) for run in alike}) > 1:
        yield (
            f"The losses of {', '.join(run.name for run in alike)} measure one quantity over the "
            f"same tokens, -log p(text) in nats per token: a decoder's is that number (it counts "
            f"the [SEP] that ends a document as a token, too), a masked diffusion model's bounds "
            f"it from above."
        )
    others = [run.name for run in runs if not run.measures_text]
    if others:
        yield (
            f"Losses of different objectives are not comparable with each other; that of "
            f"{', '.join(others)} is with no other's: other tokens are predicted, from other "
            f"context."
        )


def _probe_notes(probe: ProbeDocuments) -> Iterator[str]:
    yield (
        f"The probe is logistic regression on the mean hidden state of a document's first "
        f"{MAX_TOKENS} tokens; the bag of words sees whole documents. A probe moves little at "
        f"small sizes and after short training; mind its error."
    )
    if probe.left_out:
        yield (
            f"{probe.left_out:,} documents of the probe are left out for all runs, because one of "
            f"them was trained on their text."
        )
    if probe.unknown:
        yield (
            f"Whether a run was trained on documents of the probe is unknown for sources without "
            f"the record of preprocessing: {', '.join(probe.unknown)}."
        )


def _objective(run: ReportedRun) -> str:
    """Name the objective, and that of the phase last trained if it is another."""
    whole, last = type(run.config.objective).__name__, type(run.objective).__name__
    return whole if whole == last else f"{whole}, last {last}"


def _loss(loss: HeldOutLoss | None) -> str:
    return UNKNOWN if loss is None else f"{loss.loss:.3f} ± {loss.standard_error:.3f}"


def _accuracy(accuracy: Accuracy | None) -> str:
    return UNKNOWN if accuracy is None else f"{accuracy.value:.3f} ± {accuracy.standard_error:.3f}"
