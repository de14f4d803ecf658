"""Texts that the exported models write, through pipelines of `transformers`."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import FillMaskPipeline, pipeline, set_seed

MASK = "[MASK]"
CANDIDATES = 5
SAMPLE_TOKENS = 40
SAMPLE_SEED = 21


@dataclass(frozen=True, kw_only=True)
class Sample:
    """An input and what a model made of it."""

    given: str
    answer: str


class ShiftedFillMask(FillMaskPipeline):  # type: ignore[misc]
    """Fills masks with models that predict a token from some positions before it, or from none.

    How many, `prediction_shift` in config.json says; a plain pipeline does not look at it.
    """

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super()._forward(*args, **kwargs)
        shift = getattr(self.model.config, "prediction_shift", 0)
        outputs["logits"] = outputs["logits"].roll(shift, dims=1)
        return outputs


def check_masked_text(text: str) -> None:
    """Raise ValueError unless a text has one place to fill."""
    if (count := text.count(MASK)) != 1:
        raise ValueError(f"--masked-text {text!r}: has {count} of {MASK}; it needs exactly one")


def fill_mask(folder: Path, texts: Sequence[str]) -> list[Sample]:
    """Let the model in `folder` fill masks: its first candidates with their probabilities."""
    if not texts:
        return []
    fill = pipeline("fill-mask", model=str(folder), device="cpu", pipeline_class=ShiftedFillMask)
    return [
        Sample(
            given=text,
            answer=" · ".join(
                f"{visible(each['token_str'])} ({each['score']:.1%})"
                for each in fill(text, top_k=CANDIDATES)
            ),
        )
        for text in texts
    ]


def continue_text(folder: Path, prompts: Sequence[str]) -> list[Sample]:
    """Let the model in `folder` continue prompts: sampled, from a fixed seed."""
    if not prompts:
        return []
    generate = pipeline("text-generation", model=str(folder), device="cpu")
    set_seed(SAMPLE_SEED)
    return [
        Sample(
            given=prompt,
            answer=visible(
                generate(
                    prompt, max_new_tokens=SAMPLE_TOKENS, do_sample=True, return_full_text=False
                )[0]["generated_text"]
            ),
        )
        for prompt in prompts
    ]


def visible(text: str) -> str:
    """Return a text without blanks around it, its control characters as `\\n`, `\\t`, `\\x1b`.

    A text of blanks alone is returned as `␣`, one for each.
    """
    shown = "".join(
        repr(character)[1:-1] if unicodedata.category(character) == "Cc" else character
        for character in text
    )
    return shown.strip(" ") or "␣" * len(shown)
