"""docs/order.md as a program: which rows a run draws, what they show and score, their digests.

Written from the text alone, to be read beside it, not to be fast. Numbers in comments are sections.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import struct
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import xxhash
from record import Corpus, require, sha256

WORD, GAMMA = 2**64, 0x9E3779B97F4A7C15
BLOCK_DOCUMENTS = 65_536


# 1: counters


def mix(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31)


def key(seed: int, *words: int) -> int:
    h = mix((seed + GAMMA) % WORD)
    for word in words:
        h = mix(((h ^ word) + GAMMA) % WORD)
    return h


def draw(k: int, i: int) -> int:
    return mix((k + (i + 1) * GAMMA) % WORD)


def below(x: int, n: int) -> int:
    return x * n >> 64


# 2: permutation


@functools.lru_cache(maxsize=64)
def fisher_yates(n: int, k: int) -> list[int]:
    t = list(range(n))
    for i in range(n - 1, 0, -1):
        j = below(draw(k, i), i + 1)
        t[i], t[j] = t[j], t[i]
    return t


def fold(x: int, y: int) -> int:
    return x * y % WORD ^ x * y >> 64


def permute(n: int, k: int, x: int) -> int:
    if n <= 65_536:
        return fisher_yates(n, k)[x]
    s = (n - 1).bit_length() // 2
    b = 1 << s
    a = -(-n // b)
    while True:
        left, right = x >> s, x % b
        for r in range(8):
            half, m = (right, a) if r % 2 == 0 else (left, b)
            mixed = fold(fold(half ^ draw(k, r), 0x6A09E667F3BCC909), 0xBB67AE8584CAA73B)
            if r % 2 == 0:
                left = (left + below(mixed, m)) % a
            else:
                right = (right + below(mixed, m)) % b
        x = left * b + right
        if x < n:
            return x


# 3: blend table


@functools.cache
def blend_table(quotas: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return (source, rank) of each slot."""
    period, count, table = sum(quotas), [0] * len(quotas), []
    for j in range(period):
        lag = [q * (j + 1) - period * c for q, c in zip(quotas, count, strict=True)]
        s = lag.index(max(lag))
        table.append((s, count[s]))
        count[s] += 1
    return table


# 5: from documents to rows


class Piece(NamedTuple):
    document: int
    offset: int
    tokens: int
    cls: bool
    sep: bool
    ends: bool

    @property
    def slots(self) -> int:
        return self.tokens + self.cls + self.sep


def cut(document: int, length: int, capacity: int, add: bool) -> list[Piece]:
    return [
        Piece(document, at, min(capacity, length - at), add, add, at + capacity >= length)
        for at in range(0, length, capacity)
    ]


def best_fit(pieces: Sequence[Piece], slots: int, most: int) -> list[list[Piece]]:
    """Pack a block: its full rows, then its tails by best-fit decreasing."""
    full = [[piece] for piece in pieces if piece.slots == slots]
    rows: list[list[Piece]] = []
    # Per free space, the open rows that have it; the one that received a piece last is on top.
    open_rows: list[list[list[Piece]]] = [[] for _ in range(slots + 1)]
    for piece in sorted((p for p in pieces if p.slots < slots), key=lambda p: -p.tokens):
        free = next((f for f in range(piece.slots, slots + 1) if open_rows[f]), None)
        if free is None:
            free, row = slots, []
            rows.append(row)
        else:
            row = open_rows[free].pop()
        row.append(piece)
        if len(row) < most and free > piece.slots:
            open_rows[free - piece.slots].append(row)
    return full + [sorted(row) for row in rows]


def concatenated(documents: Sequence[tuple[int, int]], slots: int, add: bool) -> list[list[Piece]]:
    rows: list[list[Piece]] = []
    at = 0
    for document, length in documents:
        total = length + 2 * add
        begin = 0
        while begin < total:
            end = min(total, begin + slots - at % slots)
            first, last = (min(max(x - add, 0), length) for x in (begin, end))
            piece = Piece(
                document,
                first,
                last - first,
                add and begin == 0,
                add and end == total,
                end == total,
            )
            if at % slots == 0:
                rows.append([])
            rows[-1].append(piece)
            at, begin = at + end - begin, end
    return rows


