"""Tokenizers against transformers: same ids, Ettin's special tokens, literal specials as text."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers

from megatron_ettin.data.tokenize import (
    SPECIAL_TOKENS,
    Tokenizer,
    load_tokenizer,
    train_tokenizer,
    write_tokenizer,
)

VOCAB_SIZE = 400
TEXTS = [
    "The film was good, and the actors were better than the plot.",
    "  spaces   before, between and after  ",
    "new\nlines\r\nand\ttabs",
    "naïve café: 漢字, кино, 🎬 and a lone \u0301 accent; e\u0301 composes",
    "don't, I'll, it's 1,234.50 $",
    " ",
    "",
]


def sentences() -> Iterator[str]:
    for number in range(300):
        yield f"The film number {number} was {'good' if number % 3 else 'bad'}, they said."
        yield "Nobody knows whether the actors were better than the plot; [MASK] [SEP] maybe."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "made" / "here"
    write_tokenizer(train_tokenizer(sentences(), VOCAB_SIZE), path)
    return path


@pytest.fixture(scope="module")
def ours(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_special_tokens_are_the_last_five_ids(
    ours: Tokenizer, theirs: transformers.PreTrainedTokenizerBase
) -> None:
    assert len(theirs) == ours.ids.vocab_size == VOCAB_SIZE
    ids = [ours.ids.unk, ours.ids.cls, ours.ids.sep, ours.ids.pad, ours.ids.mask]
    assert ids == list(range(VOCAB_SIZE - 5, VOCAB_SIZE))
    assert theirs.convert_ids_to_tokens(ids) == list(SPECIAL_TOKENS)
    assert [theirs.unk_token_id, theirs.cls_token_id, theirs.sep_token_id] == ids[:3]
    assert [theirs.pad_token_id, theirs.mask_token_id] == ids[3:]


def test_folder_loads_with_transformers_as_a_modernbert_tokenizer(
    theirs: transformers.PreTrainedTokenizerBase,
) -> None:
    batch = theirs(["a good film", "bad"], padding=True)
    assert list(batch) == ["input_ids", "attention_mask"]
    cls, sep, pad = theirs.cls_token_id, theirs.sep_token_id, theirs.pad_token_id
    first, second = batch["input_ids"]
    assert (first[0], first[-1]) == (cls, sep)
    assert second == [cls, *theirs("bad", add_special_tokens=False)["input_ids"], sep] + [pad] * (
        len(first) - len(second) + second.count(pad)
    )
    assert theirs.model_max_length == 8192
    # The mask takes the place of a word with the space before it, so it swallows that space.
    spaced, tight = (theirs(f"film{gap}[MASK].")["input_ids"] for gap in (" ", ""))
    assert spaced == tight
    assert spaced.count(theirs.mask_token_id) == 1


def test_ids_equal_transformers(
    ours: Tokenizer, theirs: transformers.PreTrainedTokenizerBase
) -> None:
    expected = theirs(TEXTS, add_special_tokens=False)["input_ids"]
    ids = ours.encode_batch(TEXTS)
    assert [row.tolist() for row in ids] == expected
    assert {row.dtype for row in ids} == {np.dtype(np.int32)}
    assert [ours.decode(row) for row in ids[:3]] == TEXTS[:3]


def test_special_tokens_in_a_text_are_ordinary_text(
    ours: Tokenizer, theirs: transformers.PreTrainedTokenizerBase
) -> None:
    text = "a [MASK] of horror [SEP][CLS] and [PAD]"
    (ids,) = ours.encode_batch([text])
    assert ids.max() < ours.ids.unk
    assert ours.decode(ids) == text
    assert theirs.mask_token_id in theirs(text, add_special_tokens=False)["input_ids"]
    split = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert ids.tolist() == split


def test_tokens_added_to_a_published_vocabulary_stay_tokens(folder: Path, tmp_path: Path) -> None:
    """ModernBERT's folder has runs of spaces, markers and unused ids around its special tokens."""
    published = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    published.add_tokens(["|||IP_ADDRESS|||", " " * 4, "[unused0]"])
    published.add_special_tokens(["<|endoftext|>"])
    write_tokenizer(published, tmp_path)
    text = "at |||IP_ADDRESS|||:    [unused0]<|endoftext|>[MASK]"
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    (ids,) = ours.encode_batch([text])
    split = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert ids.tolist() == split
    assert sum(ids >= VOCAB_SIZE) == 3
    assert ours.ids.vocab_size == len(theirs) == VOCAB_SIZE + 4
    assert ours.ids.mask == VOCAB_SIZE - 1


def test_training_twice_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    for _ in range(2):  # the second time over what is there
        write_tokenizer(train_tokenizer(sentences(), VOCAB_SIZE), tmp_path / "again")
    files = sorted(path.name for path in folder.iterdir())
    assert files == ["tokenizer.json", "tokenizer_config.json"]
    assert files == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in files:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_digest_is_of_the_file(ours: Tokenizer, folder: Path) -> None:
    content = (folder / "tokenizer.json").read_bytes()
    assert ours.digest == hashlib.sha256(content).hexdigest()


def test_a_folder_with_limits_of_its_own_gives_whole_documents(
    folder: Path, ours: Tokenizer, tmp_path: Path
) -> None:
    limited = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    limited.enable_truncation(4)
    limited.enable_padding(length=512)
    limited.save(str(tmp_path / "tokenizer.json"))
    for mine, other in zip(
        ours.encode_batch(TEXTS), load_tokenizer(tmp_path).encode_batch(TEXTS), strict=True
    ):
        np.testing.assert_array_equal(mine, other)


def test_vocabulary_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape("vocab-size 260: at least 261")):
        train_tokenizer(sentences(), 260)
    with pytest.raises(ValueError, match=r"vocab-size 5000: the text gives only (\d+) tokens") as e:
        train_tokenizer(sentences(), 5000)
    most = int(re.findall(r"at most (\d+)", str(e.value))[0])
    assert train_tokenizer(sentences(), most).get_vocab_size() == most


def test_an_error_of_the_reader_ends_the_training() -> None:
    def texts() -> Iterator[str]:
        yield "good"
        raise ValueError("a.jsonl:2: bad")

    with pytest.raises(ValueError, match=r"^a\.jsonl:2: bad$"):
        train_tokenizer(texts(), 300)


def test_bad_folders(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path}: no tokenizer folder")):
        load_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text('{"version": "1.0"')
    with pytest.raises(ValueError, match=re.escape(f"{path}: not a tokenizer.json: ")):
        load_tokenizer(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["added_tokens"] = content["added_tokens"][:3]
    path.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=re.escape(f"{path}: the tokenizer has no [PAD] [MASK]; it needs all of")
    ):
        load_tokenizer(tmp_path)
