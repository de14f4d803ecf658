"""Preprocessing of raw files to a corpus: read, tokenise in parallel, split, write.

Memory is constant. The result depends on the content of the inputs, the tokenizer and the options,
never on the number of workers. A summary beside the corpus says which content it was made from.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

from tqdm import tqdm

from megatron_ettin.data.encoding import encode_in_order
from megatron_ettin.data.provenance import CorpusWriter, sidecar_path
from megatron_ettin.data.readers import OriginFields, Record, file_format, read_files
from megatron_ettin.data.tokenize import Tokenizer, load_tokenizer
from megatron_ettin.indexed import optimal_dtype
from megatron_ettin.order.corpus_identity import identify_corpus
from megatron_ettin.publication import publish_text

# Size of a batch, which a worker gets at a time: large enough to hide the cost of sending it.
BATCH_CHARACTERS = 2**20
BATCH_DOCUMENTS = 1024
HASH_CHUNK_BYTES = 2**22
# Part of every content key: raise it when the same inputs would give other files.
FORMAT_VERSION = 3


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """Inputs, output, tokenizer and options of one preprocessing run."""

    inputs: tuple[Path, ...]
    """Raw files, in the order of their documents in the corpus."""
    output_prefix: Path
    """Start of the corpora's paths: field `text` gives OUTPUT_PREFIX_text_document.bin, .idx and
    .docs.parquet."""
    tokenizer: Path
    """Tokenizer folder."""
    json_keys: tuple[str, ...] = ("text",)
    """Fields of a record; each gives one corpus."""
    id_key: str | None = None
    """Field with a document's id, kept beside the corpus; None: `id`, where a record has one."""
    url_key: str | None = None
    """Field with a document's address; None: `url`, where a record has one."""
    workers: int = 1
    """Processes that tokenise; 1 is this process with the library's own threads."""
    append_eod: bool = False
    """Append [SEP] to each document."""
    validation_share: float = 0.0
    """Share of documents, by hash of their text, that go to OUTPUT_PREFIX_text_validation."""

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant; the message names the option."""
        if self.workers < 1:
            raise ValueError(f"workers {self.workers}: at least 1 is needed")
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"validation-share {self.validation_share}: must be in [0, 1)")
        if len(set(self.json_keys)) < len(self.json_keys):
            raise ValueError(f"json-keys {list(self.json_keys)}: a field is named twice")
        for key in self.json_keys:
            if "/" in key:
                raise ValueError(f"json-keys {key!r}: becomes part of a file name, so no '/'")

    @property
    def parts(self) -> tuple[str, ...]:
        """The corpora that each field gives."""
        return ("document", "validation") if self.validation_share else ("document",)

    def prefix(self, json_key: str, part: str) -> Path:
        """Return the path of a corpus without .bin or .idx."""
        return Path(f"{self.output_prefix}_{json_key}_{part}")


@dataclass(frozen=True, kw_only=True)
class CorpusSummary:
    """Summary of a corpus: its inputs and its contents; stored beside it as PREFIX.json."""

    key: str
    """Digest of everything that decides the content; see `content_key`."""
    documents: int
    tokens: int
    """Tokens stored, with the [SEP] of --append-eod."""
    validation_documents: int
    validation_tokens: int
    dropped: int
    """Documents without any token: counted, not stored."""
    tokenizer_digest: str
    inputs: list[dict[str, str]]
    """`path` as it was given and `sha256` of each input, in order."""
    sizes: dict[str, int]
    """Bytes of each .bin, .idx and .docs.parquet, by name."""


class PreprocessResult(NamedTuple):
    """The corpora of a run."""

    corpora: dict[Path, CorpusSummary]
    """By prefix, in the order of the fields."""
    seconds: float
    """Time spent on tokenising and writing; 0 where all of it was up to date."""


def preprocess(options: PreprocessOptions) -> PreprocessResult:
    """Make the corpora, unless they are there already, made from the same content.

    Raises:
        ValueError, OSError: naming the input or tokenizer that is at fault, or a corpus of another
            tokenizer that is in the way. Corpora that were there stay as they were, and nothing new
            is visible.
    """
    tokenizer = load_tokenizer(options.tokenizer)
    hashes = hash_files(options.inputs)
    keys = {key: content_key(options, key, hashes, tokenizer.digest) for key in options.json_keys}
    current = {}
    for json_key, key in keys.items():
        prefix = options.prefix(json_key, "document")
        summary = read_summary(prefix)
        if summary is None:
            continue
        if summary.tokenizer_digest != tokenizer.digest:
            raise ValueError(
                f"{prefix}: is a corpus of another tokenizer (SHA-256 {summary.tokenizer_digest}; "
                f"{options.tokenizer}/tokenizer.json has {tokenizer.digest}); choose another "
                f"--output-prefix, or remove {prefix}.json and make the corpus anew"
            )
        if summary.key == key:
            current[prefix] = summary
    if len(current) == len(keys):
        return PreprocessResult(current, 0.0)
    _refuse_stale_validation(options)
    begin = time.monotonic()
    counts = _write_corpora(options, tokenizer)
    corpora = {}
    for json_key, key in keys.items():
        prefix = options.prefix(json_key, "document")
        corpora[prefix] = CorpusSummary(
            key=key,
            documents=counts[json_key, "document", "documents"],
            tokens=counts[json_key, "document", "tokens"],
            validation_documents=counts[json_key, "validation", "documents"],
            validation_tokens=counts[json_key, "validation", "tokens"],
            dropped=counts[json_key, "", "dropped"],
            tokenizer_digest=tokenizer.digest,
            inputs=[
                {"path": str(path), "sha256": sha256}
                for path, sha256 in zip(options.inputs, hashes, strict=True)
            ],
            sizes={path.name: path.stat().st_size for path in _corpus_files(options, json_key)},
        )
        publish_text(_summary_path(prefix), json.dumps(asdict(corpora[prefix]), indent=2) + "\n")
    seconds = time.monotonic() - begin
    for json_key in options.json_keys:
        for part in options.parts:
            # Hashed now, while the pages are in memory, and not when a run starts.
            identify_corpus(str(options.prefix(json_key, part)))
    return PreprocessResult(corpora, seconds)


def content_key(
    options: PreprocessOptions, json_key: str, hashes: Sequence[str], tokenizer_digest: str
) -> str:
    """Return the digest of all that decides the corpus of a field.

    The paths of the inputs, the number of workers and the output's name are no part of it.
    """
    content = {
        "version": FORMAT_VERSION,
        "inputs": [
            [file_format(path), sha256] for path, sha256 in zip(options.inputs, hashes, strict=True)
        ],
        "json_key": json_key,
        "origin": [options.id_key, options.url_key],
        "tokenizer": tokenizer_digest,
        "append_eod": options.append_eod,
        "validation_share": options.validation_share,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_summary(prefix: Path) -> CorpusSummary | None:
    """Return the summary of a complete corpus; None if it is missing or a file has another size."""
    try:
        summary = CorpusSummary(**json.loads(_summary_path(prefix).read_text(encoding="utf-8")))
        sizes = {name: (prefix.parent / name).stat().st_size for name in summary.sizes}
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return summary if sizes == summary.sizes else None


def hash_files(paths: Sequence[Path]) -> list[str]:
    """Return the SHA-256 of each file, hexadecimal."""
    hashes = []
    with _byte_bar(paths, "hashing inputs") as bar:
        for path in paths:
            content = hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(HASH_CHUNK_BYTES):
                    content.update(chunk)
                    bar.update(len(chunk))
            hashes.append(content.hexdigest())
    return hashes


def _write_corpora(
    options: PreprocessOptions, tokenizer: Tokenizer
) -> Counter[tuple[str, str, str]]:
    """Tokenise and write all corpora; return counts by (field, part, what)."""
    counts: Counter[tuple[str, str, str]] = Counter()
    options.output_prefix.parent.mkdir(parents=True, exist_ok=True)
    dtype = optimal_dtype(tokenizer.ids.vocab_size)
    with ExitStack() as stack:
        writers = {
            (json_key, part): stack.enter_context(
                CorpusWriter(
                    options.prefix(json_key, part), dtype, tokenizer_sha256=tokenizer.digest
                )
            )
            for json_key in options.json_keys
            for part in options.parts
        }
        bar = stack.enter_context(_byte_bar(options.inputs, "tokenising"))
        origin = OriginFields(options.id_key, options.url_key)
        batches = _batches(read_files(options.inputs, options.json_keys, origin))
        # Closing the generator ends the worker processes; the garbage collector might do it too
        # late.
        encoded_batches = encode_in_order(
            batches,
            tokenizer,
            workers=options.workers,
            append_eod=options.append_eod,
            validation_share=options.validation_share,
        )
        stack.enter_context(closing(encoded_batches))
        for fields, records in encoded_batches:
            for json_key, encoded in zip(options.json_keys, fields, strict=True):
                counts[json_key, "", "dropped"] += encoded.dropped
                for part in options.parts:
                    writers[json_key, part].add(encoded.parts[part], records)
                    counts[json_key, part, "documents"] += len(encoded.parts[part].lengths)
                    counts[json_key, part, "tokens"] += len(encoded.parts[part].tokens)
            _advance(bar, records[-1].position, counts)
        _refuse_empty(options, counts)
        for json_key in options.json_keys:
            # Removed before the first new file is in place, and written after the last one:
            # whatever happens in between, no summary vouches for files of another run.
            _summary_path(options.prefix(json_key, "document")).unlink(missing_ok=True)
    return counts


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Group records into batches of about one size."""
    batch: list[Record] = []
    characters = 0
    for record in records:
        batch.append(record)
        characters += sum(map(len, record.texts))
        if characters >= BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _byte_bar(paths: Sequence[Path], description: str) -> "tqdm[NoReturn]":
    total = sum(path.stat().st_size for path in paths)
    return tqdm(total=total, desc=description, unit="B", unit_scale=True, disable=None)