def plan(lengths: Sequence[int], phase: dict[str, Any], pool: dict[str, Any]) -> list[list[Piece]]:
    """Return the rows of a pool: the pieces of each."""
    slots, add = phase["seq_length"], pool["specials"] == "add"
    rows: list[list[Piece]] = []
    for begin in range(pool["first_document"], pool["end_document"], BLOCK_DOCUMENTS):
        end = min(begin + BLOCK_DOCUMENTS, pool["end_document"])
        kept = [
            (document, lengths[document])
            for document in range(begin, end)
            if lengths[document] >= max(1, pool["min_doc_tokens"])
        ]
        if phase["pack"] == "concat":
            rows += concatenated(kept, slots, add)
            continue
        pieces = [piece for d, length in kept for piece in cut(d, length, slots - 2 * add, add)]
        if phase["pack"] == "none":
            rows += [[piece] for piece in pieces]
        else:
            rows += best_fit(pieces, slots, phase["max_segments_per_row"])
    return rows


# 4 and 10: the order of a run


class Row(NamedTuple):
    """A row of the run: where it comes from, and its pieces."""

    source: str
    source_id: int
    epoch: int
    row: int
    pieces: list[Piece]


class Phase:
    """A phase of order.json, with the rows of its pools."""

    def __init__(self, entry: dict[str, Any], seed: int, corpora: dict[str, Corpus]) -> None:
        self.entry, self.seed, self.pools = entry, seed, entry["pools"]
        self.table = blend_table(tuple(pool["quota"] for pool in self.pools))
        self.is_stream = entry["pack"] == "concat"
        self.is_added = self.pools[0]["specials"] == "add"
        self.rows = [plan(corpora[pool["source"]].lengths, entry, pool) for pool in self.pools]
        self.ids = [source_id(entry, pool) for pool in self.pools]
        for pool, rows in zip(self.pools, self.rows, strict=True):
            tokens = sum(piece.slots for row in rows for piece in row)
            found = {"rows": len(rows), "tokens": tokens}
            said = {name: pool[name] for name in found}
            require(found == said, f"{pool['source']}: plan of {found}, order.json has {said}")

    @property
    def end_g(self) -> int:
        return self.entry["start_g"] + self.entry["num_rows"]

    def locate(self, g: int) -> Row:
        periods, j = divmod(g - self.entry["start_g"], len(self.table))
        s, rank = self.table[j]
        pool = self.pools[s]
        epoch, at = divmod(pool["drawn"] + periods * pool["quota"] + rank, pool["rows"])
        row = permute(pool["rows"], key(self.seed, 1, self.ids[s], epoch), at)
        return Row(pool["source"], self.ids[s], epoch, row, self.rows[s][row])

    def num_tokens(self, g: int) -> int:
        return sum(piece.slots for piece in self.locate(g).pieces)


def source_id(phase: dict[str, Any], pool: dict[str, Any]) -> int:
    words = [pool["source"], pool["first_document"], pool["end_document"], phase["pack"]]
    words += [phase["seq_length"], phase["max_segments_per_row"]]
    name = ":".join(map(str, words)).encode()
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "little")


