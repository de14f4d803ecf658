"""Documents of Mosaic's MDS shards: texts, or token ids as in the published Ettin corpora.

A shard is, little-endian: u32 number of samples n; u32 [n + 1] byte at which each sample begins,
then the end; the columns as JSON; the samples. A sample is u32 size of each column whose size is
not fixed, then the columns, end to end.
"""

import json
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from megatron_ettin.data.batches import (
    ReadRequest,
    TextBatch,
    TokenBatch,
    cuts,
    known,
    no_field,
    numbers,
)
from megatron_ettin.data.blocks import unpacked
from megatron_ettin.data.lines import DAMAGE
from megatron_ettin.data.storage import RawStream

TOKENS = "input_ids"
"""Column of token ids that is read where the one field asked for is not there."""
MAX_HEADER_BYTES = 2**26
"""Largest description of the columns; real ones have a few hundred bytes."""
_DTYPES = {
    8: "uint8", 9: "int8", 16: "uint16", 17: "int16", 32: "uint32", 33: "int32", 64: "uint64",
    65: "int64",
}  # fmt: skip
_NUMBERS = {
    "int": "int64",
    **{name: name for name in _DTYPES.values()},
    **{f"float{bits}": f"float{bits}" for bits in (16, 32, 64)},
}
_TEXTS = ("str", "str_int", "str_float", "str_decimal", "json")
# Widest first: ids of 32 bits, read as 16, would be every second one 0.
_WIDTHS = ("int64", "uint32", "uint16")
# A vocabulary is smaller; two ids of 16 or 32 bits, read as one, are almost always larger.
_MAX_ID = 2**24


class _Shard(NamedTuple):
    """Header of a shard."""

    offsets: NDArray[np.int64]
    """Byte at which each sample begins, then the end [n + 1]."""
    encodings: dict[str, str]
    """Kind of each column, in order."""
    sizes: list[int | None]
    """Bytes of each column; None where they vary."""


class _Samples(NamedTuple):
    """Some samples of a shard."""

    content: bytes
    first: int
    """Samples before them."""
    begins: dict[str, NDArray[np.int64]]
    """Byte of the content at which each value begins [n], by column."""
    ends: dict[str, NDArray[np.int64]]

    def values(self, column: str) -> Iterator[bytes]:
        """Yield the value of each sample."""
        for begin, end in zip(self.begins[column], self.ends[column], strict=True):
            yield self.content[begin:end]


def read_mosaic(request: ReadRequest) -> Iterator[TextBatch | TokenBatch]:
    """Yield the samples of a shard: texts, or ids where the one field is a column of ids.

    Where the one field is not there, `input_ids` is read in its place. ValueError naming file and
    byte where the shard is truncated or damaged.
    """
    file = request.file
    with file.open() as stream:
        source = _ExactReader(unpacked(file, stream))
        try:
            yield from _read_shard(request, source, stream)
            if source.read_some():
                raise _DamagedError("bytes follow after the last sample")
        except (_DamagedError, *DAMAGE) as error:
            file.check_size()
            raise ValueError(
                f"{file.path}: MDS shard truncated or damaged at byte {source.position}: {error};"
                " copy or download it again"
            ) from error
        stream.finish()


class _DamagedError(Exception):
    """Bytes that are no shard."""


