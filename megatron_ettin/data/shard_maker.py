"""One shard, from raw files to its committed corpora: reading, tokenising and writing overlap."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from megatron_ettin.data.batch_tokenizer import BatchTokenizer, TokenizedTexts
from megatron_ettin.data.batches import is_large
from megatron_ettin.data.corpus_summary import CorpusSummary, forget_summary, publish_stamps
from megatron_ettin.data.duplicates import Duplicates
from megatron_ettin.data.encoding import (
    DROPPED,
    DocumentSelector,
    count_name,
    hash_documents,
)
from megatron_ettin.data.output_store import remove_file, store_files
from megatron_ettin.data.pipeline import map_in_threads, prefetch
from megatron_ettin.data.preprocess_options import PreprocessOptions, Shard
from megatron_ettin.data.progress import Progress
from megatron_ettin.data.provenance import CorpusWriter, sidecar_path
from megatron_ettin.data.quarantine import Quarantine
from megatron_ettin.data.raw_files import RawFile, TextBatch, TokenBatch
from megatron_ettin.data.shard_reading import read_shard
from megatron_ettin.data.tokenize import Tokenizer
from megatron_ettin.indexed import optimal_dtype
from megatron_ettin.order.corpus_identity import identify_corpus
from megatron_ettin.order.shard_list import DATASET_FILE

#: Threads that encode: two are as fast as the reading and writing, which share Python's lock.
NUM_ENCODERS = 2


class EncodedBatch(NamedTuple):
    """Batch of a raw file, with the ids and the hashes of each of its fields."""

    file: RawFile
    batch: TextBatch | TokenBatch
    fields: list[TokenizedTexts]
    hashes: list[NDArray[np.uint8]]
    """[n, 32] each, of `hash_documents`."""


class ShardMaker:
    """Maker of shards by one set of options; holds the tokenizer between them."""

    def __init__(
        self, options: PreprocessOptions, tokenizer: Tokenizer, library: BatchTokenizer
    ) -> None:
        """Take the library that `choose_library` returned."""
        self._options = options
        self._tokenizer = tokenizer
        self._library = library

    def make(self, shard: Shard, progress: Progress) -> dict[str, CorpusSummary]:
        """Commit the corpora of a shard; return the summary of each field.

        Raises:
            ValueError, OSError: naming file and line. What was there stays as it was.
        """
        options = self._options
        with closing(Quarantine(options.bad_records(shard), options.max_bad_share)) as quarantine:
            documents = DocumentSelector(self._tokenizer, self._library, options.rules)
            with ShardWriter(options, shard, self._tokenizer, documents) as writer:
                on_bad = quarantine.add if options.quarantines else None
                with ExitStack() as stages:
                    batches = stages.enter_context(
                        closing(prefetch(read_shard(options, shard, on_bad), _is_large))
                    )
                    encoded = prefetch(self._encoded(batches), lambda item: is_large(item.batch))
                    for item in stages.enter_context(closing(encoded)):
                        writer.add(item, progress)
                        del item  # before the next one is waited for
                        quarantine.judge(writer.records, at_end=False)
                quarantine.judge(writer.records, at_end=True)
                writer.finish()
            quarantine.publish()
        summaries = {}
        for json_key, counts in writer.counts.items():
            counts["bad"] = quarantine.records
            summaries[json_key] = self._summary(shard, json_key, counts)
            summaries[json_key].publish(options.prefix(json_key, "document", shard))
            for part in options.parts:
                prefix = options.prefix(json_key, part, shard)
                publish_stamps(prefix, [shard.before, shard.stamps])
                # Hashed now, while the pages are in memory, and not when a run starts.
                identify_corpus(str(prefix))
        store_files(options, self._files(shard))
        for file in shard.inputs:
            progress.finish_file(file.size)
        return summaries

    def _files(self, shard: Shard) -> Iterator[Path]:
        """Yield the files of a shard that a store keeps; identities hold times of this machine."""
        options = self._options
        for json_key in options.json_keys:
            for part in options.parts:
                prefix = options.prefix(json_key, part, shard)
                yield from _corpus_files(prefix)
                yield from (Path(f"{prefix}{end}") for end in (".inputs.json", ".json"))
        yield options.bad_records(shard)

    def _encoded(
        self, batches: Iterator[tuple[RawFile, TextBatch | TokenBatch]]
    ) -> Iterator[EncodedBatch]:
        def encode(item: tuple[RawFile, TextBatch | TokenBatch]) -> EncodedBatch:
            file, batch = item
            if isinstance(batch, TextBatch):
                fields = [self._library.encode(texts) for texts in batch.texts]
            else:
                fields = [TokenizedTexts(batch.tokens, batch.lengths)]
            hashes = [hash_documents(batch, field) for field in range(len(fields))]
            return EncodedBatch(file, batch, fields, hashes)

        return map_in_threads(encode, batches, NUM_ENCODERS, _is_large)

    def _summary(self, shard: Shard, json_key: str, counts: Counter[str]) -> CorpusSummary:
        options = self._options
        folder = options.prefix(json_key, "document", shard).parent
        files = [
            path
            for part in options.parts
            for path in _corpus_files(options.prefix(json_key, part, shard))
        ]
        return CorpusSummary(
            settings=options.settings(json_key),
            documents=counts["documents"],
            tokens=counts["tokens"],
            validation_documents=counts["validation_documents"],
            validation_tokens=counts["validation_tokens"],
            dropped={reason: counts[reason] for reason in (*DROPPED, "bad")},
            tokenizer_digest=self._tokenizer.digest,
            inputs=[
                {
                    "path": file.path,
                    "format": file.format,
                    "bytes": file.size,
                    "sha256": file.digest().sha256,
                }
                for file in shard.inputs
            ],
            sizes={os.path.relpath(path, folder): path.stat().st_size for path in files},
        )


class ShardWriter:
    """Writer of the corpora of a shard; the block's normal end publishes them all."""

    def __init__(
        self,
        options: PreprocessOptions,
        shard: Shard,
        tokenizer: Tokenizer,
        documents: DocumentSelector,
    ) -> None:
        """Start the files; ValueError if another process is writing this shard."""
        self._options = options
        self._shard = shard
        self._documents = documents
        self.records = 0
        """Documents that were added, stored or not."""
        self.counts: dict[str, Counter[str]] = {key: Counter() for key in options.json_keys}
        """Documents and tokens that were stored, and dropped documents, by field."""
        self._duplicates = {
            key: Duplicates.of(options, shard, index) if options.deduplicate else None
            for index, key in enumerate(options.json_keys)
        }
        self._writers: dict[tuple[str, str], CorpusWriter] = {}
        dtype = optimal_dtype(tokenizer.ids.vocab_size)
        with ExitStack() as stack:
            for key in options.json_keys:
                for part in options.parts:
                    prefix = options.prefix(key, part, shard)
                    prefix.parent.mkdir(parents=True, exist_ok=True)
                    writer = CorpusWriter(prefix, dtype, tokenizer_sha256=tokenizer.digest)
                    self._writers[key, part] = stack.enter_context(writer)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def add(self, item: EncodedBatch, progress: Progress) -> None:
        """Add the documents of a batch that the rules select."""
        made = Counter[str]()
        count = len(item.batch.lines)
        for index, key in enumerate(self._options.json_keys):
            duplicates = self._duplicates[key]
            chosen = self._documents.select(
                item.batch,
                index,
                item.fields[index],
                item.hashes[index],
                None if duplicates is None else duplicates.among(self.records, count),
                item.file.path,
            )
            self.counts[key].update(chosen.dropped)
            for part in self._options.parts:
                documents = chosen.parts[part]
                self._writers[key, part].add(documents, item.batch, item.file.path)
                self.counts[key][count_name(part, "documents")] += len(documents.lengths)
                self.counts[key][count_name(part, "tokens")] += len(documents.tokens)
                made["documents"] += len(documents.lengths)
                made["tokens"] += len(documents.tokens)
        self.records += count
        progress.advance(item.batch.position, made["documents"], made["tokens"])

    def finish(self) -> None:
        """Say that all documents are there: the corpora may replace those of an earlier run.

        Raises:
            ValueError: a corpus that is one output would be empty.
        """
        for key, counts in self.counts.items():
            for part in self._options.parts:
                if self._shard.index is None and not counts[count_name(part, "documents")]:
                    corpus = self._options.corpus(key, part)
                    raise ValueError(empty_corpus(key, corpus, counts))
        for key in self._options.json_keys:
            # Removed before the first new file is in place, and written after the last one:
            # whatever happens in between, no summary vouches for files of another run.
            for part in self._options.parts:
                forget_summary(self._options.prefix(key, part, self._shard))
                if self._shard.index is not None:
                    # It would speak of a shard that is being replaced.
                    remove_file(self._options, self._options.corpus(key, part) / DATASET_FILE)


def empty_corpus(json_key: str, corpus: Path, counts: Counter[str]) -> str:
    """Return the message for a corpus without documents."""
    dropped = ", ".join(f"{counts[reason]} {reason}" for reason in (*DROPPED, "bad"))
    return (
        f'field "{json_key}": no document for {corpus}: {counts["documents"]} for '
        f"training, {counts['validation_documents']} for validation, dropped: {dropped}"
    )


def _is_large(item: tuple[RawFile, TextBatch | TokenBatch]) -> bool:
    return is_large(item[1])


def _corpus_files(prefix: Path) -> list[Path]:
    return [Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), sidecar_path(prefix)]
