"""Models of other families are measured as ours are: BERT and Llama, with random weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from megatron_ettin.data.tokenize import load_tokenizer
from megatron_ettin.evaluation.model import Model, open_model
from megatron_ettin.evaluation.tasks.fine_tuning import FineTuning
from megatron_ettin.evaluation.tasks.linear_probe import LinearProbe
from megatron_ettin.evaluation.tasks.minimal_pairs import MinimalPairs
from megatron_ettin.evaluation.tasks.task import Task
from megatron_ettin.export.tokenizer import write_tokenizer
from tests.conftest import TinyCorpus
from tests.labelled_texts import write_reviews

FAMILIES: dict[str, tuple[Any, Any, Any]] = {
    "bert": (BertConfig, BertForMaskedLM, "encoder"),
    "llama": (LlamaConfig, LlamaForCausalLM, "decoder"),
}


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, tiny_corpus: TinyCorpus, tmp_path: Path) -> Model:
    config_class, model_class, architecture = FAMILIES[request.param]
    tokenizer = load_tokenizer(tiny_corpus.folder / "tokenizer")
    config = config_class(
        vocab_size=tokenizer.ids.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        pad_token_id=tokenizer.ids.pad,
        bos_token_id=tokenizer.ids.cls,
        eos_token_id=tokenizer.ids.sep,
    )
    folder = tmp_path / request.param
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model_class(config).save_pretrained(folder)
    write_tokenizer(tokenizer, folder, architecture=architecture, max_length=128)
    return open_model(str(folder))


def test_they_are_classified_probed_and_asked_for_minimal_pairs(
    model: Model, tmp_path: Path
) -> None:
    data = write_reviews(tmp_path / "reviews", {"train": 96, "validation": 48})
    pairs = [{"sentence_good": f"ab cd {n}", "sentence_bad": f"cd {n} ab"} for n in range(6)]
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "order.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n")
    tuning = FineTuning(data=data, learning_rates=(3e-3,), weight_decays=(1e-5,), num_epochs=(1,))
    tasks: list[Task] = [
        LinearProbe(data=data),
        MinimalPairs(folder=str(tmp_path / "pairs")),
        tuning,
    ]
    found = []
    for task in tasks:
        task.check()
        found.append(task.measure(model, seed=0, scratch=tmp_path))
    scores = [next(iter(each.scores.values())) for each in found]
    assert [score.metric for score in scores] == ["accuracy"] * 3
    assert [len(score.items) for score in scores] == [48, 6, 48]
    # The family's own classifier adds tensors, and the notes name them.
    assert found[-1].notes["tensors not pre-trained"]
