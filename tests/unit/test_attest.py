"""A signed statement about a run, and the verifier that knows nothing of this project."""

import base64
import getpass
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from google.protobuf.json_format import ParseDict
from in_toto_attestation.v1.statement import Statement
from in_toto_attestation.v1.statement_pb2 import Statement as StatementMessage

from megatron_ettin.config import to_yaml
from megatron_ettin.order.ledger import Ledger, LedgerWriter
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.queries.attest import PAYLOAD_TYPE, attest, make_statement
from tests.conftest import TinyCorpus
from tests.keys import KEYS, write_keys
from tests.runs import record_run, tiny_config
from tests.saved_checkpoints import list_files, publish_recorded, saved_files
from tools import order as order_tool

VERIFIER = Path(__file__).parents[2] / "examples" / "verify_attestation.py"


@dataclass(frozen=True)
class Signed:
    """A run with checkpoints, and an attestation of it."""

    run: RunFolder
    attestation: Path
    private: Path
    public: Path

    def copy(self, folder: Path) -> "Signed":
        """Return the same in another folder, where a test may change it."""
        shutil.copytree(self.run.path.parent, folder, dirs_exist_ok=True)
        names = (path.name for path in (self.attestation, self.private, self.public))
        return Signed(RunFolder(folder / "run"), *(folder / name for name in names))


