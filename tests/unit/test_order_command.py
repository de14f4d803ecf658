"""tools/order.py as its users call it: text, JSON, help, errors."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_ettin.queries.command_line import COMMANDS, parse
from tests.conftest import TinyCorpus
from tests.unit.queried import Queried, make_queried
from tools import order

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def queried(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Queried:
    return make_queried(tiny_corpus, tmp_path_factory.mktemp("queried"))


def ask(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    order.main([str(word) for word in words])
    return capsys.readouterr().out


def ask_json(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    (line,) = ask(capsys, *words, "--json").splitlines()
    answer = json.loads(line)
    assert isinstance(answer, dict)
    return answer


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_parses(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        order.main([command, "--help"])
    text = capsys.readouterr().out
    assert "--json" in text
    example = " ".join(text.split("example: python tools/order.py")[1].split())
    words = shlex.split(example)
    module, _ = parse(words)
    assert module.__name__.endswith(command.replace("-", "_"))


def test_where(queried: Queried, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("where", "--run", queried.folder, "--id", "alpha-17", "--source", "alpha")
    (document,) = ask_json(capsys, *words)["documents"]
    mine = [p for p in queried.pieces if (p.source, p.document) == ("alpha", 17)]
    assert [place["g"] for place in document["places"] if place["step"]] == [p.g for p in mine]
    text = ask(capsys, *words)
    lines = [line.split() for line in text.splitlines()]
    assert ["id", "alpha-17"] in lines
    for piece in mine:
        assert any(line[:3] == [str(piece.g), str(piece.step), str(piece.slot)] for line in lines)


def test_exposures(queried: Queried, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("exposures", "--run", queried.folder, "--doc", "beta:3", "--at", 30)
    answer = ask_json(capsys, *words)
    assert (answer["at"], answer["step"]) == ("step_00000030", 30)
    before = [p for p in queried.before(answer["g"]) if (p.source, p.document) == ("beta", 3)]
    assert answer["documents"][0]["tokens_seen"] == sum(piece.length for piece in before)
    assert "tokens since last" in ask(capsys, *words)


def test_unseen(queried: Queried, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("unseen", "--run", queried.folder, "--at", 4, "--num", 5, "--seed", 1)
    documents = ask_json(capsys, *words)["documents"]
    assert len(documents) == 5
    assert str(documents[0]["ordinal"]) in ask(capsys, *words)


def test_docs(queried: Queried, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("docs", "--run", queried.folder, "--from", 0, "--to", 4)
    answer = ask_json(capsys, *words, "--output", tmp_path / "a.parquet")
    assert answer["pieces"] == len(queried.before(answer["g_end"]))
    text = ask(capsys, *words, "--output", tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert "without provenance:\n  beta" in text


def test_batch(queried: Queried, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("batch", "--run", queried.folder, "--step", 1, "--rank", 1, "--data-parallel-size", 2)
    answer = ask_json(capsys, *words, "--masked", "--tokenizer-text")
    assert answer["micro_batch_tokens"] == 512
    assert [row["g"] for row in answer["rows"]] == [4, 5, 6, 7, 12, 13, 14, 15]
    row = answer["rows"][0]
    assert len(row["tokens"]) == len(row["inputs"]) == len(row["labels"]) == row["num_tokens"]
    assert None in row["labels"]
    text = ask(capsys, *words)
    assert str(row["tokens"][-1]) in text
    assert "labels" not in text


def test_plan_of_files_and_of_a_run(
    queried: Queried, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    yaml = queried.folder.with_suffix(".yaml")
    answer = ask_json(capsys, "plan", "--config", yaml, "--figure", tmp_path / "rows.png")
    assert (tmp_path / "rows.png").stat().st_size > 10_000
    assert answer.pop("figure") == str(tmp_path / "rows.png")
    of_run = ask_json(capsys, "plan", "--run", queried.folder)
    assert of_run.pop("figure") is None
    assert answer == of_run


def test_sql(queried: Queried, capsys: pytest.CaptureFixture[str]) -> None:
    query = "select sum(length) as tokens, any_value(source) as s from segments where step = 1"
    (row,) = ask_json(capsys, "sql", query, "--run", queried.folder)["table"]
    assert row["tokens"] == sum(p.length for p in queried.pieces if p.step == 1)
    assert str(row["tokens"]) in ask(capsys, "sql", query, "--run", queried.folder)
    limited = ask_json(
        capsys, "sql", "from steps", "--run", queried.folder, "--from", 4, "--to", 30
    )
    assert limited["rows"] == 26


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("where", "--doc", "alpha:9999"), "has documents 0 to 499"),
        (("where", "--id", "beta-1"), "beta.docs.parquet"),
        (("exposures", "--doc", "alpha:1", "--at", "7"), "there are: step_00000004, "),
        (("batch", "--step", "1", "--rank", "0"), "go together"),
        (("batch", "--step", "100000"), "has steps 1 to"),
        (("sql", "selct 1"), "syntax error"),
        (("unseen", "--at", "4", "--num", "0", "--seed", "1"), "num 0 must be positive"),
    ],
)
def test_errors_are_one_line_of_advice(
    queried: Queried, words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit, match=r"^error: ") as caught:
        order.main([*words, "--run", str(queried.folder)])
    assert message in str(caught.value)


def test_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"error: .*config\.yaml"):
        order.main(["where", "--run", str(tmp_path), "--doc", "alpha:1"])


@pytest.mark.slow
def test_reader_may_stop_early(queried: Queried) -> None:
    """Read one line and leave, as `order.py batch … | head -1` does."""
    command = [sys.executable, "tools/order.py", "sql", "from range(300000)"]
    process = subprocess.Popen(
        [*command, "--run", str(queried.folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "rows  300000\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 1
