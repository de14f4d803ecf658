"""A run's folder as training leaves it, made without training: config, order and a true ledger."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ettin.config import RunConfig, load_config, parse_args, to_yaml
from megatron_ettin.data.loader import Loader
from megatron_ettin.data.orders import sample_order
from megatron_ettin.order import SampleOrder
from megatron_ettin.order.digest import add_digests, format_digest, mask_digest, token_digest
from megatron_ettin.order.ledger_format import Kind
from megatron_ettin.order.ledger_writer import LedgerWriter
from megatron_ettin.order.steps import first_row_kept, planned_steps
from tests.conftest import TinyCorpus


def tiny_config(corpus: TinyCorpus, run_dir: Path, **sections: Any) -> RunConfig:
    """Return a run of two short phases over the tiny corpora; `sections` replace or add some."""
    path = corpus.write_config(
        run_dir.with_suffix(".yaml"), **{"objective": "MaskedLM", **sections}
    )
    return parse_args(["--config", str(path), "--run_dir", str(run_dir)])


def record_run(
    config: RunConfig, *, steps: int | None = None, save_steps: Sequence[int] = ()
) -> Path:
    """Write the folder of a run that has taken `steps` steps (all if None); return it.

    The ledger has the digests of what training would have consumed. There is a checkpoint's record
    after each of `save_steps` and after each phase that was finished; no weights.
    """
    folder = Path(config.run_dir)
    folder.mkdir(parents=True)
    order = sample_order(config)
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "order.json").write_text(order.spec.to_json())
    config = load_config(folder / "config.yaml")
    with LedgerWriter.open(folder / "ledger") as writer:
        _Recording(config, order, writer).write(steps, set(save_steps))
    return folder


class _Recording:
    """What training/recorder.py writes, in the same order."""

    def __init__(self, config: RunConfig, order: SampleOrder, writer: LedgerWriter) -> None:
        self.config, self.order, self.writer = config, order, writer
        self.step = self.g = self.tokens = 0
        self.digests = {"order_digest": (0, 0), "token_digest": (0, 0)}

    def write(self, steps: int | None, save_steps: set[int]) -> None:
        self._event(Kind.START, payload=self._description())
        self._begin_phase()
        planned = planned_steps(
            self.order, self.config.phases, self.config.data.skip_rows, g=0, phase_tokens=0
        )
        for begin, end in planned:
            if self.step == steps:
                break
            if begin > self.g:
                self._skip()
            if self.g == self._phase().start_g and self.g:
                self._begin_phase()
            self._take_step(begin, end)
            if self.step in save_steps or self._kept() == self._phase(self.g - 1).end_g:
                self._save()
        else:
            if self._kept(self.order.spec.num_rows - 1) > self.g:
                self._skip()
            self._event(Kind.END, payload=self._sums())
        self.writer.sync()

    def _phase(self, g: int | None = None) -> Any:
        return self.order.spec.phases[self.order.spec.phase_index(self.g if g is None else g)]

    def _kept(self, g: int | None = None) -> int:
        phase = self._phase(self.g - 1 if g is None else g)
        return first_row_kept(phase, self.config.data.skip_rows, self.g)

    def _begin_phase(self) -> None:
        phase = self._phase()
        payload = {"name": phase.name, "start_g": phase.start_g, "num_rows": phase.num_rows}
        self._event(Kind.PHASE, payload=payload)

    def _skip(self) -> None:
        """Record the skipped rows from here on, up to the end of the phase at most."""
        end = first_row_kept(self._phase(), self.config.data.skip_rows, self.g)
        self._event(Kind.SKIP, payload={"reason": "data.skip_rows"}, g_end=end)
        self.g = end

    def _take_step(self, begin: int, end: int) -> None:
        phase = self.order.spec.phase_index(begin)
        lanes = self.order.order_digests(begin, end).sum(axis=0, dtype=np.uint64)
        tokens, masks = np.zeros(2, dtype=np.uint64), np.zeros(1, dtype=np.uint64)
        loader = Loader(
            order=self.order,
            objective=self.config.objective,
            ids=self.order.ids,
            mask_seed=self.config.seeds.mask,
            micro_batch_tokens=self.config.hardware.micro_batch_tokens,
            data_parallel_rank=0,
            data_parallel_size=1,
        )
        for batch in loader.micro_batches(begin, end):
            tokens += token_digest(batch.rows, loader.objective.original_tokens(batch))
            masks += mask_digest(batch)
        count = int(self.order.row_tokens(begin, end).sum())
        self.step, self.g, self.tokens = self.step + 1, end, self.tokens + count
        for name, value in (("order_digest", lanes), ("token_digest", tokens)):
            self.digests[name] = add_digests(self.digests[name], value.tolist())
        self.writer.append_steps(
            step=[self.step],
            phase=[phase],
            g_begin=[begin],
            g_end=[end],
            n_tokens=[count],
            order_digest=lanes[None],
            token_digest=tokens[None],
            mask_digest=masks,
        )

    def _save(self) -> None:
        payload = {"name": f"step_{self.step:08d}", "phase": self._phase(self.g - 1).name}
        self._event(Kind.CHECKPOINT, payload={**payload, **self._sums()})
        self.writer.sync()

    def _sums(self) -> dict[str, Any]:
        sums = {name: format_digest(value) for name, value in self.digests.items()}
        return {"tokens": self.tokens, **sums}

    def _description(self) -> dict[str, Any]:
        spec, objective = self.order.spec, self.config.objective
        return {
            "order_id": spec.order_id,
            "phase_ids": spec.phase_ids(),
            "objective": {"name": type(objective).__name__, **dataclasses.asdict(objective)},
            "seeds": dataclasses.asdict(self.config.seeds),
            "layout": {**dataclasses.asdict(self.config.hardware), "data_parallel_size": 1},
            "versions": {},
            "host": "test",
            "from_checkpoint": None,
        }

    def _event(self, kind: Kind, *, payload: dict[str, Any], g_end: int | None = None) -> None:
        self.writer.append(
            kind,
            step=self.step,
            g_begin=self.g,
            g_end=self.g if g_end is None else g_end,
            phase=self.order.spec.phase_index(min(self.g, self.order.num_rows - 1)),
            payload=payload,
        )
