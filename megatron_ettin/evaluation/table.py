"""The numbers of a comparison with their uncertainties: as a table, as text, as summary.json."""

from __future__ import annotations

from typing import Any, NamedTuple

from megatron_ettin.evaluation.probe import MAX_TOKENS, Accuracy
from megatron_ettin.evaluation.twins import Comparison, Twin
from megatron_ettin.order.digest import format_digest
from megatron_ettin.text_table import text_table
from megatron_ettin.training.validation import HeldOutLoss

NOTES = (
    "± is one standard error: of a loss over rows of held-out text, of an accuracy over test "
    "reviews (binomial), of a difference over the same reviews.",
    "The held-out losses of the twins are not comparable with each other: the encoder predicts "
    "masked tokens from both sides, the decoder each next token from the left. Each stands beside "
    "the loss that the training text's token frequencies alone (unigram) give on the same tokens.",
    f"The probe is logistic regression on the mean hidden state of a review's first {MAX_TOKENS} "
    "tokens; the bag of words sees whole reviews. The probe moves little at this size and length "
    "of training, and nothing is claimed from it.",
)


class Row(NamedTuple):
    """A line of the table."""

    name: str
    encoder: str
    decoder: str


def rows(comparison: Comparison) -> list[Row]:
    """Return the table of a comparison, without its headings."""
    of_twins = (_cells(comparison.encoder), _cells(comparison.decoder))
    both = {
        "probe: bag of words (TF-IDF)": _accuracy(comparison.words),
        "probe: most frequent label": _accuracy(comparison.majority),
    }
    return [
        *(Row(name, of_twins[0][name], of_twins[1][name]) for name in of_twins[0]),
        *(Row(name, value, value) for name, value in both.items()),
    ]


def token_digests(comparison: Comparison) -> tuple[str, str, str]:
    """Return the digests of the tokens that encoder and decoder consumed, and how they compare."""
    encoder, decoder = (_digest(twin) for twin in comparison.twins.values())
    return encoder, decoder, "equal" if encoder == decoder else "DIFFERENT"


def as_text(comparison: Comparison) -> str:
    """Return the table, the digests and the notes as lines for a console."""
    encoder, decoder, verdict = token_digests(comparison)
    return "\n".join(
        [
            *text_table(("", "encoder", "decoder"), rows(comparison)),
            "",
            f"digest of the tokens consumed: {verdict}",
            f"  encoder {encoder}",
            f"  decoder {decoder}",
            "",
            *NOTES,
        ]
    )


def summary(comparison: Comparison) -> dict[str, Any]:
    """Return the content of summary.json."""
    return {
        **{name: _numbers(twin) for name, twin in comparison.twins.items()},
        "majority_accuracy": comparison.majority.value,
        "versions": comparison.versions,
    }


def _numbers(twin: Twin) -> dict[str, Any]:
    run = twin.run
    return {
        "first_loss": run.training[0]["loss"],
        "last_loss": run.training[-1]["loss"],
        "heldout_loss": run.held_out.loss,
        "unigram_loss": twin.unigram.loss,
        "probe_accuracy": twin.probe.value,
        "untrained_probe_accuracy": twin.untrained_probe.value,
        "token_digest": _digest(twin),
        "tokens": run.state.consumed_tokens,
        "seconds": run.seconds,
        "tokens_per_s": run.tokens_per_second,
    }


def _cells(twin: Twin) -> dict[str, str]:
    run = twin.run
    difference, error = twin.probe.minus(twin.untrained_probe)
    return {
        "objective": type(run.config.objective).__name__,
        "tokens trained on": f"{run.state.consumed_tokens:,}",
        "seconds": f"{run.seconds:.0f}",
        "tokens per second": f"{run.tokens_per_second:,.0f}",
        "training loss: first report": f"{run.training[0]['loss']:.3f}",
        "training loss: last report": f"{run.training[-1]['loss']:.3f}",
        "held-out loss": _loss(run.held_out),
        "held-out loss: unigram": _loss(twin.unigram),
        "probe accuracy": _accuracy(twin.probe),
        "probe: before training": _accuracy(twin.untrained_probe),
        "probe: gained by training": f"{difference:+.3f} ± {error:.3f}",
    }


def _digest(twin: Twin) -> str:
    return format_digest(twin.run.state.token_digest)


def _loss(loss: HeldOutLoss) -> str:
    return f"{loss.loss:.3f} ± {loss.standard_error:.3f}"


def _accuracy(accuracy: Accuracy) -> str:
    return f"{accuracy.value:.3f} ± {accuracy.standard_error:.3f}"
