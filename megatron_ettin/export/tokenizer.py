"""Tokenizer of an exported model: the same vocabulary, with the special tokens of its kind.

An encoder reads `[CLS] x [SEP]`. A decoder starts from `[CLS]`; a `[SEP]` after its prompt would
make generation and likelihoods wrong. Both the Rust path (tokenizer.json's template) and the Python
path of transformers must leave it out.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import tokenizers

from megatron_ettin.data.tokenize import SPECIAL_TOKENS, Tokenizer, load_tokenizer
from megatron_ettin.model.weight_map import Architecture

logger = logging.getLogger(__name__)

#: Length of the published tokenizer, whose embedding has rows beyond it.
PUBLISHED_LENGTH = 50_285


def matching_tokenizer(folder: str | None, sha256: str) -> Tokenizer | None:
    """Return the tokenizer that a model was trained with; None, with a notice, if it is gone."""
    if folder is None:
        logger.warning("notice: the model came without a tokenizer; so does what is written")
        return None
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        logger.warning("notice: %s is gone; the model is written without a tokenizer", path)
        return None
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        logger.warning(
            "notice: %s is not the tokenizer the model was trained with (another SHA-256); the "
            "model is written without a tokenizer",
            path,
        )
        return None
    return load_tokenizer(Path(folder))


def special_ids(tokenizer: Tokenizer | None, vocab_size: int) -> dict[str, int]:
    """Return the token ids of the five roles by field of config.json.

    Without a tokenizer they are assumed: the last five of the vocabulary, as in the published one.
    """
    if tokenizer is not None:
        cls_id, sep_id, pad_id = tokenizer.ids.cls, tokenizer.ids.sep, tokenizer.ids.pad
    else:
        first = max(min(vocab_size, PUBLISHED_LENGTH) - len(SPECIAL_TOKENS), 0)
        cls_id, sep_id, pad_id = first + 1, first + 2, first + 3
    return {
        "pad_token_id": pad_id,
        "bos_token_id": cls_id,
        "eos_token_id": sep_id,
        "cls_token_id": cls_id,
        "sep_token_id": sep_id,
    }


def write_tokenizer(
    tokenizer: Tokenizer, output: Path, *, architecture: Architecture, max_length: int
) -> None:
    """Write tokenizer.json and tokenizer_config.json as `AutoTokenizer` reads them.

    Other entries of the source's tokenizer_config.json are kept.
    """
    backend = tokenizers.Tokenizer.from_file(str(tokenizer.folder / "tokenizer.json"))
    backend.no_truncation()
    backend.no_padding()
    is_decoder = architecture == "decoder"
    framed = (
        ("[CLS] $A", "[CLS] $A $B")
        if is_decoder
        else (
            "[CLS] $A [SEP]",
            "[CLS] $A [SEP] $B [SEP]",
        )
    )
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=framed[0],
        pair=framed[1],
        special_tokens=[("[CLS]", tokenizer.ids.cls), ("[SEP]", tokenizer.ids.sep)],
    )
    backend.save(str(output / "tokenizer.json"))
    config = _source_config(tokenizer.folder)
    # transformers rebuilds the template from add_bos_token and add_eos_token where they are set.
    for name in ("add_bos_token", "add_eos_token", "bos_token", "eos_token"):
        config.pop(name, None)
    config |= {
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
        "pad_token": "[PAD]",
        "sep_token": "[SEP]",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "[UNK]",
    }
    if is_decoder:
        config |= {"bos_token": "[CLS]", "eos_token": "[SEP]"}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (output / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _source_config(folder: Path) -> dict[str, object]:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {"clean_up_tokenization_spaces": False}
    try:
        config: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    return config
