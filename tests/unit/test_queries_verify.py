"""verify: a true record passes, and every kind of damage is found and named."""

import dataclasses
import json
import os
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ettin import native
from megatron_ettin.file_digests import FileList
from megatron_ettin.order.ledger import RECORD, Head, Kind, Ledger, LedgerWriter
from megatron_ettin.order.ledger.format import GENESIS, seal
from megatron_ettin.queries.answer import FAULTS_KEPT
from megatron_ettin.queries.recorded_run import open_run
from megatron_ettin.queries.verify import Verification, verify
from megatron_ettin.queries.verify_rows import SMALLEST_SAMPLE, sample_steps
from tests.conftest import TinyCorpus
from tests.mutations import change_token, swap_documents
from tests.runs import record_run, tiny_config
from tools import order as order_tool

PHASES: list[dict[str, Any]] = [
    {"name": "short", "train_tokens": 20_000, "seq_length": 128, "global_batch_size": 4},
    {"name": "long", "train_tokens": 10_000, "seq_length": 256, "global_batch_size": 3},
]


@dataclasses.dataclass(frozen=True)
class Run:
    """A run over corpora of its own, which a test may damage."""

    folder: Path
    corpus: Path
    pieces: Any
    names: list[str]
    ledger: Ledger

    def steps_with(self, documents: Iterable[tuple[str, int]]) -> list[int]:
        """Return the steps whose rows hold a piece of one of the documents."""
        rows = set()
        for source, document in documents:
            named = self.pieces.source == self.names.index(source)
            rows |= set(self.pieces.g[named & (self.pieces.document == document)].tolist())
        return self.steps_of(rows)

    def steps_of(self, rows: set[int]) -> list[int]:
        """Return the steps of some rows."""
        steps = self.ledger.steps
        return [
            int(step["step"])
            for step in steps
            if any(step["g_begin"] <= g < step["g_end"] for g in rows)
        ]


