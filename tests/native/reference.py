"""docs/order.md once more, slow and obvious, in pure Python: the oracle of the C++ extension."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

WORD = 1 << 64
GAMMA = 0x9E3779B97F4A7C15
PERMUTATION, MASK, NORMAL_WEIGHTS, UNIFORM_WEIGHTS, DROPOUT = 1, 2, 3, 4, 5  # docs/order.md
NOISE, MIXTURE = 8, 9


# 1. Counters


def mix64(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % WORD
    return z ^ (z >> 31)


def unmix64(z: int) -> int:
    """Undo mix64, for tests that need a draw which chance would hardly bring."""
    for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        unshifted = z
        for _ in range(64 // shift):
            unshifted = z ^ (unshifted >> shift)
        z = unshifted * pow(factor, -1, WORD) % WORD
    return z


def counter_key(seed: int, purpose: int, words: Sequence[int]) -> int:
    key = mix64((seed + GAMMA) % WORD)
    for word in (purpose, *words):
        key = mix64(((key ^ word) + GAMMA) % WORD)
    return key


def draw(key: int, index: int) -> int:
    return mix64((key + (index + 1) * GAMMA) % WORD)


def below(value: int, n: int) -> int:
    return value * n // WORD


def open_unit(value: int) -> float:
    return (value // 2**12 + 0.5) / 2**52


# 2. Permutation


def fold(a: int, b: int) -> int:
    product = a * b
    return product % WORD ^ product // WORD


def round_function(x: int, round_key: int, size: int) -> int:
    return below(fold(fold(x ^ round_key, 0x6A09E667F3BCC909), 0xBB67AE8584CAA73B), size)


def fisher_yates(n: int, key: int) -> list[int]:
    table = list(range(n))
    for i in range(n - 1, 0, -1):
        j = below(draw(key, i), i + 1)
        table[i], table[j] = table[j], table[i]
    return table


def permute(n: int, key: int, index: int) -> int:
    if n <= 65_536:
        return fisher_yates(n, key)[index]
    s = (n - 1).bit_length() // 2
    a = -(-n // 2**s)
    while True:
        left, right = divmod(index, 2**s)
        for r in range(8):
            if r % 2 == 0:
                left = (left + round_function(right, draw(key, r), a)) % a
            else:
                right = (right + round_function(left, draw(key, r), 2**s)) % 2**s
        index = left * 2**s + right
        if index < n:
            return index


# 3. Blend


def blend_table(quotas: Sequence[int]) -> tuple[list[int], list[int]]:
    period = sum(quotas)
    count = [0] * len(quotas)
    sources, ranks = [], []
    for j in range(period):
        deficits = [q * (j + 1) - period * c for q, c in zip(quotas, count, strict=True)]
        source = deficits.index(max(deficits))
        sources.append(source)
        ranks.append(count[source])
        count[source] += 1
    return sources, ranks


# 4. Phase


@dataclass(frozen=True, kw_only=True)
class Source:
    id: int
    quota: int
    rows: int
    drawn: int


def locate(seed: int, sources: Sequence[Source], n: int) -> tuple[int, int, int]:
    """Count the draws of each source one by one: no ranks, no division by the period."""
    table, _ = blend_table([source.quota for source in sources])
    slots = [table[i % len(table)] for i in range(n + 1)]
    source = sources[slots[n]]
    drawn = source.drawn + slots[:n].count(slots[n])
    epoch, index = divmod(drawn, source.rows)
    key = counter_key(seed, PERMUTATION, [source.id, epoch])
    return slots[n], epoch, permute(source.rows, key, index)


# 5. Rows


@dataclass(frozen=True)
class Piece:
    document: int
    offset: int
    length: int
    cls: bool
    sep: bool
    ends_document: bool

    @property
    def slots(self) -> int:
        return self.length + self.cls + self.sep


def cut_document(document: int, length: int, seq_length: int, specials: str) -> list[Piece]:
    add = specials == "add"
    capacity = seq_length - 2 if add else seq_length
    pieces = []
    for offset in range(0, length, capacity):
        size = min(capacity, length - offset)
        pieces.append(Piece(document, offset, size, add, add, offset + size == length))
    return pieces


def pack_best_fit(
    documents: Sequence[tuple[int, int]], seq_length: int, specials: str, max_segments: int
) -> list[list[Piece]]:
    pieces = [p for d, length in documents for p in cut_document(d, length, seq_length, specials)]
    full = [[piece] for piece in pieces if piece.slots == seq_length]
    tails = [piece for piece in pieces if piece.slots < seq_length]
    tails.sort(key=lambda piece: -piece.length)  # stable: equal lengths stay by document
    bins: list[list[Piece]] = []
    free: list[int] = []
    touched: list[int] = []  # when the bin last received a piece
    for time, piece in enumerate(tails):
        fitting = [
            i for i in range(len(bins)) if free[i] >= piece.slots and len(bins[i]) < max_segments
        ]
        if fitting:
            best = min(fitting, key=lambda i: (free[i], -touched[i]))
        else:
            best = len(bins)
            bins.append([])
            free.append(seq_length)
            touched.append(0)
        bins[best].append(piece)
        free[best] -= piece.slots
        touched[best] = time
    return full + [sorted(pieces, key=lambda piece: piece.document) for pieces in bins]


def pack_stream(
    documents: Sequence[tuple[int, int]], seq_length: int, specials: str
) -> list[list[Piece]]:
    """Lay out the block slot by slot; "c" and "s" are [CLS] and [SEP], numbers are tokens."""
    stream: list[tuple[int, int, str | int]] = []  # document, its tokens, what the slot holds
    for document, length in documents:
        slots: list[str | int] = ["c", *range(length), "s"]
        stream += [
            (document, length, slot) for slot in (slots if specials == "add" else slots[1:-1])
        ]
    rows = []
    for begin in range(0, len(stream), seq_length):
        row = stream[begin : begin + seq_length]
        pieces = []
        for document, length in dict.fromkeys((d, n) for d, n, _ in row):
            held = [slot for d, _, slot in row if d == document]
            tokens = [slot for slot in held if isinstance(slot, int)]
            offset = tokens[0] if tokens else 0 if "c" in held else length
            ends = held[-1] == ("s" if specials == "add" else length - 1)
            pieces.append(Piece(document, offset, len(tokens), "c" in held, "s" in held, ends))
        rows.append(pieces)
    return rows


def plan_rows(
    lengths: Sequence[int],
    first: int,
    end: int,
    seq_length: int,
    *,
    pack: str,
    specials: str,
    min_doc_tokens: int,
    max_segments: int,
    block: int = 65_536,
) -> list[list[Piece]]:
    rows: list[list[Piece]] = []
    for begin in range(first, end, block):
        documents = [
            (document, lengths[document])
            for document in range(begin, min(begin + block, end))
            if lengths[document] >= max(min_doc_tokens, 1)
        ]
        if pack == "bfd":
            rows += pack_best_fit(documents, seq_length, specials, max_segments)
        elif pack == "concat":
            rows += pack_stream(documents, seq_length, specials)
        else:
            pieces = (cut_document(d, length, seq_length, specials) for d, length in documents)
            rows += [[piece] for document in pieces for piece in document]
    return rows


# 6. Stream


@dataclass(frozen=True, kw_only=True)
class Stream:
    tokens: list[int]
    position_ids: list[int]
    cu_seqlens: list[int]
    segment_kind: list[int]
    num_tokens: list[int]


def assemble(
    rows: Sequence[Sequence[tuple[list[int], bool]]],
    seq_length: int,
    max_segments: int,
    pad_id: int,
) -> Stream:
    """rows: for each row its segments as (slots with specials, ends_document); [] is idle.

    A concat row is one segment, said to end its document.
    """
    stream = Stream(tokens=[], position_ids=[], cu_seqlens=[0], segment_kind=[], num_tokens=[])
    for pieces in rows:
        used = sum(len(slots) for slots, _ in pieces)
        segments = [(slots, 2 if ends else 1) for slots, ends in pieces]
        segments.append(([pad_id] * (seq_length - used), 0))
        segments += [([], 0)] * (max_segments + 1 - len(segments))
        for slots, kind in segments:
            stream.tokens.extend(slots)
            stream.position_ids.extend(range(len(slots)))
            stream.cu_seqlens.append(len(stream.tokens))
            stream.segment_kind.append(kind)
        stream.num_tokens.append(used)
    return stream


# 7. Masks


def mask_row(
    tokens: Sequence[int],
    g: int,
    *,
    mask_seed: int,
    mask_rate: float,
    mask_id: int,
    vocab_size: int,
    special_ids: Sequence[int],
) -> tuple[list[int], list[bool]]:
    masked, selected = list(tokens), [False] * len(tokens)
    if g < 0:
        return masked, selected
    key = counter_key(mask_seed, MASK, [g])
    for p, token in enumerate(tokens):
        share = Fraction(draw(key, 3 * p) // 2**11, 2**53)
        if token in special_ids or not share < Fraction(mask_rate):
            continue
        selected[p] = True
        tenth = below(draw(key, 3 * p + 1), 10)
        if tenth < 8:
            masked[p] = mask_id
        elif tenth == 8:
            masked[p] = below(draw(key, 3 * p + 2), vocab_size)
    return masked, selected


def noise_level(g: int, *, mask_seed: int) -> Fraction:
    place = (draw(counter_key(mask_seed, NOISE, []), 0) + g * GAMMA) % WORD // 2**11
    return 1 - Fraction(place, 2**53)


def diffused_labels(
    tokens: Sequence[int], g: int, *, mask_seed: int, mask_id: int, **rules: Any
) -> tuple[list[int], list[int | None]]:
    rules |= {"mask_rate": float(noise_level(g, mask_seed=mask_seed))}
    _, labels = masked_labels(tokens, g, mask_seed=mask_seed, mask_id=mask_id, **rules)
    inputs = [t if label is None else mask_id for t, label in zip(tokens, labels, strict=True)]
    return inputs, labels


# 7. Labels: a row with its segments (length, kind) gives inputs, and a label or None per slot


def segment_of_slots(segments: Sequence[tuple[int, int]]) -> list[int]:
    return [number for number, (length, _) in enumerate(segments) for _ in range(length)]


def causal_labels(
    tokens: Sequence[int], segments: Sequence[tuple[int, int]], specials: str
) -> list[int | None]:
    segment = segment_of_slots(segments)
    labels: list[int | None] = [None] * len(tokens)
    for p in range(len(tokens) - 1):
        _, kind = segments[segment[p]]
        if kind == 0 or segment[p + 1] != segment[p]:
            continue
        is_last = p + 2 == len(tokens) or segment[p + 2] != segment[p]
        if specials == "add" and kind == 1 and is_last:
            continue
        labels[p] = tokens[p + 1]
    return labels


def masked_labels(
    tokens: Sequence[int], g: int, **rules: Any
) -> tuple[list[int], list[int | None]]:
    inputs, selected = mask_row(tokens, g, **rules)
    return inputs, [
        t if is_selected else None for t, is_selected in zip(tokens, selected, strict=True)
    ]


def masked_next_labels(
    tokens: Sequence[int], segments: Sequence[tuple[int, int]], g: int, **rules: Any
) -> tuple[list[int], list[int | None]]:
    segment = segment_of_slots(segments)
    inputs, selected = mask_row(tokens, g, **rules)
    labels: list[int | None] = [None] * len(tokens)
    for p, token in enumerate(tokens):
        if p == 0 or segment[p] != segment[p - 1]:
            inputs[p] = token
        elif selected[p]:
            labels[p - 1] = token
    return inputs, labels


def dropout_row(
    g: int, *, seed: int, layer: int, seq_length: int, channels: int, rate: float
) -> list[Fraction]:
    key = counter_key(seed, DROPOUT, [layer, g])
    threshold = min(-(-Fraction(rate) * 65536 // 1), 65535)
    factors = []
    for e in range(seq_length * channels):
        lane = draw(key, e // 4) >> 16 * (e % 4) & 0xFFFF
        factors.append(Fraction(0) if lane < threshold else Fraction(65536, 65536 - threshold))
    return factors


# 8. Weights


def hash_name(name: str) -> int:
    value = 0xCBF29CE484222325
    for byte in name.encode():
        value = (value ^ byte) * 0x100000001B3 % WORD
    return mix64(value)


def uniforms(name: str, seed: int, purpose: int, begin: int, count: int) -> NDArray[np.float64]:
    key = counter_key(seed, purpose, [hash_name(name)])
    return np.array([open_unit(draw(key, i)) for i in range(begin, begin + count)])


# The .idx file of documents of one sequence each


def index_bytes(lengths: Sequence[int], dtype_code: int, item_size: int) -> bytes:
    n = len(lengths)
    offsets = [item_size * sum(lengths[:i]) for i in range(n)]
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, dtype_code, n, n + 1)
    body = struct.pack(f"<{n}i", *lengths) + struct.pack(f"<{n}q", *offsets)
    return header + body + struct.pack(f"<{n + 1}q", *range(n + 1))


# 10. Digests: the bytes of a row, and the hash of another implementation


def order_row_bytes(g: int, source_id: int, epoch: int, row: int, pieces: Sequence[Piece]) -> bytes:
    content = struct.pack("<QQQQI", g, source_id, epoch, row, len(pieces))
    for piece in pieces:
        flags = piece.cls + 2 * piece.sep + 4 * piece.ends_document
        content += struct.pack("<QQIB", piece.document, piece.offset, piece.length, flags)
    return content


def token_row_bytes(g: int, pieces: Sequence[Sequence[int]]) -> bytes:
    tokens = [token for piece in pieces for token in piece]
    words = [len(pieces), *(len(piece) for piece in pieces), *tokens]
    return struct.pack(f"<Q{len(words)}I", g, *words)


def mask_row_bytes(
    g: int,
    inputs: Sequence[int],
    labels: Sequence[int | None],
    weights: Sequence[float] | None = None,
) -> bytes:
    content = struct.pack("<Q", g)
    for token, label in zip(inputs, labels, strict=True):
        content += struct.pack("<II", token, 0xFFFFFFFF if label is None else label)
    if weights is None:
        return content
    used = [0.0 if label is None else w for w, label in zip(weights, labels, strict=True)]
    if all(label is None or w == 1.0 for w, label in zip(weights, labels, strict=True)):
        return content
    return content + struct.pack(f"<{len(used)}f", *used)


def hash_lanes(content: bytes) -> list[int]:
    value = xxhash.xxh3_128_intdigest(content)
    return [value % WORD, value // WORD]
