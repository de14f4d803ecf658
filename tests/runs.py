"""A run's folder as training leaves it, made without training: config, order and a true ledger."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ettin.checkpoint import RunState
from megatron_ettin.config import RunConfig, load_config, parse_args, to_yaml
from megatron_ettin.data.batches import TextBatch
from megatron_ettin.data.encoding import EncodedPart
from megatron_ettin.data.loader import Loader
from megatron_ettin.data.orders import open_order
from megatron_ettin.data.provenance import CorpusWriter
from megatron_ettin.file_digests import FileList
from megatron_ettin.native import TokenFile
from megatron_ettin.order import PhaseSpec, SampleOrder
from megatron_ettin.order.digest import add_digests
from megatron_ettin.order.ledger import LedgerWriter
from megatron_ettin.order.row_loss_writer import RowLossWriter
from megatron_ettin.order.row_losses import trained_entries
from megatron_ettin.order.steps import pass_skipped_rows
from megatron_ettin.training.preparation import (
    ORDER_LANES,
    TOKEN_LANES,
    StepRange,
    digest_lanes,
    phase_steps,
)
from megatron_ettin.training.recorder import Recorder
from megatron_ettin.training.start_record import describe_run
from tests.conftest import TinyCorpus

NO_FILES = FileList({})


def tiny_config(corpus: TinyCorpus, run_dir: Path, **sections: Any) -> RunConfig:
    """Return a run of two short phases over the tiny corpora; `sections` replace or add some."""
    path = corpus.write_config(
        run_dir.with_suffix(".yaml"), **{"objective": "MaskedLM", **sections}
    )
    return parse_args(["--config", str(path), "--run_dir", str(run_dir)])


def record_run(
    config: RunConfig,
    *,
    steps: int | None = None,
    save_steps: Sequence[int] = (),
    files: FileList = NO_FILES,
) -> Path:
    """Write the folder of a run that has taken `steps` steps (all if None); return it.

    The ledger is that of training: its own recorder writes it, with the digests of what training
    would consume. There is a checkpoint's record after each of `save_steps` and after each phase
    that was finished, of `files`; no weights.
    """
    folder = Path(config.run_dir)
    folder.mkdir(parents=True)
    order = open_order(config)
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "order.json").write_text(order.spec.to_json())
    config = load_config(folder / "config.yaml")
    with LedgerWriter.open(folder / "ledger") as writer:
        is_on = config.logging.row_losses
        losses = RowLossWriter.open(folder / "ledger", 0, fork=None, is_on=is_on)
        _record(config, order, writer, losses, steps, save_steps, files)
    return folder


def made_losses(begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the loss sums and tokens of rows [begin, end) in runs made here: functions of g.

    Every 11th row has no scored position. Losses fall, and every 37th stands out.
    """
    draws = np.array([np.random.default_rng(g).normal(size=2) for g in range(begin, end)])
    g = np.arange(begin, end)
    tokens = np.where(g % 11 == 10, 0, 100 + np.abs(10 * draws[:, 1]).astype(int))
    means = 2.0 + 4.0 / np.sqrt(1 + g / 50) + 0.1 * draws[:, 0] + 1.5 * (g % 37 == 36)
    return means * tokens, tokens.astype(np.float64)


def _record(
    config: RunConfig,
    order: SampleOrder,
    writer: LedgerWriter,
    losses: RowLossWriter | None,
    steps: int | None,
    save_steps: Sequence[int],
    files: FileList,
) -> None:
    """Take steps as training/loop.py does, but for the model; each has a report of its own."""
    spec = order.spec
    state = RunState(phase_ids=tuple(spec.phase_ids()), phase_ends=tuple(spec.phase_ends()))
    description = describe_run(config, spec, state, order.ids, data_parallel_size=1)
    recorder = Recorder(writer, description, spec, state, is_amended=False, losses=losses)
    loader = Loader.of_run(config, order)
    for index, phase in enumerate(spec.phases):
        state = dataclasses.replace(state, phase=phase.name, phase_tokens=0)
        recorder.record_phase(state, index, phase)
        state = _skip(phase, index, config, recorder, state)
        for step in phase_steps(config, order, state, phase.end_g):
            if state.step == steps:
                writer.sync()
                return
            batches = loader.micro_batches(step.g_begin, step.g_end)
            lanes = sum(digest_lanes(batch, loader, index) for batch in batches)
            entries = trained_entries(*made_losses(step.g_begin, step.g_end))
            recorder.record_steps([step], lanes[None], entries)
            state = _skip(phase, index, config, recorder, _after(state, step, lanes))
            if state.g == phase.end_g or state.step in save_steps:
                name = f"step_{state.step:08d}"
                state = recorder.record_checkpoint(state, name, files.sha256)
    recorder.record_end(state)


def _skip(
    phase: PhaseSpec, index: int, config: RunConfig, recorder: Recorder, state: RunState
) -> RunState:
    end = pass_skipped_rows(phase, config.data.skip_rows, state.g)
    if end == state.g:
        return state
    recorder.record_skip(state, index, end)
    return dataclasses.replace(state, g=end)


def _after(state: RunState, step: StepRange, lanes: np.ndarray) -> RunState:
    return dataclasses.replace(
        state,
        g=step.g_end,
        step=step.step,
        consumed_tokens=state.consumed_tokens + step.tokens,
        phase_tokens=state.phase_tokens + step.tokens,
        order_digest=add_digests(state.order_digest, lanes[ORDER_LANES].tolist()),
        token_digest=add_digests(state.token_digest, lanes[TOKEN_LANES].tolist()),
    )


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
    count = len(numbers)
    batch = TextBatch(
        texts=([f"{prefix.name} {number}" for number in numbers],),
        ids=[None if n == 5 else f"{prefix.name}-{number}" for n, number in enumerate(numbers)],
        urls=[f"https://{prefix.name}.example/{n}" for n in range(count)],
        lines=range(1, count + 1),
        position=0,
    )
    with CorpusWriter(prefix, file.dtype, tokenizer_sha256=tokenizer_sha256) as writer:
        writer.add(part, batch, "raw.jsonl")
