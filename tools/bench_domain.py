"""Measure a change of domain and vocabulary against a random start (docs/conversion.md).

python tools/bench_domain.py --seeds 1 2 3
"""

import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from megatron_ettin.command_parser import CommandParser


def main() -> None:
    """Measure every objective and seed; print a table."""
    parser = CommandParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--objectives", nargs="+", choices=["mlm", "clm"], default=["clm"])
    add("--seeds", nargs="+", type=int, default=[1, 2, 3], metavar="N")
    add("--general-tokens", type=int, default=2_000_000, help="trained on prose (2,000,000)")
    add("--tokens", type=int, default=200_000, help="trained on code by either start (200,000)")
    text = Path("quickstart/text")
    add(
        "--text",
        type=Path,
        default=text,
        help=f"the quickstart's text, or where to put it ({text})",
    )
    add("--json", action="store_true", help="end with all figures as JSON")
    args = parser.parse_args()
    from benchmarks import domain_change

    outcomes = []
    with tempfile.TemporaryDirectory() as scratch:
        domain_change.make_texts(Path(scratch), args.text)
        units = [(objective, seed) for objective in args.objectives for seed in args.seeds]
        for objective, seed in tqdm(units, disable=None):
            outcomes.append(
                domain_change.measure(
                    Path(scratch),
                    objective,
                    seed,
                    general_tokens=args.general_tokens,
                    tokens=args.tokens,
                )
            )
            print(outcomes[-1], file=sys.stderr, flush=True)
    print("\n".join(domain_change.table(outcomes)))
    if args.json:
        print(domain_change.as_json(outcomes))


if __name__ == "__main__":
    main()