def _advance(bar: "tqdm[NoReturn]", position: int, counts: Counter[tuple[str, str, str]]) -> None:
    if bar.disable:
        return
    seconds = max(bar.format_dict["elapsed"], 1e-9)
    rates = {}
    for unit in ("documents", "tokens"):
        total = sum(count for (_, _, counted), count in counts.items() if counted == unit)
        rates[unit] = f"{total / seconds:,.0f}/s"
    bar.set_postfix(rates, refresh=False)
    bar.update(position - bar.n)


def _refuse_empty(options: PreprocessOptions, counts: Counter[tuple[str, str, str]]) -> None:
    for json_key in options.json_keys:
        for part in options.parts:
            if not counts[json_key, part, "documents"]:
                raise ValueError(
                    f'field "{json_key}": no document for {options.prefix(json_key, part)}:'
                    f" {counts[json_key, 'document', 'documents']} for training,"
                    f" {counts[json_key, 'validation', 'documents']} for validation,"
                    f" {counts[json_key, '', 'dropped']} without any token"
                )


def _refuse_stale_validation(options: PreprocessOptions) -> None:
    if options.validation_share:
        return
    for json_key in options.json_keys:
        index = Path(f"{options.prefix(json_key, 'validation')}.idx")
        if index.exists():
            raise ValueError(
                f"{index}: made by an earlier run, and without --validation-share its documents"
                " would be trained on too; remove it, or choose another --output-prefix"
            )


def _corpus_files(options: PreprocessOptions, json_key: str) -> list[Path]:
    prefixes = [options.prefix(json_key, part) for part in options.parts]
    return [
        path
        for prefix in prefixes
        for path in (Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), sidecar_path(prefix))
    ]


def _summary_path(prefix: Path) -> Path:
    return Path(f"{prefix}.json")
