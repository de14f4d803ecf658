"""Command line of preprocessing: one corpus by options, or all corpora of a configuration file."""

import json
import re
from pathlib import Path

import pytest

from megatron_ettin.data.command_line import parse_command
from megatron_ettin.data.encoding import SelectionRules
from megatron_ettin.data.preprocess import preprocess
from megatron_ettin.data.tokenize import train_tokenizer, write_tokenizer
from megatron_ettin.indexed import IndexedReader

ROOT = Path(__file__).parents[2]
TEXTS = [f"document {number} about the film" for number in range(40)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder with two raw files and a tokenizer."""
    for name in "ab":
        lines = "".join(json.dumps({"text": f"{name} {text}"}) + "\n" for text in TEXTS)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    write_tokenizer(train_tokenizer(TEXTS, 270), tmp_path / "tokenizer")
    return tmp_path


def write_config(folder: Path, sources: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(f"""\
model: {{num_layers: 2}}
data:
  tokenizer: {folder}/tokenizer
  sources:
{sources}
  blend: {{pretrain: {{a: 1.0}}}}
""")
    return path


def test_options_are_those_of_the_command_line(folder: Path) -> None:
    corpora, execution = parse_command(
        "",
        [
            *("--input", f"{folder}/*.jsonl", "--output-prefix", "out/x"),
            *("--tokenizer", f"{folder}/tokenizer", "--json-keys", "text", "title", "--shards"),
            *("--workers", "3", "--append-eod", "--validation-share", "0.1", "--min-tokens", "2"),
            *("--max-tokens", "9", "--deduplicate", "exact", "--on-error", "quarantine"),
            *("--executor", "slurm", "--tasks", "5"),
            *("--executor-options", "partition=cpu", "time=4:00:00", "cpus_per_task=8"),
        ],
    )
    (options,) = corpora
    assert [Path(file.path).name for file in options.inputs] == ["a.jsonl", "b.jsonl"]
    assert options.rules == SelectionRules(
        append_eod=True, validation_share=0.1, min_tokens=2, max_tokens=9
    )
    assert (options.json_keys, options.workers, options.shards) == (("text", "title"), 3, True)
    assert (options.deduplicate, options.on_error) == ("exact", "quarantine")
    assert (execution.executor, execution.tasks) == ("slurm", 5)
    assert execution.options == {"partition": "cpu", "time": "4:00:00", "cpus_per_task": 8}


def test_one_file_makes_all_corpora_of_a_run(folder: Path) -> None:
    path = write_config(
        folder,
        f"""\
    a: {{prefix: {folder}/out/a_text_document, raw: {{inputs: ["{folder}/a.jsonl"]}}}}
    b:
      prefix: {folder}/out/b_text_document
      raw: {{inputs: ["{folder}/b.jsonl"], shards: true, validation_share: 0.2}}
    made_before: {{prefix: elsewhere}}""",
    )
    corpora, _ = parse_command("", ["--config", str(path), "--workers", "2"])
    assert [options.workers for options in corpora] == [2, 2]
    for options in corpora:
        preprocess(options)
    assert len(IndexedReader(f"{folder}/out/a_text_document")) == len(TEXTS)
    parts = [f"{folder}/out/b_text_{part}/00000" for part in ("document", "validation")]
    assert sum(len(IndexedReader(part)) for part in parts) == len(TEXTS)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ("    a: {prefix: out/a}", "no entry of data.sources has `raw`"),
        (
            "    a: {prefix: out/a, raw: {inputs: [a.jsonl]}}",
            "data.sources.a.prefix: 'out/a' must be one prefix that ends with '_text_document'",
        ),
        ("    a: {prefix: out/a_text_document, raw: {inputs: [no.jsonl]}}", "no.jsonl"),
        ("    a: {prefix: out/a, raw: {input: [a.jsonl]}}", "mine.yaml: "),
    ],
)
def test_what_a_file_cannot_mean(folder: Path, sources: str, message: str) -> None:
    path = write_config(folder, sources)
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        parse_command("", ["--config", str(path)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "x", "--input", "a"], "--input: not with --config"),
        (["--input", "a"], "--output-prefix, --tokenizer: needed, unless --config"),
        (["--input", "a", "--executor-options", "x"], "'x' is not NAME=VALUE"),
        (["--input", "a", "--tasks", "3"], "--tasks and --executor-options: only with --executor"),
    ],
)
def test_what_a_command_line_cannot_mean(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_command("", arguments)
    assert message in capsys.readouterr().err


def test_an_executor_needs_shards(folder: Path) -> None:
    arguments = ["--input", f"{folder}/a.jsonl", "--output-prefix", "x", "--executor", "local"]
    with pytest.raises(ValueError, match="executor: x is not made of shards"):
        parse_command("", [*arguments, "--tokenizer", f"{folder}/tokenizer"])


def test_the_example_of_the_documents_is_read(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    (folder / "own" / "text").mkdir(parents=True)
    (folder / "a.jsonl").rename(folder / "own" / "text" / "a.jsonl")
    monkeypatch.chdir(folder)
    corpora, _ = parse_command("", ["--config", str(ROOT / "examples" / "data" / "own_text.yaml")])
    assert [str(options.output_prefix) for options in corpora] == ["own/tokens/own"]
    assert corpora[0].rules.validation_share == 0.02
