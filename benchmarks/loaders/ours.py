"""This project's order and loader: a row is a function of its number, and the state is a number."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import megatron_ettin
from benchmarks.loaders.cases import RunSetting
from benchmarks.loaders.indexed_format import IndexedRival
from benchmarks.loaders.outcomes import DrawnSample
from benchmarks.loaders.rival import (
    PACKED_ROWS,
    PACKED_TOKENS,
    ROW_TOKENS,
    TEXT_VOCAB_SIZE,
    VOCAB_SIZE,
    RivalStream,
    RunPlan,
    identify,
)
from megatron_ettin.config import DataConfig, PhaseConfig, SourceConfig
from megatron_ettin.data.loader import Loader
from megatron_ettin.objectives import CausalLM
from megatron_ettin.order import SampleOrder
from megatron_ettin.rows import TokenIds

IDS = TokenIds(vocab_size=VOCAB_SIZE, unk=0, cls=1, sep=2, pad=3, mask=4)


class OurLoader(IndexedRival):
    """`SampleOrder` and `Loader`, as a training run calls them."""

    def packed_batches(self, path: Path) -> Iterator[Any]:
        """Yield a run's micro-batches: best-fit rows, [CLS] and [SEP] around each piece."""
        phase = PhaseConfig(
            name="text",
            train_tokens=2**60,
            train_rows=1,
            seq_length=PACKED_TOKENS,
            global_batch_size=PACKED_ROWS,
        )
        data = DataConfig(
            tokenizer="none",
            sources={"text": SourceConfig(prefix=str(path))},
            blend={"text": {"text": 1.0}},
        )
        ids = dataclasses.replace(IDS, vocab_size=TEXT_VOCAB_SIZE, pad=0, unk=3)
        settings: dict[str, Any] = {"data": data, "seed": 1, "tokenizer_sha256": "none", "ids": ids}
        pool = SampleOrder(phases=[phase], **settings).spec.phases[0].pools[0]
        epoch = dataclasses.replace(phase, train_rows=pool.rows // PACKED_ROWS * PACKED_ROWS)
        loader = Loader(
            order=SampleOrder(phases=[epoch], **settings),
            objective=CausalLM(),
            ids=ids,
            mask_seed=0,
            micro_batch_tokens=PACKED_ROWS * PACKED_TOKENS,
            data_parallel_rank=0,
            data_parallel_size=1,
        )
        for batch in loader.micro_batches(0, loader.order.num_rows):
            yield batch.tokens.reshape(PACKED_ROWS, PACKED_TOKENS)

    def open(self, plan: RunPlan, state: Any | None) -> RivalStream:
        """Start at a row; a blend that changed is one phase more, as docs/order.md asks."""
        return _OurSteps(open_order(self.corpora(plan.sizes), plan), plan.present, state or 0)

    @staticmethod
    def versions() -> dict[str, str]:
        """Return this project's version."""
        return {"megatron-ettin": megatron_ettin.__version__}


class _OurSteps(RivalStream):
    def __init__(self, order: SampleOrder, setting: RunSetting, row: int) -> None:
        self._order = order
        self._batch = setting.batch
        self._row = row
        self._loaders = [
            Loader(
                order=order,
                objective=CausalLM(),
                ids=IDS,
                mask_seed=0,
                micro_batch_tokens=setting.batch // setting.ranks * ROW_TOKENS,
                data_parallel_rank=rank,
                data_parallel_size=setting.ranks,
            )
            for rank in range(setting.ranks)
        ]

    def step(self) -> list[DrawnSample]:
        end = min(self._row + self._batch, self._order.phase_at(self._row).end_g)
        samples = [
            sample
            for loader in self._loaders
            for batch in loader.micro_batches(self._row, end)
            for sample in identify(batch.tokens.reshape(-1, ROW_TOKENS)[batch.rows.g >= 0])
        ]
        self._row = end
        return samples

    def state(self) -> int:
        return self._row


def open_order(corpora: list[Path], plan: RunPlan) -> SampleOrder:
    """Return the order of a run; it has a phase for each blend."""
    parts: list[tuple[tuple[int, ...], int]] = []
    for setting, end in [*plan.earlier, (plan.present, plan.present.horizon)]:
        if parts and parts[-1][0] == setting.weights:
            parts.pop()
        parts.append((setting.weights, end))
    names = [f"source{number}" for number in range(len(corpora))]
    phases, blend, begin = [], {}, 0
    for number, (weights, end) in enumerate(parts):
        name = f"phase{number}"
        phases.append(
            PhaseConfig(
                name=name,
                train_tokens=(end - begin) * ROW_TOKENS,
                train_rows=end - begin,
                seq_length=ROW_TOKENS,
                global_batch_size=plan.present.batch,
            )
        )
        blend[name] = dict(zip(names, map(float, weights), strict=True))
        begin = end
    data = DataConfig(
        tokenizer="none",
        sources={
            name: SourceConfig(prefix=str(path), specials="present")
            for name, path in zip(names, corpora, strict=True)
        },
        blend=blend,
    )
    return SampleOrder(phases=phases, data=data, seed=plan.seed, tokenizer_sha256="none", ids=IDS)
