"""The published layout: written, continued, refused, read back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from megatron_ettin.config import DataConfig, PhaseConfig, SourceConfig
from megatron_ettin.native import TokenFile
from megatron_ettin.queries import provenance_of_rows
from megatron_ettin.queries.export import export_ettin
from megatron_ettin.queries.import_ettin import import_ettin
from megatron_ettin.queries.record import digest_hex
from megatron_ettin.queries.recorded_run import RecordedRun, open_run
from tests.conftest import TinyCorpus
from tests.mutations import change_token
from tests.runs import record_run, tiny_config
from tools import order as order_tool

PHASES: list[dict[str, Any]] = [
    {"name": "short", "train_tokens": 20_000, "seq_length": 128, "global_batch_size": 1},
    {"name": "decay", "train_tokens": 4_000, "seq_length": 256, "global_batch_size": 8},
]


def make(corpus: TinyCorpus, folder: Path, **sections: Any) -> RecordedRun:
    data = json.loads(json.dumps(corpus.data).replace('"long"', '"decay"'))
    config = tiny_config(corpus, folder, **{"phases": PHASES, "data": data, **sections})
    return open_run(record_run(config, save_steps=[40, 130]))


@pytest.fixture(scope="module")
def run(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> RecordedRun:
    return make(tiny_corpus, tmp_path_factory.mktemp("exported") / "run")


def export(run: RecordedRun, output: Path) -> list[Any]:
    return export_ettin(run, output, run.checkpoint("0"), run.checkpoints[-1])


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet"))


def read(folder: Path) -> list[dict[str, Any]]:
    rows = [row for name in files(folder) for row in pq.read_table(folder / name).to_pylist()]
    return sorted(rows, key=lambda row: row["g"])


def test_rows_are_those_of_the_run(run: RecordedRun, tmp_path: Path) -> None:
    folders = export(run, tmp_path)
    assert files(tmp_path) == [
        "checkpoint_000001/steps_000001_to_000040.parquet",
        "checkpoint_000002/steps_000041_to_000100.parquet",
        "checkpoint_000002/steps_000101_to_000130.parquet",
        "checkpoint_000003/steps_000131_to_000158.parquet",
        "decay_checkpoint_000004/steps_000159_to_000160.parquet",
    ]
    order = run.order
    rows = read(tmp_path)
    pieces = order.pieces(0, order.num_rows)
    assert [row["g"] for row in rows] == list(range(order.num_rows))
    for row, tokens in zip(rows, order.tokens(0, order.num_rows), strict=True):
        g = row["g"]
        here = pieces.g == g
        assert row["input_ids"] == tokens.tolist()
        assert row["step"] == run.steps_of_rows(np.array([g]))[0]
        assert row["slot"] == g - run.rows_of_step(row["step"])[0]
        assert row["documents"] == pieces.document[here].tolist()
        assert row["offsets"] == pieces.offset[here].tolist()
        assert row["lengths"] == pieces.length[here].tolist()
        assert row["positions"] == pieces.position[here].tolist()
        assert {row["source"]} == {order.source_names[s] for s in pieces.source[here]}
        piece = TokenFile(order.prefixes(row["source"])[0]).tokens(
            row["documents"][0], row["offsets"][0], row["lengths"][0]
        )
        assert row["input_ids"][1 : 1 + len(piece)] == piece.tolist(), "after the added [CLS]"
    assert sum(folder.rows for folder in folders) == order.num_rows
    assert sum(folder.tokens for folder in folders) == sum(len(row["input_ids"]) for row in rows)


def test_files_say_which_rows_they_hold(run: RecordedRun, tmp_path: Path) -> None:
    export(run, tmp_path)
    path = tmp_path / "checkpoint_000002" / "steps_000041_to_000100.parquet"
    found = pq.read_metadata(path).metadata
    steps = run.ledger.steps[40:100]
    digest = digest_hex(steps["token_digest"].sum(axis=0, dtype=np.uint64))
    assert found[b"megatron_ettin.token_digest"].decode() == digest
    assert found[b"megatron_ettin.rows"] == b"40-100"
    assert found[b"megatron_ettin.tokens"].decode() == str(steps["n_tokens"].sum())
    assert pq.read_schema(path).field("input_ids").type == pa.list_(pa.uint16())


def test_the_card_names_the_order_and_the_chain(run: RecordedRun, tmp_path: Path) -> None:
    export(run, tmp_path)
    text = (tmp_path / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert sorted(
        p.relative_to(tmp_path).as_posix()
        for p in tmp_path.glob(header["configs"][0]["data_files"])
    ) == files(tmp_path)
    assert run.order.spec.order_id in text
    assert run.ledger.head.chain in text
    assert "| decay_checkpoint_000004 | step_00000160 | 159 to 160 | 16 |" in text


def test_an_export_goes_on_where_it_was(run: RecordedRun, tmp_path: Path) -> None:
    export(run, tmp_path)
    whole = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    gone = files(tmp_path)[1]
    (tmp_path / gone).unlink()
    (tmp_path / f"{gone}.tmp.1ab").write_bytes(b"of an export that was killed")
    folders = export(run, tmp_path)
    assert [folder.files_kept for folder in folders] == [1, 1, 1, 1]
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == whole
    assert sum(folder.tokens for folder in folders) == run.ledger.steps["n_tokens"].sum()


def test_a_part_of_the_run(run: RecordedRun, tmp_path: Path) -> None:
    export_ettin(run, tmp_path, run.checkpoint("40"), run.checkpoint("step_00000130"))
    assert {name.split("/")[0] for name in files(tmp_path)} == {"checkpoint_000002"}
    assert [row["step"] for row in read(tmp_path)] == list(range(41, 131))
    with pytest.raises(ValueError, match="no step lies between step_00000040 and step_00000040"):
        export_ettin(run, tmp_path, run.checkpoint("40"), run.checkpoint("40"))


def test_files_of_another_run_are_refused(
    run: RecordedRun, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    export(run, tmp_path / "out")
    other = make(tiny_corpus, tmp_path / "other", seeds={"order": 4})
    with pytest.raises(ValueError, match=r"steps_000001_to_000040\.parquet: is of another export"):
        export(other, tmp_path / "out")
    (tmp_path / "out" / files(tmp_path / "out")[0]).write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"no parquet file .*remove it"):
        export(run, tmp_path / "out")


def test_tokens_that_the_ledger_does_not_know_are_not_written(
    own_corpus: TinyCorpus, tmp_path: Path
) -> None:
    run = make(own_corpus, tmp_path / "run")
    pieces = run.order.pieces(50, 51)
    source = own_corpus.folder / run.order.source_names[pieces.source[0]]
    offset = int(pieces.offset[0])
    change_token(source, document=int(pieces.document[0]), offset=offset)
    with pytest.raises(ValueError, match="not those that the ledger has recorded"):
        export(run, tmp_path / "out")
    left = [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert left in ([], ["steps_000001_to_000040.parquet"])


def test_skipped_rows_are_in_no_file(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    data = json.loads(json.dumps(tiny_corpus.data).replace('"long"', '"decay"'))
    run = make(tiny_corpus, tmp_path / "run", data={**data, "skip_rows": [[20, 60]]})
    export(run, tmp_path / "out")
    assert [row["g"] for row in read(tmp_path / "out")][15:25] == [*range(15, 20), *range(60, 65)]


def test_ids_come_from_the_record_of_the_corpus(tmp_path: Path, own_corpus: TinyCorpus) -> None:
    write_sidecar(own_corpus.folder / "alpha")
    run = make(own_corpus, tmp_path / "run")
    export(run, tmp_path / "out")
    rows = read(tmp_path / "out")
    assert {row["source"] for row in rows} == {"alpha", "beta"}
    for row in rows:
        known = row["source"] == "alpha"
        assert row["ids"] == [f"id-{d}" if known else None for d in row["documents"]]
        assert row["urls"] == [None] * len(row["documents"])


def test_row_groups_are_read_once_for_many_files(
    tmp_path: Path, own_corpus: TinyCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not once for each step, nor for each file."""
    from megatron_ettin.data.provenance import Provenance

    write_sidecar(own_corpus.folder / "alpha", group=50)
    run = make(own_corpus, tmp_path / "run")
    groups = -(-run.order.corpus("alpha").num_documents // 50)
    read, found = Provenance._read, []

    def record(self: Provenance, group: int, columns: list[str]) -> pa.Table:
        found.append(group)
        return read(self, group, columns)

    monkeypatch.setattr(Provenance, "_read", record)
    export(run, tmp_path / "out")
    assert len(files(tmp_path / "out")) == 5
    assert found == list(range(groups))
    rows = read_ids(tmp_path / "out")
    # In short stretches the same, by more passes; each in ascending order.
    monkeypatch.setattr(provenance_of_rows, "STRETCH_BYTES", 500)
    monkeypatch.setattr(provenance_of_rows, "CHUNK_ROWS", 7)
    export(run, tmp_path / "again")
    assert read_ids(tmp_path / "again") == rows
    passes = 1 + int((np.diff(found[groups:]) <= 0).sum())
    assert 2 < passes < run.steps_done // 2


def read_ids(folder: Path) -> list[list[str]]:
    return [row["ids"] for row in read(folder)]


def write_sidecar(prefix: Path, group: int = 2**16) -> None:
    from megatron_ettin.data.provenance import SCHEMA, sidecar_path

    file = TokenFile(str(prefix))
    count = file.num_documents
    columns = [
        np.arange(count),
        [f"id-{i}" for i in range(count)],
        [None] * count,
        [bytes(32)] * count,
        file.lengths.astype(np.int64),
        pa.array(["a.jsonl"] * count).dictionary_encode(),
        np.arange(1, count + 1),
    ]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
    with pq.ParquetWriter(sidecar_path(prefix), SCHEMA) as writer:
        writer.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA), row_group_size=group)
        writer.add_key_value_metadata({"tokens": str(file.num_tokens)})


