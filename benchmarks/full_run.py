"""A run's folder of any size, made without training: order and plans are real, results made up.

A source consists of shards that are hard links of one file, so that billions of documents take the
disk of one shard. Tokens are a hole. Digests are random: nothing that compares tokens passes. They
are true in a second run, of the first few steps, for questions that read all that a run was fed.
"""

from __future__ import annotations

import itertools
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from benchmarks.made_up_corpus import write_shard, write_sidecar
from megatron_ettin.checkpoint import RunState
from megatron_ettin.config import RunConfig, parse_args, to_yaml
from megatron_ettin.data.orders import open_order
from megatron_ettin.data.tokenize import load_tokenizer, train_tokenizer, write_tokenizer
from megatron_ettin.order import SampleOrder
from megatron_ettin.order.corpus_identity import identify_corpus
from megatron_ettin.order.ledger import Kind, LedgerWriter
from megatron_ettin.order.row_loss_writer import RowLossWriter
from megatron_ettin.order.row_losses import trained_entries
from megatron_ettin.order.steps import plan_steps
from megatron_ettin.queries.record import digest_hex
from megatron_ettin.training.start_record import describe_run

#: Share of the shards of each source.
SOURCES = {"web": 0.6, "code": 0.25, "papers": 0.1, "books": 0.05}
#: Pool, row length and share of the rows of a step by phase, as in the published recipe.
PHASES = {
    "pretrain": ((0.0, 0.85), 1024, 1.0),
    "extension": ((0.85, 0.97), 8192, 0.2),
    "decay": ((0.97, 1.0), 8192, 0.2),
}
MEAN_TOKENS = 745
"""Tokens of a document that the phases count on: a little fewer than the mean."""
DONE_SHARE = 0.99
EARLY = "early"
"""Folder of the second run, beside the first."""
EARLY_STEPS = 2
CHECKPOINTS = 100
CHUNK_ROWS = 1 << 20
REPORT_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class FullRun:
    """Size of a run that is made up."""

    folder: Path
    documents: int
    shards: int
    step_rows: int
    """Rows of a step of the first phase."""

    def make(self) -> Path:
        """Make corpora and runs; return the folder of the long one."""
        config = self._config(self._corpora())
        order = open_order(config)
        planned = np.array(list(plan_steps(order, config.phases, [], g=0, phase_tokens=0)))
        done = planned[: int(len(planned) * DONE_SHARE)]
        run = Path(config.run_dir)
        for folder, fed in (
            (run, _made_up(order, done)),
            (run.with_name(EARLY), _true(order, done[:EARLY_STEPS])),
        ):
            folder.mkdir()
            (folder / "config.yaml").write_text(to_yaml(config))
            (folder / "order.json").write_text(order.spec.to_json())
            _record(folder, order, config, fed)
        return run

    def _corpora(self) -> dict[str, list[str]]:
        """Write the corpora; return the prefixes of the shards of each source."""
        texts = [f"{word} of the made up text number {n}" for n, word in enumerate("abcdefgh" * 64)]
        write_tokenizer(train_tokenizer(texts, 300), self.folder / "tokenizer")
        first = self.folder / "shard"
        lengths = write_shard(first, self.documents // self.shards)
        write_sidecar(first, lengths, load_tokenizer(self.folder / "tokenizer").digest)
        sources = {}
        for name, share in SOURCES.items():
            count = max(1, round(share * self.shards))
            sources[name] = [str(self.folder / f"{name}_{n:04d}") for n in range(count)]
            for prefix in sources[name]:
                for end in (".bin", ".idx", ".docs.parquet"):
                    os.link(f"{first}{end}", f"{prefix}{end}")
        # After the last link, each of which sets the time of change that an identity holds.
        identify_corpus(str(first))
        for prefix in itertools.chain(*sources.values()):
            shutil.copy(f"{first}.identity.json", f"{prefix}.identity.json")
        return sources

    def _config(self, sources: dict[str, list[str]]) -> RunConfig:
        phases = [
            {
                "name": name,
                "train_tokens": int(self.documents * (last - first) * MEAN_TOKENS),
                "seq_length": seq_length,
                "global_batch_size": max(1, int(self.step_rows * share)),
            }
            for name, ((first, last), seq_length, share) in PHASES.items()
        ]
        weights = {name: len(prefixes) for name, prefixes in sources.items()}
        path = self.folder / "run.yaml"
        sections = {
            "objective": "MaskedLM",
            "phases": phases,
            "data": {
                "tokenizer": str(self.folder / "tokenizer"),
                "sources": {name: {"prefix": prefixes} for name, prefixes in sources.items()},
                "blend": dict.fromkeys(PHASES, weights),
                "pools": {phase: list(pool) for phase, (pool, _, _) in PHASES.items()},
                "allow_duplicates": True,
            },
            "logging": {"row_losses": True},
        }
        path.write_text(yaml.safe_dump(sections))
        model = "--config=examples/model/nano.yaml"
        return parse_args([model, f"--config={path}", f"--run_dir={self.folder / 'run'}"])


class _Fed(NamedTuple):
    """Rows, tokens and digests of n steps, for their records."""

    steps: NDArray[np.int64]
    """[n, 2] first row, and the one after the last."""
    tokens: NDArray[np.int64]
    """[n]."""
    order_digests: NDArray[np.uint64]
    """[n, 2]."""
    token_digests: NDArray[np.uint64]
    """[n, 2]."""


def _made_up(order: SampleOrder, steps: NDArray[np.int64]) -> _Fed:
    phase = np.searchsorted(order.spec.phase_ends(), steps[:, 0], side="right")
    lengths = np.array([phase.seq_length for phase in order.spec.phases])
    tokens = (steps[:, 1] - steps[:, 0]) * lengths[phase]
    digests = np.random.default_rng(1).integers(0, 2**63, (len(steps), 2), dtype=np.uint64)
    return _Fed(steps, tokens, digests, digests)


def _true(order: SampleOrder, steps: NDArray[np.int64]) -> _Fed:
    tokens = [order.row_tokens(*rows).sum() for rows in steps.tolist()]
    of_order = [order.order_digests(*rows).sum(axis=0) for rows in steps.tolist()]
    of_tokens = [order.digested_tokens(*rows)[1].sum(axis=0) for rows in steps.tolist()]
    return _Fed(steps, np.array(tokens), np.array(of_order), np.array(of_tokens))


def _record(run: Path, order: SampleOrder, config: RunConfig, fed: _Fed) -> None:
    """Write the ledger, row losses and metrics of steps."""
    spec, steps, tokens = order.spec, fed.steps, fed.tokens
    index = np.searchsorted(spec.phase_ends(), steps[:, 0], side="right")
    begun = describe_run(config, spec, RunState(), order.ids, data_parallel_size=1)
    with LedgerWriter.open(run / "ledger") as writer:
        losses = RowLossWriter.open(run / "ledger", 0, fork=None, is_on=True)
        assert losses is not None
        writer.append(Kind.START, step=0, g_begin=0, g_end=0, payload=begun)
        firsts = np.flatnonzero(np.diff(index, prepend=-1))
        cuts = np.linspace(0, len(steps), CHECKPOINTS + 1).astype(int)
        every = np.unique([*cuts, *firsts])
        for first, last in zip(every[:-1].tolist(), every[1:].tolist(), strict=True):
            if first in firsts:
                phase, g = spec.phases[index[first]], int(steps[first, 0])
                payload = {"name": phase.name, "start_g": phase.start_g, "num_rows": phase.num_rows}
                at = {"step": first, "g_begin": g, "g_end": g, "phase": int(index[first])}
                writer.append(Kind.PHASE, **at, payload=payload)
            here = slice(first, last)
            writer.append_steps(
                np.arange(first, last) + 1,
                index[here],
                *(steps[here, 0], steps[here, 1]),
                tokens[here],
                *(fed.order_digests[here], fed.token_digests[here], fed.order_digests[here, 0]),
            )
            g = int(steps[last - 1, 1])
            _write_losses(losses, int(steps[first, 0]), g)
            of_order, of_tokens = (
                digest_hex(digests[:last].sum(axis=0, dtype=np.uint64))
                for digests in (fed.order_digests, fed.token_digests)
            )
            payload = {
                "name": f"step_{last:08d}",
                "phase": spec.phases[index[last - 1]].name,
                "tokens": int(tokens[:last].sum()),
                "order_digest": of_order,
                "token_digest": of_tokens,
                "row_losses": losses.describe(g),
            }
            losses.begin_after_checkpoint(g)
            writer.append(Kind.CHECKPOINT, step=last, g_begin=g, g_end=g, payload=payload)
        losses.close()
        writer.sync()
    _write_metrics(run, fed)


def _write_losses(losses: RowLossWriter, begin: int, end: int) -> None:
    """Write losses that fall with the rows, of which one in a thousand stands out."""
    draws = np.random.default_rng(begin).normal(0.0, 0.15, min(CHUNK_ROWS, end - begin))
    draws[::1000] += 2.0
    scored = np.full(len(draws), 307.0)
    for first in range(begin, end, CHUNK_ROWS):
        count = min(CHUNK_ROWS, end - first)
        means = 2.0 + 6.0 / (1.0 + first / 1e6) ** 0.3 + draws[:count]
        losses.write(first, trained_entries(means * scored[:count], scored[:count]))


def _write_metrics(run: Path, fed: _Fed) -> None:
    steps = fed.steps
    sums = np.cumsum(fed.token_digests, axis=0, dtype=np.uint64)
    consumed = np.cumsum(fed.tokens)
    with (run / "metrics.jsonl").open("w") as file:
        for last in range(REPORT_STEPS - 1, len(steps), REPORT_STEPS):
            told = f'"kind": "train", "step": {last + 1}, "g": {steps[last, 1]}, "loss": 2.5, '
            digest = digest_hex(sums[last])
            file.write(f'{{{told}"tokens": {consumed[last]}, "token_digest": "{digest}"}}\n')
