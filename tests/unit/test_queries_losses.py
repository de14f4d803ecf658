"""Questions about losses of rows, each against a slow answer from the pieces of every row."""

import dataclasses
import itertools
import math
import os
import shutil
import statistics
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from megatron_ettin.config import load_config
from megatron_ettin.order.blend import blend_quotas, rows_by_source, sources_of_rows
from megatron_ettin.order.row_losses import ENTRY, HEADER_BYTES, RowLossError
from megatron_ettin.queries import run_losses
from megatron_ettin.queries.answer import FAIL, PASS
from megatron_ettin.queries.documents import DocumentName
from megatron_ettin.queries.losses import find_curves, find_document_losses
from megatron_ettin.queries.outstanding_rows import find_outstanding
from megatron_ettin.queries.recorded_run import RecordedRun, open_run
from megatron_ettin.queries.run_losses import FEWEST_ROWS, GROWTH, SHORTEST_ROWS, RunLosses
from megatron_ettin.queries.spikes import find_spikes
from megatron_ettin.queries.verify import verify
from tests.runs import made_losses
from tests.unit.queried import SKIPPED, Queried

Z = 4.0


def true_losses(queried: Queried) -> dict[int, float]:
    """Return the mean loss of each row that was trained on and has one."""
    rows = {piece.g for piece in queried.before(queried.done)}
    sums, tokens = made_losses(0, queried.done)
    return {g: float(np.float32(sums[g]) / tokens[g]) for g in sorted(rows) if tokens[g]}


def sources_of(queried: Queried) -> dict[int, str]:
    return {piece.g: piece.source for piece in queried.pieces}


