"""Tokenizers: loading a folder, encoding and decoding, and training one in Ettin's layout.

No other module of the data path knows the `tokenizers` library. A folder is anything with a
`tokenizer.json` and the five special tokens: one of ours, or a published ModernBERT one.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray

from megatron_ettin.publication import publish_text
from megatron_ettin.rows import TokenIds

SPECIAL_TOKENS = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")
"""Special tokens in the order of Ettin's ids 50280 to 50284: the last five of a vocabulary."""

MODEL_MAX_LENGTH = 8192
"""Longest input that the tokenizer folder announces, in tokens: the published models' context."""


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A loaded tokenizer folder."""

    folder: Path
    digest: str
    """SHA-256 of tokenizer.json, hexadecimal."""
    ids: TokenIds
    _backend: tokenizers.Tokenizer = field(repr=False, compare=False)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Return the ids [n] int32 of each text, whole and without special tokens.

        A special token spelled out in a text ("[MASK]") is ordinary text, as with transformers'
        `split_special_tokens=True`: a raw document cannot smuggle in a control token.
        """
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def to_json(self) -> str:
        """Return the tokenizer as a tokenizer.json, without the folder's truncation and padding."""
        return str(self._backend.to_str())

    @property
    def added_tokens(self) -> list[str]:
        """Spelling of the tokens that were added to the vocabulary and are not special."""
        return [
            token.content
            for token in self._backend.get_added_tokens_decoder().values()
            if not token.special
        ]

    def normalize(self, text: str) -> str:
        """Return a text as the tokenizer reads it before it cuts it: in NFC, for one of ours."""
        normalizer = self._backend.normalizer
        return text if normalizer is None else str(normalizer.normalize_str(text))

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """Return the text of the ids, special tokens spelled out."""
        return str(self._backend.decode([int(i) for i in ids], skip_special_tokens=False))


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load a folder with tokenizer.json.

    FileNotFoundError where there is none; ValueError where it cannot be read or lacks one of the
    five special tokens.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no tokenizer folder (it has no tokenizer.json)")
    content = path.read_bytes()
    try:
        backend = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path}: not a tokenizer.json: {error}") from error
    # A published folder may truncate or pad for another use; a corpus holds whole documents.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    vocabulary = backend.get_vocab(with_added_tokens=True)
    missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
    if missing:
        raise ValueError(
            f"{path}: the tokenizer has no {' '.join(missing)}; it needs all of"
            f" {' '.join(SPECIAL_TOKENS)}"
        )
    unk, cls, sep, pad, mask = (vocabulary[token] for token in SPECIAL_TOKENS)
    return Tokenizer(
        folder=folder,
        digest=hashlib.sha256(content).hexdigest(),
        # One more than the largest id: a vocabulary may have holes.
        ids=TokenIds(
            vocab_size=max(vocabulary.values()) + 1,
            unk=unk,
            cls=cls,
            sep=sep,
            pad=pad,
            mask=mask,
        ),
        _backend=backend,
    )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Train byte-level BPE of exactly `vocab_size` tokens, the five special ones last.

    The result depends on the texts and the size only. NFC, no prefix space and `[CLS] $A [SEP]` are
    ModernBERT's. ValueError if the size is too small, or the text gives fewer tokens.
    """
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    smallest = len(alphabet) + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab-size {vocab_size}: at least {smallest} (all bytes and specials)")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(iter(texts), trainer)
    tokenizer.add_special_tokens(
        # [MASK] takes in the space before it: "the [MASK]" is filled by a token that starts with
        # one.
        [
            tokenizers.AddedToken(token, special=True, normalized=False, lstrip=token == "[MASK]")
            for token in SPECIAL_TOKENS
        ]
    )
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if size != vocab_size:
        raise ValueError(
            f"vocab-size {vocab_size}: the text gives only {size} tokens; give more text or ask for"
            f" at most {size}"
        )
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def write_tokenizer(tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    """Write a folder that `transformers.AutoTokenizer` loads; equal tokenizers give equal bytes.

    tokenizer.json is published last: the other file is the same for every vocabulary.

    Raises:
        FileExistsError: another tokenizer is there.
    """
    config = {
        "clean_up_tokenization_spaces": False,
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": MODEL_MAX_LENGTH,
        "pad_token": "[PAD]",
        "sep_token": "[SEP]",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "[UNK]",
    }
    path, text = folder / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n"
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise FileExistsError(
            f"{path}: is another tokenizer, and corpora made with it would be mixed with new ones; "
            f"choose another folder, or remove this one and what was made with it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    publish_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    publish_text(path, text)