def test_what_was_exported_can_be_imported(run: RecordedRun, tmp_path: Path) -> None:
    export(run, tmp_path / "out")
    found = import_ettin(tmp_path / "out", tmp_path / "corpora" / "back")
    rows = read(tmp_path / "out")
    corpus = TokenFile(str(tmp_path / "corpora" / "back"))
    assert corpus.num_documents == found.documents == len(rows)
    for document, row in enumerate(rows):
        assert corpus.tokens(document).tolist() == row["input_ids"]
    steps = pq.read_table(tmp_path / "corpora" / "back.steps.parquet").to_pylist()
    assert [row["step"] for row in steps] == [row["step"] for row in rows]
    assert [row["ordinal"] for row in steps] == list(range(len(rows)))
    ends = [40, 130, 158, 160]
    assert [row["checkpoint"] for row in steps] == [
        1 + sum(row["step"] > end for end in ends) for row in rows
    ]
    assert (found.longest, found.dtype) == (max(len(row["input_ids"]) for row in rows), "uint16")


def test_the_snippet_makes_rows_of_the_record(run: RecordedRun, tmp_path: Path) -> None:
    """Its sections build an order in which each recorded row is a row, nothing cut or packed."""
    from megatron_ettin.order import SampleOrder

    export(run, tmp_path / "out")
    import_ettin(tmp_path / "out", tmp_path / "back")
    snippet = yaml.safe_load((tmp_path / "back.yaml").read_text())
    (phase,) = snippet["phases"]
    data = snippet["data"]
    sources = {name: SourceConfig(**source) for name, source in data["sources"].items()}
    order = SampleOrder(
        phases=[PhaseConfig(**{**phase, "global_batch_size": 8})],
        data=DataConfig(tokenizer="unused", sources=sources, blend=data["blend"]),
        seed=1,
        tokenizer_sha256="",
        ids=run.order.ids,
    )
    drawn = sorted(tokens.tolist() for tokens in order.tokens(0, order.num_rows))
    assert drawn == sorted(row["input_ids"] for row in read(tmp_path / "out"))


