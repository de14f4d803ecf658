"""docs/howto.md, block after block, in one folder with a made-up text.

Tools run in this process. A training command is parsed, its order is opened, and its run is written
as training would leave it after a few steps, without weights.
"""

import glob
import importlib
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ettin.config import RunConfig, parse_args
from megatron_ettin.data.orders import open_order
from megatron_ettin.order.digest import add_digests, format_digest
from megatron_ettin.order.ledger import Ledger
from tests.runs import record_run
from tests.shell_blocks import blocks, commands

ROOT = Path(__file__).parents[2]
HOWTO = ROOT / "docs/howto.md"
SECTION = re.compile(r"^## (.+)$", re.MULTILINE)
LOOP = re.compile(r"^for (\w+) in ([^;]+); do\n(.*?)^done$", re.MULTILINE | re.DOTALL)
PRETRAIN = "megatron_ettin.pretrain"
#: Sections whose text says that their commands are not run.
UNCHECKED = (
    "Continue a Hugging Face model",
    "Extend an imported model",
    "Evaluate on your own labels",
    "Many nodes",
)
STEPS = 4


def sections() -> dict[str, str]:
    """Return the text of each section, by its title."""
    _, *parts = SECTION.split(HOWTO.read_text())
    return dict(zip(parts[::2], parts[1::2], strict=True))


def commands_of(text: str) -> Iterator[list[str]]:
    """Yield the commands of a section as the shell would run them: loops and globs expanded."""
    for language, block in blocks(text):
        if language != "bash":
            continue

        def repeated(loop: re.Match[str]) -> str:
            return "".join(loop[3].replace(f"${loop[1]}", value) for value in loop[2].split())

        for words in commands(LOOP.sub(repeated, block)):
            yield [name for word in words for name in (sorted(glob.glob(word)) or [word])]


def write_texts(folder: Path) -> None:
    """Write documents of random words, enough for a vocabulary; one of them holds a sentence."""
    chance = random.Random(5)
    letters = "etaoinshrdlu"
    words = ["".join(chance.choices(letters, k=chance.randint(4, 9))) for _ in range(6000)]
    folder.mkdir(parents=True)
    with (folder / "made.jsonl").open("w") as file:
        for number in range(900):
            text = " ".join(chance.choices(words, k=40))
            if number == 450:
                text += " Paris is the capital of France."
            file.write(json.dumps({"text": text}) + "\n")


def write_run(config: RunConfig) -> None:
    """Write the folder of a run after a few steps, with a report of each."""
    ledger = Ledger.read(record_run(config, steps=STEPS) / "ledger")
    lines, tokens, digest = [], 0, (0, 0)
    for step in ledger.steps:
        tokens += int(step["n_tokens"])
        digest = add_digests(digest, step["token_digest"].tolist())
        lines.append(
            {"kind": "train", "step": int(step["step"]), "g": int(step["g_end"]),
             "phase": "pretrain", "tokens": tokens, "loss": 9.0, "lr": 1e-3, "seconds": 1.0,
             "tokens_per_second": 1.0, "token_digest": format_digest(digest)}
        )  # fmt: skip
    metrics = Path(config.run_dir) / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))


def run(words: list[str]) -> str:
    """Carry out a command of the document; return what kind it was."""
    if PRETRAIN in words:
        config = parse_args(words[words.index(PRETRAIN) + 1 :])
        if Path(config.run_dir).exists():
            assert config.checkpoint.resume, f"{config.run_dir} is there already"
            open_order(config)
        else:
            write_run(config)
        return "train"
    program, script, *arguments = words
    assert program == "python", f"no way to run {words}"
    name = Path(script).stem
    importlib.import_module(f"tools.{name}").main(arguments)
    return name


@pytest.mark.slow
def test_the_blocks_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    write_texts(tmp_path / "own" / "text")
    monkeypatch.chdir(tmp_path)
    ran = {
        title: [run(words) for words in commands_of(text)]
        for title, text in sections().items()
        if title not in UNCHECKED
    }
    assert all(ran.values())
    printed = capsys.readouterr().out
    assert "PASS" in printed
    assert re.search(r"optimizer\.lr +0\.001 +0\.004", printed)
    where = printed[printed.index("steps done") :]
    assert re.search(r"source +own\n +ordinal +\d+", where)
    for name in ("lr.png", "lr.html", "lr-report/report.html"):
        assert (tmp_path / "runs" / name).stat().st_size > 10_000


def test_what_is_not_run_is_said() -> None:
    for title in UNCHECKED:
        assert re.search(r"checked for\s+(its|their)\s+(options|files)\s+alone", sections()[title])
