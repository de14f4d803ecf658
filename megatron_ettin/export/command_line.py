"""Commands of tools/convert.py and their options, named as the functions of export/ take them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

DESCRIPTION = (
    "Convert checkpoints to Hugging Face folders and back, and from Composer (docs/conversion.md)."
)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command and its options."""
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("to-hf", help="checkpoint to ModernBERT folder").add_argument
    add("--checkpoint", type=Path, required=True, metavar="DIR", help="run_dir/checkpoints/step_N")
    add("--output", type=Path, required=True, metavar="DIR", help="new folder")
    check = "compare each file's SHA-256 with what was saved, before it is loaded"
    add("--check-files", action=argparse.BooleanOptionalAction, default=True, help=check)
    add("--license", metavar="ID", help="for the model card: apache-2.0, for example")
    add("--language", action="append", default=[], metavar="CODE", help="for the card; repeat")
    add("--base-model", metavar="REPO", help="for the card: whose weights the run started from")
    add("--dataset", action="append", default=[], metavar="REPO", help="for the card; repeat")
    add = commands.add_parser("from-hf", help="ModernBERT folder to checkpoint").add_argument
    add("--input", type=Path, required=True, metavar="DIR", help="has config.json, safetensors")
    add("--output", type=Path, required=True, metavar="DIR", help="new folder")
    layout = "checked and written to config.yaml; the tensors fit any layout; default: 1"
    add("--tensor-parallel-size", type=int, default=1, metavar="N", help=layout)
    add("--pipeline-parallel-size", type=int, default=1, metavar="N", help=layout)
    window = "keys a local layer sees on each side (decoder: to the left); default: as transformers"
    add("--sliding-window", type=int, metavar="N", help=window + " computes (decoder: 128 is 63)")
    shift = "1: a [MASK] is predicted from the position before it (MNTP); 0: in place; default: "
    add("--prediction-shift", type=int, choices=(0, 1), help=shift + "as config.json says, or 0")
    add = commands.add_parser(
        "from-composer", help="raw checkpoint of the original code to checkpoint"
    ).add_argument
    add("--input", type=Path, required=True, metavar="FILE", help="saved by Composer (.pt)")
    add("--output", type=Path, required=True, metavar="DIR", help="new folder")
    add("--config", type=Path, metavar="YAML", help="its training file; where the input has none")
    length = "longest rows the model was trained on; default: max_seq_len of --config"
    add("--max-seq-length", type=int, metavar="N", help=length)
    add("--prediction-shift", type=int, choices=(0, 1), help=shift + "0")
    add("--tokenizer", type=Path, metavar="DIR", help="its tokenizer; default: none")
    pack = "tiny models and expected outputs, for ports of the architecture to other libraries"
    add = commands.add_parser("conformance", help=pack).add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="new folder")
    return parser.parse_args(arguments)
