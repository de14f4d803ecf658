"""Parquet's Bloom filters: which row groups of a file may hold a value.

A filter says "no" for certain and "perhaps" else. The format is that of the Parquet specification
(BloomFilter.md): blocks of eight 32-bit words, chosen and filled by the XXH64 of the value's bytes.
pyarrow writes these filters and tells where they are, but does not ask them.
"""

from __future__ import annotations

import os
import struct

BLOCK_BYTES = 32
MAX_HEADER_BYTES = 64
_MASK = 2**64 - 1
_PRIMES = (
    0x9E3779B185EBCA87,
    0xC2B2AE3D27D4EB4F,
    0x165667B19E3779F9,
    0x85EBCA77C2B2AE63,
    0x27D4EB2F165667C5,
)
#: A word of a block has one bit set for a value: the top five of the hash times the word's salt.
_SALTS = (
    0x47B6137B,
    0x44974D91,
    0x8824AD5B,
    0xA2B7289D,
    0x705495C7,
    0x2DF1424B,
    0x9EFC4947,
    0x5C6BFB31,
)


def may_hold(descriptor: int, offset: int, length: int, hashed: int) -> bool:
    """Return False if the filter at `offset` of a file excludes the value of this XXH64.

    `length` counts the filter's header too. A filter that cannot be read excludes nothing.
    """
    header = os.pread(descriptor, min(MAX_HEADER_BYTES, length), offset)
    num_bytes = _num_bytes(header)
    if not 0 < num_bytes < length or num_bytes % BLOCK_BYTES:
        return True
    block = (hashed >> 32) * (num_bytes // BLOCK_BYTES) >> 32
    words = os.pread(descriptor, BLOCK_BYTES, offset + length - num_bytes + block * BLOCK_BYTES)
    if len(words) != BLOCK_BYTES:
        return True
    low = hashed & 0xFFFFFFFF
    return all(
        word >> ((low * salt & 0xFFFFFFFF) >> 27) & 1
        for word, salt in zip(struct.unpack("<8I", words), _SALTS, strict=True)
    )


def _num_bytes(header: bytes) -> int:
    """Return the size of the bits that a filter's header states; 0 where there is no such header.

    In Thrift's compact protocol: field 1, an i32, as a zigzag number of seven bits a byte.
    """
    if header[:1] != b"\x15":
        return 0
    value = shift = 0
    for byte in header[1:6]:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value >> 1 if value % 2 == 0 else 0
    return 0


def xxh64(data: bytes) -> int:
    """Return the XXH64 of a value, with seed 0 (the algorithm's specification, one value)."""
    one, two, three, four, five = _PRIMES
    tail = len(data) % 32
    if len(data) >= 32:
        lanes = [(one + two) & _MASK, two, 0, -one & _MASK]
        for words in struct.iter_unpack("<4Q", data[: len(data) - tail]):
            lanes = [_round(lane, word) for lane, word in zip(lanes, words, strict=True)]
        value = sum(_rotated(lane, by) for lane, by in zip(lanes, (1, 7, 12, 18), strict=True))
        for lane in lanes:
            value = ((value ^ _round(0, lane)) * one + four) & _MASK
    else:
        value = five
    value = (value + len(data)) & _MASK
    rest = data[len(data) - tail :]
    while len(rest) >= 8:
        value ^= _round(0, int.from_bytes(rest[:8], "little"))
        value = (_rotated(value, 27) * one + four) & _MASK
        rest = rest[8:]
    if len(rest) >= 4:
        value ^= int.from_bytes(rest[:4], "little") * one & _MASK
        value = (_rotated(value, 23) * two + three) & _MASK
        rest = rest[4:]
    for byte in rest:
        value = _rotated(value ^ byte * five & _MASK, 11) * one & _MASK
    for shift, prime in ((33, two), (29, three)):
        value = (value ^ value >> shift) * prime & _MASK
    return value ^ value >> 32


def _round(lane: int, word: int) -> int:
    return _rotated((lane + word * _PRIMES[1]) & _MASK, 31) * _PRIMES[0] & _MASK


def _rotated(value: int, by: int) -> int:
    return (value << by | value >> 64 - by) & _MASK
