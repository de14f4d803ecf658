"""The exported tokenizer frames texts for its kind of model, and plain pipelines run."""

import ast
import dataclasses
import json
import logging
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, pipeline

from megatron_ettin.data.tokenize import load_tokenizer, train_tokenizer, write_tokenizer
from megatron_ettin.export.huggingface import from_huggingface, to_huggingface
from megatron_ettin.objectives import MaskedDiffusion, MaskedNextToken
from tests.parity.references import KINDS
from tests.parity.runs import make_run, save_run

VOCAB_SIZE = 512
UNK, CLS, SEP, PAD, MASK = range(VOCAB_SIZE - 5, VOCAB_SIZE)
SYLLABLES = ("ta", "le", "ka", "mi", "so", "ru")
TEXT = "a tale of a table"


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a byte-level tokenizer trained on a few syllables."""
    draw = random.Random(0)
    words = ["".join(draw.choices(SYLLABLES, k=3)) for _ in range(400)]
    texts = [" ".join(draw.choices(words, k=50)) for _ in range(100)]
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(train_tokenizer([*texts, TEXT], VOCAB_SIZE), folder)
    return folder


@pytest.fixture(scope="module")
def exported(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folder of each kind of model, exported with the tokenizer."""
    folders = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        config = make_run(kind, tokenizer_folder, vocab_size=VOCAB_SIZE)
        save_run(folder / "c", config, "extension", load_tokenizer(tokenizer_folder).digest)
        to_huggingface(folder / "c", folder / "hf")
        folders[kind] = folder / "hf"
    return folders


@pytest.fixture(scope="module")
def words(tokenizer_folder: Path) -> list[int]:
    """Return the ids of TEXT without any frame."""
    backend = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    ids: list[int] = backend.encode(TEXT, add_special_tokens=False).ids
    return ids


