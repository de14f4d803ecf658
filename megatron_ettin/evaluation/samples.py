"""Texts that the exported models write, through pipelines of `transformers`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import FillMaskPipeline, pipeline, set_seed

MASKED_TEXTS = (
    "This is one of the [MASK] movies I have ever seen.",
    "The acting was great but the [MASK] was boring.",
    "Paris is the capital of [MASK].",
)
PROMPTS = ("This movie is", "Albert Einstein was")
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


def encoder_samples(folder: Path) -> list[Sample]:
    """Let the encoder in `folder` fill masks: its first candidates with their probabilities."""
    fill_mask = pipeline(
        "fill-mask", model=str(folder), device="cpu", pipeline_class=ShiftedFillMask
    )
    return [
        Sample(
            given=text,
            answer=", ".join(
                f"{each['token_str'].strip()} ({each['score']:.1%})"
                for each in fill_mask(text, top_k=CANDIDATES)
            ),
        )
        for text in MASKED_TEXTS
    ]


def decoder_samples(folder: Path) -> list[Sample]:
    """Let the decoder in `folder` continue prompts: sampled, from a fixed seed."""
    generate = pipeline("text-generation", model=str(folder), device="cpu")
    set_seed(SAMPLE_SEED)
    return [
        Sample(
            given=prompt,
            answer=generate(
                prompt, max_new_tokens=SAMPLE_TOKENS, do_sample=True, return_full_text=False
            )[0]["generated_text"].strip(),
        )
        for prompt in PROMPTS
    ]
