"""The bytes of each token, for tokenizers whose texts are the joined bytes of their tokens."""

from __future__ import annotations

import json
from typing import Any

from megatron_ettin.data.tokenize import Tokenizer


def token_bytes(tokenizer: Tokenizer) -> list[bytes | None] | None:
    """Return the bytes of each id, None for one that is no text; None for another tokenizer.

    Byte-level tokenizers are meant: their decoder joins the bytes that the letters of all tokens
    stand for. Special tokens are no text.
    """
    content = json.loads(tokenizer.to_json())
    vocabulary = content["model"].get("vocab")
    joins_bytes = _joins_bytes(content["decoder"])
    if not joins_bytes or not isinstance(vocabulary, dict):
        return None
    added = {token["id"]: token for token in content["added_tokens"]}
    tokens: list[bytes | None] = [None] * tokenizer.ids.vocab_size
    for spelling, id_ in vocabulary.items():
        tokens[id_] = _bytes_of(spelling)
    for id_, token in added.items():
        tokens[id_] = None if token["special"] else _bytes_of(token["content"])
    ids = tokenizer.ids
    for id_ in (ids.unk, ids.cls, ids.sep, ids.pad, ids.mask):
        tokens[id_] = None
    return tokens


def _joins_bytes(decoder: dict[str, Any] | None) -> bool:
    if decoder is not None and decoder["type"] == "Sequence":
        return len(decoder["decoders"]) == 1 and _joins_bytes(decoder["decoders"][0])
    return decoder is not None and decoder["type"] == "ByteLevel"


def _bytes_of(spelling: str) -> bytes:
    """Return what the decoder makes of a token; one with other letters stands for itself."""
    values = [_BYTES.get(letter) for letter in spelling]
    if any(value is None for value in values):
        return spelling.encode()
    return bytes(value for value in values if value is not None)


def _byte_letters() -> dict[str, int]:
    """Return the byte of each letter of the byte-level alphabet (GPT-2).

    Printable bytes of Latin-1 stand for themselves, the others for the letters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_letters()