def sha(x: dict[str, Any]) -> str:
    text = json.dumps(x, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return sha256(text.encode())


def order_ids(order: dict[str, Any]) -> list[str]:
    head = {"format": "order/1", "seed": order["seed"], "tokenizer": order["tokenizer_sha256"]}
    ids = [sha(head)]
    for phase in order["phases"]:
        rule = {name: value for name, value in phase.items() if name != "num_rows"}
        ids.append(sha({"previous": ids[-1], "phase": rule}))
    return ids[1:]


# 7: masks and labels

Segment = tuple[list[int], bool]  # its tokens, and whether it ends its document


def noise_level(g: int, mask_seed: int) -> float:
    place = (draw(key(mask_seed, 8), 0) + g * GAMMA) % WORD >> 11
    return 1 - place * 2.0**-53


def objective_of(g: int, phase: Phase, start: dict[str, Any]) -> dict[str, Any]:
    """Return the plain objective of a row."""
    objective: dict[str, Any] = start["objective"]
    if objective["name"] == "ByPhase":
        objective = objective["by_phase"].get(phase.entry["name"], objective["objective"])
    if objective["name"] != "Mixture":
        return objective
    place = (draw(key(start["seeds"]["mask"], 9, g), 0) >> 11) * 2.0**-53
    sums = list(accumulate(objective["shares"]))
    number = sum(each / sums[-1] <= place for each in sums[:-1])
    chosen: dict[str, Any] = objective["objectives"][number]
    return chosen


def inputs_and_labels(
    segments: Sequence[Segment], g: int, phase: Phase, start: dict[str, Any]
) -> tuple[list[int], list[int | None], float]:
    """Return the input and the label (None where not scored) of each token of a row.

    The number is the weight of every scored token.
    """
    tokens = [token for segment, _ in segments for token in segment]
    labels: list[int | None] = [None] * len(tokens)
    objective, ids = objective_of(g, phase, start), start["token_ids"]
    firsts = list(accumulate((len(segment) for segment, _ in segments), initial=0))
    if objective["name"] == "CausalLM":
        for (_, ends), begin, end in zip(segments, firsts, firsts[1:], strict=False):
            last = end - 1 if ends or not phase.is_added else end - 2
            labels[begin:last] = tokens[begin + 1 : last + 1]
        return tokens, labels, 1.0
    shift = {"MaskedLM": 0, "MaskedNextToken": 1, "MaskedDiffusion": 0}[objective["name"]]
    is_diffusion = objective["name"] == "MaskedDiffusion"
    if is_diffusion:
        rate = noise_level(g, start["seeds"]["mask"])
    else:
        rates = objective["mask_rate_by_phase"]
        rate = rates.get(phase.entry["name"], objective["mask_rate"])
    threshold = math.ceil(rate * 2.0**53)
    special = {ids[name] for name in ("unk", "cls", "sep", "pad", "mask")}
    inputs, k = list(tokens), key(start["seeds"]["mask"], 2, g)
    for p, token in enumerate(tokens):
        if token in special or (shift and p in firsts) or draw(k, 3 * p) >> 11 >= threshold:
            continue
        labels[p - shift] = token
        tenth = 0 if is_diffusion else below(draw(k, 3 * p + 1), 10)
        if tenth == 8:
            inputs[p] = below(draw(k, 3 * p + 2), ids["vocab_size"])
        elif tenth < 8:
            inputs[p] = ids["mask"]
    return inputs, labels, 1 / rate if is_diffusion else 1.0


# 10: digests


def lanes(content: bytes) -> list[int]:
    value = xxhash.xxh3_128_intdigest(content)
    return [value % WORD, value >> 64]


def row_digests(
    g: int, phase: Phase, corpora: dict[str, Corpus], start: dict[str, Any]
) -> tuple[int, list[int]]:
    """Return a row's tokens, and the lanes of its three digests as a record has them."""
    row, ids = phase.locate(g), start["token_ids"]
    order = struct.pack("<QQQQI", g, row.source_id, row.epoch, row.row, len(row.pieces))
    segments: list[Segment] = []
    for piece in row.pieces:
        flags = piece.cls + 2 * piece.sep + 4 * piece.ends
        order += struct.pack("<QQIB", piece.document, piece.offset, piece.tokens, flags)
        held = corpora[row.source].tokens(piece.document, piece.offset, piece.tokens)
        slots = [ids["cls"]] * piece.cls + held + [ids["sep"]] * piece.sep
        segments.append((slots, piece.ends))
    if phase.is_stream:
        segments = [([slot for slots, _ in segments for slot in slots], True)]
    tokens = [token for segment, _ in segments for token in segment]
    words = [len(segments), *(len(segment) for segment, _ in segments), *tokens]
    token = struct.pack(f"<Q{len(words)}I", g, *words)
    mask = struct.pack("<Q", g)
    inputs, labels, weight = inputs_and_labels(segments, g, phase, start)
    for shown, label in zip(inputs, labels, strict=True):
        mask += struct.pack("<II", shown, 0xFFFFFFFF if label is None else label)
    (rounded,) = struct.unpack("<f", struct.pack("<f", weight))
    if rounded != 1.0 and any(label is not None for label in labels):
        words = [0.0 if label is None else rounded for label in labels]
        mask += struct.pack(f"<{len(words)}f", *words)
    return len(tokens), [*lanes(order), *lanes(token), lanes(mask)[0]]


# 12: steps


def cuts(
    phase: Phase,
    settings: dict[str, Any],
    skip_rows: Sequence[Sequence[int]],
    decided: Sequence[Sequence[int]],
) -> Iterator[tuple[str, int, int]]:
    """Yield the SKIP and STEP records, as (kind, g_begin, g_end), that a phase is cut into."""
    g, t = phase.entry["start_g"], 0
    ramp, size = settings["batch_ramp_tokens"], settings["global_batch_size"]
    while True:
        begin = g
        ends = [end for first, end in decided if first <= g < end]
        if ends:
            g = max(ends)
        else:
            for first, end in skip_rows:
                g = end if first <= g < end else g
        g = min(g, phase.end_g)
        if g > begin:
            yield "SKIP", begin, g
            continue
        if g == phase.end_g:
            return
        rows = size
        if ramp is not None and t < ramp:
            least = settings["batch_ramp_start"]
            rows = least + (size - least) * t // ramp
        firsts = [first for first, _ in (*skip_rows, *decided) if first > g]
        end = min(g + rows, phase.end_g, *firsts)
        yield "STEP", g, end
        t += sum(phase.num_tokens(row) for row in range(g, end))
        g = end
