"""A run's folder as training leaves it, made without training: config, order and a true ledger."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ettin.config import RunConfig, load_config, parse_args, to_yaml
from megatron_ettin.data.encoding import EncodedPart
from megatron_ettin.data.loader import Loader
from megatron_ettin.data.orders import sample_order
from megatron_ettin.data.provenance import CorpusWriter
from megatron_ettin.data.readers import Record
from megatron_ettin.native import TokenFile
from megatron_ettin.order import PhaseSpec, SampleOrder
from megatron_ettin.order.digest import add_digests, format_digest, mask_digest, token_digest
from megatron_ettin.order.ledger import Kind, LedgerWriter
from megatron_ettin.order.steps import first_row_kept, step_end
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


def add_provenance(prefix: Path, tokenizer_sha256: str) -> None:
    """Write a corpus anew with its sidecar; document n has the text "NAME n" and the id "NAME-n".

    Documents 3 and 4 share id and text, document 5 has no id.
    """
    file = TokenFile(prefix)
    numbers = [3 if n == 4 else n for n in range(file.num_documents)]
    tokens = [file.tokens(n) for n in range(file.num_documents)]
    part = EncodedPart(
        tokens=np.concatenate(tokens).astype(np.int32),
        lengths=np.array([len(document) for document in tokens], dtype=np.int64),
        places=np.arange(file.num_documents),
        sha256=b"".join(hashlib.sha256(f"{prefix.name} {n}".encode()).digest() for n in numbers),
    )
    records = [
        Record(
            texts=(f"{prefix.name} {number}",),
            id=None if n == 5 else f"{prefix.name}-{number}",
            url=f"https://{prefix.name}.example/{n}",
            path=Path("raw.jsonl"),
            line=n + 1,
            position=n,
        )
        for n, number in enumerate(numbers)
    ]
    with CorpusWriter(prefix, file.dtype, tokenizer_sha256=tokenizer_sha256) as writer:
        writer.add(part, records)


class _Recording:
    """What training/recorder.py writes, in the same order."""

    def __init__(self, config: RunConfig, order: SampleOrder, writer: LedgerWriter) -> None:
        self.config, self.order, self.writer = config, order, writer
        self.skip_rows = config.data.skip_rows
        self.step = self.g = self.tokens = self.phase_tokens = 0
        self.digests = {"order_digest": (0, 0), "token_digest": (0, 0)}

    def write(self, steps: int | None, save_steps: set[int]) -> None:
        self._event(Kind.START, payload=self._description())
        for phase, settings in zip(self.order.spec.phases, self.config.phases, strict=True):
            self.phase_tokens = 0
            payload = {"name": phase.name, "start_g": phase.start_g, "num_rows": phase.num_rows}
            self._event(Kind.PHASE, payload=payload)
            self._skip(phase)
            while self.g < phase.end_g:
                if self.step == steps:
                    self.writer.sync()
                    return
                end = step_end(
                    phase, settings, self.skip_rows, g=self.g, phase_tokens=self.phase_tokens
                )
                self._take_step(self.g, end)
                self._skip(phase)
                if self.g == phase.end_g or self.step in save_steps:
                    payload = {"name": f"step_{self.step:08d}", "phase": phase.name}
                    self._event(Kind.CHECKPOINT, payload={**payload, **self._sums()})
        self._event(Kind.END, payload=self._sums())
        self.writer.sync()

    def _skip(self, phase: PhaseSpec) -> None:
        end = first_row_kept(phase, self.skip_rows, self.g)
        if end > self.g:
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
        self.step, self.g = self.step + 1, end
        self.tokens, self.phase_tokens = self.tokens + count, self.phase_tokens + count
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

    def _sums(self) -> dict[str, Any]:
        sums = {name: format_digest(value) for name, value in self.digests.items()}
        return {"tokens": self.tokens, **sums}

    def _description(self) -> dict[str, Any]:
        spec, objective = self.order.spec, self.config.objective
        content = (Path(self.config.run_dir) / "config.yaml").read_bytes()
        return {
            "order_id": spec.order_id,
            "phase_ids": spec.phase_ids(),
            "phase_ends": spec.phase_ends(),
            "config_sha256": hashlib.sha256(content).hexdigest(),
            "objective": {"name": type(objective).__name__, **dataclasses.asdict(objective)},
            "seeds": dataclasses.asdict(self.config.seeds),
            "model": dataclasses.asdict(self.config.model),
            "token_ids": dataclasses.asdict(self.order.ids),
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