def write_record(folder: Path, name: str, steps: list[int], ids: list[Any], **more: Any) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = more.pop("kind", pa.list_(pa.uint32()))
    pq.write_table(pa.table({"input_ids": pa.array(ids, kind), "step": steps, **more}), path)
    return path


def test_folders_files_and_steps_are_put_in_order(tmp_path: Path) -> None:
    write_record(tmp_path, "decay_000001/steps_000001_to_000100.parquet", [1], [[7]])
    write_record(tmp_path, "ext_checkpoint_000010/steps_000001_to_000100.parquet", [1], [[6]])
    write_record(tmp_path, "ext_checkpoint_000009/steps_000001_to_000100.parquet", [1], [[5]])
    last = "checkpoint_000002/steps_000101_to_000200.parquet"
    write_record(tmp_path, last, [102, 101, 102, 101], [[3, 3], [1], [4], [2, 2, 2]])
    write_record(tmp_path, "checkpoint_000001/steps_000001_to_000100.parquet", [1], [[70_000]])
    found = import_ettin(tmp_path, tmp_path / "back")
    corpus = TokenFile(str(tmp_path / "back"))
    documents = [corpus.tokens(i).tolist() for i in range(corpus.num_documents)]
    assert documents == [[70_000], [1], [2, 2, 2], [3, 3], [4], [5], [6], [7]]
    assert (found.dtype, found.longest) == ("int32", 3)
    rows = pq.read_table(tmp_path / "back.steps.parquet")["row"].to_pylist()
    assert rows == [0, 1, 3, 0, 2, 0, 0, 0]


