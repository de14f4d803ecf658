"""batch: the very rows, digests and masks that the ledger says were consumed; rank by rank."""

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from megatron_ettin.data.tokenize import load_tokenizer
from megatron_ettin.objectives import MaskedLM
from megatron_ettin.order import SampleOrder
from megatron_ettin.order.ledger import Kind, Ledger, LedgerWriter
from megatron_ettin.queries.batch import RankSlice, describe_batch
from megatron_ettin.queries.recorded_run import RecordedRun, open_run
from tests.conftest import TinyCorpus
from tests.native import reference
from tests.runs import record_run, tiny_config
from tests.unit.queried import STEPS, Queried

SHORT, LONG = 3, STEPS  # steps of the first phase, and of the one that is packed otherwise


@pytest.mark.parametrize("step", [SHORT, LONG, LONG + 2])
def test_batch_has_the_digests_of_the_ledger(queried: Queried, step: int) -> None:
    """Token and mask digests of the answer, by another implementation, are the recorded ones."""
    answer = describe_batch(queried.run, step, is_masked=True)
    record = queried.whole.ledger.steps[step - 1]
    assert (answer.g_begin, answer.g_end) == (record["g_begin"], record["g_end"])
    assert [row.g for row in answer.rows] == list(range(answer.g_begin, answer.g_end))
    assert answer.is_done == (step <= STEPS)
    lanes, masks = np.zeros(2, dtype=np.uint64), 0
    for row in answer.rows:
        # A row of a concat phase is one segment.
        edges = [p.position for p in row.pieces] if step < LONG else [0]
        cuts = zip(edges, [*edges[1:], len(row.tokens)], strict=True)
        segments = [row.tokens[begin:end] for begin, end in cuts]
        lanes += np.array(reference.hash_lanes(reference.token_row_bytes(row.g, segments)), "u8")
        assert row.inputs is not None
        assert row.labels is not None
        masks += reference.hash_lanes(reference.mask_row_bytes(row.g, row.inputs, row.labels))[0]
    assert lanes.tolist() == record["token_digest"].tolist()
    assert masks % 2**64 == record["mask_digest"]
    assert sum(row.num_tokens for row in answer.rows) == record["n_tokens"]


@pytest.mark.parametrize("step", [SHORT, LONG])
def test_pieces_are_those_of_a_scan(queried: Queried, step: int) -> None:
    answer = describe_batch(queried.run, step)
    scanned = [piece for piece in queried.pieces if piece.step == step]
    found = [
        (row.g, step, row.slot, p.position, row.source, row.epoch, p.document, p.offset, p.length)
        for row in answer.rows
        for p in row.pieces
    ]
    assert found == [tuple(piece) for piece in scanned]
    for row in answer.rows:
        assert row.num_tokens == len(row.tokens)
        assert (row.inputs, row.labels, row.text, row.micro_batch) == (None, None, None, None)
        for piece in row.pieces:
            length = queried.run.order.corpus(row.source).length(piece.document)
            at_end = piece.offset + piece.length == length
            if step < LONG:
                assert piece.ends_document == at_end
            known = f"https://alpha.example/{piece.document}" if row.source == "alpha" else None
            assert piece.url == known


