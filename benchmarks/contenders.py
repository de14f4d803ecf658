"""Ways to train the same model on the same text, a step at a time: ours, and transformers' module.

All of them do whole optimizer steps. They are compared by the tokens that they learn from, special
tokens counted, padding not.

No GPU has run its code for GPUs yet.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.device import wait_for_device
from megatron_ettin import distributed
from megatron_ettin.checkpoint import RunState, SavedModel
from megatron_ettin.config import FIRST_ROTARY_BASES, RunConfig, with_rotary_bases
from megatron_ettin.data.orders import open_order
from megatron_ettin.data.tokenize import load_tokenizer
from megatron_ettin.export.architecture import huggingface_config, kind_of
from megatron_ettin.native import TokenCorpus, TokenFile
from megatron_ettin.objectives import Batch
from megatron_ettin.order import SampleOrder
from megatron_ettin.order.shard_list import list_shards
from megatron_ettin.rows import PADDING, TokenIds
from megatron_ettin.training import set_up
from megatron_ettin.training.interval import Interval
from megatron_ettin.training.loop import train_step
from megatron_ettin.training.preparation import (
    Prepared,
    StepRange,
    phase_micro_batches,
    prefetch,
)
from megatron_ettin.training.profile import trace_steps

IGNORED = -100
"""A label that transformers' losses leave out."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """Work of one step."""

    tokens: int
    """Tokens, special tokens counted, padding not."""
    slots: int
    """Positions that went through the model, padding counted."""
    flops: float | None = None
    """Operations that the model needs for its documents; None where they are not counted."""


class Contender(ABC):
    """A model in training."""

    def __init__(self) -> None:
        """Start with nothing open."""
        self.opened = ExitStack()
        """Threads and files that live beside the steps."""

    @abstractmethod
    def step(self) -> Step:
        """Take one optimizer step; on a GPU, return without waiting for it."""

    def variants(self) -> dict[str, Callable[[], Step]]:
        """Return the ways to take a step that are measured, by suffixes of the contender's name."""
        return {"": self.step}

    def close(self) -> None:
        """Close `opened`; take no step afterwards."""
        self.opened.close()


class Ours(Contender):
    """This project's training loop, less its reports and checkpoints."""

    def __init__(self, config: RunConfig) -> None:
        """Build the run of `config` from its beginning; needs process groups, a fresh run_dir."""
        super().__init__()
        order = open_order(config)
        self.state: RunState = set_up.starting_state(config, order)
        self.run = set_up.build_training(config, order, self.state)
        self.opened.enter_context(self.run.reporter)
        coming = phase_micro_batches(
            config, self.run.loader, self.state, order.spec.phases[0].end_g
        )
        prepared = self.opened.enter_context(prefetch(coming))
        self._steps = itertools.groupby(prepared, key=attrgetter("step"))
        self._kept: tuple[StepRange, list[Prepared]] | None = None

    def step(self) -> Step:
        """Train on the next rows of the order."""
        return self._step(*next(self._steps))

    def step_again(self) -> Step:
        """Train on the rows of one step again and again, as if the loader cost nothing.

        The first call takes the next step's micro-batches and keeps them on the device.
        """
        if self._kept is None:
            step, batches = next(self._steps)
            self._kept = step, list(batches)
        step, kept = self._kept
        for each in kept:
            # The first layer builds the masks of each micro-batch and the others reuse them.
            # Reused over steps they would hide that cost; on a GPU there are none.
            each.micro_batch.packed.masks.clear()
        return self._step(step, iter(kept))

    def variants(self) -> dict[str, Callable[[], Step]]:
        """Return steps on the order's rows, and on rows that are on the device already."""
        return {"": self.step, "_data_on_gpu": self.step_again}

    def trace(self, folder: Path) -> None:
        """Take steps until the second micro-batch is over; leave a trace of that one in `folder`.

        The device is idle at both its ends.
        """
        seen = 0
        with trace_steps(folder, warm_up=1, steps=1) as micro_batch_done:

            def announced(batches: Iterator[Prepared]) -> Iterator[Prepared]:
                nonlocal seen
                for batch in batches:
                    if seen:
                        wait_for_device()
                        micro_batch_done()
                    seen += 1
                    yield batch

            # The first warms the profiler up, and the third one's beginning is the second's end.
            while seen < 3:
                step, batches = next(self._steps)
                self._step(step, announced(batches))

    def _step(self, step: StepRange, batches: Iterator[Prepared]) -> Step:
        self._flops = 0.0
        self.run.ddp.train()
        self.state = train_step(
            self.run,
            step,
            self._counted(batches),
            self.state,
            self.run.config.optimizer.lr,
            Interval(),
        )
        seq_length = self.run.config.phases[0].seq_length
        return Step(
            tokens=step.tokens,
            slots=(step.g_end - step.g_begin) * seq_length,
            flops=self._flops,
        )

    def _counted(self, batches: Iterator[Prepared]) -> Iterator[Prepared]:
        for batch in batches:
            self._flops += batch.flops
            yield batch


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """A batch as transformers takes it: arrays [rows, length]; no `mask` if all is attended."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    mask: NDArray[np.int64] | None
    real_tokens: int

    def on(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Return the arguments of the model's forward."""
        arrays = {"input_ids": self.tokens, "labels": self.labels, "attention_mask": self.mask}
        return {
            name: torch.from_numpy(array).to(device)
            for name, array in arrays.items()
            if array is not None
        }


