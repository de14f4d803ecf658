"""The bytes of each token, against what the tokenizer itself decodes."""

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from megatron_ettin.data.token_bytes import token_bytes
from megatron_ettin.data.tokenize import (
    SPECIAL_TOKENS,
    Tokenizer,
    load_tokenizer,
    train_tokenizer,
    write_tokenizer,
)

#: Added tokens that are no special ones: runs of spaces as ModernBERT's, and a letter that the
#: byte-level alphabet has too.
ADDED = ["  ", "    ", "|||EMAIL|||", "naïve"]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    trained = train_tokenizer(["the café of the 中文 😀 letters"] * 3, 285)
    trained.add_tokens([AddedToken(token, normalized=False) for token in ADDED])
    write_tokenizer(trained, folder)
    return load_tokenizer(folder)


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.sampled_from([*"the caféx中😀\u0301\n", *ADDED]), max_size=30))
def test_a_text_is_the_joined_bytes_of_its_tokens(byte_level: Tokenizer, texts: list[str]) -> None:
    table = token_bytes(byte_level)
    assert table is not None
    (ids,) = byte_level.encode_batch(["".join(texts)])
    joined = b"".join(table[id_] or b"" for id_ in ids)
    assert joined.decode(errors="replace") == byte_level.decode(ids)
    if "naïve" not in texts:  # decoded as the bytes that its letters stand for, one of them invalid
        assert joined.decode() == byte_level.normalize("".join(texts))


def test_special_tokens_and_holes_are_no_text(byte_level: Tokenizer) -> None:
    table = token_bytes(byte_level)
    assert table is not None
    assert len(table) == byte_level.ids.vocab_size
    ids = byte_level.ids
    assert [table[id_] for id_ in (ids.unk, ids.cls, ids.sep, ids.pad, ids.mask)] == [None] * 5
    assert sum(token is None for token in table) == 5
    assert {table[-1], table[-2]} == {"naïve".encode("latin-1"), b"|||EMAIL|||"}


def test_other_decoders_do_not_join_bytes(tmp_path: Path) -> None:
    vocabulary = {token: number for number, token in enumerate([*SPECIAL_TOKENS, "a", "##b"])}
    other = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    other.normalizer = normalizers.Lowercase()
    other.pre_tokenizer = pre_tokenizers.Whitespace()
    other.decoder = decoders.WordPiece()
    other.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert token_bytes(loaded) is None
    assert loaded.normalize("AB") == "ab"
    other.decoder = decoders.Sequence([decoders.ByteLevel()])
    other.save(str(tmp_path / "tokenizer.json"))
    assert token_bytes(load_tokenizer(tmp_path)) == [None] * 5 + [b"a", b"##b"]
