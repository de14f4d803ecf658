"""Continued training on one's own text: examples/domain.sh as a user runs it, and its refusals."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

from megatron_ettin.config import load_config
from megatron_ettin.data.tokenize import train_tokenizer, write_tokenizer
from megatron_ettin.domain.recipe import MAX_STEP_TOKENS, RELEASED, make_recipe
from tests.models import write_random_model
from tools.domain import main

ROOT = Path(__file__).parents[2]
WORDS = ["".join(random.Random(n).choices("etaoinshrdlu", k=2 + n % 6)) for n in range(300)]
MODEL_ROW = 128


def write_texts(path: Path, words: Sequence[str], count: int) -> Path:
    chance = random.Random(path.name)
    texts = (" ".join(chance.choices(words, k=chance.randint(20, 60))) for _ in range(count))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write two texts, labels, a tokenizer of each text, and a model of general text."""
    folder = tmp_path_factory.mktemp("given")
    general = write_texts(folder / "general.jsonl", WORDS[:200], 45)
    domain = write_texts(folder / "domain.jsonl", WORDS[100:], 45)
    write_tokenizer(train_tokenizer(texts_of(general), 330), folder / "general")
    write_tokenizer(train_tokenizer(texts_of(domain), 350), folder / "domain")
    write_random_model(folder / "hf", "encoder", folder / "general", max_tokens=MODEL_ROW)
    chance = random.Random(9)
    with (folder / "labels.jsonl").open("w") as file:
        for number in range(60):
            words = WORDS[100 * (number % 2) :][:100]
            text = " ".join(chance.choices(words, k=12))
            file.write(json.dumps({"text": text, "label": f"kind {number % 2}"}) + "\n")
    return folder


