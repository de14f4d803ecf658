"""Tokenising of batches, on one process or several; results come in the order of the batches."""

import functools
import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_ettin.data.readers import Record
from megatron_ettin.data.tokenize import Tokenizer, load_tokenizer


class EncodedPart(NamedTuple):
    """Documents of one corpus, in order."""

    tokens: NDArray[np.int32]
    """Ids of all documents, end to end."""
    lengths: NDArray[np.int64]
    """Tokens of each document, none of them 0."""
    places: NDArray[np.int64]
    """Index of each document in its batch, ascending."""
    sha256: bytes
    """SHA-256 of the UTF-8 text of each document, 32 bytes each, end to end."""


class EncodedField(NamedTuple):
    """One field of a batch of documents."""

    parts: dict[str, EncodedPart]
    dropped: int


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Settings of the tokenising; small, because every task of a worker carries them."""

    folder: Path
    digest: str
    append_eod: bool
    validation_share: float

    def encode(self, tokenizer: Tokenizer, batch: list[tuple[str, ...]]) -> list[EncodedField]:
        """Return each field of the batch as tokens."""
        return [self._encode_field(tokenizer, texts) for texts in zip(*batch, strict=True)]

    def encode_in_worker(self, batch: list[tuple[str, ...]]) -> list[EncodedField]:
        """Return the same from a worker, with the tokenizer that its process has loaded."""
        return self.encode(_worker_tokenizer(self.folder, self.digest), batch)

    def _encode_field(self, tokenizer: Tokenizer, texts: Sequence[str]) -> EncodedField:
        end = [np.array([tokenizer.ids.sep], dtype=np.int32)] if self.append_eod else []
        documents: dict[str, list[NDArray[np.int32]]] = {"document": [], "validation": []}
        lengths: dict[str, list[int]] = {"document": [], "validation": []}
        places: dict[str, list[int]] = {"document": [], "validation": []}
        hashes: dict[str, list[bytes]] = {"document": [], "validation": []}
        for place, (text, ids) in enumerate(zip(texts, tokenizer.encode_batch(texts), strict=True)):
            if not len(ids):
                continue
            sha256 = hashlib.sha256(text.encode()).digest()
            part = "validation" if _in_share(sha256, self.validation_share) else "document"
            documents[part] += [ids, *end]
            lengths[part].append(len(ids) + len(end))
            places[part].append(place)
            hashes[part].append(sha256)
        parts = {
            part: EncodedPart(
                np.concatenate([np.empty(0, dtype=np.int32), *arrays]),
                np.array(lengths[part], dtype=np.int64),
                np.array(places[part], dtype=np.int64),
                b"".join(hashes[part]),
            )
            for part, arrays in documents.items()
        }
        return EncodedField(parts, dropped=len(texts) - sum(map(len, places.values())))


def in_validation(text: str, share: float) -> bool:
    """Say whether a document belongs to the validation set: a function of its text only.

    It does if the first 8 bytes of the SHA-256 of its UTF-8 text, as a big-endian fraction of 2^64,
    are below the share. Copies of a text are therefore on the same side, and a larger share keeps
    all documents of a smaller one.
    """
    return _in_share(hashlib.sha256(text.encode()).digest(), share)


def _in_share(sha256: bytes, share: float) -> bool:
    return share > 0 and int.from_bytes(sha256[:8], "big") < share * 2**64


def encode_in_order(
    batches: Iterable[list[Record]],
    tokenizer: Tokenizer,
    *,
    workers: int,
    append_eod: bool,
    validation_share: float,
) -> Generator[tuple[list[EncodedField], list[Record]], None, None]:
    """Yield each batch encoded, with its records, in order; few batches are in memory at a time.

    One worker is this process, with the threads of the tokenizer library. More are processes of one
    thread each. They end with the generator, so close it. ChildProcessError if one of them dies.
    """
    encoder = Encoder(
        folder=tokenizer.folder,
        digest=tokenizer.digest,
        append_eod=append_eod,
        validation_share=validation_share,
    )
    if workers == 1:
        for batch in batches:
            yield encoder.encode(tokenizer, _texts(batch)), batch
        return
    # Not forked: the libraries of the readers have threads, and a fork copies their locks.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    pending: deque[tuple[Future[list[EncodedField]], list[Record]]] = deque()
    try:
        for batch in batches:
            pending.append((pool.submit(encoder.encode_in_worker, _texts(batch)), batch))
            if len(pending) > 2 * workers:
                future, done = pending.popleft()
                yield future.result(), done
        for future, done in pending:
            yield future.result(), done
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a tokenising process died, perhaps for want of memory; try fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _texts(batch: list[Record]) -> list[tuple[str, ...]]:
    # A worker needs nothing else of a record, and every byte sent to it is pickled.
    return [record.texts for record in batch]


def _start_worker() -> None:
    # The processes are the parallelism; threads of the library would fight over the cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # The parent gets Ctrl-C too and ends its workers; theirs would only print tracebacks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """End this worker when its parent is killed: it would wait for its next task for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@functools.cache
def _worker_tokenizer(folder: Path, digest: str) -> Tokenizer:
    tokenizer = load_tokenizer(folder)
    if tokenizer.digest != digest:
        raise ValueError(f"{folder}: tokenizer.json was changed while it was in use")
    return tokenizer
