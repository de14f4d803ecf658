"""Turn raw text into a tokenised corpus, Megatron's PREFIX_text_document.bin and .idx.

PREFIX_text_document.docs.parquet beside them holds the provenance of each document.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_ettin.data.preprocess import PreprocessOptions, preprocess
from megatron_ettin.data.readers import READERS, expand_inputs


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, preprocess, print one line per corpus."""
    args = vars(parse_arguments(arguments))
    try:
        inputs = expand_inputs(args.pop("input"))
        result = preprocess(PreprocessOptions(inputs=inputs, **args))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    for prefix, corpus in result.corpora.items():
        tokens = corpus.tokens + corpus.validation_tokens
        speed = f"{tokens / result.seconds:,.0f} tokens/s" if result.seconds else "up to date"
        print(
            f"{prefix}: {corpus.documents:,} documents, {corpus.tokens:,} tokens; validation"
            f" {corpus.validation_documents:,} documents, {corpus.validation_tokens:,} tokens;"
            f" {corpus.dropped:,} empty documents dropped; {speed}"
        )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line, named as the fields of PreprocessOptions."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    formats = ", ".join(READERS)
    add("--input", nargs="+", required=True, metavar="FILE", help=f"files or globs: {formats}")
    add("--output-prefix", type=Path, required=True, metavar="PREFIX", help="start of output paths")
    add("--tokenizer", type=Path, required=True, metavar="FOLDER", help="holds tokenizer.json")
    keys_help = "fields to tokenise, each into a corpus of its own; default: text"
    add("--json-keys", nargs="+", default=("text",), metavar="FIELD", help=keys_help)
    add("--id-key", metavar="FIELD", help="field with the id of a document; default: id, if any")
    add("--url-key", metavar="FIELD", help="field with its address; default: url, if any")
    workers_help = "processes that tokenise; default: 1, this process with the library's threads"
    add("--workers", type=int, default=1, metavar="N", help=workers_help)
    add("--append-eod", action="store_true", help="append [SEP] to each document; default: off")
    share_help = "share of documents, chosen by hash of text, for PREFIX_FIELD_validation"
    add("--validation-share", type=float, default=0.0, metavar="SHARE", help=share_help)
    args = parser.parse_args(arguments)
    args.json_keys = tuple(args.json_keys)
    return args


if __name__ == "__main__":
    main()
