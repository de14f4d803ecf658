"""Questions about a run over shards have the answers of the run over the one pair."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from megatron_ettin.data.tokenize import load_tokenizer
from megatron_ettin.queries.batch import describe_batch
from megatron_ettin.queries.documents import DocumentName
from megatron_ettin.queries.export import export_ettin
from megatron_ettin.queries.exposures import count_exposures
from megatron_ettin.queries.plan import build_plans
from megatron_ettin.queries.recorded_run import RecordedRun, open_run
from megatron_ettin.queries.sql import run_query
from megatron_ettin.queries.unseen import draw_unseen
from megatron_ettin.queries.verify import verify
from megatron_ettin.queries.where import locate
from tests.conftest import TinyCorpus
from tests.mutations import change_token
from tests.runs import record_run, tiny_config
from tests.shards import cut_into_shards, describe_shards

PHASES: list[dict[str, Any]] = [
    {"name": "short", "train_tokens": 20_000, "seq_length": 128, "global_batch_size": 4},
    {"name": "long", "train_tokens": 10_000, "seq_length": 256, "global_batch_size": 3},
]
CUTS = [50, 50, 200, 450]


def record(corpus: TinyCorpus, folder: Path, prefix: str) -> RecordedRun:
    data = {**corpus.data, "sources": {**corpus.data["sources"], "alpha": {"prefix": prefix}}}
    config = tiny_config(corpus, folder, phases=PHASES, data=data)
    return open_run(record_run(config, steps=30, save_steps=[10]))


@pytest.fixture(scope="module")
def runs(
    tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RecordedRun, RecordedRun]:
    """Return two runs over the same documents: alpha is one pair, or a folder of shards."""
    folder = tmp_path_factory.mktemp("runs")
    digest = load_tokenizer(tiny_corpus.folder / "tokenizer").digest
    described = []
    for name, cuts in (("pair", []), ("shards", CUTS)):
        shards = cut_into_shards(tiny_corpus.folder / "alpha", folder / name, cuts)
        describe_shards(shards, digest)
        prefix = shards[0] if name == "pair" else str(folder / name)
        described.append(record(tiny_corpus, folder / f"{name}_run", prefix))
    return described[0], described[1]


@pytest.mark.parametrize(
    "name",
    [
        DocumentName(doc="alpha:49"),
        DocumentName(doc="alpha:50"),
        DocumentName(id="doc 3"),
        DocumentName(id="doc 321", source="alpha"),
    ],
)
def test_documents_are_found(
    runs: tuple[RecordedRun, RecordedRun], tmp_path: Path, name: DocumentName
) -> None:
    answers = [locate(run, name) for run in runs]
    assert answers[0].documents == answers[1].documents
    exposures = [count_exposures(run, name, run.checkpoints[-1]) for run in runs]
    assert exposures[0].documents == exposures[1].documents
    (tmp_path / "text").write_text("doc 3\n")
    texts = [locate(run, DocumentName(text_file=tmp_path / "text")) for run in runs]
    assert texts[0].documents == texts[1].documents
    assert [document.ordinal for document in texts[1].documents] == [3, 13]


def test_batches_and_tables_are_the_same(runs: tuple[RecordedRun, RecordedRun]) -> None:
    for step in (1, 7, 30):
        batches = [describe_batch(run, step, with_text=True, is_masked=True) for run in runs]
        assert batches[0].rows == batches[1].rows
    for query in (
        "SELECT * FROM docs ORDER BY source, ordinal",
        "SELECT * FROM segments ORDER BY g, slot",
    ):
        tables = [run_query(run, query).table for run in runs]
        assert tables[0].to_pylist() == tables[1].to_pylist()
    unseen = [draw_unseen(run, run.checkpoints[0], num=20, seed=3) for run in runs]
    assert unseen[0].documents == unseen[1].documents


def test_exports_are_the_same(runs: tuple[RecordedRun, RecordedRun], tmp_path: Path) -> None:
    rows = []
    for number, run in enumerate(runs):
        export_ettin(run, tmp_path / str(number), run.checkpoint("0"), run.checkpoints[0])
        paths = sorted((tmp_path / str(number)).rglob("*.parquet"))
        rows.append([row for path in paths for row in pq.read_table(path).to_pylist()])
    assert rows[0] == rows[1]


@pytest.fixture
def run(tiny_corpus: TinyCorpus, tmp_path: Path) -> RecordedRun:
    """Return a run over a folder of three shards, which a test may change."""
    folder = tmp_path / "alpha"
    cut_into_shards(tiny_corpus.folder / "alpha", folder, CUTS)
    for shard in ("00003", "00004"):
        for path in folder.glob(f"{shard}.*"):
            path.rename(tmp_path / path.name)
    return record(tiny_corpus, tmp_path / "run", str(folder))


def test_every_shard_is_verified(run: RecordedRun) -> None:
    found = verify(run.folder, files=True, share=1.0)
    assert found.passed, (found.faults, found.changes)
    (files,) = (check for check in found.checks if check.check == "files")
    assert files.compared == 1 + 2 * 3 + 2, "the tokenizer, three shards and a pair"


def test_a_run_stays_true_when_shards_are_added(run: RecordedRun, tmp_path: Path) -> None:
    for shard in ("00003", "00004"):
        for path in tmp_path.glob(f"{shard}.*"):
            path.rename(tmp_path / "alpha" / path.name)
    found = verify(run.folder, files=True, share=1.0)
    assert found.passed, (found.faults, found.changes)
    assert "source 'alpha': 2 shards are no part of the order" in found.notes
    again = open_run(run.folder)
    assert again.order.corpus("alpha").num_documents == 200
    name = DocumentName(doc="alpha:7")
    assert locate(again, name).documents == locate(run, name).documents
    config = again.config_for("plans")
    plans = build_plans(config, recorded=again.order.spec)  # type: ignore[arg-type]
    assert plans.order_id == run.order.spec.order_id


def test_a_changed_shard_is_named(run: RecordedRun, tmp_path: Path) -> None:
    shard = tmp_path / "alpha" / "00002"
    change_token(shard, document=4)
    found = verify(run.folder, files=True, share=1.0)
    assert not found.passed
    assert any(f"{shard}.bin (source 'alpha'): tokens_sha256" in f.what for f in found.faults)
    assert f"shard 2, {shard}, had tokens_sha256" in found.changes[0]
    with pytest.raises(ValueError, match=r"shard 2, .*00002, had tokens_sha256"):
        open_run(run.folder)


def test_a_lost_shard_is_named(run: RecordedRun, tmp_path: Path) -> None:
    for path in list((tmp_path / "alpha").glob("00002.*")):
        path.unlink()
    with pytest.raises(ValueError, match="it had 3 shards, and now has 2"):
        open_run(run.folder)
    found = verify(run.folder, order=False, tokens=False, files=True)
    assert [f.what for f in found.faults] == ["source 'alpha': shard 2 is not there any more"]


def test_a_document_without_provenance_is_explained(
    tiny_corpus: TinyCorpus, run: RecordedRun
) -> None:
    digest = load_tokenizer(tiny_corpus.folder / "tokenizer").digest
    describe_shards(run.order.prefixes("alpha")[:1], digest)
    with pytest.raises(FileNotFoundError, match=r"'alpha' has no .*00001\.docs\.parquet"):
        locate(open_run(run.folder), DocumentName(id="doc 3"))