@pytest.mark.long
def test_one_command_gives_a_model_and_a_page(given: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    command = (
        f"bash examples/domain.sh {output} --model {given / 'hf'} --text {given / 'domain.jsonl'} "
        f"--general {given / 'general.jsonl'} --replay 0.2 --tokenizer {given / 'domain'}"
    )
    labels = {"LABELS": str(given / "labels.jsonl"), "TRAIN": "--logging.log_every_steps 50"}
    shell(command, **labels)
    found = json.loads((output / "before_after.json").read_text())
    wholes = {line["corpus"]: line for line in found["held_out"] if line["is_whole"]}
    assert list(wholes) == ["domain_text_validation", "general_text_validation"]
    domain = wholes["domain_text_validation"]
    assert domain["after"] < domain["before"] - 0.2
    assert 0.0 <= found["accuracy"]["before"] <= 1.0
    page = (output / "before_after.html").read_text()
    assert f"{found['accuracy']['after']:.3f} after" in page
    config = load_config(output / "run/config.yaml")
    assert config.data.blend == {"domain": {"domain": 0.8, "general": 0.2}}
    model = AutoModelForMaskedLM.from_pretrained(output / "hf")
    assert model.config.vocab_size == 350
    assert len(AutoTokenizer.from_pretrained(output / "hf")) == 350
    assert pipeline("fill-mask", model=str(output / "hf"))(f"{WORDS[150]} [MASK]")


def shell(command: str, **environment: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command.split(),
        cwd=ROOT,
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def refusal(given: Path, output: Path, **changed: str) -> str:
    options = {"model": str(given / "hf"), "text": str(given / "domain.jsonl"), **changed}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    with pytest.raises(SystemExit) as caught:
        main([*words, "--output", str(output)])
    assert not (output / "run.yaml").exists()
    return str(caught.value)


def test_what_cannot_work_is_refused_with_a_reason(given: Path, tmp_path: Path) -> None:
    other = tmp_path / "hf"
    write_random_model(other, "encoder", given / "general")
    (other / "tokenizer.json").write_bytes((given / "domain/tokenizer.json").read_bytes())
    said = refusal(given, tmp_path / "a", model=str(other))
    assert "has 350 ids, but the model's embedding has 330 rows" in said
    assert "--tokenizer" in said
    said = refusal(given, tmp_path / "b", **{"seq-length": "256"})
    assert "the model is made for rows of 128; extend it first" in said
    small = write_texts(tmp_path / "small.jsonl", WORDS, 4)
    assert "4 for training, 0 for validation" in refusal(given, tmp_path / "c", text=str(small))
    long = write_random_model(tmp_path / "long", "encoder", given / "general", max_tokens=4096)
    said = refusal(given, tmp_path / "g", model=str(long))
    assert "fill no row of 4,096; give more documents, or shorter rows" in said
    said = refusal(given, tmp_path / "d", general=str(given / "general.jsonl"), replay="0.9")
    assert "the general text is too small" in said
    assert "--replay 1.5: is a share" in refusal(given, tmp_path / "e", replay="1.5")
    (tmp_path / "f").mkdir()
    (tmp_path / "f/mine.txt").write_text("kept")
    assert "exists already" in refusal(given, tmp_path / "f")


def test_an_output_of_another_tokenizer_is_not_mixed(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--model", str(given / "hf"), "--output", str(tmp_path / "o")]
    common += ["--text", str(given / "domain.jsonl")]
    main(common)
    before = (tmp_path / "o/run.yaml").read_bytes()
    main(common)  # again: what is there is not made anew
    assert "up to date" in capsys.readouterr().out
    assert (tmp_path / "o/run.yaml").read_bytes() == before
    with pytest.raises(SystemExit, match="was made with another tokenizer"):
        main([*common, "--tokenizer", str(given / "domain")])
    assert (tmp_path / "o/run.yaml").read_bytes() == before
    config = load_config(tmp_path / "o/run.yaml")
    assert config.data.blend == {"domain": {"domain": 1.0}}
    assert config.phases[0].seq_length == MODEL_ROW
    assert config.objective.scored_share("domain") == 0.15


def test_defaults_follow_the_released_runs() -> None:
    for path in sorted((ROOT / "examples/cross").glob("*.yaml")):
        if path.stem == "nano":
            continue
        released = yaml.safe_load(path.read_text())
        (phase,) = released["phases+"]
        sizes = dict(zip(["17m", "32m", "68m", "150m", "400m", "1b"], RELEASED, strict=True))
        recipe = make_recipe(
            num_parameters=sizes[path.stem][0],
            domain_tokens=10**11,
            general_tokens=10**11,
            replay=0.1,
            seq_length=8192,
        )
        sections = recipe.sections()
        for name in ("lr", "weight_decay"):
            assert sections["optimizer"][name] == released["optimizer"][name], path.stem
        (own,) = sections["phases"]
        for name in ("lr_end", "lr_decay", "global_batch_size", "seq_length"):
            assert own[name] == phase[name], path.stem
        shares = sections["optimizer"]["warmup_tokens"], own["lr_decay_tokens"]
        wanted = released["optimizer"]["warmup_tokens"], phase["lr_decay_tokens"]
        for share, tokens in zip(shares, wanted, strict=True):
            found, expected = share / own["train_tokens"], tokens / phase["train_tokens"]
            assert found == pytest.approx(expected, rel=1e-3), path.stem


def test_the_budget_follows_the_text() -> None:
    def recipe(tokens: int) -> tuple[int, int]:
        made = make_recipe(
            num_parameters=150_000_000,
            domain_tokens=tokens,
            general_tokens=tokens,
            replay=0.2,
            seq_length=1024,
        )
        return made.train_tokens, made.rows_of_a_step

    assert recipe(10_000) == (50_000, 1)
    assert recipe(10_000_000) == (50_000_000, 97)
    assert recipe(10**12) == (50_000_000_000, MAX_STEP_TOKENS // 1024)
    with pytest.raises(ValueError, match=r"give at least 4,096 tokens, or shorter rows"):
        recipe(4095)
    assert recipe(4096)[0] == 20_480
