"""Held-out losses of checkpoints, token by token: means by corpus and by position in the text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_ettin import checkpoint, checkpoint_files, distributed
from megatron_ettin.config import HardwareConfig, RunConfig, SeedConfig
from megatron_ettin.data.loader import Loader
from megatron_ettin.data.orders import open_held_out_order
from megatron_ettin.model.linear_cross_entropy import SummedLoss
from megatron_ettin.model.provider import build_stage
from megatron_ettin.training.device_copy import make_copy_stream
from megatron_ettin.training.micro_batch import make_micro_batch
from megatron_ettin.training.validation import HeldOutLoss, mean_over_rows

#: End of the first range of positions; each further one ends at twice the last end.
FIRST_RANGE = 64


@dataclass(frozen=True, kw_only=True)
class TokenLosses:
    """Losses of n scored tokens of a fixed set of rows."""

    rows: NDArray[np.int64]
    """[n] row of each token."""
    positions: NDArray[np.int64]
    """[n] position in its text that the token is predicted from, [CLS] being 0."""
    losses: NDArray[np.float64]
    """[n] losses in nats."""

    def mean(self) -> HeldOutLoss:
        """Return the mean loss and its standard error over rows."""
        sums = np.bincount(self.rows, self.losses)
        table = np.stack([sums, np.bincount(self.rows)], axis=1)
        return mean_over_rows(torch.from_numpy(table[table[:, 1] > 0]))

    def minus(self, other: TokenLosses) -> HeldOutLoss:
        """Return the mean difference to another model's losses of the same tokens.

        The error is that of paired rows, which is smaller than that of two separate samples.
        """
        return dataclasses.replace(self, losses=self.losses - other.losses).mean()

    def between(self, begin: int, end: int) -> Self:
        """Return the losses at positions [begin, end)."""
        chosen = (self.positions >= begin) & (self.positions < end)
        return dataclasses.replace(
            self,
            rows=self.rows[chosen],
            positions=self.positions[chosen],
            losses=self.losses[chosen],
        )

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Yield the ranges of positions that have tokens: [0, 64), [64, 128), [128, 256) ..."""
        begin, end = 0, FIRST_RANGE
        while begin <= self.positions.max():
            if ((self.positions >= begin) & (self.positions < end)).any():
                yield begin, end
            begin, end = end, 2 * end


def token_losses(
    folder: Path, config: RunConfig, corpus: str | list[str], *, num_rows: int, seq_length: int
) -> TokenLosses:
    """Measure the checkpoint in `folder` on the first rows of a held-out corpus, in fp32.

    Rows, masks and tokenizer are those of the run `config`: two checkpoints are measured on the
    same tokens. Its RoPE bases are those that the checkpoint was saved with.

    Raises:
        ValueError, OSError: the checkpoint or the corpus cannot be read, the corpus is too short
            for a row, or the objective weighs its tokens.
    """
    checkpoint_files.check_files(folder)
    saved = checkpoint.read_model(folder)
    loader = _loader(config, corpus, num_rows=num_rows, seq_length=seq_length)
    hardware, stream = HardwareConfig(), make_copy_stream()
    found = []
    with distributed.process_groups(hardware):
        stage = build_stage(saved.model, saved.attention, hardware, SeedConfig())
        stage.to(distributed.device())
        checkpoint.load(folder, stage, None, saved.model)
        stage.set_rotary_bases(saved.rotary_base_global, saved.rotary_base_local)
        stage.eval()
        batches = loader.micro_batches(0, num_rows)
        for batch in tqdm(batches, desc=f"{folder.name}", unit=" rows", disable=None, leave=False):
            if batch.weights is not None:
                raise ValueError(
                    f"{type(config.objective).__name__}: weighs its tokens, so that they have no "
                    f"loss each; tools/report.py has its held-out bound"
                )
            slots = np.flatnonzero(batch.loss_mask)
            whole = slice(0, len(batch.tokens))
            given = make_micro_batch(batch, slots=whole, capacity=1, stream=stream)
            given.wait()
            with torch.inference_mode():
                loss = stage(given.tokens, given.packed, given.scored, given.labels)
            assert isinstance(loss, SummedLoss)
            rows = batch.rows
            found.append(
                TokenLosses(
                    rows=rows.g[slots // rows.seq_length],
                    positions=rows.position_ids[slots].astype(np.int64),
                    losses=loss.by_position.double().cpu().numpy()[: len(slots)],
                )
            )
    return TokenLosses(
        **{
            field.name: np.concatenate([getattr(part, field.name) for part in found])
            for field in dataclasses.fields(TokenLosses)
        }
    )


def _loader(
    config: RunConfig, corpus: str | list[str], *, num_rows: int, seq_length: int
) -> Loader:
    validation = dataclasses.replace(config.validation, num_rows=num_rows, seq_length=seq_length)
    data = dataclasses.replace(config.data, validation=[corpus])
    # Every row of the run must fit, though only held-out ones are read.
    longest = max([seq_length, *(phase.seq_length for phase in config.phases)])
    hardware = HardwareConfig(micro_batch_tokens=longest)
    measured = dataclasses.replace(config, validation=validation, data=data, hardware=hardware)
    loader = Loader.of_run(measured, open_held_out_order(measured))
    # One row at a time: a long row takes memory enough.
    return dataclasses.replace(loader, micro_batch_tokens=seq_length)