@pytest.fixture(scope="module")
def original(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("original")
    run = make(tiny_corpus, folder / "now")
    shutil.copytree(folder / "now", folder / "kept")
    return run


@pytest.fixture
def run(original: Run) -> Run:
    """Return the run and its corpora as they were, time stamps included, and in their places."""
    now = original.folder.parent
    shutil.rmtree(now)
    shutil.copytree(now.with_name("kept"), now)
    return original


def make(tiny_corpus: TinyCorpus, tmp_path: Path, **sections: Any) -> Run:
    corpus = tiny_corpus.copy_to(tmp_path / "corpus")
    config = tiny_config(corpus, tmp_path / "run", **{"phases": PHASES, **sections})
    folder = record_run(config, save_steps=[5, 20])
    opened = open_run(folder)
    return Run(
        folder=folder,
        corpus=tmp_path / "corpus",
        pieces=opened.order.pieces(0, opened.order.num_rows),
        names=opened.order.source_names,
        ledger=opened.ledger,
    )


def check_all(run: Run) -> Verification:
    return verify(run.folder, share=1.0)


def failures(found: Verification) -> dict[str, int]:
    return {check.check: check.failures for check in found.checks if check.failures}


def assert_named(run: Run, found: Verification, steps: list[int]) -> None:
    """Check that exactly the first records of these steps are named, each as it is."""
    assert len(steps) > 0
    assert [fault.step for fault in found.faults] == steps[:FAULTS_KEPT]
    for fault in found.faults:
        record = run.ledger.records[fault.seq]
        assert record["kind"] == Kind.STEP
        assert record["step"] == fault.step
        assert fault.rows == (record["g_begin"], record["g_end"])


@pytest.mark.parametrize("objective", ["MaskedLM", "CausalLM"])
def test_a_true_record_passes(tiny_corpus: TinyCorpus, tmp_path: Path, objective: str) -> None:
    data = {**tiny_corpus.data, "skip_rows": [[8, 13]]}
    corpus_data = json.loads(
        json.dumps(data).replace(str(tiny_corpus.folder), str(tmp_path / "corpus"))
    )
    run = make(tiny_corpus, tmp_path, objective=objective, data=corpus_data)
    found = check_all(run)
    assert found.passed, (found.faults, found.changes)
    assert {check.check: check.compared for check in found.checks} == {
        "chain": len(run.ledger.records),
        "order": len(run.ledger.steps),
        "tokens": len(run.ledger.steps),
        "tokenizers": 0,
    }
    assert found.chain == run.ledger.head.chain
    assert found.tokens == run.ledger.steps["n_tokens"].sum()


@pytest.mark.parametrize("keeps_time", [False, True])
def test_one_token(run: Run, keeps_time: bool) -> None:
    """A token behind the old time is found too, and its rows and steps are named."""
    source, document = run.names[run.pieces.source[0]], int(run.pieces.document[0])
    path = run.corpus / f"{source}.bin"
    stamps = path.stat().st_atime_ns, path.stat().st_mtime_ns
    offset = int(run.pieces.offset[0])
    change_token(run.corpus / source, document=document, offset=offset)
    if keeps_time:
        os.utime(path, ns=stamps)
    found = check_all(run)
    pieces = run.pieces
    holds = (pieces.source == pieces.source[0]) & (pieces.document == document)
    holds &= (pieces.offset <= offset) & (offset < pieces.offset + pieces.length)
    assert_named(run, found, run.steps_of(set(pieces.g[holds].tolist())))
    assert list(failures(found)) == ["tokens"]
    assert "other tokens than today's" in found.faults[0].what
    assert found.changes != []
    assert not found.passed


def test_the_row_is_named_where_it_is_the_only_one(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    one_row = [{**PHASES[0], "global_batch_size": 1, "train_tokens": 3000}]
    run = make(tiny_corpus, tmp_path, phases=one_row)
    source, document = run.names[run.pieces.source[0]], int(run.pieces.document[0])
    change_token(run.corpus / source, document=document, offset=int(run.pieces.offset[0]))
    fault = check_all(run).faults[0]
    assert fault.row == 0
    assert str(fault).startswith("record 2, step 1, row 0: its rows held other tokens")


def test_two_documents_of_one_length(run: Run) -> None:
    lengths = native.TokenFile(str(run.corpus / "alpha")).lengths
    seen = np.unique(run.pieces.document[run.pieces.source == run.names.index("alpha")])
    pairs = [(a, b) for a in seen for b in seen if a < b and lengths[a] == lengths[b] >= 10]
    one, other = (int(document) for document in pairs[0])
    swap_documents(run.corpus / "alpha", one, other)
    found = check_all(run)
    assert_named(run, found, run.steps_with([("alpha", one), ("alpha", other)]))
    assert list(failures(found)) == ["tokens"]


def test_two_documents_of_other_lengths(run: Run) -> None:
    lengths = native.TokenFile(str(run.corpus / "alpha")).lengths
    seen = np.unique(run.pieces.document[run.pieces.source == run.names.index("alpha")])
    one = int(seen[0])
    other = next(int(document) for document in seen if lengths[document] != lengths[one])
    swap_documents(run.corpus / "alpha", one, other)
    found = check_all(run)
    now = open_run(run.folder, must_match=False).order
    differing = {
        g
        for g in range(int(run.pieces.g[-1]) + 1)
        if [column[run.pieces.g == g].tolist() for column in run.pieces]
        != [column.tolist() for column in now.pieces(g, g + 1)]
    }
    assert not found.passed
    assert any("lengths_sha256" in change for change in found.changes)
    by_order = [fault for fault in found.faults if "other pieces" in fault.what]
    assert [fault.step for fault in by_order] == run.steps_of(differing)[:FAULTS_KEPT]


def swap_rows(path: Path, one: list[int], other: list[int], *, seal_again: bool) -> None:
    """Swap two packed rows of a plan of one block, which hold these documents of the block."""
    content = bytearray(path.read_bytes())
    (table,) = struct.unpack_from("<q", content, 136)
    (body,) = struct.unpack_from("<q", content, table + 8)
    packed, tails = struct.unpack_from("<II", content, table + 32)
    (first,) = struct.unpack_from("<q", content, 48)
    (end,) = struct.unpack_from("<q", content, 56)
    samples = -(-(end - first) // 64)
    documents = np.frombuffer(content, "<u2", tails, body + 8 * samples).tolist()
    places = [
        next(i for i in range(tails) if documents[i : i + len(row)] == row) for row in (one, other)
    ]
    for place, row in zip(places, (other, one), strict=True):
        struct.pack_into(f"<{len(row)}H", content, body + 8 * samples + 2 * place, *row)
    if seal_again:
        size = 8 * samples + (2 * (tails + packed) + 7) // 8 * 8
        hashed = native.xxh3_64(bytes(content[body : body + size]))
        struct.pack_into("<Q", content, table + 40, hashed)
        parts = [native.xxh3_64(bytes(content[:144])), native.xxh3_64(bytes(content[table:-16]))]
        hashed = native.xxh3_64(struct.pack("<QQ", *parts))
        struct.pack_into("<Q", content, len(content) - 16, hashed)
    path.write_bytes(content)


@pytest.mark.parametrize("seal_again", [False, True])
def test_two_rows_of_a_plan(run: Run, seal_again: bool) -> None:
    opened = open_run(run.folder)
    assert run.names[0] == "alpha"
    (plan,) = [plan for pool, plan in opened.order.plans(0) if pool.source == "alpha"]
    pieces = plan.pieces(np.arange(plan.num_rows))
    rows = [part.tolist() for part in np.split(pieces.document, pieces.splits[1:-1])]
    of_alpha = (run.pieces.source == 0) & (run.pieces.g < opened.order.spec.phases[0].end_g)
    drawn = np.unique(run.pieces.row[of_alpha]).tolist()
    one, other = next(
        (a, b)
        for a in drawn
        for b in drawn
        if a < b and len(rows[a]) == len(rows[b]) > 1 and rows[a] != rows[b]
    )
    (path,) = [
        path
        for path in opened.order.plan_paths()
        if path.parent.name == "alpha.plans"
        and path.read_bytes()[48:64] == struct.pack("<qq", plan.first_document, plan.end_document)
    ]
    swap_rows(path, rows[one], rows[other], seal_again=seal_again)
    found = verify(run.folder, tokens=False)
    assert not found.passed
    assert failures(found).keys() == {"order"}
    if not seal_again:
        assert str(path) in found.faults[0].what
        assert found.faults[0].row is not None
        return
    moved = of_alpha & np.isin(run.pieces.row, (one, other))
    assert_named(run, found, run.steps_of(set(run.pieces.g[moved].tolist())))
    for fault in found.faults:
        inside = moved & (run.pieces.g >= fault.rows[0]) & (run.pieces.g < fault.rows[1])
        assert fault.row == run.pieces.g[inside].min()


def rewrite(run: Run, *, seal_again: bool, **fields: Any) -> int:
    """Alter the record of step 7; return its number."""
    path = run.folder / "ledger" / "records.led"
    records = np.frombuffer(bytearray(path.read_bytes()), RECORD)
    index = int(np.flatnonzero((records["kind"] == Kind.STEP) & (records["step"] == 7))[0])
    for name, value in fields.items():
        records[name][index] = value
    content = bytearray(records.tobytes())
    if seal_again:
        seal(content, GENESIS)
    path.write_bytes(content)
    return index


def test_an_altered_record_breaks_the_chain(run: Run) -> None:
    index = rewrite(run, seal_again=False, n_tokens=5)
    found = check_all(run)
    assert f"records.led: record {index}, byte {128 * index}" in found.faults[0].what
    assert found.chain is None
    assert not found.passed


@pytest.mark.parametrize("field", ["order_digest", "token_digest", "mask_digest", "n_tokens"])
def test_a_record_that_was_sealed_again(run: Run, field: str) -> None:
    """Whoever rewrites the whole chain is betrayed by sums, rows and tokens."""
    index = rewrite(run, seal_again=True, **{field: 5})
    found = check_all(run)
    named = [fault for fault in found.faults if fault.step == 7]
    assert [fault.seq for fault in named] == [index]
    check = "tokens" if field in ("token_digest", "mask_digest") else "order"
    assert failures(found)[check] == 1
    assert ("chain" in failures(found)) == (field != "mask_digest"), "checkpoints hold sums"


def write_state(run: Run, **changes: Any) -> Path:
    """Write the state.json of the first checkpoint as training does, with some fields changed."""
    point = run.ledger.checkpoints()[0]
    digests = {
        name: [int(point.payload[name][16:], 16), int(point.payload[name][:16], 16)]
        for name in ("order_digest", "token_digest")
    }
    state = {
        "g": point.g,
        "step": point.step,
        "consumed_tokens": point.payload["tokens"],
        "ledger_seq": point.head.seq,
        "ledger_chain": point.head.chain,
        **FileList({}).to_document(),
        **digests,
        **changes,
    }
    folder = run.folder / "checkpoints" / point.payload["name"]
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps(state))
    return folder / "state.json"


def test_a_checkpoint_of_this_ledger(run: Run) -> None:
    write_state(run)
    found = verify(run.folder, order=False, tokens=False)
    assert found.passed, found.faults
    assert found.checks[0].compared == len(run.ledger.records) + 1


def test_a_checkpoint_that_an_earlier_version_saved(run: Run) -> None:
    """Neither its record nor its state has digests of files; only a note says so."""
    point = run.ledger.checkpoints()[0]
    before = Head(
        point.head.seq - 1, run.ledger.records["chain"][point.head.seq - 1].tobytes().hex()
    )
    payload = {name: value for name, value in point.payload.items() if name != "files_sha256"}
    with LedgerWriter.open(run.folder / "ledger", before) as writer:
        where = {"step": point.step, "g_begin": point.g, "g_end": point.g, "phase": 0}
        writer.append(Kind.CHECKPOINT, **where, payload=payload)
    earlier = dataclasses.replace(run, ledger=Ledger.read(run.folder / "ledger"))
    path = write_state(earlier)
    state = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in state.items() if not k.startswith("files")}))
    found = verify(run.folder, order=False, tokens=False)
    assert found.passed, found.faults
    note = f"{payload['name']} is of an earlier version: nothing was recorded of its files"
    assert note in found.notes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"g": 3}, "g is 3, but its record says 20"),
        ({"consumed_tokens": 1}, "consumed_tokens is 1, but"),
        ({"token_digest": [1, 2]}, "token_digest is 00000000000000020000000000000001, but"),
        ({"ledger_chain": "00" * 32}, "its chain head is no record of this ledger"),
    ],
)
def test_a_checkpoint_of_another_state(run: Run, change: dict[str, Any], message: str) -> None:
    path = write_state(run, **change)
    found = verify(run.folder, order=False, tokens=False)
    assert [fault.what.startswith(f"{path}: {message}") for fault in found.faults] == [True]
    assert not found.passed


