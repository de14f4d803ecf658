"""Train a byte-level BPE tokenizer on raw text and write a folder that transformers loads."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from megatron_ettin.command_parser import CommandParser
from megatron_ettin.data.raw_files import READERS, RawFile, expand_inputs, read_text_batches
from megatron_ettin.data.tokenize import train_tokenizer, write_tokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, train, write."""
    args = parse_arguments(arguments)
    try:
        texts = read_texts(expand_inputs(args.input), args.json_keys)
        write_tokenizer(train_tokenizer(texts, args.vocab_size), args.output)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{args.output}: byte-level BPE, {args.vocab_size:,} tokens")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    formats = ", ".join(READERS)
    input_help = f"files, globs, folders, URLs, or @FILE with a list of these: {formats}"
    add("--input", nargs="+", required=True, metavar="FILE", help=input_help)
    add("--output", type=Path, required=True, metavar="FOLDER", help="folder of the tokenizer")
    add("--json-keys", nargs="+", default=["text"], metavar="FIELD", help="default: text")
    size_help = "tokens of the vocabulary, the five special ones included; default: 8192"
    add("--vocab-size", type=int, default=8192, metavar="N", help=size_help)
    return parser.parse_args(arguments)


def read_texts(files: Sequence[RawFile], fields: Sequence[str]) -> Iterator[str]:
    """Yield every field of every document under a progress bar over the bytes read."""
    total = sum(file.size for file in files)
    with tqdm(total=total, desc="reading", unit="B", unit_scale=True, disable=None) as bar:
        for batch in read_text_batches(files, fields):
            for texts in zip(*batch.texts, strict=True):
                yield from texts
            bar.update(batch.position - bar.n)


if __name__ == "__main__":
    main()
