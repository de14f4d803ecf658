"""Measure training beside transformers' own module: the same model, text and precision.

python tools/bench_train.py --device cpu --models nano 17m --json

The text is the quickstart's: `make quickstart QUICKSTART_SHORT=1` makes it.
"""

import os
import sys
from pathlib import Path

from tqdm import tqdm

from benchmarks.model_sizes import SIZES
from benchmarks.training_cells import Cell, measure_cells, training_cells
from benchmarks.training_table import failure, print_json, print_nothing, print_report
from megatron_ettin.command_parser import CommandParser


def main() -> None:
    """Measure every cell and report it."""
    cells, prints_json = parse_arguments()
    measured = measure_cells(cells, print_json if prints_json else print_nothing)
    killed = []
    for cell, figures in zip(tqdm(cells, disable=None), measured, strict=True):
        killed += [cell] if figures is None else []
        print_report(cell, figures)
    if killed:
        sys.exit(f"error: {failure(killed)}")


def parse_arguments() -> tuple[list[Cell], bool]:
    """Return the cells to measure, and whether to print a JSON object."""
    parser = CommandParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--models", nargs="+", choices=SIZES, default=["nano", "17m"], metavar="SIZE")
    add("--objectives", nargs="+", choices=["mlm", "clm"], default=["mlm", "clm"])
    add("--precisions", nargs="+", choices=["fp32", "bf16", "fp8"], help="fp32; on a GPU bf16")
    add("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    data = Path("examples/data/quickstart.yaml")
    add("--data", type=Path, default=data, help=f"its `data` section is taken ({data})")
    add("--rounds", type=int, default=7, help="timed steps of each contender (7)")
    add("--micro-batch-tokens", type=int, help="slots of a micro-batch (CPU 4096, GPU 65536)")
    add("--step-tokens", type=int, help="slots of a step (CPU 4096, GPU 524288)")
    add("--cuda-graphs", action="store_true", help="ours with hardware.cuda_graphs")
    add("--no-peers", action="store_true", help="measure this project alone")
    add("--path-cost", action="store_true", help="also the cost over plain PyTorch by part (CPU)")
    add("--profile", type=Path, help="trace one micro-batch of each cell below this folder")
    add("--threads", type=int, default=os.cpu_count(), help="threads of the process, on a CPU")
    add("--json", action="store_true", help="also print each figure in a JSON object, at once")
    options = vars(parser.parse_args())
    prints_json = options.pop("json")
    try:
        return training_cells(**options), prints_json
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
