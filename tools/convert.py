"""Convert checkpoints to Hugging Face folders and back, and from Composer (docs/conversion.md)."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_ettin.export.command_line import parse

if TYPE_CHECKING:  # importing it takes seconds, which a wrong option need not wait for
    from megatron_ettin.checkpoint import SavedModel


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, convert, print one line."""
    args = vars(parse(arguments))
    if not sys.warnoptions:
        # Warnings of Megatron-Core's import would bury a one-line error.
        warnings.filterwarnings("ignore", module=r"megatron\.")
    from megatron_ettin.export.card import CardMetadata
    from megatron_ettin.export.composer import from_composer
    from megatron_ettin.export.conformance import write_pack
    from megatron_ettin.export.huggingface import to_huggingface
    from megatron_ettin.export.series import write_series

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    command, output = args.pop("command"), args["output"]
    if command in ("to-hf", "series"):
        args["metadata"] = CardMetadata(
            license=args.pop("license"),
            languages=tuple(args.pop("language")),
            base_model=args.pop("base_model"),
            datasets=tuple(args.pop("dataset")),
        )
    try:
        if command == "conformance":
            write_pack(output)
            print(f"{output}: a conformance pack; {output / 'README.md'} says how it is used")
            return
        if command == "series":
            for line in write_series(args.pop("runs"), **args):
                print(line, flush=True)
            return
        if command == "to-hf":
            saved = to_huggingface(args.pop("checkpoint"), **args)
        elif command == "from-composer":
            saved = from_composer(args.pop("input"), **args)
        else:
            saved = convert_from_huggingface(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print(
        f"{output}: {saved.attention} attention, {saved.model.num_layers} layers of"
        f" {saved.model.hidden_size}, window {saved.model.sliding_window}, RoPE bases"
        f" {saved.rotary_base_global:g} (global) and {saved.rotary_base_local:g} (local)"
        + (", masks predicted from the position before" if saved.prediction_shift else "")
    )


def convert_from_huggingface(args: dict[str, Any]) -> SavedModel:
    """Convert a folder, with another vocabulary if a tokenizer is given; print a line on that."""
    from megatron_ettin.export.huggingface import from_huggingface
    from megatron_ettin.export.vocabulary_swap import plan_swap

    tokenizer, sample = args.pop("tokenizer"), args.pop("tokenizer_sample")
    swap = None if tokenizer is None else plan_swap(args["input"], tokenizer, sample)
    saved = from_huggingface(args.pop("input"), **args, swap=swap)
    if swap is not None:
        print(swap.describe())
    return saved


if __name__ == "__main__":
    main()
