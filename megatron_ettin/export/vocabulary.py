"""Vocabularies of tokenizers by the bytes that tokens stand for, whichever way they are spelled."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from megatron_ettin.data.tokenize import SPECIAL_TOKENS

#: Fields of tokenizer_config.json that name the token of a role, best first, in the order of
#: SPECIAL_TOKENS.
ROLE_FIELDS = (
    ("unk_token",),
    ("cls_token", "bos_token"),
    ("sep_token", "eos_token"),
    ("pad_token",),
    ("mask_token",),
)
#: Spellings: byte-level BPE has a character for each byte; SentencePiece a "▁" for each space and
#: <0x0A> for a byte that no other token has.
BYTE_LEVEL, SENTENCE_PIECE = "byte-level", "SentencePiece"
SPACE = "▁"
ONE_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
#: Bytes that are no UTF-8, as `surrogateescape` decodes them.
STRAY = re.compile("([\udc80-\udcff])")


class Vocabulary:
    """Tokens of a tokenizer folder, their bytes and roles, and how it cuts a text."""

    def __init__(self, folder: Path) -> None:
        """Read tokenizer.json, and the roles of special tokens from the files beside it.

        Raises:
            ValueError, OSError: no tokenizer there, or one with another spelling of tokens.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder}: no tokenizer (it has no tokenizer.json)")
        try:
            text = path.read_text(encoding="utf-8")
            self._backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path}: not a tokenizer.json: {error}") from error
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        self._spelling = _spelling(path, json.loads(text).get("decoder"))
        self._byte_of = _byte_level_alphabet()
        self._char_of = {byte: char for char, byte in self._byte_of.items()}
        added = self._backend.get_added_tokens_decoder()
        ids = self._backend.get_vocab(with_added_tokens=True)
        self.size = max(ids.values()) + 1
        """One more than the largest id: a vocabulary may have holes."""
        self.specials = {token.content: i for i, token in added.items() if token.special}
        """Ids of special tokens by spelling."""
        self.roles = _roles(folder, ids)
        """Ids of the tokens of the five roles, by Ettin's names; a role may be missing."""
        plain = {i: token.content.encode() for i, token in added.items() if not token.special}
        left_out = {*self.specials.values(), *self.roles.values()}
        self.tokens = plain | {
            i: self._bytes(token)
            for token, i in ids.items()
            if i not in left_out and i not in plain
        }
        """Bytes of the other tokens by id."""

    def pieces(self, content: bytes) -> list[int]:
        """Return the ids of the tokens that bytes are cut into, without any context."""
        if self._spelling == BYTE_LEVEL:
            return self._model_ids("".join(self._char_of[byte] for byte in self._normal(content)))
        ids = []
        for part in STRAY.split(content.decode("utf-8", errors="surrogateescape")):
            spelled = f"<0x{ord(part) - 0xDC00:02X}>" if STRAY.match(part) else part
            ids += self._model_ids(spelled.replace(" ", SPACE))
        return ids

    def spans(self, texts: Sequence[str]) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
        """Yield the ids of each text, and the characters [from, to) of each of them."""
        for encoding in self._backend.encode_batch(list(texts), add_special_tokens=False):
            yield encoding.ids, encoding.offsets

    def _model_ids(self, spelled: str) -> list[int]:
        whole = self._backend.model.token_to_id(spelled) if spelled else None
        if whole is not None:
            return [whole]
        return [token.id for token in self._backend.model.tokenize(spelled)] if spelled else []

    def _normal(self, content: bytes) -> bytes:
        """Return bytes as the tokenizer normalizes them; some tokens end within a character."""
        normalizer = self._backend.normalizer
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            return content
        return content if normalizer is None else normalizer.normalize_str(text).encode()

    def _bytes(self, token: str) -> bytes:
        if self._spelling == BYTE_LEVEL:
            return b"".join(
                bytes([self._byte_of[char]]) if char in self._byte_of else char.encode()
                for char in token
            )
        byte = ONE_BYTE.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE, " ").encode()


def _spelling(path: Path, decoder: Any) -> str:
    described = json.dumps(decoder, ensure_ascii=False)
    if '"ByteLevel"' in described:
        return BYTE_LEVEL
    if SPACE in described:
        return SENTENCE_PIECE
    found = decoder["type"] if isinstance(decoder, dict) else decoder
    raise ValueError(
        f"{path}: decoder: {found}: only byte-level and SentencePiece tokens have bytes that can "
        f"be compared"
    )


def _roles(folder: Path, ids: dict[str, int]) -> dict[str, int]:
    named: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file():
            named |= json.loads(path.read_text(encoding="utf-8"))
    roles: dict[str, int] = {}
    for role, fields in zip(SPECIAL_TOKENS, ROLE_FIELDS, strict=True):
        values = [named.get(field) for field in fields]
        spellings = [value["content"] if isinstance(value, dict) else value for value in values]
        for spelling in (role, *spellings):
            if spelling in ids:
                roles.setdefault(role, ids[spelling])
    return roles


def _byte_level_alphabet() -> dict[str, int]:
    """Return the byte of each character of the byte-level spelling (GPT-2's table)."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in kept]
    table = {chr(byte): byte for byte in kept}
    return table | {chr(256 + place): byte for place, byte in enumerate(others)}
