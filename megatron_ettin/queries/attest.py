"""Sign a statement of what a run was trained on, with which code, into which checkpoints."""

from __future__ import annotations

import argparse
import datetime
import getpass
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ettin import __version__
from megatron_ettin.file_digests import FileDigest
from megatron_ettin.order.ledger import Kind, Ledger, find_description
from megatron_ettin.order.run_folder import STATE_FILE, RunFolder
from megatron_ettin.order.spec import OrderSpec
from megatron_ettin.publication import publish_text
from megatron_ettin.queries.answer import add_shared_arguments, show
from megatron_ettin.queries.verify_chain import require_sound

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner

EXAMPLE = "attest --run runs/encoder --key key.pem --output attestation.json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:megatron-ettin:training-record:1"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
#: Fields of the last START or RESUME record that the statement repeats.
REPEATED = ("objective", "seeds", "config_sha256", "initialized_from")


@dataclass(frozen=True, kw_only=True)
class Attestation:
    """Summary of what was signed, and its place."""

    output: str
    key_id: str | None
    """Name of the public key, as in the envelope: a hash of it. None if nothing was signed."""
    order_id: str
    chain_head: str
    record: int
    """Number of the record whose chain hash the head is."""
    subjects: int
    """Files whose SHA-256 is given: order.json, the state of each checkpoint, and --subject."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_shared_arguments(parser, EXAMPLE)
    add = parser.add_argument
    key = (
        "private key that signs: PEM with an Ed25519, ECDSA or RSA key; without one, the statement "
        "itself is written, for another program to sign"
    )
    add("--key", type=Path, metavar="PEM", help=key)
    add("--output", type=Path, required=True, metavar="FILE", help="JSON file to write")
    subject = "file to attest too, such as weights that were converted; may be given again"
    add("--subject", type=Path, action="append", default=[], metavar="FILE", help=subject)


def print_answer(args: argparse.Namespace) -> int:
    """Print the answer; return 0."""
    return show(attest(args.run, key=args.key, output=args.output, files=args.subject), args)


def attest(
    folder: Path, *, key: Path | None, output: Path, files: Sequence[Path] = ()
) -> Attestation:
    """Write an in-toto statement about a run, in a DSSE envelope if there is a key to sign with.

    Raises:
        ValueError: the run's record is wrong, or `key` is no private key that can sign.
        OSError: a file cannot be read or written.
    """
    signer = None if key is None else load_signer(key)
    statement = make_statement(folder, files)
    text = json.dumps(statement, ensure_ascii=False, separators=(",", ":"))
    if signer is None:
        publish_text(output, text)
    else:
        publish_text(output, json.dumps(_sign(text.encode(), signer), indent=2) + "\n")
    head = statement["predicate"]["ledger"]["head"]
    return Attestation(
        output=str(output),
        key_id=None if signer is None else signer.public_key.keyid,
        order_id=statement["predicate"]["order"]["order_id"],
        chain_head=head["chain"],
        record=head["seq"],
        subjects=len(statement["subject"]),
    )


def load_signer(path: Path) -> CryptoSigner:
    """Read a private key; ask for its password if it has one.

    Raises:
        ValueError: naming the file, if it has no private key that can sign.
    """
    try:
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
        from securesystemslib.signer import CryptoSigner
    except ImportError as error:
        raise ValueError(f"{error.name} is missing: install megatron-ettin[attest]") from error
    content = path.read_bytes()
    try:
        try:
            private = load_pem_private_key(content, None)
        except TypeError:  # it is encrypted
            password = getpass.getpass(f"password of {path}: ")
            private = load_pem_private_key(content, password.encode())
        return CryptoSigner(private)
    except Exception as error:  # of several libraries, none with a base of its own
        raise ValueError(
            f"{path}: no private key that can sign ({error}); `openssl genpkey -algorithm ed25519 "
            f"-out key.pem` makes one"
        ) from error


def make_statement(folder: Path, files: Sequence[Path] = ()) -> dict[str, Any]:
    """Return the in-toto statement about a run, and about further files.

    Raises:
        ValueError: the run's record is wrong, or two subjects have one name.
    """
    run = RunFolder(folder)
    ledger = require_sound(folder)
    # in-toto asks for one subject at least, and a run may have no checkpoint yet.
    named = (run.order, *_states(run))
    subjects = {path.relative_to(folder).as_posix(): path for path in named}
    for path in files:
        if path.name in subjects:
            raise ValueError(f"--subject {path}: another subject is called {path.name} too")
        subjects[path.name] = path
    return {
        "_type": STATEMENT_TYPE,
        "subject": [
            {"name": name, "digest": {"sha256": FileDigest.of_file(path).sha256}}
            for name, path in subjects.items()
        ],
        "predicateType": PREDICATE_TYPE,
        "predicate": _predicate(run, ledger),
    }


def _states(run: RunFolder) -> Iterator[Path]:
    """Yield the state of each checkpoint: it lists all other files of it with their digests."""
    for checkpoint in run.complete_checkpoints():
        yield checkpoint / STATE_FILE


def _predicate(run: RunFolder, ledger: Ledger) -> dict[str, Any]:
    spec = run.read_order()
    started = find_description(ledger.events)
    now = datetime.datetime.now(datetime.UTC)
    return {
        "attested_at": now.isoformat(timespec="seconds"),
        "attested_by": {"megatron-ettin": __version__},
        "ledger": _describe_ledger(ledger),
        "order": {
            "order_id": spec.order_id,
            "phase_ids": spec.phase_ids(),
            "phase_ends": spec.phase_ends(),
            "tokenizer_sha256": spec.tokenizer_sha256,
            "order_json_sha256": hashlib.sha256(run.order.read_bytes()).hexdigest(),
        },
        "corpora": _corpora(spec),
        "training": {name: started.get(name) for name in REPEATED},
        "software": _software(ledger),
        "checkpoints": [
            {"name": point.payload["name"], "step": point.step, "g": point.g}
            | {name: point.payload.get(name) for name in ("tokens", "files_sha256")}
            for point in ledger.checkpoints()
        ],
    }


def _describe_ledger(ledger: Ledger) -> dict[str, Any]:
    kinds = ledger.records["kind"]
    return {
        "head": ledger.head._asdict(),
        "first_record": ledger.records["chain"][0].tobytes().hex(),
        "steps": len(ledger.steps),
        "rows": int((ledger.steps["g_end"] - ledger.steps["g_begin"]).sum()),
        "tokens": int(ledger.steps["n_tokens"].sum()),
        "forks": len(ledger.forks()),
        "has_ended": bool(kinds[kinds != Kind.FORK][-1] == Kind.END),
    }


def _corpora(spec: OrderSpec) -> list[dict[str, Any]]:
    """Return the identity of each corpus; a source that grew between phases is there twice."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for phase in spec.phases:
        for pool in phase.pools:
            found[pool.source, pool.lengths_sha256, pool.tokens_sha256] = {
                "source": pool.source,
                "documents": pool.documents_in_file,
                "tokens": pool.tokens_in_file,
                "lengths_sha256": pool.lengths_sha256,
                "tokens_sha256": pool.tokens_sha256,
            }
    return list(found.values())


def _software(ledger: Ledger) -> list[dict[str, Any]]:
    """Return what the run said of its code whenever that changed, with the step before."""
    found: list[dict[str, Any]] = []
    for seq, payload in ledger.events.items():
        if "versions" not in payload:
            continue
        said = {"versions": payload["versions"], "revision": payload.get("revision")}
        if not found or any(found[-1][name] != value for name, value in said.items()):
            found.append({"after_step": int(ledger.records["step"][seq]), **said})
    return found


def _sign(content: bytes, signer: CryptoSigner) -> dict[str, Any]:
    """Return a DSSE envelope around a statement."""
    from securesystemslib.dsse import Envelope

    envelope = Envelope(content, PAYLOAD_TYPE, {})
    envelope.sign(signer)
    document: dict[str, Any] = envelope.to_dict()
    return document