FIRST = "checkpoint_000001/steps_000001_to_000100.parquet"


@pytest.mark.parametrize(
    ("name", "steps", "ids", "more", "message"),
    [
        (FIRST, [1, 2], [[1], []], {}, "parquet: row 1: has no input_ids"),
        (FIRST, [1, 2], [[1], None], {}, "parquet: row 1: has no input_ids"),
        (FIRST, [1, 2], [[1], [2, None]], {}, "parquet: row 1: input_ids hold None"),
        (FIRST, [1, 2], [[1], [2**31]], {}, "row 1: input_ids hold 2147483648; ids are 0 to"),
        (FIRST, [1, None], [[1], [2]], {}, "parquet: row 1: has no step"),
        (FIRST, [1, 101], [[1], [2]], {}, "row 1: is of step 101, not of 1 to 100"),
        (FIRST, [1], ["x"], {"kind": pa.string()}, "input_ids are string, not lists of integers"),
        ("run/steps_000001_to_000100.parquet", [1], [[1]], {}, r"run/steps.*expected \[ext_"),
        ("checkpoint_000001/data.parquet", [1], [[1]], {}, "data.parquet: expected"),
    ],
)
def test_a_record_that_is_wrong_is_named(
    tmp_path: Path,
    name: str,
    steps: list[int],
    ids: list[Any],
    more: dict[str, Any],
    message: str,
) -> None:
    write_record(tmp_path, name, steps, ids, **more)
    with pytest.raises(ValueError, match=message):
        import_ettin(tmp_path, tmp_path / "back")
    assert [path.name for path in tmp_path.glob("back*")] == []


def test_ids_beyond_the_tokenizer_are_named(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    write_record(tmp_path, FIRST, [1, 1], [[1], [2, tiny_corpus.vocab_size]])
    with pytest.raises(ValueError, match=r"row 1: input_ids hold 512; ids are 0 to 511"):
        import_ettin(tmp_path, tmp_path / "back", tokenizer=tiny_corpus.folder / "tokenizer")


def test_steps_twice_and_nothing_at_all(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder with files"):
        import_ettin(tmp_path, tmp_path / "back")
    write_record(tmp_path, FIRST, [1], [[1]])
    write_record(tmp_path, "checkpoint_000001/steps_000100_to_000200.parquet", [100], [[1]])
    with pytest.raises(ValueError, match="begins before"):
        import_ettin(tmp_path, tmp_path / "back")


def test_a_corpus_is_never_replaced(tmp_path: Path) -> None:
    write_record(tmp_path, FIRST, [1], [[1]])
    import_ettin(tmp_path, tmp_path / "back")
    with pytest.raises(FileExistsError, match=r"back\.idx: exists already"):
        import_ettin(tmp_path, tmp_path / "back")


def test_the_commands(run: RecordedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(tmp_path / "out")
    order_tool.main(
        [
            *("export", "--layout", "ettin", "--run", str(run.folder), "--output", output),
            *("--to", "step_00000040", "--json"),
        ]
    )
    answer = json.loads(capsys.readouterr().out)
    assert answer["rows"] == 40
    assert answer["notes"] == ["the 120 steps after step_00000040 are not part of it"]
    order_tool.main(["import-ettin", "--input", output, "--output", str(tmp_path / "b"), "--json"])
    assert json.loads(capsys.readouterr().out)["documents"] == 40


def test_a_run_that_megatron_trained(tmp_path: Path) -> None:
    from tests.unit.mcore_runs import EMPTY, train

    trained = train(tmp_path / "mcore", samples=60, checkpoints=[2, 6])
    run = open_run(trained.folder)
    export(run, tmp_path / "out")
    assert [name.split("/")[0] for name in files(tmp_path / "out")] == [
        "checkpoint_000001",
        "checkpoint_000002",
    ]
    rows = read(tmp_path / "out")
    assert [row["g"] for row in rows] == list(range(60))
    assert [row["step"] for row in rows] == [1 + g // 10 for g in range(60)]
    for row in rows:
        assert row["input_ids"] == trained[row["g"]].tolist()
        with_tokens = [d for d in trained.documents(row["g"]) if d != EMPTY]
        assert row["documents"] == with_tokens
    assert "Megatron-LM" in (tmp_path / "out" / "README.md").read_text()
