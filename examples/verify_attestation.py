"""Verify what `tools/order.py attest` has signed, with Python and `cryptography` alone.

python examples/verify_attestation.py --attestation FILE --key PUBLIC.pem --run RUN_DIR

It checks the signature, then what the statement says of a run's ledger and order.json (--run), of
checkpoints (--checkpoint) and of other files (--file), and prints PASS or the first fault.
docs/attestation.md says what a PASS means; docs/ledger.md is the format of the ledger.
"""

import argparse
import base64
import hashlib
import json
import sys
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:megatron-ettin:training-record:1"
RECORD_BYTES, CHAIN_BYTES, STEP = 128, 32, 2
ECDSA_HASHES = {256: hashes.SHA256(), 384: hashes.SHA384(), 521: hashes.SHA512()}


class FaultError(Exception):
    """The attestation, or what it speaks of, is not what was signed."""


def main() -> None:
    """Check everything that the command line names, in turn."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--attestation", type=Path, required=True, metavar="FILE")
    parser.add_argument("--key", type=Path, required=True, metavar="PEM", help="public key")
    parser.add_argument("--run", type=Path, metavar="DIR", help="run_dir, or a copy of it")
    parser.add_argument("--checkpoint", type=Path, action="append", default=[], metavar="DIR")
    parser.add_argument("--file", type=Path, action="append", default=[], metavar="FILE")
    args = parser.parse_args()
    try:
        statement = open_envelope(args.attestation.read_bytes(), args.key.read_bytes())
        said, checks = statement["predicate"], ["signature"]
        if args.run is not None:
            order = {"order.json": said["order"]["order_json_sha256"]}
            checks.append(check_file(args.run / "order.json", order, "order.json"))
            checks.append(check_ledger(args.run / "ledger", said["ledger"]))
        digests = {entry["name"]: entry["digest"]["sha256"] for entry in statement["subject"]}
        checks += [check_checkpoint(folder, digests) for folder in args.checkpoint]
        checks += [check_file(path, digests, path.name) for path in args.file]
    except (FaultError, OSError) as error:
        sys.exit(f"FAIL: {error}")
    head = said["ledger"]["head"]
    print("PASS", *checks, f"signed at {said['attested_at']} by the signer's own clock", sep="\n")
    print(f"order id    {said['order']['order_id']}\nchain head  {head['chain']} ({head['seq']})")


def open_envelope(content: bytes, public_key: bytes) -> dict:
    """Return the statement in a DSSE envelope whose signature is that of the key."""
    try:
        envelope = json.loads(content)
        payload = base64.b64decode(envelope["payload"], validate=True)
        signatures = [base64.b64decode(s["sig"], validate=True) for s in envelope["signatures"]]
        payload_type = envelope["payloadType"].encode()
    except (ValueError, KeyError, TypeError) as error:
        raise FaultError(f"the attestation is no DSSE envelope: {error}") from error
    signed = b"DSSEv1 %d %b %d %b" % (len(payload_type), payload_type, len(payload), payload)
    if not any(
        fits(load_pem_public_key(public_key), signature, signed) for signature in signatures
    ):
        raise FaultError("no signature is that of the key: another key, or a changed statement")
    statement = json.loads(payload)
    kinds = (statement.get("_type"), statement.get("predicateType"))
    if kinds != (STATEMENT_TYPE, PREDICATE_TYPE):
        raise FaultError(f"the key has signed a statement of another kind: {kinds}")
    return statement


def fits(key: object, signature: bytes, signed: bytes) -> bool:
    """Tell whether a signature is that of a key."""
    try:
        if isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature, signed)
        elif isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, signed, ec.ECDSA(ECDSA_HASHES[key.curve.key_size]))
        elif isinstance(key, rsa.RSAPublicKey):
            pss = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.AUTO)
            key.verify(signature, signed, pss, hashes.SHA256())
        else:
            raise FaultError(f"{type(key).__name__}: no key of a kind that attest signs with")
    except InvalidSignature:
        return False
    return True


def check_ledger(folder: Path, said: dict) -> str:
    """Follow the chain from its beginning to the signed head; the run may have gone on since."""
    seq = said["head"]["seq"]
    size = (seq + 1) * RECORD_BYTES
    records = (folder / "records.led").read_bytes()[:size]
    if len(records) < size:
        raise FaultError(f"{folder}: ends before record {seq}, which was signed")
    # The chain before a record and its body are neighbours in the file, and the chain follows.
    chained = hashlib.sha256(b"megatron-ettin-ledger/1\0").digest() + records
    view, sha256 = memoryview(chained), hashlib.sha256
    for at in range(0, size, RECORD_BYTES):
        end = at + RECORD_BYTES
        if sha256(view[at:end]).digest() != view[end : end + CHAIN_BYTES]:
            raise FaultError(f"{folder}/records.led: record {at // RECORD_BYTES}: wrong chain")
    if records[-CHAIN_BYTES:].hex() != said["head"]["chain"]:
        raise FaultError(
            f"{folder}/records.led: record {seq} has another chain than was signed: the ledger was "
            "written anew, or the run went back before it (then it is in ledger/forks)"
        )
    lines = iter((folder / "events.jsonl").read_bytes().splitlines())
    for at in (at for at in range(0, size, RECORD_BYTES) if records[at] != STEP):
        if hashlib.sha256(next(lines, b"")).digest() != records[at + 48 : at + 80]:
            raise FaultError(f"{folder}/events.jsonl: not the line of record {at // RECORD_BYTES}")
    return f"ledger: {seq + 1} records"


def check_checkpoint(folder: Path, digests: dict) -> str:
    """Compare a checkpoint's state with the statement, and its files with the state's list."""
    state = folder / "state.json"
    check_file(state, digests, f"checkpoints/{folder.resolve().name}/state.json")
    listed = json.loads(state.read_bytes())["files"]
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    if different := present ^ (listed.keys() | {"state.json"}):
        raise FaultError(f"{folder}: missing or not listed: {', '.join(sorted(different))}")
    for name, digest in listed.items():
        if sha256_of(folder / name) != digest["sha256"]:
            raise FaultError(f"{folder / name}: is not the file that was signed")
    return f"checkpoint {folder.resolve().name}: {len(listed)} files"


def check_file(path: Path, digests: dict, name: str) -> str:
    """Compare a file with the statement's digest of that name."""
    if digests.get(name) != (found := sha256_of(path)):
        raise FaultError(f"{path}: its SHA-256 is {found}; signed as {name}: {digests.get(name)}")
    return f"file {name}"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