@pytest.fixture(scope="module")
def signed(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Signed:
    folder = tmp_path_factory.mktemp("attested")
    config = tiny_config(tiny_corpus, folder / "run")
    files = list_files(saved_files(to_yaml(config).encode()))
    run = record_run(config, steps=6, save_steps=(2, 4), files=files)
    publish_recorded(RunFolder(run))
    private, public = write_keys(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(b"weights")
    attest(run, key=private, output=folder / "attestation.json", files=[weights])
    return Signed(RunFolder(run), folder / "attestation.json", private, public)


def verify(signed: Signed, *more: str) -> str:
    """Run the verifier as somebody without this project does; return what it prints."""
    command = [sys.executable, "-I", str(VERIFIER), f"--attestation={signed.attestation}"]
    done = subprocess.run(
        [*command, f"--key={signed.public}", f"--run={signed.run.path}", *more],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def test_the_verifier_is_short_and_knows_nothing_of_the_project() -> None:
    text = VERIFIER.read_text()
    assert len(text.splitlines()) <= 150
    assert "import megatron_ettin" not in text
    assert "from megatron_ettin" not in text


def test_an_attestation_passes_with_everything_that_it_names(signed: Signed) -> None:
    checkpoints = [f"--checkpoint={path}" for path in signed.run.complete_checkpoints()]
    said = verify(signed, *checkpoints, f"--file={signed.run.path.parent / 'model.safetensors'}")
    ledger = Ledger.read(signed.run.ledger)
    assert said.splitlines()[:7] == [
        "PASS",
        "signature",
        "file order.json",
        f"ledger: {len(ledger.records)} records",
        "checkpoint step_00000002: 2 files",
        "checkpoint step_00000004: 2 files",
        "file model.safetensors",
    ]
    assert f"chain head  {ledger.head.chain}" in said
    assert f"order id    {signed.run.read_order().order_id}" in said


def test_the_statement_says_what_the_run_recorded(signed: Signed) -> None:
    envelope = json.loads(signed.attestation.read_text())
    assert envelope["payloadType"] == PAYLOAD_TYPE
    statement = json.loads(base64.b64decode(envelope["payload"]))
    made = make_statement(signed.run.path)
    assert statement["predicate"] == made["predicate"] | {
        "attested_at": statement["predicate"]["attested_at"]
    }
    spec, ledger = signed.run.read_order(), Ledger.read(signed.run.ledger)
    said = statement["predicate"]
    assert said["ledger"]["tokens"] == sum(ledger.steps["n_tokens"].tolist())
    assert {(c["source"], c["tokens_sha256"]) for c in said["corpora"]} == {
        (pool.source, pool.tokens_sha256) for phase in spec.phases for pool in phase.pools
    }
    assert [c["name"] for c in said["checkpoints"]] == ["step_00000002", "step_00000004"]
    (software,) = said["software"]
    assert software == {
        "after_step": 0,
        "versions": ledger.events[0]["versions"],
        "revision": ledger.events[0]["revision"],
    }


def test_the_statement_keeps_the_rules_of_in_toto(
    signed: Signed, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    without_checkpoint = record_run(tiny_config(tiny_corpus, tmp_path / "run"), steps=1)
    for run in (signed.run.path, without_checkpoint):
        statement = make_statement(run)
        Statement.copy_from_pb(ParseDict(statement, StatementMessage())).validate()
        assert statement["subject"][0]["name"] == "order.json"
        assert (
            statement["subject"][0]["digest"]["sha256"]
            == statement["predicate"]["order"]["order_json_sha256"]
        )


@pytest.mark.parametrize("kind", KEYS)
def test_each_kind_of_key_signs(kind: str, signed: Signed, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path, kind)
    attest(signed.run.path, key=private, output=tmp_path / "attestation.json")
    other = Signed(signed.run, tmp_path / "attestation.json", private, public)
    assert verify(other).startswith("PASS")


def test_without_a_key_the_statement_is_left_to_another_signer(
    signed: Signed, tmp_path: Path
) -> None:
    output = tmp_path / "statement.json"
    assert attest(signed.run.path, key=None, output=output).key_id is None
    statement = json.loads(output.read_text())
    assert statement.keys() == {"_type", "subject", "predicateType", "predicate"}
    assert statement["subject"] == make_statement(signed.run.path)["subject"]
    said = verify(Signed(signed.run, output, signed.private, signed.public))
    assert said.startswith("FAIL: the attestation is no DSSE envelope")


def test_a_key_with_a_password_asks_for_it(
    signed: Signed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = write_keys(tmp_path, password=b"open")
    output = tmp_path / "attestation.json"
    monkeypatch.setattr(getpass, "getpass", lambda _: "open")
    attest(signed.run.path, key=private, output=output)
    assert verify(Signed(signed.run, output, private, public)).startswith("PASS")
    monkeypatch.setattr(getpass, "getpass", lambda _: "shut")
    with pytest.raises(ValueError, match=r"key\.pem: no private key that can sign"):
        attest(signed.run.path, key=private, output=output)


def test_a_key_that_does_not_fit_is_refused(signed: Signed, tmp_path: Path) -> None:
    _, public = write_keys(tmp_path)
    said = verify(Signed(signed.run, signed.attestation, signed.private, public))
    assert said == "FAIL: no signature is that of the key: another key, or a changed statement\n"


def test_a_changed_statement_is_refused(signed: Signed, tmp_path: Path) -> None:
    copy = signed.copy(tmp_path)
    envelope = json.loads(copy.attestation.read_text())
    statement = json.loads(base64.b64decode(envelope["payload"]))
    statement["predicate"]["corpora"][0]["tokens_sha256"] = "0" * 64
    envelope["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    copy.attestation.write_text(json.dumps(envelope))
    assert verify(copy).startswith("FAIL: no signature is that of the key")


def test_a_changed_checkpoint_is_named(signed: Signed, tmp_path: Path) -> None:
    copy = signed.copy(tmp_path)
    folder = copy.run.checkpoint(4)
    weights = folder / "__0_0.distcp"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + b"\0")
    assert f"{weights}: is not the file that was signed" in verify(copy, f"--checkpoint={folder}")
    weights.write_bytes(content)
    (folder / "more").write_text("")
    assert "missing or not listed: more" in verify(copy, f"--checkpoint={folder}")
    (folder / "more").unlink()
    assert verify(copy, f"--checkpoint={folder}").startswith("PASS")
    state = folder / "state.json"
    state.write_text(state.read_text().replace('"step": 4', '"step": 5'))
    assert "signed as checkpoints/step_00000004/state.json" in verify(
        copy, f"--checkpoint={folder}"
    )


def test_a_changed_ledger_is_named(signed: Signed, tmp_path: Path) -> None:
    copy = signed.copy(tmp_path)
    records, events = copy.run.ledger / "records.led", copy.run.ledger / "events.jsonl"
    content, lines = records.read_bytes(), events.read_bytes()
    seq = len(content) // 128 - 1
    for at, byte in ((2 * 128 + 40, "record 2: wrong chain"), (len(content) - 1, f"record {seq}:")):
        records.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert byte in verify(copy)
    records.write_bytes(content[:-128])
    assert f"ends before record {seq}, which was signed" in verify(copy)
    records.write_bytes(content)
    events.write_bytes(lines.replace(b"MaskedLM", b"CausalLM", 1))
    assert "events.jsonl: not the line of record 0" in verify(copy)


def test_a_run_that_went_on_passes_and_one_that_was_written_anew_does_not(
    signed: Signed, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    copy = signed.copy(tmp_path)
    ledger = Ledger.read(copy.run.ledger)
    with LedgerWriter.open(copy.run.ledger, ledger.head) as writer:
        last = ledger.steps[-1]
        step, g = int(last["step"]) + 1, int(ledger.records["g_end"][-1])
        digests = [[1, 2]]
        writer.append_steps([step], [0], [g], [g + 8], [9], digests, digests, [3])
    assert verify(copy).startswith("PASS")
    shutil.rmtree(copy.run.path)
    record_run(tiny_config(tiny_corpus, copy.run.path), steps=6, save_steps=(2, 4))
    assert "has another chain than was signed" in verify(copy)


def test_bad_input_is_named(signed: Signed, tmp_path: Path) -> None:
    run, key = signed.run.path, signed.private
    with pytest.raises(ValueError, match=r"key\.pub: no private key that can sign .*openssl"):
        attest(run, key=signed.public, output=tmp_path / "out.json")
    with pytest.raises(FileNotFoundError):
        attest(run, key=key, output=tmp_path / "out.json", files=[tmp_path / "none"])
    twice = [signed.public, signed.copy(tmp_path / "copy").public]
    with pytest.raises(ValueError, match=r"another subject is called key\.pub too"):
        attest(run, key=key, output=tmp_path / "out.json", files=twice)
    copy = signed.copy(tmp_path / "damaged").run
    copy.order.write_text(copy.order.read_text().replace('"seed"', '"sead"'))
    with pytest.raises(ValueError, match=r"its record is wrong"):
        attest(copy.path, key=key, output=tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists(), "nothing is signed in vain"
    with pytest.raises(SystemExit, match="error: "):
        order_tool.main(
            ["attest", "--run", str(run), "--key", str(tmp_path), "--output", str(tmp_path / "o")]
        )


def test_a_run_that_has_not_begun_is_refused(signed: Signed, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(FileNotFoundError, match=r"ledger: no such folder"):
        attest(run, key=signed.private, output=tmp_path / "out.json")
    LedgerWriter.open(run / "ledger").close()
    with pytest.raises(ValueError, match=r"its record is wrong"):
        attest(run, key=signed.private, output=tmp_path / "out.json")
