"""Every command of tools/order.py is documented, and changes no file of the run that it asks."""

import hashlib
import shlex
from pathlib import Path

import pytest

from megatron_ettin.data.inspection import command_line as inspection
from megatron_ettin.queries import command_line
from tests.conftest import TinyCorpus
from tests.keys import write_keys
from tests.runs import record_run, tiny_config
from tools import order

ROOT = Path(__file__).parents[2]
#: A question to RUN for each command; OUT is a folder for what it writes, TWIN another run, KEY a
#: private key. A new command needs a line here and a row in docs/queries.md.
QUESTIONS: dict[str, str] = {
    "plan": "--run RUN",
    "batch": "--run RUN --step 1 --masked --tokenizer-text",
    "docs": "--run RUN --from 0 --to 2 --output OUT/docs.parquet",
    "where": "--run RUN --doc alpha:1",
    "losses": "--run RUN --figure OUT/losses.png",
    "spikes": "--run RUN --skip OUT/skip.yaml",
    "skips": "--run RUN",
    "search": "--run RUN --text e --num 2",
    "contaminated": "--run RUN --benchmark OUT/items.jsonl --fields text --output OUT/report",
    "unseen": "--run RUN --at 2 --num 2 --seed 1",
    "exposures": "--run RUN --doc alpha:1",
    "diff": "--run RUN --run TWIN",
    "twins": "--run RUN --run TWIN",
    "verify": "--run RUN --chain --order --tokens",
    "export": "--run RUN --layout ettin --output OUT/record",
    "import-ettin": "--input OUT/record --output OUT/imported",
    "attest": "--run RUN --key KEY --output OUT/attestation.json",
    "croissant": "--run RUN --output OUT/corpora.json",
    "training-content": "--run RUN --output OUT/content.md",
    "sql": "--run RUN 'from steps'",
}


@pytest.fixture(scope="module")
def folder(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Record two equal runs of a few steps, and write the record of one."""
    folder = tmp_path_factory.mktemp("asked")
    for name in ("run", "twin"):
        config = tiny_config(tiny_corpus, folder / name, logging={"row_losses": True})
        record_run(config, steps=4, save_steps=(2,))
    order.main(words("export", folder))
    write_keys(folder)
    (folder / "out" / "items.jsonl").write_text('{"text": "an item of a benchmark"}\n')
    return folder


def words(command: str, folder: Path) -> list[str]:
    """Return the question with its places filled in."""
    places = {"RUN": "run", "TWIN": "twin", "OUT": "out", "KEY": "key.pem"}
    text = QUESTIONS[command]
    for place, name in places.items():
        text = text.replace(place, str(folder / name))
    return [command, *shlex.split(text)]


def content(folder: Path) -> dict[str, str]:
    """Return the digest of each file of the runs, and the files that are there."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for name in ("run", "twin")
        for path in sorted((folder / name).rglob("*"))
        if path.is_file()
    }


def test_there_is_a_question_for_every_command() -> None:
    assert QUESTIONS.keys() == command_line.COMMANDS.keys()


@pytest.mark.parametrize("command", command_line.COMMANDS)
def test_a_question_changes_no_file_of_the_run(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(folder)
    assert any(name.endswith("records.led") for name in before)
    order.main(words(command, folder))
    assert capsys.readouterr().out
    assert content(folder) == before


@pytest.mark.parametrize("command", command_line.COMMANDS)
def test_every_question_is_documented(command: str) -> None:
    document = (ROOT / "docs" / "queries.md").read_text()
    rows = [line.split("|")[1] for line in document.splitlines() if line.startswith("| `")]
    assert any(f"`{command}`" in row for row in rows), "add a row to docs/queries.md"


@pytest.mark.parametrize("command", inspection.COMMANDS)
def test_every_look_into_a_corpus_is_documented(command: str) -> None:
    assert f"tools/dataset.py {command} " in (ROOT / "docs" / "data.md").read_text()
