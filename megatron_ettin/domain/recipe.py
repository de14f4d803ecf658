"""Defaults of continued training: from the model's size, the text's size and the row length.

They are those of the released cross-objective runs (docs/recipe.md), which continue trained models
with a fresh optimizer too: half the peak rate of pre-training, warm-up over the first 6 % of the
tokens, a linear fall to 0.02 over the last 20 %, 15 % masked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

PHASE = "domain"
#: Parameters with head, peak learning rate and weight decay of the six sizes (examples/cross).
RELEASED = (
    (16_913_600, 1.5e-3, 3e-4),
    (32_081_344, 1.5e-3, 3e-4),
    (68_457_664, 1.5e-3, 3e-4),
    (149_655_232, 4e-4, 1e-5),
    (395_881_664, 2.5e-4, 1e-5),
    (1_031_314_112, 2.5e-4, 5e-5),
)
WARMUP_SHARE, DECAY_SHARE, LR_END = 0.06, 0.2, 0.02
MASK_RATE = 0.15
MAX_TOKENS, MAX_STEP_TOKENS = 50_000_000_000, 346 * 8192
#: Passes over the text, of the domain and of the replay at most: up to four, repeated text is worth
#: almost as much as new text (arXiv 2305.16264).
EPOCHS = 4
#: Steps that a small text gets, as far as its rows suffice. More text means larger steps, up to the
#: released ones.
NUM_STEPS = 500
#: Fewest steps that are worth a run: the warm-up takes one.
MIN_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class DomainRecipe:
    """Budget and rates of a continued training."""

    train_tokens: int
    rows_of_a_step: int
    seq_length: int
    lr: float
    weight_decay: float

    @property
    def num_steps(self) -> int:
        """Steps of the run, about."""
        return math.ceil(self.train_tokens / (self.rows_of_a_step * self.seq_length))

    def sections(self) -> dict[str, Any]:
        """Return the sections `optimizer` and `phases` of the run."""
        return {
            "optimizer": {
                "lr": self.lr,
                "weight_decay": self.weight_decay,
                "warmup_tokens": round(self.train_tokens * WARMUP_SHARE),
            },
            "phases": [
                {
                    "name": PHASE,
                    "train_tokens": self.train_tokens,
                    "seq_length": self.seq_length,
                    "global_batch_size": self.rows_of_a_step,
                    "lr_end": LR_END,
                    "lr_decay": "linear",
                    "lr_decay_tokens": round(self.train_tokens * DECAY_SHARE),
                }
            ],
        }


def make_recipe(
    *, num_parameters: int, domain_tokens: int, general_tokens: int, replay: float, seq_length: int
) -> DomainRecipe:
    """Return the defaults for a model and texts of these sizes; `replay` is a share of the rows.

    Raises:
        ValueError: there is too little text; the message says how much would do.
    """
    train_tokens = min(round(EPOCHS * domain_tokens / (1 - replay)), MAX_TOKENS)
    smallest = MIN_STEPS * seq_length
    if train_tokens < smallest:
        needed = math.ceil(smallest * (1 - replay) / EPOCHS)
        raise ValueError(
            f"the text is too small: {domain_tokens:,} tokens, of which {EPOCHS} passes make "
            f"{train_tokens // seq_length} rows of {seq_length:,}; give at least {needed:,} "
            f"tokens, or shorter rows (--seq-length)"
        )
    if replay * train_tokens > EPOCHS * general_tokens:
        raise ValueError(
            f"the general text is too small: {general_tokens:,} tokens for "
            f"{round(replay * train_tokens):,} tokens of replay, more than {EPOCHS} passes; give "
            f"more of it, or a smaller --replay"
        )
    _, lr, weight_decay = min(
        RELEASED, key=lambda size: abs(math.log(size[0]) - math.log(num_parameters))
    )
    largest = max(1, MAX_STEP_TOKENS // seq_length)
    return DomainRecipe(
        train_tokens=train_tokens,
        rows_of_a_step=min(max(1, train_tokens // (NUM_STEPS * seq_length)), largest),
        seq_length=seq_length,
        lr=lr,
        weight_decay=weight_decay,
    )