@pytest.mark.parametrize(("size", "tokens"), [(1, 128), (2, 512), (3, 256), (8, 1024)])
def test_ranks_share_the_rows_as_in_training(queried: Queried, size: int, tokens: int) -> None:
    """Micro-batch m of rank r has rows g0 + (m * DP + r) * rows onward (docs/architecture.md)."""
    whole = {row.g: row for row in describe_batch(queried.run, SHORT, is_masked=True).rows}
    begin, end = min(whole), max(whole) + 1
    rows = tokens // 128
    found = {}
    for rank in range(size):
        part = RankSlice(rank=rank, data_parallel_size=size, micro_batch_tokens=tokens)
        answer = describe_batch(queried.run, SHORT, part=part, is_masked=True)
        count = -(-(end - begin) // (rows * size))
        assert len(answer.rows) + answer.idle_rows == count * rows
        for row in answer.rows:
            assert row.micro_batch is not None
            first = begin + (row.micro_batch * size + rank) * rows
            assert first <= row.g < first + rows
            found[row.g] = dataclasses.replace(row, micro_batch=None)
    assert found == whole


def test_text_is_the_tokenizers(queried: Queried, tiny_corpus: TinyCorpus) -> None:
    tokenizer = load_tokenizer(tiny_corpus.folder / "tokenizer")
    row = describe_batch(queried.run, SHORT, with_text=True).rows[0]
    assert row.text == tokenizer.decode(row.tokens)
    assert row.text is not None
    assert row.text.startswith("[CLS]")


@pytest.mark.parametrize(
    ("step", "part", "message"),
    [
        (0, None, "has steps 1 to"),
        (10_000, None, "has steps 1 to"),
        (1, RankSlice(rank=2, data_parallel_size=2, micro_batch_tokens=128), "rank 2"),
        (
            1,
            RankSlice(rank=0, data_parallel_size=2, micro_batch_tokens=64),
            "less than the row length",
        ),
    ],
)
def test_what_there_is_not_is_refused(
    queried: Queried, step: int, part: RankSlice | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        describe_batch(queried.run, step, part=part)


def test_the_run_has_both_packings(queried: Queried) -> None:
    assert isinstance(queried.run.order, SampleOrder)
    assert [phase.pack for phase in queried.run.order.spec.phases] == ["bfd", "concat"]
    (begin, _), (_, end) = queried.run.rows_of_step(SHORT), queried.run.rows_of_step(LONG)
    assert begin < queried.run.order.spec.phases[1].start_g < end


def with_settings(run: RecordedRun, *, mask_seed: int, mask_rate: float) -> RecordedRun:
    """Return the run with another config.yaml, as if somebody had altered it."""
    assert run.config is not None
    config = dataclasses.replace(
        run.config,
        objective=MaskedLM(mask_rate=mask_rate),
        seeds=dataclasses.replace(run.config.seeds, mask=mask_seed),
    )
    return dataclasses.replace(run, config=config)


@pytest.mark.parametrize("step", [SHORT, LONG + 2])
def test_masks_are_those_that_the_ledger_tells_of(queried: Queried, step: int) -> None:
    altered = with_settings(queried.run, mask_seed=999, mask_rate=0.7)
    assert describe_batch(altered, step, is_masked=True) == describe_batch(
        queried.run, step, is_masked=True
    )


def test_each_step_has_the_masks_of_the_process_that_took_it(
    tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    """The record of a run that went on with another objective: steps 1 to 3, then 4 to 6."""
    runs = [
        open_run(
            record_run(tiny_config(tiny_corpus, tmp_path / name, objective=objective), steps=6)
        )
        for name, objective in (("masked", "MaskedLM"), ("causal", "CausalLM"))
    ]
    first, second = (run.ledger for run in runs)
    assert first is not None
    assert second is not None
    with LedgerWriter.open(tmp_path / "both" / "ledger") as writer:
        for source, steps in ((first, slice(0, 3)), (second, slice(3, 6))):
            kind = Kind.START if source is first else Kind.RESUME
            taken = source.steps[steps]
            g, step = int(taken["g_begin"][0]), int(taken["step"][0]) - 1
            writer.append(kind, step=step, g_begin=g, g_end=g, payload=source.events[0])
            columns = ("step", "phase", "g_begin", "g_end", "n_tokens")
            digests = ("order_digest", "token_digest", "mask_digest")
            writer.append_steps(**{name: taken[name] for name in columns + digests})
    both = dataclasses.replace(runs[0], ledger=Ledger.read(tmp_path / "both" / "ledger"))
    for step in range(1, 7):
        found = describe_batch(both, step, is_masked=True)
        expected = describe_batch(runs[step > 3], step, is_masked=True)
        assert found.rows == expected.rows
        assert (found.rows[0].inputs == found.rows[0].tokens) == (step > 3)
    assert (
        describe_batch(both, 7, is_masked=True).rows
        == describe_batch(runs[1], 7, is_masked=True).rows
    )


@pytest.mark.parametrize(
    ("field", "is_masked", "message"),
    [
        ("token_digest", False, "was fed other tokens than today's files give: its token digest"),
        ("token_digest", True, "was fed other tokens than today's files give: its token digest"),
        ("mask_digest", True, "but they were masked or scored otherwise: its mask digest is"),
    ],
)
@pytest.mark.parametrize(
    "part", [None, RankSlice(rank=1, data_parallel_size=3, micro_batch_tokens=256)]
)
def test_what_is_shown_is_compared_with_the_record(
    queried: Queried, field: str, is_masked: bool, message: str, part: RankSlice | None
) -> None:
    ledger = copy.copy(queried.run.ledger)
    ledger.steps = ledger.steps.copy()
    ledger.steps[field][SHORT - 1] ^= 1
    run = dataclasses.replace(queried.run, ledger=ledger)
    with pytest.raises(ValueError, match=rf"run: step {SHORT} \(record \d+\) .*{message}"):
        describe_batch(run, SHORT, part=part, is_masked=is_masked)
    assert describe_batch(run, SHORT + 1, part=part, is_masked=is_masked).is_done
