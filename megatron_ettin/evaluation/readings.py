"""Forward passes in batches: log-probabilities of chosen tokens at chosen positions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from megatron_ettin.evaluation.model import Model

#: Slots of a batch, padding counted.
BATCH_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A language model in memory, with its tokenizer; `load` makes one."""

    model: Model
    tokenizer: Any
    language_model: Any

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without special tokens around it."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    @cached_property
    def start_id(self) -> int:
        """Token id that every input begins with: [CLS]; <s> where a decoder has no [CLS].

        A GPT-2 tokenizer has an end token alone, and documents begin after it.
        """
        names = ("bos_token_id", "cls_token_id", "eos_token_id")
        found = [getattr(self.tokenizer, name) for name in names]
        return self._needed(next((i for i in found if i is not None), None), "[CLS]")

    @cached_property
    def end_id(self) -> int:
        """Token id of [SEP], which ends every input of a masked language model."""
        return self._needed(self.tokenizer.sep_token_id, "[SEP]")

    @cached_property
    def mask_id(self) -> int:
        """Token id of [MASK]."""
        return self._needed(self.tokenizer.mask_token_id, "[MASK]")

    @cached_property
    def banned_ids(self) -> list[int]:
        """Token ids that a masked language model may not generate.

        These are the special tokens, and the rows of the output layer that belong to no token.
        """
        num_rows = self.language_model.get_output_embeddings().weight.shape[0]
        return [*self.tokenizer.all_special_ids, *range(len(self.tokenizer), num_rows)]

    def _needed(self, token_id: int | None, token: str) -> int:
        if token_id is None:
            raise ValueError(f"{self.model.folder}: the tokenizer has no {token}")
        return token_id


def load(model: Model) -> LoadedModel:
    """Load a model and its tokenizer."""
    tokenizer, language_model = model.tokenizer(), model.language_model()
    return LoadedModel(model=model, tokenizer=tokenizer, language_model=language_model)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """An input of a model, and the tokens whose log-probabilities are summed."""

    owner: int
    """Number of the continuation that the sum counts for."""
    input_ids: Sequence[int]
    positions: Sequence[int]
    """Places of the tokens. The model predicts place p from place p - prediction_shift."""
    tokens: Sequence[int]
    weight: float = 1.0
    """Factor of the sum in the score of its owner."""
    decides_greedy: bool = True
    """Flag of readings that say whether the model itself would have chosen the tokens."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Answer of a model to a reading."""

    log_probability: float
    """Sum over the reading's tokens."""
    is_greedy: bool
    """Flag that each token is the most probable one at its place."""


def predict(
    loaded: LoadedModel, readings: Iterable[Reading]
) -> Iterator[tuple[Reading, Prediction]]:
    """Yield each reading with its prediction, in order. Neighbours of one length save padding."""
    batch: list[Reading] = []
    longest = 0
    for reading in readings:
        longest = max(longest, len(reading.input_ids))
        if batch and longest * (len(batch) + 1) > BATCH_TOKENS:
            yield from zip(batch, _predict_batch(loaded, batch), strict=True)
            batch, longest = [], len(reading.input_ids)
        batch.append(reading)
    yield from zip(batch, _predict_batch(loaded, batch), strict=True)


def _predict_batch(loaded: LoadedModel, batch: Sequence[Reading]) -> list[Prediction]:
    if not batch:
        return []
    places = [(row, place) for row, one in enumerate(batch) for place in one.positions]
    logits = logits_at(loaded, [one.input_ids for one in batch], places)
    tokens = torch.tensor([token for one in batch for token in one.tokens], device=logits.device)
    logs = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(dim=1)
    is_best = most_probable(loaded, logits) == tokens
    ends = np.cumsum([len(one.tokens) for one in batch])[:-1]
    return [
        Prediction(log_probability=float(log.sum()), is_greedy=bool(best.all()))
        for log, best in zip(
            np.split(logs.double().cpu().numpy(), ends),
            np.split(is_best.cpu().numpy(), ends),
            strict=True,
        )
    ]


def most_probable(loaded: LoadedModel, logits: torch.Tensor) -> torch.Tensor:
    """Return the best token of each row of logits [n, vocab], banned ones left out.

    Nothing is banned for causal models, which end a text by a special token.
    """
    if loaded.model.attention == "bidirectional":
        logits = logits.clone()
        logits[:, loaded.banned_ids] = -torch.inf
    return logits.argmax(dim=1)


@torch.inference_mode()
def logits_at(
    loaded: LoadedModel, inputs: Sequence[Sequence[int]], places: Sequence[tuple[int, int]]
) -> torch.Tensor:
    """Return the logits [n, vocab] that predict n places, each (number of the input, position).

    Inputs are padded on the right. The output layer runs at the n places alone: logits of every
    slot would need gigabytes with a vocabulary of 50,000.
    """
    model = loaded.language_model
    longest = max(map(len, inputs))
    input_ids = torch.zeros(len(inputs), longest, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(inputs):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
    rows, positions = torch.tensor(places, device=model.device).reshape(-1, 2).unbind(dim=1)
    with _output_layer_at(model, rows, positions - loaded.model.prediction_shift):
        logits: torch.Tensor = model(
            input_ids=input_ids.to(model.device), attention_mask=attention_mask.to(model.device)
        ).logits
    return logits.float()


@contextmanager
def _output_layer_at(model: Any, rows: torch.Tensor, positions: torch.Tensor) -> Iterator[None]:
    """Feed the output layer hidden states [n, hidden] in place of [batch, positions, hidden]."""

    def choose(module: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (inputs[0][rows, positions],)

    handle = model.get_output_embeddings().register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()
