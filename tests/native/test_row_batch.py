"""The packed stream of a micro-batch, against slots laid out one by one."""

import itertools
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest

from megatron_ettin import native
from tests.native import reference
from tests.native.corpora import build_plan, piece_columns

CLS, SEP, PAD = 60_001, 60_002, 60_003
L, S = 24, 4


def write(prefix: Path, documents: list[list[int]], dtype: str) -> native.TokenFile:
    builder = native.TokenFileBuilder(prefix, dtype)
    for document in documents:
        builder.add(np.array(document, np.int64))
    builder.commit()
    return native.TokenFile(prefix)


def plan_of(
    file: native.TokenFile, specials: str, max_segments: int = S, pack: str = "bfd"
) -> native.RowPlan:
    path = Path(f"{file.prefix}.{specials}.{pack}.plan")
    return build_plan(file, path, L, pack=pack, specials=specials, max_segments=max_segments)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[list[list[int]]]:
    rng = np.random.default_rng(5)
    # Ids of the second corpus need int32; every token is distinct, so a wrong copy shows.
    sizes = rng.integers(0, 3 * L, 60)
    sizes[:6] = [0, 1, L - 2, L - 1, L, 10 * L]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    narrow = [list(range(a, b)) for a, b in itertools.pairwise(starts)]
    wide = [[token + 100_000 for token in document] for document in narrow]
    return [narrow, wide]


def plan_sources(
    files: list[native.TokenFile], pack: str = "bfd", max_segments: int = S
) -> list[native.RowPlan]:
    return [
        plan_of(files[0], "add", max_segments, pack),
        plan_of(files[1], "present", max_segments, pack),
    ]


