"""Commands of tools/convert.py and their options, named as the functions of export/ take them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_ettin.command_parser import CommandParser

DESCRIPTION = (
    "Convert checkpoints to Hugging Face folders and back, and from Composer (docs/conversion.md)."
)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command and its options."""
    parser = CommandParser(description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True)
    add = _command(commands, "to-hf", "convert a checkpoint to a ModernBERT folder")
    add("--checkpoint", type=Path, required=True, metavar="DIR", help="run_dir/checkpoints/step_N")
    add("--output", type=Path, required=True, metavar="DIR", help="new folder")
    kind = "kind of model to write, where a mixture of objectives has trained both"
    add("--as", dest="kind", choices=("encoder", "decoder"), help=kind)
    _add_card_options(add)
    _add_series(commands)
    add = _command(commands, "from-hf", "convert a ModernBERT folder to a checkpoint")
    folder = "folder with config.json and safetensors"
    add("--input", type=Path, required=True, metavar="DIR", help=folder)
    add("--output", type=Path, required=True, metavar="DIR", help="new folder")
    layout = "size to check and write to config.yaml; tensors fit any layout; default: 1"
    add("--tensor-parallel-size", type=int, default=1, metavar="N", help=layout)
    add("--pipeline-parallel-size", type=int, default=1, metavar="N", help=layout)
    window = (
        "keys that a local layer sees on each side (decoder: to the left); default: as "
        "transformers reads config.json (decoder: 128 means 63)"
    )
    add("--sliding-window", type=int, metavar="N", help=window)
    shift = "distance from a [MASK] back to the position that predicts it (MNTP: 1); default: "
    add("--prediction-shift", type=int, choices=(0, 1), help=shift + "as config.json says, or 0")
    swap = (
        "give the model this tokenizer: tokens that both have keep their vectors, others get the "
        "mean of their pieces' (docs/conversion.md)"
    )
    add("--tokenizer", type=Path, metavar="DIR", help=swap)
    sample = "raw text that weighs those pieces by how often the token replaces them"
    add("--tokenizer-sample", nargs="+", default=[], metavar="FILE", help=sample)
    raw = "convert a raw checkpoint of the original code to a checkpoint"
    add = _command(commands, "from-composer", raw)
    add("--input", type=Path, required=True, metavar="FILE", help="checkpoint of Composer (.pt)")
    add("--output", type=Path, required=True, metavar="DIR", help="new folder")
    add("--config", type=Path, metavar="YAML", help="file of its training, if the input has none")
    length = "tokens of the longest rows in training; default: max_seq_len of --config"
    add("--max-seq-length", type=int, metavar="N", help=length)
    add("--prediction-shift", type=int, choices=(0, 1), help=shift + "0")
    add("--tokenizer", type=Path, metavar="DIR", help="folder of its tokenizer; default: none")
    pack = "write tiny models and expected outputs, for ports of the architecture elsewhere"
    add = _command(commands, "conformance", pack)
    add("--output", type=Path, required=True, metavar="DIR", help="new folder")
    args = parser.parse_args(arguments)
    if args.command == "from-hf" and args.tokenizer_sample and args.tokenizer is None:
        parser.error("--tokenizer-sample: goes with --tokenizer, the tokenizer to change to")
    return args


def _add_series(commands: Any) -> None:
    series = "convert every checkpoint of a run to a revision of a local repository"
    add = _command(commands, "series", series)
    run = "run_dir of a run; repeat for its twin"
    add("--run", dest="runs", action="append", type=Path, required=True, metavar="DIR", help=run)
    repository = "folder of the repositories encoder and decoder; it may hold earlier revisions"
    add("--output", type=Path, required=True, metavar="REPO", help=repository)
    mean = "also write the mean of the last COUNT checkpoints, or of those in every TOKENS; repeat"
    add(
        "--average",
        dest="averages",
        action="append",
        default=[],
        metavar="last:COUNT|every:TOKENS",
        help=mean,
    )
    hub = "upload all revisions to this repository of the Hub (of twins: NAME-encoder, -decoder)"
    add("--upload", metavar="OWNER/NAME", help=hub)
    _add_card_options(add)


def _add_card_options(add: Callable[..., Any]) -> None:
    check = "compare the SHA-256 of each file with the saved one before loading"
    add("--check-files", action=argparse.BooleanOptionalAction, default=True, help=check)
    add("--license", metavar="ID", help="licence for the model card, such as apache-2.0")
    language = "language for the card; repeat"
    add("--language", action="append", default=[], metavar="CODE", help=language)
    add("--base-model", metavar="REPO", help="for the card: model whose weights began the run")
    dataset = "data set for the card; repeat"
    add("--dataset", action="append", default=[], metavar="REPO", help=dataset)


def _command(commands: Any, name: str, summary: str) -> Callable[..., Any]:
    """Add a command; return the `add_argument` of its parser."""
    description = f"{summary[0].upper()}{summary[1:]}."
    parser = commands.add_parser(name, help=summary, description=description)
    add: Callable[..., Any] = parser.add_argument
    return add
