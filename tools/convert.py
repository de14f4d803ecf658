"""Convert checkpoints to Hugging Face folders and back, and from Composer (docs/conversion.md)."""

import logging
import sys
import warnings
from collections.abc import Sequence

from megatron_ettin.export.command_line import parse


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, convert, print one line."""
    args = vars(parse(arguments))
    if not sys.warnoptions:
        # Warnings of Megatron-Core's import would bury a one-line error.
        warnings.filterwarnings("ignore", module=r"megatron\.")
    from megatron_ettin.export.card import CardMetadata
    from megatron_ettin.export.composer import from_composer
    from megatron_ettin.export.conformance import write_pack
    from megatron_ettin.export.huggingface import from_huggingface, to_huggingface
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
            saved = from_huggingface(args.pop("input"), **args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print(
        f"{output}: {saved.attention} attention, {saved.model.num_layers} layers of"
        f" {saved.model.hidden_size}, window {saved.model.sliding_window}, RoPE bases"
        f" {saved.rotary_base_global:g} (global) and {saved.rotary_base_local:g} (local)"
        + (", masks predicted from the position before" if saved.prediction_shift else "")
    )


if __name__ == "__main__":
    main()