def test_forks_are_verified_too(run: Run) -> None:
    write_state(run)
    start = run.ledger.checkpoints()[0]
    with LedgerWriter.open(run.folder / "ledger", start.head):
        pass
    found = verify(run.folder, order=False, tokens=False)
    assert found.passed
    assert "went back to record" in found.notes[0]
    (fork,) = (run.folder / "ledger" / "forks").glob("*.led")
    content = bytearray(fork.read_bytes())
    content[200] ^= 1
    fork.write_bytes(content)
    found = verify(run.folder, order=False, tokens=False)
    assert fork.stem in found.faults[0].what
    assert not found.passed


def test_an_altered_order_file(run: Run) -> None:
    path = run.folder / "order.json"
    path.write_text(path.read_text().replace('"quota": 45875', '"quota": 45874', 1))
    found = verify(run.folder, order=False, tokens=False)
    assert "order.json: was altered: phase_ids[0]" in found.faults[0].what


def test_a_sample_is_repeatable_and_nested(run: Run) -> None:
    small, large = (sample_steps(run.ledger, share, 3).tolist() for share in (0.5, 0.9))
    count = len(run.ledger.steps)
    assert set(small) < set(large) < set(range(count))
    assert len(small) == -(-count // 2)
    # Whoever knows the seed can draw the sample anew, step by step.
    key = native.counter_key(3, native.Purpose.VERIFY, [])
    draws = [native.counter_draws(key, int(step), 1)[0] for step in run.ledger.steps["step"]]
    assert small == sorted(np.argsort(draws, kind="stable")[: len(small)].tolist())
    assert small != sample_steps(run.ledger, 0.5, 4).tolist()
    assert len(sample_steps(run.ledger, 0.001, 3)) == SMALLEST_SAMPLE
    assert sample_steps(run.ledger, 1.0, 3).tolist() == list(range(count))


def test_the_command_chooses_what_to_check(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    def checks(*options: str) -> list[str]:
        order_tool.main(["verify", "--run", str(run.folder), "--json", *options])
        return [check["check"] for check in json.loads(capsys.readouterr().out)["checks"]]

    assert checks() == ["chain", "order", "tokens", "tokenizers"]
    assert checks("--chain") == ["chain"]
    assert checks("--order") == ["chain", "order", "tokenizers"]
    assert checks("--tokens", "--sample", "0.1", "--seed", "2") == ["chain", "tokens", "tokenizers"]
    change_token(run.corpus / "alpha", document=0)
    with pytest.raises(SystemExit) as status:
        order_tool.main(["verify", "--run", str(run.folder)])
    assert status.value.code == 1
    assert capsys.readouterr().out.startswith("FAIL\n")
