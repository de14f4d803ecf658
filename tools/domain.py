"""Prepare the continued training of a model on one's own text; examples/domain.sh does it all."""

import argparse
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

from megatron_ettin.command_parser import CommandParser


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, tokenise, convert, write OUTPUT/run.yaml."""
    args = vars(parse_arguments(arguments))
    # Warnings of Megatron-Core's import would bury a one-line error.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    from megatron_ettin.domain.prepare import DomainOptions, prepare

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        prepare(DomainOptions(**args), say=print)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    model = "ModernBERT-shaped Hugging Face folder, encoder or decoder"
    add("--model", type=Path, required=True, metavar="HF_DIR", help=model)
    text = "raw text of the domain: files, globs or @FILE, with a field text"
    add("--text", nargs="+", required=True, metavar="FILE", help=text)
    add("--output", type=Path, required=True, metavar="DIR", help="folder of all that is made")
    general = "general text, to replay and to measure what is forgotten; default: none"
    add("--general", nargs="+", default=[], metavar="FILE", help=general)
    replay = "share of the rows that are general text (0.1); 0 only measures it"
    add("--replay", type=float, default=0.1, metavar="SHARE", help=replay)
    swap = "tokenizer to move the model to; default: the model's own"
    add("--tokenizer", type=Path, metavar="DIR", help=swap)
    length = "slots of a row; default: the longest that the model is made for"
    add("--seq-length", type=int, metavar="N", help=length)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
