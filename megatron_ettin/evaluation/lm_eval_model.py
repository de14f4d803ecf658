"""Masked language models for lm-eval (EleutherAI's harness), by the rules of `scoring`.

Importing this module imports lm-eval and registers the class as `masked-lm`.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_ettin.evaluation.model import open_model
from megatron_ettin.evaluation.readings import BATCH_TOKENS, LoadedModel, load
from megatron_ettin.evaluation.scoring import (
    NUM_BOUND_SAMPLES,
    RULES,
    Continuation,
    RuleChoice,
    fill_masks,
    log_likelihoods,
    refusal,
    resolve,
)

#: Longest answer where a task sets no `max_gen_toks`, as in lm-eval's `HFLM`.
MAX_NEW_TOKENS = 256

#: (texts, token ids of the context, token ids of the continuation), as TemplateLM encodes them.
TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("masked-lm")
class MaskedLanguageModel(TemplateLM):  # type: ignore[misc]
    """An encoder, MNTP or masked diffusion model that answers lm-eval's requests.

    Contexts that are too long for the model are cut from the left and counted.
    """

    def __init__(
        self,
        pretrained: str | LoadedModel,
        rule: RuleChoice = "auto",
        seed: int = 0,
        bound_samples: int = NUM_BOUND_SAMPLES,
        **_: Any,
    ) -> None:
        """Open a folder, unless the model is loaded already.

        Raises:
            ValueError: the rule is not one for this model.
        """
        super().__init__()
        if isinstance(pretrained, str):
            pretrained = load(open_model(pretrained))
        self.loaded = pretrained
        if reason := refusal(rule, self.loaded.model):
            raise ValueError(f"{self.loaded.model.folder}: {reason}")
        self.rule = resolve(rule, self.loaded.model, masked="mask_filling")
        self.seed, self.bound_samples = seed, bound_samples
        self.num_cut_contexts = 0

    @property
    def eot_token_id(self) -> int:
        """Token id of [SEP]."""
        return self.loaded.end_id

    @property
    def prefix_token_id(self) -> int:
        """Token id of [CLS], which stands for an empty context."""
        return self.loaded.start_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the token ids of a text. The rules add special tokens, whatever is asked for."""
        return self.loaded.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], **_: Any
    ) -> list[tuple[float, bool]]:
        found = log_likelihoods(
            self.loaded,
            [self._continuation(context, tokens) for _, context, tokens in requests],
            self.rule,
            seed=self.seed,
            num_samples=self.bound_samples,
        )
        self.num_cut_contexts += sum(one.num_cut_tokens > 0 for one in found)
        return [(one.log_likelihood, one.is_greedy) for one in found]

    def _continuation(self, context: list[int], tokens: list[int]) -> Continuation:
        if context[:1] == [self.prefix_token_id]:
            context = context[1:]
        # Choices of a question have one context, and share the masks of the bound.
        item = zlib.crc32(np.array(context, dtype=np.int64).tobytes())
        return Continuation(context, tokens, item)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of each text, in windows as long as the model reads.

        A window after the first has one token of context, as in lm-eval's `HFLM`.
        """
        longest = self.loaded.model.max_tokens - RULES[self.rule][1] - 1
        windows: list[TokenRequest] = []
        owners = []
        for number, request in enumerate(requests):
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=longest,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        scores = np.zeros(len(requests))
        np.add.at(scores, owners, [score for score, _ in self._loglikelihood_tokens(windows)])
        return [float(score) for score in scores]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Fill masks greedily until a stop sequence; it is left out of the answer.

        Raises:
            ValueError: a task asks for sampling.
        """
        answers = len(requests) * [""]
        encoded = [self.tok_encode(request.args[0]) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: (str(requests[i].args[1]), encoded[i]))
        start = 0
        while start < len(order):
            options = requests[order[start]].args[1]
            settings = normalize_gen_kwargs(options, MAX_NEW_TOKENS)
            if settings["do_sample"]:
                raise ValueError(f"{self.loaded.model.name}: answers are greedy, never sampled")
            num_texts = max(1, BATCH_TOKENS // self.loaded.model.max_tokens)
            batch = [i for i in order[start : start + num_texts] if requests[i].args[1] == options]
            for i, answer in zip(
                batch, self._generate([encoded[i] for i in batch], settings), strict=True
            ):
                answers[i] = answer
            start += len(batch)
        return answers

    def _generate(self, contexts: list[list[int]], settings: dict[str, Any]) -> list[str]:
        stops, decode = settings["until"], self.loaded.tokenizer.decode
        generated = fill_masks(
            self.loaded,
            contexts,
            max_new_tokens=settings["max_gen_toks"],
            is_finished=lambda ids: any(stop in decode(ids) for stop in stops),
        )
        return [postprocess_generated_text(decode(ids), stops, None) for ids in generated]
