"""Command line of tools/preprocess_data.py: one corpus by options, or all corpora of a run."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import jsonargparse
import yaml

from megatron_ettin.command_parser import CommandParser
from megatron_ettin.config.data import DataConfig, RawSourceConfig
from megatron_ettin.data.encoding import SelectionRules
from megatron_ettin.data.preprocess_options import PreprocessOptions
from megatron_ettin.data.raw_files import expand_inputs


@dataclass(frozen=True)
class Execution:
    """Executor of datatrove that makes the shards; none if this process does."""

    executor: str | None
    tasks: int
    options: dict[str, int | str]
    """Options of the executor, by name."""


class Command(NamedTuple):
    """Corpora that a command line asks for, and who makes them."""

    corpora: list[PreprocessOptions]
    execution: Execution


CONFIG_HELP = "the YAML file of a run: makes the corpus of each data.sources entry that has `raw`"
#: Options of a single corpus, which a configuration file gives by source.
SINGLE = ("input", "output_prefix", "tokenizer")


def parse_command(description: str, arguments: Sequence[str] | None) -> Command:
    """Return what the command line asks for (`--help` exits).

    Raises:
        ValueError, OSError: naming the option, field or input that is at fault.
    """
    parser = _parser(description)
    args = parser.parse_args(arguments)
    given = {name: value for name, value in vars(args).items() if value is not None}
    if "executor" not in given and given.keys() & {"tasks", "executor_options"}:
        parser.error("--tasks and --executor-options: only with --executor")
    execution = Execution(
        given.pop("executor", None), given.pop("tasks", 1), dict(given.pop("executor_options", ()))
    )
    everywhere: dict[str, Any] = {
        name: given.pop(name) for name in ("workers", "library") if name in given
    }
    if args.config is not None:
        others = sorted(given.keys() - {"config"})
        if others:
            parser.error(f"--{others[0].replace('_', '-')}: not with --config, which says it")
        corpora = _of_run(Path(args.config), everywhere)
    else:
        missing = [f"--{name.replace('_', '-')}" for name in SINGLE if name not in given]
        if missing:
            parser.error(f"{', '.join(missing)}: needed, unless --config names a file")
        corpora = [_of_one(given | everywhere)]
    for options in corpora:
        if execution.executor is not None and not options.shards:
            raise ValueError(f"executor: {options.output_prefix} is not made of shards (--shards)")
    return Command(corpora, execution)


def _of_one(given: dict[str, Any]) -> PreprocessOptions:
    rules = {
        field.name: given.pop(field.name) for field in fields(SelectionRules) if field.name in given
    }
    inputs = expand_inputs(given.pop("input"))
    store, slash, name = str(given["output_prefix"]).rpartition("/")
    if "://" in store + slash:
        given |= {"store": store, "output_prefix": name}
    given["output_prefix"] = Path(given["output_prefix"])
    if "json_keys" in given:
        given["json_keys"] = tuple(given["json_keys"])
    return PreprocessOptions(inputs=inputs, rules=SelectionRules(**rules), **given)


def _of_run(path: Path, everywhere: dict[str, Any]) -> list[PreprocessOptions]:
    """Return the options of each source of a configuration file that names raw files."""
    data = _read_data(path)
    found = [
        _of_source(name, source.prefix, source.raw, Path(data.tokenizer), everywhere)
        for name, source in data.sources.items()
        if source.raw is not None
    ]
    if not found:
        raise ValueError(f"{path}: no entry of data.sources has `raw`, so there is nothing to make")
    return found


def _of_source(
    name: str,
    prefix: str | list[str],
    raw: RawSourceConfig,
    tokenizer: Path,
    everywhere: dict[str, Any],
) -> PreprocessOptions:
    end = f"_{raw.json_key}_document"
    if not isinstance(prefix, str) or not prefix.endswith(end):
        raise ValueError(
            f"data.sources.{name}.prefix: {prefix!r} must be one prefix that ends with {end!r}, "
            "as its corpus is made from raw files"
        )
    return PreprocessOptions(
        inputs=expand_inputs(raw.inputs),
        output_prefix=Path(prefix.removesuffix(end)),
        tokenizer=tokenizer,
        json_keys=(raw.json_key,),
        id_key=raw.id_key,
        url_key=raw.url_key,
        shards=raw.shards,
        rules=SelectionRules(
            validation_share=raw.validation_share,
            min_tokens=raw.min_tokens,
            max_tokens=raw.max_tokens,
        ),
        deduplicate=raw.deduplicate,
        on_error=raw.on_error,
        **everywhere,
    )


def _read_data(path: Path) -> DataConfig:
    """Return section `data` of a configuration file, whatever else it has.

    Raises:
        ValueError: naming the file and the field that is unknown, missing or of the wrong type.
    """
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DataConfig, "data")
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        parsed = parser.parse_object({"data": document["data"]})
    except KeyError:
        raise ValueError(f"{path}: no section `data`") from None
    except (jsonargparse.ArgumentError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error
    data: DataConfig = parser.instantiate(parsed)["data"]
    return data


def _parser(description: str) -> argparse.ArgumentParser:
    # An option that is not given is None, so that PreprocessOptions alone knows the defaults.
    parser = CommandParser(description=description)
    add = parser.add_argument
    add("--config", metavar="FILE", help=CONFIG_HELP)
    inputs_help = "files, globs, URLs, or @FILE with one of them per line"
    add("--input", nargs="+", metavar="FILE", help=inputs_help)
    prefix_help = "start of output paths, or of URLs"
    add("--output-prefix", metavar="PREFIX", help=prefix_help)
    add("--tokenizer", type=Path, metavar="FOLDER", help="holds tokenizer.json")
    keys_help = "fields to tokenise, each into a corpus of its own; default: text"
    add("--json-keys", nargs="+", metavar="FIELD", help=keys_help)
    add("--id-key", metavar="FIELD", help="field with the id of a document; default: id, if any")
    add("--url-key", metavar="FIELD", help="field with its address; default: url, if any")
    shards_help = "make one shard of each input, so that an interrupted run goes on after the last"
    add("--shards", action="store_true", default=None, help=shards_help)
    workers_help = "processes that make shards side by side; default: 1, with a few threads"
    add("--workers", type=int, metavar="N", help=workers_help)
    eod_help = "append [SEP] to each document; default: off"
    add("--append-eod", action="store_true", default=None, help=eod_help)
    share_help = "share of documents, chosen by hash of text, for PREFIX_FIELD_validation"
    add("--validation-share", type=float, metavar="SHARE", help=share_help)
    least_help = "leave out documents with fewer tokens; default: 1"
    add("--min-tokens", type=int, metavar="N", help=least_help)
    most_help = "leave out documents with more tokens; default: no limit"
    add("--max-tokens", type=int, metavar="N", help=most_help)
    copies_help = "exact: store only the first of documents with the same text"
    add("--deduplicate", choices=["exact"], help=copies_help)
    error_help = "at a record that cannot be read, stop (default) or write it to PREFIX.bad.jsonl"
    add("--on-error", choices=["stop", "quarantine"], help=error_help)
    bad_help = "largest share of bad records that quarantine accepts; default: 0.001"
    add("--max-bad-share", type=float, metavar="SHARE", help=bad_help)
    library_help = "auto (default): gigatoken where it gives the ids of tokenizers"
    add("--library", choices=["auto", "tokenizers"], help=library_help)
    executor_help = "datatrove's executor that makes the shards; default: this process"
    add("--executor", choices=["local", "ray", "slurm"], help=executor_help)
    add("--tasks", type=int, metavar="N", help="tasks of the executor; default: 1")
    settings_help = "options of datatrove's executor, such as partition=cpu time=4:00:00"
    add(
        "--executor-options", nargs="+", type=_named_value, metavar="NAME=VALUE", help=settings_help
    )
    return parser


def _named_value(text: str) -> tuple[str, int | str]:
    """Return name and value of NAME=VALUE; digits are a number."""
    name, sign, value = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, int(value) if value.isdigit() else value
