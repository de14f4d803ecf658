"""Documents of raw files in batches; the suffix of a file decides how it is read.

Every error names the file and the line or row, because a corpus has millions of them. A new format
is one generator function, one line in `READERS` and one in `storage.SUFFIXES` (docs/extending.md).
"""

from collections.abc import Callable, Iterator, Sequence

from megatron_ettin.data.arrow_records import read_arrow, read_parquet
from megatron_ettin.data.batches import (
    BadRecord,
    OriginFields,
    ReadRequest,
    TextBatch,
    TokenBatch,
)
from megatron_ettin.data.json_records import read_json
from megatron_ettin.data.mosaic_records import read_mosaic
from megatron_ettin.data.raw_inputs import expand_inputs
from megatron_ettin.data.storage import RawFile
from megatron_ettin.data.text_records import read_csv, read_txt

__all__ = [
    "READERS",
    "BadRecord",
    "OriginFields",
    "RawFile",
    "TextBatch",
    "TokenBatch",
    "expand_inputs",
    "read_batches",
    "read_text_batches",
]

READERS: dict[str, Callable[[ReadRequest], Iterator[TextBatch | TokenBatch]]] = {
    ".jsonl": read_json,
    ".jsonl.gz": read_json,
    ".jsonl.zst": read_json,
    ".json.gz": read_json,
    ".json.zst": read_json,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".csv": read_csv,
    ".txt": read_txt,
    ".mds": read_mosaic,
    ".mds.gz": read_mosaic,
    ".mds.zst": read_mosaic,
    ".mds.zstd": read_mosaic,
}
_ROWS = (".parquet", ".arrow", ".mds")


def read_batches(
    file: RawFile,
    fields: Sequence[str],
    origin: OriginFields | None = None,
    *,
    on_bad: Callable[[BadRecord], None] | None = None,
) -> Iterator[TextBatch | TokenBatch]:
    """Yield the documents of a file in order, in batches of about 4 MB of text.

    Args:
        file: File to read; its digest is known afterwards where it was read front to back.
        fields: Fields whose texts are wanted.
        origin: Fields of the id and the url; None: neither is wanted.
        on_bad: Gets each record that is not a document; reading then goes on after it.

    Raises:
        ValueError: A record is bad and `on_bad` is None; or the file as a whole is: truncated,
            damaged, without a wanted column, changed while it was read. The message names the file
            and the line, row or byte. The documents before it were yielded.
        OSError: The file cannot be opened or read.
    """
    suffix = file.format
    request = ReadRequest(
        file=file,
        fields=tuple(fields),
        origin=origin,
        on_bad=on_bad,
        unit=": row " if suffix.startswith(_ROWS) else ":",
    )
    return READERS[suffix](request)


def read_text_batches(files: Sequence[RawFile], fields: Sequence[str]) -> Iterator[TextBatch]:
    """Yield the texts of all files in order; `position` counts bytes over all of them.

    ValueError as from `read_batches`, for documents that are token ids, and where no file holds any
    document (empty corpus).
    """
    start, empty = 0, True
    for file in files:
        for batch in read_batches(file, fields):
            if isinstance(batch, TokenBatch):
                raise ValueError(f"{file.path}: holds token ids, and text is needed")
            empty = False
            yield batch._replace(position=start + batch.position)
        start += file.size
    if empty:
        raise ValueError(f"empty corpus: no document in {', '.join(file.path for file in files)}")
