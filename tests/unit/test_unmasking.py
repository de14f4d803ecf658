"""Filling of masks step by step: all of them, by the order that is asked for, as the seed says."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from megatron_ettin.export.unmasking import Unmasking
from tests.conftest import TinyCorpus
from tests.models import write_random_model

MASK, VOCAB = 9, 12


class Recorded:
    """Logits that are known by position: token p % 8 at slot p, surest at the highest slot."""

    def __init__(self) -> None:
        self.inputs: list[torch.Tensor] = []

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        self.inputs.append(tokens.clone())
        n, t = tokens.shape
        logits = torch.zeros(n, t, VOCAB)
        places = torch.arange(t)
        logits[:, places, places % 8] = 1.0 + places.float()
        logits[..., MASK] = 100.0
        return logits


def masked(length: int = 8) -> torch.Tensor:
    return torch.tensor([[10, *[MASK] * length, 11]])


@pytest.mark.parametrize("order", ["confidence", "random"])
@pytest.mark.parametrize("steps", [1, 3, 8, 50])
def test_every_mask_is_filled_an_equal_share_at_a_time(order: Any, steps: int) -> None:
    model = Recorded()
    filled = Unmasking(model, mask_id=MASK).fill(masked(), steps=steps, order=order, temperature=0)
    assert filled.tolist() == [[10, *[p % 8 for p in range(1, 9)], 11]]
    left = [int((tokens == MASK).sum()) for tokens in model.inputs]
    assert left[0] == 8
    assert len(left) == min(steps, 8)
    shares = [a - b for a, b in zip(left, [*left[1:], 0], strict=True)]
    assert max(shares) - min(shares) <= 1


def test_the_surest_come_first_and_random_order_is_another() -> None:
    by_order = {}
    for order in ("confidence", "random"):
        model = Recorded()
        Unmasking(model, mask_id=MASK).fill(masked(), steps=4, order=order, temperature=0)  # type: ignore[arg-type]
        by_order[order] = [(tokens[0] == MASK).nonzero()[:, 0].tolist() for tokens in model.inputs]
    assert by_order["confidence"] == [list(range(1, 9 - 2 * step)) for step in range(4)]
    assert by_order["random"] != by_order["confidence"]


def test_a_row_depends_on_the_seed_its_number_and_itself() -> None:
    def fill(tokens: torch.Tensor, seed: int = 5) -> list[list[int]]:
        flat = Unmasking(lambda x: torch.zeros(*x.shape, VOCAB), mask_id=MASK, never=[10, 11])
        return flat.fill(tokens, steps=4, seed=seed).tolist()  # type: ignore[no-any-return]

    two = masked().repeat(2, 1)
    assert fill(two) == fill(two)
    assert fill(two)[0] != fill(two)[1]
    assert fill(two)[0] == fill(masked())[0]
    assert fill(two, seed=6) != fill(two)
    assert {token for row in fill(masked(400)) for token in row[1:-1]} == set(range(9))


def test_no_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="steps: 0"):
        Unmasking(Recorded(), mask_id=MASK).fill(masked(), steps=0)


def test_a_model_of_transformers_fills_its_own_masks(
    tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    folder = write_random_model(tmp_path / "hf", "encoder", tiny_corpus.folder / "tokenizer")
    model = AutoModelForMaskedLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "a b" + " [MASK]" * 6
    tokens = tokenizer(text, return_tensors="pt")["input_ids"]
    filled = Unmasking.of(model, tokenizer).fill(tokens, steps=6, temperature=0)
    assert not (filled == tokenizer.mask_token_id).any()
    kept = tokens != tokenizer.mask_token_id
    assert torch.equal(filled[kept], tokens[kept])
    # One mask a step, the surest first: the same, step by step, by hand.
    expected = tokens.clone()
    for _ in range(6):
        with torch.no_grad():
            logits = model(input_ids=expected).logits[0]
        logits[:, tokenizer.all_special_ids] = float("-inf")
        chances, best = logits.softmax(-1).max(-1)
        chances[expected[0] != tokenizer.mask_token_id] = -1.0
        place = int(chances.argmax())
        expected[0, place] = best[place]
    assert torch.equal(filled, expected)
