"""Show, token by token, every row that a step was or will be fed, of all ranks or of one."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_ettin import objectives
from megatron_ettin.data.loader import Loader
from megatron_ettin.data.tokenize import Tokenizer, load_tokenizer
from megatron_ettin.order import NotRecordedError
from megatron_ettin.order.digest import mask_digest, token_digest
from megatron_ettin.queries.answer import add_shared_arguments, show
from megatron_ettin.queries.documents import Document, Sidecars
from megatron_ettin.queries.masking_record import Masking, MaskingRecord
from megatron_ettin.queries.record import digest_hex, step_record
from megatron_ettin.queries.recorded_run import RecordedRun, open_run


@dataclass(frozen=True, kw_only=True)
class RankSlice:
    """One data-parallel rank of a layout."""

    rank: int
    data_parallel_size: int
    micro_batch_tokens: int


@dataclass(frozen=True, kw_only=True)
class BatchPiece:
    """Part of a document in a row."""

    document: int
    offset: int
    length: int
    position: int
    """First slot of the row that the piece occupies, with its special tokens."""
    ends_document: bool
    id: str | None
    url: str | None


@dataclass(frozen=True, kw_only=True)
class BatchRow:
    """A row of the step, without its padding."""

    g: int
    slot: int
    """Number of the row in its step, from 0."""
    micro_batch: int | None
    """Number of the rank's micro-batch; None if no rank was asked for."""
    source: str
    epoch: int
    row: int
    num_tokens: int
    pieces: list[BatchPiece]
    tokens: list[int]
    """Token ids before masking."""
    text: str | None
    inputs: list[int] | None
    """Token ids after masking, as the model reads them."""
    labels: list[int | None] | None
    """Label of each position; None if the position is not scored."""


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """Rows [g_begin, g_end) of a step, or the rows of one rank."""

    run: str
    step: int
    is_done: bool
    g_begin: int
    g_end: int
    rank: int | None
    data_parallel_size: int | None
    micro_batch_tokens: int | None
    idle_rows: int
    """Padding rows that complete the rank's last micro-batch."""
    rows: list[BatchRow]


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A row as the model gets it; every array is [num_tokens]. g is -1 for an idle row."""

    g: int
    micro_batch: int
    tokens: NDArray[np.int64]
    inputs: NDArray[np.int64] | None
    labels: NDArray[np.int64] | None
    is_scored: NDArray[np.bool_] | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_shared_arguments(parser, "batch --run runs/encoder --step 1000 --tokenizer-text")
    add = parser.add_argument
    add("--step", type=int, required=True, metavar="S", help="optimizer step, counted from 1")
    add(
        "--rank",
        type=int,
        metavar="R",
        help="show only the rows of this data-parallel rank, counted from 0",
    )
    add("--data-parallel-size", type=int, metavar="N", help="number of data-parallel ranks")
    micro = "slots of a micro-batch; default: the run's own"
    add("--micro-batch-tokens", type=int, metavar="T", help=micro)
    add("--tokenizer-text", action="store_true", help="also print each row as text")
    add("--masked", action="store_true", help="also print the inputs and labels of the objective")


def print_answer(args: argparse.Namespace) -> int:
    """Print the answer; return 0."""
    opened = open_run(args.run)
    part = None
    if (args.rank is None) != (args.data_parallel_size is None):
        raise ValueError("--rank and --data-parallel-size go together")
    if args.rank is not None:
        tokens = args.micro_batch_tokens
        if tokens is None:
            remedy = "give --micro-batch-tokens, its rows x length"
            tokens = opened.config_for("micro-batches", remedy).hardware.micro_batch_tokens
        part = RankSlice(
            rank=args.rank, data_parallel_size=args.data_parallel_size, micro_batch_tokens=tokens
        )
    answer = describe_batch(
        opened, args.step, part=part, with_text=args.tokenizer_text, is_masked=args.masked
    )
    return show(answer, args)


def describe_batch(
    run: RecordedRun,
    step: int,
    *,
    part: RankSlice | None = None,
    with_text: bool = False,
    is_masked: bool = False,
) -> StepBatch:
    """Return the rows of a step, or those of one rank, exactly as training sees them.

    Raises:
        ValueError: the run has no such step, rank, masks or tokenizer; or the rows of a step that
            was taken do not have the digests in the ledger.
    """
    begin, end = run.rows_of_step(step)
    length = run.order.seq_length(begin)
    if part is not None:
        _check_rank(part, length)
    rows = list(_rows(run, step, part, is_masked=is_masked))
    tokenizer = _tokenizer(run) if with_text else None
    return StepBatch(
        run=str(run.folder),
        step=step,
        is_done=step <= run.steps_done,
        g_begin=begin,
        g_end=end,
        rank=part.rank if part else None,
        data_parallel_size=part.data_parallel_size if part else None,
        micro_batch_tokens=part.micro_batch_tokens if part else None,
        idle_rows=sum(row.g < 0 for row in rows),
        rows=_describe_rows(run, begin, end, rows, tokenizer, has_parts=part is not None),
    )


def _check_rank(part: RankSlice, length: int) -> None:
    if not 0 <= part.rank < part.data_parallel_size:
        raise ValueError(f"rank {part.rank} is not one of {part.data_parallel_size}")
    if part.micro_batch_tokens < length:
        raise ValueError(
            f"--micro-batch-tokens {part.micro_batch_tokens} is less than the row length {length} "
            f"of this step"
        )


def _rows(
    run: RecordedRun, step: int, part: RankSlice | None, *, is_masked: bool
) -> Iterator[_Row]:
    """Yield the rows of the step, or all rows of the rank (idle ones too), in training order."""
    begin, end = run.rows_of_step(step)
    try:
        masking = _masking(run, step)
    except NotRecordedError:
        if is_masked:
            raise
        yield from _stored_rows(run, begin, end, part)
        return
    digests = np.zeros(3, dtype=np.uint64)
    # The Loader is the one that feeds the training loop, so the answer cannot drift from training.
    # If no rank is asked for, one rank takes all rows, one row per micro-batch. Otherwise the rows
    # of every rank are made, because the ledger has digests of whole steps only.
    for rank in range(part.data_parallel_size if part else 1):
        loader = Loader(
            order=run.order,
            objective=masking.objective,
            ids=run.order.ids,
            mask_seed=masking.mask_seed,
            micro_batch_tokens=part.micro_batch_tokens if part else run.order.seq_length(begin),
            data_parallel_rank=rank,
            data_parallel_size=part.data_parallel_size if part else 1,
        )
        for m, fed in enumerate(loader.micro_batches(begin, end)):
            # uint64 sums wrap around, as those in the ledger do.
            digests[:2] += token_digest(fed.rows, masking.objective.original_tokens(fed))
            digests[2:] += mask_digest(fed)
            if part is None or rank == part.rank:
                yield from _split_micro_batch(fed, m, is_masked=is_masked)
    _require_recorded_digests(run, step, digests, is_masked=is_masked)


def _masking(run: RecordedRun, step: int) -> Masking:
    """Return the masking of a step: the ledger's, or the configuration's if there is no ledger."""
    if not len(run.ledger.records):
        config = run.config_for("masks")
        return Masking(config.objective, config.seeds.mask)
    is_done = step <= run.steps_done
    seq = step_record(run.ledger, step - 1).seq if is_done else run.ledger.head.seq + 1
    return MaskingRecord(run.ledger).at(seq)


def _split_micro_batch(fed: objectives.Batch, number: int, *, is_masked: bool) -> Iterator[_Row]:
    for index, (g, count) in enumerate(
        zip(fed.rows.g.tolist(), fed.rows.num_tokens.tolist(), strict=True)
    ):
        # Rows are end to end in one stream; the padding of a row follows its tokens.
        row = slice(index * fed.rows.seq_length, index * fed.rows.seq_length + count)
        yield _Row(
            g=g,
            micro_batch=number,
            tokens=fed.rows.tokens[row],
            inputs=fed.tokens[row] if is_masked else None,
            labels=fed.labels[row] if is_masked else None,
            is_scored=fed.loss_mask[row] if is_masked else None,
        )


def _require_recorded_digests(
    run: RecordedRun, step: int, digests: NDArray[np.uint64], *, is_masked: bool
) -> None:
    """Raise ValueError if a step that was taken has other digests in the ledger.

    `digests` [3] are those of today's rows: two lanes of the token digest, then the mask digest.
    """
    if step > len(run.ledger.steps):
        return
    record = run.ledger.steps[step - 1]
    where = f"{run.folder}: step {step} (record {record['seq']})"
    if (digests[:2] != record["token_digest"]).any():
        raise ValueError(
            f"{where} was fed other tokens than today's files give: its token digest is "
            f"{digest_hex(record['token_digest'])}, today's {digest_hex(digests[:2])}; ask "
            f"`verify --tokens` which steps differ"
        )
    if is_masked and digests[2] != record["mask_digest"]:
        raise ValueError(
            f"{where} was fed the same tokens, but they were masked or scored otherwise: its mask "
            f"digest is {int(record['mask_digest']):016x}, today's {int(digests[2]):016x}; ask "
            f"with the version that trained the run"
        )


def _stored_rows(run: RecordedRun, begin: int, end: int, part: RankSlice | None) -> Iterator[_Row]:
    """Yield rows [begin, end) as their corpora hold them, dealt out as the Loader does."""
    tokens = run.order.tokens(begin, end)
    rows = part.micro_batch_tokens // run.order.seq_length(begin) if part else 1
    rank, size = (part.rank, part.data_parallel_size) if part else (0, 1)
    for m in range(-(-(end - begin) // (rows * size))):
        # Micro-batches are dealt to the ranks in turn, as the loader does for our own runs.
        first = begin + (m * size + rank) * rows
        for g in range(first, first + rows):
            inside = g < end
            yield _Row(
                g=g if inside else -1,
                micro_batch=m,
                tokens=tokens[g - begin] if inside else np.empty(0, dtype=np.int64),
                inputs=None,
                labels=None,
                is_scored=None,
            )


def _describe_rows(
    run: RecordedRun,
    begin: int,
    end: int,
    rows: list[_Row],
    tokenizer: Tokenizer | None,
    *,
    has_parts: bool,
) -> list[BatchRow]:
    """Return the rows that are not idle, with their pieces."""
    pieces = run.order.pieces(begin, end)
    names = run.order.source_names
    # Pieces are sorted by g: those of row g are numbers boundaries[g - begin] to the next one.
    boundaries = pieces.row_splits(begin, end).tolist()
    used = [row for row in rows if row.g >= 0]
    pieces_of = [range(*boundaries[row.g - begin : row.g - begin + 2]) for row in used]
    documents = {
        piece: Document(names[pieces.source[piece]], int(pieces.document[piece]))
        for here in pieces_of
        for piece in here
    }
    origins = dict(zip(documents, Sidecars(run).origins(list(documents.values())), strict=True))
    return [
        BatchRow(
            g=row.g,
            slot=row.g - begin,
            micro_batch=row.micro_batch if has_parts else None,
            source=documents[here[0]].source,
            epoch=int(pieces.epoch[here[0]]),
            row=int(pieces.row[here[0]]),
            num_tokens=len(row.tokens),
            pieces=[
                BatchPiece(
                    document=documents[piece].ordinal,
                    offset=int(pieces.offset[piece]),
                    length=int(pieces.length[piece]),
                    position=int(pieces.position[piece]),
                    ends_document=bool(pieces.ends_document[piece]),
                    id=origins[piece].id,
                    url=origins[piece].url,
                )
                for piece in here
            ],
            tokens=row.tokens.tolist(),
            text=tokenizer.decode(row.tokens) if tokenizer else None,
            inputs=None if row.inputs is None else row.inputs.tolist(),
            labels=_scored_labels(row),
        )
        for row, here in zip(used, pieces_of, strict=True)
    ]


def _scored_labels(row: _Row) -> list[int | None] | None:
    if row.labels is None or row.is_scored is None:
        return None
    pairs = zip(row.labels.tolist(), row.is_scored.tolist(), strict=True)
    return [label if is_scored else None for label, is_scored in pairs]


def _tokenizer(run: RecordedRun) -> Tokenizer:
    return load_tokenizer(Path(run.config_for("tokenizer's files").data.tokenizer))