def slow_stretches(queried: Queried) -> list[tuple[int, int]]:
    """Cut the rows so far as docs/queries.md says."""
    cuts = []
    for phase in queried.run.order.phases:
        first, last = phase.start_g, min(phase.end_g, queried.done)
        while first < last:
            shortest = SHORTEST_ROWS * 2
            length = max(shortest, (first - phase.start_g) // GROWTH)
            end = first + length
            if last - end < shortest:
                end = last
            cuts.append((first, end))
            first = end
    return cuts


def slow_scores(queried: Queried) -> dict[int, float]:
    """Return the z-score of each row whose source has enough rows in its stretch."""
    losses, sources, scores = true_losses(queried), sources_of(queried), {}
    for first, end in slow_stretches(queried):
        groups = defaultdict(list)
        for g in range(first, end):
            if g in losses:
                groups[sources[g]].append(g)
        for rows in groups.values():
            if len(rows) < FEWEST_ROWS:
                continue
            middle = statistics.median(losses[g] for g in rows)
            spread = 1.4826 * statistics.median(abs(losses[g] - middle) for g in rows)
            scores.update({g: (losses[g] - middle) / spread for g in rows})
    return scores


def test_rows_that_stand_out_are_those_of_a_slow_search(queried: Queried) -> None:
    scores = slow_scores(queried)
    expected = sorted((g for g, z in scores.items() if z >= Z), key=lambda g: (-scores[g], g))
    assert len(expected) > 10
    assert {g % 37 for g in expected} == {36}
    assert not set(range(*SKIPPED)) & scores.keys()
    found = find_spikes(queried.run, z=Z, num=7)
    assert (found.g_begin, found.g_end, found.rows_above) == (0, queried.done, len(expected))
    assert [row.g for row in found.rows] == expected[:7]
    losses, sources = true_losses(queried), sources_of(queried)
    for row in found.rows:
        assert row.z == pytest.approx(scores[row.g], rel=1e-9)
        assert (row.loss, row.source) == (pytest.approx(losses[row.g]), sources[row.g])
        assert row.typical == pytest.approx(row.loss - 1.5, abs=0.6)
        (step,) = {piece.step for piece in queried.pieces if piece.g == row.g}
        assert row.step == step
    held = [(d.g, d.source, d.ordinal, d.offset, d.length) for d in found.documents]
    assert held == [
        (p.g, p.source, p.document, p.offset, p.length)
        for g in expected[:7]
        for p in queried.pieces
        if p.g == g
    ]
    for document in found.documents:
        others = {
            p.g
            for p in queried.before(queried.done)
            if (p.source, p.document) == (document.source, document.ordinal) and p.g in scores
        } - {document.g}
        assert document.other_rows == len(others)
        if others:
            middle = statistics.median(scores[g] for g in others)
            assert document.other_z == pytest.approx(middle, rel=1e-9)
        if document.source == "alpha":  # the only one with provenance
            assert document.line == document.ordinal + 1
            assert document.url == f"https://alpha.example/{document.ordinal}"


def test_a_part_of_a_run_is_judged_as_the_whole_is(queried: Queried) -> None:
    begin, end = 101, queried.done - 50
    whole = find_spikes(queried.run, z=Z, num=1000)
    part = find_spikes(queried.run, begin, end, z=Z, num=1000)
    assert part.rows == [row for row in whole.rows if begin <= row.g < end]
    with pytest.raises(ValueError, match="--z 0, --num 5: a score above 0"):
        find_spikes(queried.run, z=0, num=5)


def test_the_sources_of_rows_repeat_with_the_blend() -> None:
    rows = np.arange(500)
    quotas = blend_quotas([0.5, 0.3, 0.2], period=64)
    pattern = sources_of_rows(quotas, rows[:64])
    assert sources_of_rows(quotas, rows[70:]).tolist() == pattern[rows[70:] % 64].tolist()
    for begin, end in ((0, 64), (3, 3), (10, 499)):
        counted = np.bincount(pattern[rows[begin:end] % 64], minlength=3)
        assert rows_by_source(quotas, begin, end).tolist() == counted.tolist()


def test_long_stretches_are_sampled_in_blocks() -> None:
    stretch = run_losses.LossStretch(0, 5, 200_005)
    blocks = list(run_losses._sampled(stretch))
    assert (len(blocks), blocks[0][0], blocks[-1][1]) == (64, 5, 200_005)
    assert all(b - a == 1024 for a, b in blocks)
    assert all(one[1] <= two[0] for one, two in itertools.pairwise(blocks))


def test_the_sources_of_rows_are_those_of_their_pieces(queried: Queried) -> None:
    losses, names = RunLosses(queried.whole), queried.whole.order.source_names
    sources = sources_of(queried)
    for index, phase in enumerate(losses.phases):
        order = [names.index(pool.source) for pool in phase.pools]
        found = losses.sources(index, np.arange(phase.start_g, phase.end_g))
        for g, source in zip(range(phase.start_g, phase.end_g), found.tolist(), strict=True):
            assert g not in sources or names[order[source]] == sources[g]


def test_curves_are_the_means_of_all_rows(queried: Queried, tmp_path: Path) -> None:
    figure = tmp_path / "losses.png"
    curves = find_curves(queried.run, figure=figure)
    sums, tokens = made_losses(0, queried.done)
    sources = sources_of(queried)
    trained = {piece.g for piece in queried.before(queried.done)}
    assert len(curves.points) > 8
    covered = 0
    for point in curves.points:
        rows = [
            g
            for g in range(point.g_begin, point.g_end)
            if g in trained and sources[g] == point.source and tokens[g]
        ]
        covered += len(rows)
        assert point.rows == len(rows)
        mean = np.float32(sums[rows]).astype(float).sum() / tokens[rows].sum()
        assert point.loss == pytest.approx(mean, rel=1e-6)
    assert covered == sum(bool(tokens[g]) for g in trained)
    # Every step before the middle of the rows counts in full.
    last = curves.points[-1]
    ledger = queried.run.ledger
    middle = (last.g_begin + last.g_end) // 2
    done = int((ledger.steps["g_end"] <= middle).sum())
    begun = ledger.cumulative("n_tokens")[done - 1 : done + 1].tolist()
    assert begun[0] <= last.run_tokens <= begun[1]
    assert {p.source for p in find_curves(queried.run, source="beta").points} == {"beta"}
    with Image.open(figure) as picture:
        assert picture.size == (1440, 736)
    with pytest.raises(ValueError, match="nothing to draw"):
        find_curves(queried.run, 20, 21, figure=figure)


def test_a_documents_rows_have_their_losses(queried: Queried) -> None:
    scores, losses = slow_scores(queried), true_losses(queried)
    past = {p.document for p in queried.before(queried.done) if p.source == "alpha"}
    future = {p.document for p in queried.pieces if p.source == "alpha" and p.g >= queried.done}
    number = max(past & future)
    seen = [p for p in queried.pieces if (p.source, p.document) == ("alpha", number)]
    name = DocumentName(doc=f"alpha:{number}")
    (document,) = find_document_losses(queried.run, name).documents
    assert [place.g for place in document.places] == [piece.g for piece in seen]
    for place in document.places:
        if place.g in losses and place.g < queried.done:
            assert place.loss == pytest.approx(losses[place.g])
        else:
            assert (place.loss, place.typical, place.z) == (None, None, None)
        if place.g in scores:
            assert place.z == pytest.approx(scores[place.g], rel=1e-9)
    begin, end = seen[1].g, seen[-1].g
    (part,) = find_document_losses(queried.run, name, begin, end).documents
    assert part.places == [p for p in document.places if begin <= p.g < end]


def test_the_yaml_leaves_out_what_is_listed_and_what_was(queried: Queried, tmp_path: Path) -> None:
    path = tmp_path / "skip.yaml"
    found = find_spikes(queried.run, z=Z, num=5, skip=path)
    ranges = yaml.safe_load(path.read_text())["data"]["skip_rows"]
    left_out = [g for first, end in ranges for g in range(first, end)]
    assert left_out == sorted({*range(*SKIPPED), *(row.g for row in found.rows)})
    config = load_config(queried.folder / "config.yaml")
    dataclasses.replace(config.data, skip_rows=[(a, b) for a, b in ranges])  # is accepted


@pytest.fixture
def copied(queried: Queried, tmp_path: Path) -> RecordedRun:
    folder = shutil.copytree(queried.folder, tmp_path / "run")
    return open_run(folder)


def losses_file(run: RecordedRun) -> Path:
    return run.folder / "ledger" / "row_losses.bin"


def test_a_short_or_damaged_file_is_named(copied: RecordedRun) -> None:
    path = losses_file(copied)
    content = bytearray(path.read_bytes())
    content[HEADER_BYTES + 8 * 40 + 7] ^= 0x80  # the state of row 40
    path.write_bytes(content)
    for ask in (find_spikes, find_curves):
        with pytest.raises(RowLossError, match=rf"{path}: byte 336, row 40: not what a run writes"):
            ask(copied)
    checkpoint = copied.checkpoints[-1].g
    os.truncate(path, HEADER_BYTES + 8 * (checkpoint - 1))
    with pytest.raises(RowLossError, match=f"ends before row {checkpoint - 1}, but a checkpoint's"):
        find_spikes(copied)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"keeps no losses of rows \(logging\.row_losses\)"):
        find_spikes(copied)