@pytest.mark.parametrize("kind", [*KINDS, "shifted", "diffusion"])
def test_what_the_card_shows_runs(
    kind: str,
    exported: dict[str, Path],
    tokenizer_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = exported.get(kind, tmp_path / "hf")
    if kind not in exported:
        objective = {"shifted": MaskedNextToken(), "diffusion": MaskedDiffusion()}[kind]
        config = make_run("encoder", tokenizer_folder, vocab_size=VOCAB_SIZE)
        config = dataclasses.replace(config, objective=objective)
        save_run(tmp_path / "c", config, "extension", load_tokenizer(tokenizer_folder).digest)
        to_huggingface(tmp_path / "c", folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    shown = (folder / "README.md").read_text().split("```python\n")[1].partition("```")[0]
    *steps, answer = ast.parse(shown).body
    names: dict[str, Any] = {}
    exec(compile(ast.Module(steps, type_ignores=[]), "README.md", "exec"), names)
    said = eval(ast.unparse(answer), names)
    if kind == "shifted":
        # Not what the position of the mask says, but the one before it.
        inputs = names["tokenizer"]("The film was [MASK].", return_tensors="pt")
        place = inputs["input_ids"][0].tolist().index(MASK)
        expected = names["model"](**inputs).logits[0, place - 1].topk(5).indices
        assert said == names["tokenizer"].batch_decode(expected)
    elif kind == "diffusion":
        assert (names["inputs"]["input_ids"] == MASK).sum() == 12
        assert not (names["filled"] == MASK).any()
        assert "[MASK]" not in said[0]
        assert len(said[0]) > len("The film was.")
    else:
        assert said[0]["sequence" if kind == "encoder" else "generated_text"]


def frame(kind: str, words: list[int]) -> list[int]:
    return [CLS, *words, SEP] if kind == "encoder" else [CLS, *words]


@pytest.mark.parametrize("kind", KINDS)
def test_frame_is_the_same_in_rust_and_python(
    kind: str, exported: dict[str, Path], words: list[int]
) -> None:
    backend = tokenizers.Tokenizer.from_file(str(exported[kind] / "tokenizer.json"))
    tokenizer = AutoTokenizer.from_pretrained(exported[kind])
    assert backend.encode(TEXT).ids == frame(kind, words)
    assert tokenizer(TEXT)["input_ids"] == frame(kind, words)
    assert tokenizer(TEXT, add_special_tokens=False)["input_ids"] == words
    assert set(tokenizer(TEXT)) == {"input_ids", "attention_mask"}
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"], skip_special_tokens=True) == TEXT
    pair = tokenizer(TEXT, TEXT)["input_ids"]
    ends = [SEP] if kind == "encoder" else []
    assert pair == [CLS, *words, *ends, *words, *ends]


def test_decoder_has_what_harnesses_ask_for(exported: dict[str, Path], words: list[int]) -> None:
    """lm-eval takes bos or eos as the prefix of an empty context, and eos as the stop."""
    tokenizer = AutoTokenizer.from_pretrained(exported["decoder"])
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("[CLS]", "[SEP]")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (CLS, SEP)
    generation = GenerationConfig.from_pretrained(exported["decoder"])
    assert (generation.bos_token_id, generation.eos_token_id) == (CLS, SEP)
    assert generation.pad_token_id == PAD
    with_bos = AutoTokenizer.from_pretrained(exported["decoder"], add_bos_token=True)
    assert with_bos(TEXT)["input_ids"] == [CLS, *words]


@pytest.mark.parametrize("kind", KINDS)
def test_special_ids_are_the_tokenizers(kind: str, exported: dict[str, Path]) -> None:
    config = AutoConfig.from_pretrained(exported[kind])
    assert (config.cls_token_id, config.sep_token_id, config.pad_token_id) == (CLS, SEP, PAD)
    assert (config.bos_token_id, config.eos_token_id) == (CLS, SEP)
    tokenizer = AutoTokenizer.from_pretrained(exported[kind])
    assert (tokenizer.mask_token_id, tokenizer.pad_token_id) == (MASK, PAD)
    assert tokenizer.model_max_length == 512


def test_fill_mask_pipeline(exported: dict[str, Path]) -> None:
    fill = pipeline("fill-mask", model=str(exported["encoder"]), device="cpu")
    answers = fill("a tale of a [MASK]", top_k=3)
    assert len(answers) == 3
    assert all(0.0 < answer["score"] < 1.0 for answer in answers)


def test_text_generation_pipeline(exported: dict[str, Path]) -> None:
    generate = pipeline("text-generation", model=str(exported["decoder"]), device="cpu")
    prompts = [f"{TEXT} {TEXT}", "a"]
    answers = generate(prompts, max_new_tokens=20, do_sample=False, batch_size=2)
    assert all(
        answer[0]["generated_text"].startswith(prompt)
        for prompt, answer in zip(prompts, answers, strict=True)
    )
    # Padding beside a longer prompt changes nothing.
    alone = generate("a", max_new_tokens=20, do_sample=False)
    assert alone[0]["generated_text"] == answers[1][0]["generated_text"]


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizer_comes_back(kind: str, exported: dict[str, Path], tmp_path: Path) -> None:
    """An imported folder's tokenizer goes out again with the model."""
    saved = from_huggingface(exported[kind], tmp_path / "c")
    assert saved.tokenizer == str(exported[kind])
    to_huggingface(tmp_path / "c", tmp_path / "hf")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (exported[kind] / name).read_bytes()


def spoil(folder: Path, **fields: Any) -> None:
    """Set fields of a tokenizer_config.json."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("kind", KINDS)
def test_source_for_the_other_kind(
    kind: str, exported: dict[str, Path], words: list[int], tmp_path: Path
) -> None:
    """The frame is the model's, whatever the source's was; so are the limits it came with."""
    other = {"encoder": "decoder", "decoder": "encoder"}[kind]
    source = Path(shutil.copytree(exported[other], tmp_path / "source"))
    spoil(source, add_bos_token=True, add_eos_token=True, model_max_length=7)
    backend = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=99)
    backend.save(str(source / "tokenizer.json"))
    config = make_run(kind, source, vocab_size=VOCAB_SIZE)
    save_run(tmp_path / "c", config, "extension", load_tokenizer(source).digest)
    to_huggingface(tmp_path / "c", tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer(TEXT)["input_ids"] == frame(kind, words)
    assert tokenizer.model_max_length == 512


@pytest.mark.parametrize("state", ["gone", "changed"])
def test_model_without_its_tokenizer(
    state: str, tokenizer_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "tokenizer"))
    digest = load_tokenizer(folder).digest
    if state == "gone":
        shutil.rmtree(folder)
    else:
        with (folder / "tokenizer.json").open("a") as file:
            file.write("\n")
    config = make_run("decoder", folder, vocab_size=VOCAB_SIZE)
    save_run(tmp_path / "c", config, "extension", digest)
    with caplog.at_level(logging.WARNING):
        to_huggingface(tmp_path / "c", tmp_path / "hf")
    assert f"{folder / 'tokenizer.json'} is" in caplog.text
    assert not (tmp_path / "hf" / "tokenizer.json").exists()
    found = AutoConfig.from_pretrained(tmp_path / "hf")
    # Assumed: the last five of the vocabulary, where tokenizers trained here have them.
    assert (found.cls_token_id, found.sep_token_id, found.pad_token_id) == (CLS, SEP, PAD)


def test_token_ids_of_an_imported_model_stay(
    exported: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A tokenizer with other names (mmBERT has <bos>, <eos>) cannot say which ids they are."""
    folder = Path(shutil.copytree(exported["decoder"], tmp_path / "hf"))
    (folder / "tokenizer.json").unlink()
    document = json.loads((folder / "config.json").read_text())
    ids = {"bos_token_id": 2, "eos_token_id": [1, 7], "pad_token_id": 0, "sep_token_id": 1}
    (folder / "config.json").write_text(json.dumps(document | ids))
    from_huggingface(folder, tmp_path / "c")
    caplog.clear()
    to_huggingface(tmp_path / "c", tmp_path / "again")
    for read in (AutoConfig, GenerationConfig):
        found = read.from_pretrained(tmp_path / "again")
        assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (2, [1, 7], 0)
    assert "assumed" not in caplog.text
