"""Help begins with the purpose; a typo gets the nearest name."""

from pathlib import Path

import pytest

from megatron_ettin.command_parser import CommandParser, nearest
from megatron_ettin.config import parse_args
from megatron_ettin.config.command_line import ConfigError
from megatron_ettin.estimate import command_line as estimate
from tests.conftest import TinyCorpus


@pytest.fixture
def parser() -> CommandParser:
    parser = CommandParser(prog="tool", description="Do something useful.")
    commands = parser.add_subparsers(dest="command", required=True)
    where = commands.add_parser("where", description="Say where.")
    where.add_argument("--run", required=True)
    where.add_argument("--kind", choices=["short", "long"])
    where.add_argument("--no-check", action="store_true")
    where.add_argument_group("Names").add_argument("--name", nargs="*")
    return parser


def test_help_begins_with_the_purpose_and_the_groups(parser: CommandParser) -> None:
    assert parser.format_help().startswith("Do something useful.\n\nusage: tool")
    assert parser.format_help().count("Do something useful.") == 1


def test_groups_are_named(parser: CommandParser, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser.parse_args(["where", "--help"])
    assert capsys.readouterr().out.startswith(
        "Say where.\nGroups of options: Names.\n\nusage: tool where"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["wheer", "--run", "a"], "did you mean where?"),
        (["where", "--rnu", "a"], "--rnu: no such option; did you mean --run?"),
        (["where", "--rnu=a"], "--rnu: no such option; did you mean --run?"),
        (["where", "--run", "a", "--zzzzzz"], "--zzzzzz: no such option\n"),
        (["where", "--run", "a", "--kind", "shor"], "did you mean short?"),
    ],
)
def test_a_typo_gets_the_nearest_name(
    parser: CommandParser,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as error:
        parser.parse_args(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_what_is_right_is_parsed(parser: CommandParser) -> None:
    args = parser.parse_args(["where", "--ru", "a", "--no-check", "--name", "b", "c"])
    assert (args.run, args.no_check, args.name) == ("a", True, ["b", "c"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--modle.num_layers=3"], "--modle.num_layers: no such option; did you mean --model.num"),
        (["--run-dir=x"], "--run-dir: no such option; did you mean --run_dir?"),
        (["--hardware.precision=bf17"], "did you mean bf16?"),
        (["--objective=MaskedLN"], "did you mean MaskedLM?"),
    ],
)
def test_a_typo_of_a_field_gets_the_nearest_name(
    tiny_corpus: TinyCorpus, tmp_path: Path, arguments: list[str], message: str
) -> None:
    config = tiny_corpus.write_config(tmp_path / "typo.yaml", objective="MaskedLM")
    with pytest.raises(ConfigError) as error:
        parse_args([f"--config={config}", "--run_dir=runs/x", *arguments])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--devise=cpu", "did you mean --device?"),
        ("--hardware.precision=bf17", "did you mean bf16?"),
    ],
)
def test_a_typo_in_a_plan_gets_the_nearest_name(argument: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        estimate.parse(["--config=examples/model/nano.yaml", argument])
    assert message in str(error.value)


def test_far_names_are_not_suggested() -> None:
    assert nearest("colour", ["seed", "objective"]) is None