class _ExactReader:
    """Reader of exact numbers of bytes."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self.position = 0
        """Bytes read so far, of a compressed shard decompressed ones."""

    def read_some(self) -> bytes:
        return self._source.read(1)

    def read(self, size: int) -> bytes:
        pieces = []
        missing = size
        while missing:
            piece = self._source.read(min(missing, 2**22))
            if not piece:
                raise _DamagedError(f"{missing} of the next {size} bytes are missing")
            pieces.append(piece)
            self.position += len(piece)
            missing -= len(piece)
        return b"".join(pieces)


def _read_shard(
    request: ReadRequest, source: _ExactReader, stream: RawStream
) -> Iterator[TextBatch | TokenBatch]:
    shard = _read_header(source)
    path = request.file.path
    fields = _find_fields(request, shard.encodings)
    try:
        names = request.origin_names(shard.encodings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for name in filter(None, names):
        if shard.encodings[name] not in (*_TEXTS, *_NUMBERS):
            raise ValueError(
                f'{path}: field "{name}" is {shard.encodings[name]}, which has no text to keep as'
                " the id or url of a document; name another with --id-key or --url-key"
            )
    is_tokens = shard.encodings[fields[0]] != "str"
    dtype: str | None = None
    for begin, end in cuts(np.diff(shard.offsets)):
        content = source.read(int(shard.offsets[end] - shard.offsets[begin]))
        samples = _split(shard, content, begin, end)
        if is_tokens:
            values = list(samples.values(fields[0]))
            encoding = shard.encodings[fields[0]]
            if encoding == "bytes":
                dtype = dtype or _width(path, fields[0], values)
                encoding = f"ndarray:{dtype}:any"
            arrays = [_ids(value, encoding) for value in values]
            yield from _token_batch(request, shard, samples, names, arrays, stream.position)
        else:
            yield from _text_batch(request, shard, samples, fields, names, stream.position)


def _read_header(source: _ExactReader) -> _Shard:
    (count,) = np.frombuffer(source.read(4), "<u4").tolist()
    offsets = np.frombuffer(source.read(4 * (count + 1)), "<u4").astype(np.int64)
    header = int(offsets[0]) - source.position
    if not 0 < header <= MAX_HEADER_BYTES or (np.diff(offsets) < 0).any():
        raise _DamagedError("the places of the samples are not ascending")
    try:
        columns = json.loads(source.read(header))
        encodings = dict(zip(columns["column_names"], columns["column_encodings"], strict=True))
        sizes = list(columns["column_sizes"])
    except (ValueError, KeyError, TypeError) as error:
        raise _DamagedError(f"the columns are not described: {error}") from error
    if len(sizes) != len(encodings):
        raise _DamagedError("the columns are not described")
    return _Shard(offsets, encodings, sizes)


def _find_fields(request: ReadRequest, encodings: dict[str, str]) -> tuple[str, ...]:
    """Return the columns to read: all of text, or a single one of ids."""
    path, fields = request.file.path, request.fields
    if len(fields) == 1 and fields[0] not in encodings and TOKENS in encodings:
        fields = (TOKENS,)
    for field in fields:
        if field not in encodings:
            raise ValueError(f"{path}: {no_field(field, list(encodings))}")
        encoding = encodings[field]
        is_ids = encoding == "bytes" or encoding.split(":")[0] == "ndarray"
        if encoding != "str" and not (is_ids and len(fields) == 1):
            raise ValueError(f'{path}: field "{field}" is {encoding}, not a string')
    return fields


def _split(shard: _Shard, content: bytes, first: int, end: int) -> _Samples:
    """Find the values of samples [first, end), whose bytes are given."""
    offsets = shard.offsets[first : end + 1] - shard.offsets[first]
    begins, lengths = offsets[:-1], np.diff(offsets)
    num_free = shard.sizes.count(None)
    if (lengths < 4 * num_free).any():
        raise _DamagedError(f"sample {first + int(np.argmin(lengths)) + 1} is too short")
    places = begins[:, None] + np.arange(4 * num_free)
    free = np.frombuffer(content, np.uint8)[places].view("<u4").astype(np.int64)
    at = begins + 4 * num_free
    starts, stops, used = {}, {}, 0
    for name, size in zip(shard.encodings, shard.sizes, strict=True):
        starts[name] = at
        at = at + (free[:, used] if size is None else size)
        used += size is None
        stops[name] = at
    wrong = at != offsets[1:]
    if wrong.any():
        sample = first + int(np.argmax(wrong)) + 1
        raise _DamagedError(f"the columns of sample {sample} are not as long as the sample")
    return _Samples(content, first, starts, stops)


def _text_batch(
    request: ReadRequest,
    shard: _Shard,
    samples: _Samples,
    fields: tuple[str, ...],
    names: tuple[str | None, str | None],
    position: int,
) -> list[TextBatch]:
    columns: list[list[str | None]] = []
    faults: dict[int, tuple[str, bytes]] = {}
    for field in fields:
        columns.append([])
        for place, value in enumerate(samples.values(field)):
            text, fault = _text(field, value)
            columns[-1].append(text)
            if fault:
                faults.setdefault(place, (fault, value))
    for place in sorted(faults):
        request.report(samples.first + place + 1, *faults[place])
    kept = [place for place in range(len(columns[0])) if place not in faults]
    ids, urls = (_origin(shard, samples, name, kept) for name in names)
    if not kept:
        return []
    texts = tuple([cast(str, column[place]) for place in kept] for column in columns)
    lines = numbers([samples.first + place + 1 for place in kept])
    return [TextBatch(texts, ids, urls, lines, position)]


def _text(field: str, value: bytes) -> tuple[str | None, str]:
    try:
        return value.decode(), ""
    except UnicodeDecodeError as error:
        return None, f'field "{field}": invalid UTF-8 at byte {error.start + 1}'


def _token_batch(
    request: ReadRequest,
    shard: _Shard,
    samples: _Samples,
    names: tuple[str | None, str | None],
    arrays: list[NDArray[Any] | str],
    position: int,
) -> list[TokenBatch]:
    """Return the ids of the samples as a batch; what is no array of ids is reported."""
    kept: list[int] = []
    good: list[NDArray[np.int32]] = []
    for place, ids in enumerate(arrays):
        if isinstance(ids, str):
            request.report(samples.first + place + 1, ids)
            continue
        kept.append(place)
        good.append(ids.astype(np.int32))
    if not kept:
        return []
    ids_, urls = (_origin(shard, samples, name, kept) for name in names)
    lines = numbers([samples.first + place + 1 for place in kept])
    lengths = np.array([len(ids) for ids in good], dtype=np.int64)
    return [TokenBatch(np.concatenate(good), lengths, ids_, urls, lines, position)]


def _origin(
    shard: _Shard, samples: _Samples, name: str | None, kept: list[int]
) -> list[str | None] | None:
    """Return the id or url of the samples that are kept, as text."""
    if name is None:
        return None
    encoding = shard.encodings[name]
    values = list(samples.values(name))
    if encoding in _NUMBERS:
        dtype = _NUMBERS[encoding]
        return [str(np.frombuffer(values[place], dtype)[0].item()) for place in kept]
    try:
        return known([values[place].decode() for place in kept])
    except UnicodeDecodeError as error:
        raise _DamagedError(f'field "{name}" is not UTF-8: {error}') from error


def _ids(value: bytes, encoding: str) -> NDArray[Any] | str:
    """Return the ids of a value of the encoding ndarray[:dtype[:shape]], or why it holds none.

    What the encoding leaves open stands before the ids.
    """
    dtype, _, shape = encoding.removeprefix("ndarray").removeprefix(":").partition(":")
    at, axes = 0, shape.count(",") + 1
    try:
        if not dtype:
            dtype, at = _DTYPES[value[0]], 1
        if not shape:
            # The number of axes and log2 of the bytes of each axis' length, in one byte.
            axes, width = value[at] >> 2, 1 << (value[at] & 3)
            at += 1 + axes * width
        ids = np.frombuffer(value, np.dtype(dtype).newbyteorder("<"), offset=at)
    except (KeyError, IndexError, ValueError, TypeError) as error:
        return f"no array of token ids: {error}"
    if axes != 1 or ids.dtype.kind not in "iu":
        return f"an array of {ids.dtype} with {axes} axes, not one of token ids"
    if len(ids) and (ids.min() < 0 or ids.max() >= 2**31):
        return f"holds {ids.min() if ids.min() < 0 else ids.max()}; token ids are 0 to {2**31 - 1}"
    return ids


def _width(path: str, field: str, values: list[bytes]) -> str:
    """Return the type of ids that are stored as nothing but their bytes.

    It is the widest one with which all values are whole and below _MAX_ID.
    """
    content = b"".join(values)
    for dtype in _WIDTHS:
        size = np.dtype(dtype).itemsize
        if all(len(value) % size == 0 for value in values):
            ids = np.frombuffer(content, np.dtype(dtype).newbyteorder("<"))
            if not len(ids) or (ids.min() >= 0 and ids.max() < _MAX_ID):
                return dtype
    raise ValueError(
        f'{path}: field "{field}" holds bytes that are no token ids of type {", ".join(_WIDTHS)}'
    )
