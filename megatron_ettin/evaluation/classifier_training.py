"""Training of a classifier by transformers' Trainer: one trial of a grid.

No GPU has run its code for GPUs yet.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from megatron_ettin.evaluation.classifier import Classifier, outputs
from megatron_ettin.evaluation.model import quiet_transformers

Outputs = NDArray[np.float64]
#: Evaluations take batches of this many times the training's: they keep no activations.
EVALUATION_BATCHES = 4


@dataclass(frozen=True, kw_only=True)
class FineTuningRecipe:
    """Settings of a training; the defaults are those of ModernBERT's evaluation code.

    The optimizer is AdamW with betas 0.9 and 0.98 and epsilon 1e-6, without gradient clipping. The
    rate decays linearly to zero. (Source: src/evals/finetuning_jobs.py, src/evals/glue_jobs.py.)
    """

    learning_rate: float = 5e-5
    """Peak of the learning rate."""
    weight_decay: float = 5e-6
    """Share of a weight that a step at the peak removes, as in Composer's DecoupledAdamW."""
    num_epochs: int = 1
    batch_size: int = 64
    warmup_share: float = 0.06
    """Share of the steps in which the learning rate rises."""
    evaluation_steps: int | None = None
    """Steps from one evaluation to the next; None: one epoch's."""
    patience: int = 3
    """Evaluations in a row without a better value that end the training."""


@dataclass(frozen=True, kw_only=True)
class TrainedClassifier:
    """Outcome of a training; the classifier has the weights of the best evaluation."""

    value: float
    """Best value on the validation split."""
    best_step: int
    num_steps: int
    """Steps that were taken: fewer than planned where the training ended early."""
    outputs: Outputs
    """Outputs [n, classes] of the best evaluation."""


def train(
    classifier: Classifier,
    recipe: FineTuningRecipe,
    *,
    train_features: Sequence[dict[str, Any]],
    validation_features: Sequence[dict[str, Any]],
    value: Callable[[Outputs], float],
    seed: int,
) -> TrainedClassifier:
    """Train a classifier and leave it with the weights that had the highest value.

    `value` judges outputs [n, classes] on the validation features. The result is a function of the
    arguments and the seed. On a GPU the products are of bf16, as in the published protocol.
    """
    on_gpu = classifier.module.device.type == "cuda"

    def evaluate() -> tuple[float, Outputs]:
        found = outputs(
            classifier, validation_features, batch_size=EVALUATION_BATCHES * recipe.batch_size
        )
        return value(found), found

    best = _BestWeights(classifier, evaluate, recipe)
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        arguments = _arguments(recipe, seed=seed, folder=folder, on_gpu=on_gpu)
        trainer = Trainer(
            model=classifier.module,
            args=arguments,
            train_dataset=list(train_features),
            data_collator=classifier.collator,
            callbacks=[best],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.train()
    return best.finish(trainer.state.global_step)


def _arguments(recipe: FineTuningRecipe, *, seed: int, folder: str, on_gpu: bool) -> Any:
    arguments = TrainingArguments(
        output_dir=folder,
        seed=seed,
        per_device_train_batch_size=recipe.batch_size,
        num_train_epochs=recipe.num_epochs,
        learning_rate=recipe.learning_rate,
        # torch's AdamW multiplies the decay by the learning rate, DecoupledAdamW by its share
        # of the peak.
        weight_decay=recipe.weight_decay / recipe.learning_rate,
        adam_beta1=0.9,
        adam_beta2=0.98,
        adam_epsilon=1e-6,
        max_grad_norm=0.0,
        lr_scheduler_type="linear",
        warmup_steps=recipe.warmup_share,
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
    )
    # One device: Trainer would multiply the batch by the number of visible GPUs.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


class _BestWeights(TrainerCallback):  # type: ignore[misc]
    """Evaluates at the recipe's intervals, keeps the best weights, and ends a useless training."""

    def __init__(
        self,
        classifier: Classifier,
        evaluate: Callable[[], tuple[float, Outputs]],
        recipe: FineTuningRecipe,
    ) -> None:
        self._module = classifier.module
        self._evaluate = evaluate
        self._recipe = recipe
        self._value = -math.inf
        self._step = 0
        self._num_worse = 0
        self._evaluated_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the progress bar."""
        self._bar = tqdm(
            total=state.max_steps,
            desc=f"fine-tuning at {self._recipe.learning_rate:g}",
            unit="step",
            leave=False,
            disable=None,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Evaluate if the interval is given in steps and complete."""
        self._bar.update()
        interval = self._recipe.evaluation_steps
        if interval is not None and state.global_step % interval == 0:
            self._judge(state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Evaluate if the interval is an epoch, and after the last step in any case."""
        is_last = state.global_step == state.max_steps
        if self._recipe.evaluation_steps is None or is_last:
            self._judge(state, control)

    def _judge(self, state: Any, control: Any) -> None:
        if self._evaluated_step == state.global_step:
            return
        self._evaluated_step = state.global_step
        value, found = self._evaluate()
        self._module.train()
        if math.isnan(value):
            # The correlation with a constant counts as the lowest one.
            value = -1.0
        if value > self._value or self._step == 0:
            self._value, self._outputs, self._step = value, found, state.global_step
            self._num_worse = 0
            self._weights = {
                name: tensor.detach().to("cpu", copy=True)
                for name, tensor in self._module.state_dict().items()
            }
        else:
            self._num_worse += 1
        if self._num_worse >= self._recipe.patience:
            control.should_training_stop = True

    def finish(self, num_steps: int) -> TrainedClassifier:
        """Restore the best weights and return the course of the training."""
        self._bar.close()
        self._module.load_state_dict(self._weights)
        self._module.eval()
        return TrainedClassifier(
            value=self._value, best_step=self._step, num_steps=num_steps, outputs=self._outputs
        )