@pytest.fixture(scope="module")
def sources(
    corpora: list[list[list[int]]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[native.TokenFile], list[native.RowPlan]]:
    folder = tmp_path_factory.mktemp("corpora")
    files = [
        write(folder / "narrow", corpora[0], "uint16"),
        write(folder / "wide", corpora[1], "int32"),
    ]
    return files, plan_sources(files)


def expected_rows(
    corpora: list[list[list[int]]],
    plans: list[native.RowPlan],
    source_index: list[int],
    row: list[int],
) -> list[list[tuple[list[int], bool]]]:
    rows = []
    for source, number in zip(source_index, row, strict=True):
        pieces: list[tuple[list[int], bool]] = []
        if source >= 0:
            columns = piece_columns(plans[source].pieces(np.array([number])))
            for document, offset, length, cls, sep, ends in zip(*columns, strict=True):
                tokens = corpora[source][document][offset : offset + length]
                slots = [*([CLS] if cls else []), *tokens, *([SEP] if sep else [])]
                pieces.append((slots, bool(ends)))
        if source >= 0 and plans[source].pack == "concat":
            pieces = [([slot for slots, _ in pieces for slot in slots], True)]
        rows.append(pieces)
    return rows


def assemble(
    plans: list[native.RowPlan],
    source_index: list[int],
    row: list[int],
    **change: int,
) -> native.PackedRows:
    shape = {"seq_length": L, "max_segments_per_row": S, **change}
    return native.assemble_rows(
        plans,
        np.array(source_index, np.int32),
        np.array(row, np.int64),
        cls_id=CLS,
        sep_id=SEP,
        pad_id=PAD,
        **shape,
    )


@pytest.mark.parametrize("pack", ["bfd", "concat", "none"])
def test_stream_equals_the_reference(
    corpora: list[list[list[int]]],
    sources: tuple[list[native.TokenFile], list[native.RowPlan]],
    pack: str,
) -> None:
    files, plans = sources
    max_segments = S
    if pack != "bfd":
        max_segments = 1
        plans = plan_sources(files, pack, max_segments)
    rng = np.random.default_rng(2)
    indices = [s for s in (0, 1) for _ in range(plans[s].num_rows)] + [-1] * 5
    rows = [r for plan in plans for r in range(plan.num_rows)] + [-1] * 5
    shuffle = rng.permutation(len(rows))
    indices, rows = [indices[i] for i in shuffle], [rows[i] for i in shuffle]
    packed = assemble(plans, indices, rows, max_segments_per_row=max_segments)
    stream = expected_rows(corpora, plans, indices, rows)
    expected = reference.assemble(stream, L, max_segments, PAD)
    columns = {field.name: getattr(packed, field.name) for field in fields(expected)}
    assert {name: column.tolist() for name, column in columns.items()} == asdict(expected)
    dtypes = [column.dtype.name for column in columns.values()]
    assert dtypes == ["int64", "int64", "int32", "uint8", "int64"]


def test_concat_streams_are_cut_wherever_a_row_is_full(
    corpora: list[list[list[int]]],
    sources: tuple[list[native.TokenFile], list[native.RowPlan]],
) -> None:
    files, _ = sources
    plans = plan_sources(files, "concat", 1)
    for source in (0, 1):
        documents = [document for document in corpora[source] if document]
        stream = [
            slot
            for document in documents
            for slot in ([CLS, *document, SEP] if source == 0 else document)
        ]
        count = plans[source].num_rows
        packed = assemble(plans, [source] * count, list(range(count)), max_segments_per_row=1)
        assert packed.tokens.tolist() == stream + [PAD] * (-len(stream) % L)
        assert packed.position_ids[:L].tolist() == list(range(L))
        assert packed.cu_seqlens[:3].tolist() == [0, L, L]


def test_rows_of_a_plan_hold_each_token_once(
    corpora: list[list[list[int]]],
    sources: tuple[list[native.TokenFile], list[native.RowPlan]],
) -> None:
    _, plans = sources
    for source in (0, 1):
        count = plans[source].num_rows
        tokens = assemble(plans, [source] * count, list(range(count))).tokens
        ordinary = tokens[~np.isin(tokens, [CLS, SEP, PAD])]
        assert sorted(ordinary.tolist()) == sorted(t for d in corpora[source] for t in d)


def test_a_row_does_not_depend_on_its_neighbours(
    sources: tuple[list[native.TokenFile], list[native.RowPlan]],
) -> None:
    _, plans = sources
    tokens = assemble(plans, [0, 1, -1, 0], [3, 2, -1, 0]).tokens
    for place, (source, row) in enumerate([(0, 3), (1, 2), (-1, -1), (0, 0)]):
        alone = assemble(plans, [source], [row]).tokens
        np.testing.assert_array_equal(tokens[place * L : (place + 1) * L], alone)


def test_several_sequences_per_document(tmp_path: Path) -> None:
    """A document that others wrote as several sequences is their concatenation."""
    document = list(range(30))
    write(tmp_path / "one", [document], "uint16")
    header = b"MMIDIDX\0\0" + np.uint64(1).tobytes() + b"\x08"
    header += np.array([2, 2], np.uint64).tobytes() + np.array([12, 18], np.int32).tobytes()
    header += np.array([0, 24], np.int64).tobytes() + np.array([0, 2], np.int64).tobytes()
    (tmp_path / "one.idx").write_bytes(header)
    file = native.TokenFile(tmp_path / "one")
    assert file.lengths.tolist() == [30]
    plan = plan_of(file, "present")
    packed = assemble([plan], [0, 0], [0, 1])
    assert packed.tokens[:30].tolist() == document


def test_plan_and_shape_must_agree(
    sources: tuple[list[native.TokenFile], list[native.RowPlan]],
) -> None:
    _, plans = sources
    with pytest.raises(ValueError, match=r"plans\[0\] has rows of 24 slots, not 32"):
        assemble(plans, [0], [0], seq_length=32)
    with pytest.raises(ValueError, match=r"plans\[0\] has up to 4 segments"):
        assemble(plans, [0], [0], max_segments_per_row=3)


@pytest.mark.parametrize(("index", "row"), [(2, 0), (-2, 0), (-1, 0)])
def test_unknown_source_is_refused(
    sources: tuple[list[native.TokenFile], list[native.RowPlan]], index: int, row: int
) -> None:
    with pytest.raises(ValueError, match=f"row 1 of the batch: no source index {index}"):
        assemble(sources[1], [0, index], [0, row])


def test_unknown_row_is_refused(
    sources: tuple[list[native.TokenFile], list[native.RowPlan]],
) -> None:
    with pytest.raises(IndexError, match="row 100000 of a plan"):
        assemble(sources[1], [0], [100_000])
    with pytest.raises(ValueError, match="row has 2 values, expected 1"):
        assemble(sources[1], [0], [0, 1])
