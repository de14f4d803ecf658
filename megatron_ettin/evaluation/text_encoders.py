"""Encoders of texts for retrieval: a pre-trained model, pooled or as one vector a token.

Built from the modules of sentence-transformers, in fp32. Every kind of model gets the same modules;
only the pooling may differ.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from megatron_ettin.evaluation.model import Model

Pooling = Literal["mean", "weightedmean", "lasttoken", "cls"]


def single_vector_encoder(
    model: Model, pooling: Pooling, *, max_tokens: int, append_sep: bool
) -> Any:
    """Build a `SentenceTransformer`: token embeddings of the model, pooled to one vector."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling as PoolingModule

    transformer = _transformer(model, max_tokens, append_sep)
    size = transformer.get_embedding_dimension()
    return SentenceTransformer(
        modules=[transformer, PoolingModule(size, pooling_mode=pooling)], device=str(model.device)
    )


def multi_vector_encoder(
    model: Model, embedding_size: int, *, max_tokens: int, append_sep: bool
) -> Any:
    """Build a `MultiVectorEncoder`: one vector of length 1 a token, by a new linear projection.

    These are the modules that sentence-transformers itself gives a model without a head; the
    weights of the projection are drawn from torch's global generator.
    """
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Dense, Normalize
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
    from torch import nn

    transformer = _transformer(model, max_tokens, append_sep)
    projection = Dense(
        transformer.get_embedding_dimension(),
        embedding_size,
        bias=False,
        activation_function=nn.Identity(),
        module_input_name="token_embeddings",
    )
    normalize = Normalize(module_input_name="token_embeddings")
    return MultiVectorEncoder(
        modules=[transformer, projection, MultiVectorMask(), normalize], device=str(model.device)
    )


def read_encoder(class_name: str, folder: Path, model: Model) -> Any:
    """Load an encoder that was saved to a folder; `class_name` is of sentence-transformers."""
    import sentence_transformers

    return getattr(sentence_transformers, class_name)(str(folder), device=str(model.device))


def append_separator(tokenizer: Any) -> None:
    """Let a tokenizer end every text with [SEP], or its end-of-text token, if it does not yet.

    Raises:
        ValueError: it has neither.
    """
    from tokenizers.processors import TemplateProcessing

    separator = tokenizer.sep_token or tokenizer.eos_token
    if separator is None:
        raise ValueError("append_sep: the tokenizer has neither a [SEP] nor an end-of-text token")
    frame = tokenizer.convert_ids_to_tokens(tokenizer("")["input_ids"])
    if frame and frame[-1] == separator:
        return
    special = {*frame, separator}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*frame, "$A", separator],
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in special],
    )


def _transformer(model: Model, max_tokens: int, append_sep: bool) -> Any:
    import torch
    from sentence_transformers.base.modules import Transformer

    transformer = Transformer(
        str(model.folder), model_kwargs={"dtype": torch.float32}, max_seq_length=max_tokens
    )
    if append_sep and model.attention == "causal":
        append_separator(transformer.tokenizer)
    return transformer
