"""Identity of a tokenised corpus: two hashes of its content, computed once and kept beside it.

`PREFIX.identity.json` holds the sizes, times and inodes of the .bin and .idx that were hashed.
While these match, the hashes are valid, and a corpus of any size opens at once. Otherwise the files
are hashed again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from megatron_ettin.file_lock import open_locked
from megatron_ettin.native import TokenFile
from megatron_ettin.publication import publish_text, remove_leftovers

logger = logging.getLogger(__name__)

FORMAT = "megatron-ettin-corpus-identity/2"
CHUNK_BYTES = 2**22
CHUNK_DOCUMENTS = 2**20
#: Stamps that a copy may keep (`cp -p`), and that a program may set.
KEPT_STAMPS = ("idx_bytes", "idx_mtime_ns", "bin_bytes", "bin_mtime_ns")
#: Stamps that only the kernel sets: they tell a file from its copy, and from itself before a write.
OWN_STAMPS = ("idx_inode", "idx_ctime_ns", "bin_inode", "bin_ctime_ns")


@dataclass(frozen=True, kw_only=True)
class CorpusIdentity:
    """Hashes of the content of a .bin/.idx pair, with size and time stamp of the files."""

    idx_bytes: int
    idx_mtime_ns: int
    bin_bytes: int
    bin_mtime_ns: int
    idx_inode: int
    idx_ctime_ns: int
    bin_inode: int
    bin_ctime_ns: int
    documents: int
    tokens: int
    lengths_sha256: str
    """SHA-256 of the lengths of all documents in tokens, as little-endian i64, hexadecimal."""
    tokens_sha256: str
    """SHA-256 of the .bin, hexadecimal."""

    @property
    def content(self) -> tuple[str, str]:
        """(lengths_sha256, tokens_sha256): two corpora with equal ones hold the same documents."""
        return self.lengths_sha256, self.tokens_sha256


def identify_corpus(prefix: str, *, folder: Path | None = None) -> CorpusIdentity:
    """Return the identity of PREFIX.bin and PREFIX.idx; hash the files only if none is stored.

    A stored identity, beside the corpus or in `folder`, is valid while it has the sizes, times and
    inodes of both files. Otherwise the pair is opened with all checks and hashed, with a progress
    bar on a terminal, and the identity is published in `folder`, by default beside the corpus. If
    several processes need it at the same time, one hashes and the others wait.

    Raises:
        FileNotFoundError: if the pair is not there.
        ValueError: naming file and byte if the pair is not valid, or if it changes meanwhile.
        PermissionError: before any hashing, if the identity cannot be written where it belongs.
    """
    places = [_path(prefix, None), *([] if folder is None else [_path(prefix, folder)])]
    known = _known(prefix, places)
    if known is not None:
        return known
    _require_writable(places[-1].parent)
    earlier = _stored(prefix, places, KEPT_STAMPS)
    with _one_at_a_time(prefix) as is_alone:
        known = _known(prefix, places)
        if known is None:
            if is_alone:
                remove_leftovers(places[-1])
            known = hash_corpus(prefix)
            publish_text(places[-1], _to_json(known))
    if earlier:
        _say_what_changed(prefix, earlier[-1], known)
    return known


def _known(prefix: str, places: Sequence[Path]) -> CorpusIdentity | None:
    valid = _stored(prefix, places, KEPT_STAMPS + OWN_STAMPS)
    return valid[0] if valid else None


def _stored(prefix: str, places: Sequence[Path], names: Sequence[str]) -> list[CorpusIdentity]:
    """Return the stored identities whose stamps `names` are those of the files now."""
    stamps = _stamps(prefix)
    found = [stored for path in places if (stored := _read(path)) is not None]
    return [each for each in found if all(getattr(each, name) == stamps[name] for name in names)]


def _say_what_changed(prefix: str, earlier: CorpusIdentity, now: CorpusIdentity) -> None:
    """Log whether files with their old sizes and modification times have their old content."""
    if now.content == earlier.content:
        logger.info("%s: copied, moved or touched; hashed again, the content is the same", prefix)
    for end, name in (("bin", "tokens_sha256"), ("idx", "lengths_sha256")):
        if getattr(now, name) != getattr(earlier, name):
            logger.warning(
                "%s.%s: its bytes changed, though its size and modification time did not",
                *(prefix, end),
            )


def hash_corpus(prefix: str) -> CorpusIdentity:
    """Return the identity of PREFIX.bin and PREFIX.idx as they are now, ignoring stored ones.

    Reads all of both, with a bar on a terminal, and writes nothing.

    Raises:
        FileNotFoundError: if the pair is not there.
        ValueError: naming file and byte if the pair is not valid, or if it changes meanwhile.
    """
    stamps = _stamps(prefix)
    file = TokenFile(prefix)
    identity = CorpusIdentity(
        **stamps,
        documents=file.num_documents,
        tokens=file.num_tokens,
        lengths_sha256=_hash_lengths(file),
        tokens_sha256=_hash_tokens(prefix, stamps["bin_bytes"]),
    )
    if _stamps(prefix) != stamps:
        raise ValueError(
            f"{prefix}.bin or .idx: changed while its identity was computed; start again when its"
            " writer has finished"
        )
    return identity


@contextmanager
def _one_at_a_time(prefix: str) -> Iterator[bool]:
    """Hold a lock on the .idx while one of many ranks hashes; the others then find the result.

    It only saves work: where the file system has no such locks, all of them hash. The block gets
    whether the lock is held.
    """
    with ExitStack() as held:
        is_alone = False
        with suppress(OSError):
            # For reading: the corpus may be another user's.
            held.callback(os.close, open_locked(Path(f"{prefix}.idx"), os.O_RDONLY))
            is_alone = True
        yield is_alone


def _path(prefix: str, folder: Path | None) -> Path:
    if folder is None:
        return Path(f"{prefix}.identity.json")
    # Corpora of one name in two folders must not share a file here.
    absolute = Path(prefix).absolute()
    place = hashlib.sha256(os.fsencode(absolute)).hexdigest()[:16]
    return folder / f"{absolute.name}-{place}.identity.json"


def _stamps(prefix: str) -> dict[str, int]:
    idx, data = os.stat(f"{prefix}.idx"), os.stat(f"{prefix}.bin")
    kept = (idx.st_size, idx.st_mtime_ns, data.st_size, data.st_mtime_ns)
    own = (idx.st_ino, idx.st_ctime_ns, data.st_ino, data.st_ctime_ns)
    return dict(zip(KEPT_STAMPS + OWN_STAMPS, kept + own, strict=True))


def _to_json(identity: CorpusIdentity) -> str:
    content = {"format": FORMAT, **asdict(identity)}
    return json.dumps({**content, "sha256": _seal(content)}, indent=2) + "\n"


def _seal(content: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> CorpusIdentity | None:
    """Return the stored identity, None if there is none or its seal does not match."""
    try:
        content = json.loads(path.read_bytes())
        seal = content.pop("sha256")
        whole = seal == _seal(content) and content.pop("format") == FORMAT
        return CorpusIdentity(**content) if whole else None
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError, AttributeError):
        # Damaged, or not ours: hashing again is always right.
        return None


def _require_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The file has no name, so a kill leaves nothing behind.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PermissionError(
            f"{folder}: the identity of a corpus cannot be written here ({error.strerror}); set"
            " data.plan_dir to a folder that can be written"
        ) from error


def _hash_lengths(file: TokenFile) -> str:
    content = hashlib.sha256()
    for begin in range(0, file.num_documents, CHUNK_DOCUMENTS):
        end = min(begin + CHUNK_DOCUMENTS, file.num_documents)
        content.update(file.read_lengths(begin, end).astype("<i8", copy=False).data)
    return content.hexdigest()


def _hash_tokens(prefix: str, total: int) -> str:
    content = hashlib.sha256()
    name = f"hashing {Path(prefix).name}.bin"
    bar = tqdm(total=total, desc=name, unit="B", unit_scale=True, disable=None)
    with bar, open(f"{prefix}.bin", "rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            content.update(chunk)
            bar.update(len(chunk))
    return content.hexdigest()