class Transformers(Contender):
    """transformers' module in a plain training loop: autocast for bf16, torch's fused AdamW."""

    def __init__(
        self,
        config: RunConfig,
        batches: Iterator[Inputs],
        *,
        sparse: bool,
        micro_batches: int,
        attention: str = "sdpa",
    ) -> None:
        """Build the module with its own initial weights.

        Args:
            config: whose model, objective, precision and learning rate it takes.
            batches: endless.
            sparse: predict at scored positions only (`sparse_prediction`, encoders alone have it).
            micro_batches: batches of a step.
            attention: transformers' name of an implementation.
        """
        super().__init__()
        self.device = distributed.device()
        self.model = _module(config, sparse=sparse, attention=attention).to(self.device)
        self.model.train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.optimizer.lr, fused=True
        )
        self.batches, self.micro_batches = batches, micro_batches
        self.is_bf16 = config.hardware.precision != "fp32"

    def step(self) -> Step:
        """Train on the next batches."""
        tokens = slots = 0
        for inputs in itertools.islice(self.batches, self.micro_batches):
            with self._precision():
                loss = self.model(**inputs.on(self.device)).loss
            (loss / self.micro_batches).backward()
            tokens += inputs.real_tokens
            slots += inputs.tokens.size
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Step(tokens=tokens, slots=slots)

    def _precision(self) -> AbstractContextManager[Any]:
        if not self.is_bf16:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def _module(config: RunConfig, *, sparse: bool, attention: str) -> Any:
    phase = with_rotary_bases(config.phases, FIRST_ROTARY_BASES, {})[0]
    saved = SavedModel(
        model=config.model,
        attention=config.objective.attention,
        rotary_base_global=phase.rotary_bases.base_global,
        rotary_base_local=phase.rotary_bases.base_local,
        max_seq_length=phase.seq_length,
        tokenizer=None,
    )
    ids = load_tokenizer(Path(config.data.tokenizer)).ids
    special = {"pad_token_id": ids.pad, "cls_token_id": ids.cls, "sep_token_id": ids.sep}
    ends = {"bos_token_id": ids.cls, "eos_token_id": ids.sep}
    settings = huggingface_config(saved, special_ids=special | ends)
    if sparse:
        settings.sparse_prediction = True
    settings._attn_implementation = attention
    return kind_of(saved.attention).model_class(settings)


def packed_batches(config: RunConfig, order: SampleOrder) -> Iterator[Inputs]:
    """Yield the micro-batches that ours trains on, [rows, seq_length], as if each row were a text.

    Documents of a row see each other, which transformers' module cannot prevent. Starts again
    after the last row.
    """
    loader = set_up.build_loader(config, order)
    (phase, *_) = order.spec.phases
    while True:
        for batch in loader.micro_batches(0, phase.end_g):
            yield _whole_rows(batch, causal=config.objective.attention == "causal")


def _whole_rows(batch: Batch, *, causal: bool) -> Inputs:
    length = batch.rows.seq_length
    tokens = batch.tokens.reshape(-1, length)
    # transformers' decoder shifts its labels itself, ours are shifted by the objective.
    labels = batch.rows.tokens if causal else np.where(batch.loss_mask, batch.labels, IGNORED)
    segments = np.diff(batch.rows.cu_seqlens)
    real = int(segments[batch.rows.segment_kind != PADDING].sum())
    return Inputs(tokens=tokens, labels=labels.reshape(-1, length), mask=None, real_tokens=real)


def padded_batches(
    config: RunConfig, ids: TokenIds, *, batch_size: int, by_length: bool
) -> Iterator[Inputs]:
    """Yield batches of `batch_size` documents, padded to the longest, without end.

    Documents come in random order, those of the first source; what is longer than the phase's rows
    is cut, as a user of transformers would. `by_length` sorts each hundred batches by length first
    and then mixes the batches. Masks are drawn at random, at the phase's rate.
    """
    source, *_ = config.data.sources.values()
    reader = TokenCorpus([TokenFile(prefix) for prefix in list_shards(source.prefix)])
    limit = config.phases[0].seq_length - 2
    draw = np.random.default_rng(config.seeds.order)
    while True:
        documents = draw.permutation(reader.num_documents)
        for pool in np.split(documents, range(100 * batch_size, len(documents), 100 * batch_size)):
            if by_length:
                pool = pool[np.argsort([reader.length(document) for document in pool])]
            batches = np.split(pool, range(batch_size, len(pool), batch_size))
            for place in draw.permutation(len(batches)):
                texts = [reader.tokens(document)[:limit] for document in batches[place]]
                yield _padded(config, ids, texts, draw)


def _padded(
    config: RunConfig, ids: TokenIds, texts: Sequence[NDArray[np.int64]], draw: np.random.Generator
) -> Inputs:
    framed = [np.concatenate([[ids.cls], text, [ids.sep]]) for text in texts]
    lengths = np.array([len(text) for text in framed])
    mask = np.arange(lengths.max()) < lengths[:, None]
    tokens = np.full(mask.shape, ids.pad)
    tokens[mask] = np.concatenate(framed)
    labels = np.where(mask, tokens, IGNORED)
    if config.objective.attention == "bidirectional":
        rate = config.objective.scored_share(config.phases[0].name)
        scored = (draw.random(mask.shape) < rate) & mask & ~np.isin(tokens, ids.special)
        labels[~scored] = IGNORED
        tokens = np.where(scored & (draw.random(mask.shape) < 0.8), ids.mask, tokens)
    return Inputs(
        tokens=tokens, labels=labels, mask=mask.astype(np.int64), real_tokens=int(lengths.sum())
    )