def test_verify_finds_a_flipped_bit_and_notes_what_is_gone(copied: RecordedRun) -> None:
    path = losses_file(copied)
    whole = path.read_bytes()

    def checked() -> tuple[str, list[str], list[str]]:
        answer = verify(copied.folder, order=False, tokens=False)
        (check,) = [check for check in answer.checks if check.check == "row losses"]
        faults = [str(fault) for fault in answer.faults]
        return check.verdict, faults, [note for note in answer.notes if "losses" in note]

    assert checked() == (PASS, [], [])
    second = copied.checkpoints[0].g
    flipped = bytearray(whole)
    flipped[HEADER_BYTES + 8 * second] ^= 1  # the lowest bit of a loss
    path.write_bytes(flipped)
    verdict, (fault,), notes = checked()
    byte = HEADER_BYTES + 8 * second
    assert (verdict, notes) == (FAIL, [])
    assert f"{path}: the entries from byte {byte} on have SHA-256" in fault
    assert f"rows [{second}, " in fault
    path.write_bytes(whole[:HEADER_BYTES] + bytes(8 * second) + whole[HEADER_BYTES + 8 * second :])
    verdict, faults, (note,) = checked()
    assert (verdict, faults) == (PASS, [])
    assert f"the losses of rows [0, {second}) are gone" in note
    path.unlink()
    assert checked()[:2] == (PASS, [])


def test_rows_of_an_objective_are_compared_with_their_like(
    queried: Queried, tmp_path: Path
) -> None:
    """Of a mixture, in which the second objective's losses are all higher by far."""
    run = copy_as_mixture(queried, tmp_path / "run")
    chosen = run.config_for("objectives").objective.choose(np.arange(queried.done), 21)
    entries = np.memmap(losses_file(run), ENTRY, "r+", HEADER_BYTES, queried.done)

    entries["loss_sum"] *= np.where(chosen == 1, np.float32(3.0), np.float32(1.0))
    entries.flush()
    losses = RunLosses(run)
    found = find_outstanding(losses, 0, queried.done, z=Z, num=1000)
    assert found.count > 10
    assert {g % 37 for g in found.g.tolist()} == {36}
    assert {0, 1} == set(chosen[found.g].tolist())
    assert math.isfinite(found.unjudged)


def copy_as_mixture(queried: Queried, folder: Path) -> RecordedRun:
    from megatron_ettin.objectives import CausalLM, MaskedLM, Mixture

    config = queried.run.config_for("objectives")
    objective = Mixture(objectives=[MaskedLM(), CausalLM()], shares=[1.0, 1.0])
    return dataclasses.replace(
        queried.run,
        folder=Path(shutil.copytree(queried.folder, folder)),
        config=dataclasses.replace(config, objective=objective),
    )
