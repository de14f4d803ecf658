"""Names of the loaders, and what one process measures of one of them.

    python -m benchmarks.loaders.contest cases NAME FOLDER --cases 1000
    python -m benchmarks.loaders.contest text NAME FOLDER --megabytes 20
    python -m benchmarks.loaders.contest cost NAME FOLDER

Cases go to FOLDER/NAME.jsonl as they end, and those that are there are not run again.
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

from benchmarks.loaders.cases import AXES, Axis, draw_case
from benchmarks.loaders.loader_costs import measure_cost, write_text
from benchmarks.loaders.outcomes import ResumeOutcome
from benchmarks.loaders.resume import run_case
from benchmarks.loaders.rival import Rival

#: Module and class of each loader; the modules import the packages.
RIVALS = {
    "ours": ("ours", "OurLoader"),
    "megatron-core": ("gpt_dataset", "MegatronCore"),
    "grain": ("grain_elastic", "Grain"),
    "grain-iterators": ("grain_iterators", "GrainIterators"),
    "litdata": ("litdata_streaming", "LitData"),
    "streaming": ("mosaic_streaming", "Streaming"),
}
#: Loaders of this project's own environment; the others need that of requirements.txt.
AT_HOME = ("ours", "megatron-core")


def rival_class(name: str) -> type[Rival]:
    """Return the class of a loader; ImportError if its package is missing."""
    module, attribute = RIVALS[name]
    found: type[Rival] = getattr(importlib.import_module(f"benchmarks.loaders.{module}"), attribute)
    return found


def run_cases(name: str, folder: Path, *, cases: int, seed: int = 0) -> None:
    """Run what is missing of `cases` cases of each axis, number by number over all axes."""
    rival = rival_class(name)(folder / "corpora" / name)
    rival.prepare()
    path = folder / f"{name}.jsonl"
    known = set(read_outcomes(path))
    versions = rival.versions()
    with path.open("a", buffering=1) as lines:
        for number in range(cases):
            for axis in AXES:
                if (axis, number) not in known:
                    outcome = run_case(rival, draw_case(axis, number, seed=seed))
                    line = {"axis": axis, "number": number, **outcome.to_dict(), **versions}
                    lines.write(json.dumps(line) + "\n")


def read_outcomes(path: Path) -> dict[tuple[Axis, int], ResumeOutcome]:
    """Return the outcomes in a file by axis and number; a line that was cut off counts as none."""
    outcomes = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            fields: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            continue
        named = {key: fields[key] for key in ResumeOutcome.__dataclass_fields__}
        outcomes[fields["axis"], fields["number"]] = ResumeOutcome.from_dict(named)
    return outcomes


def main() -> None:
    """Run the cases of a loader, or print what it costs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("versions", "cases", "text", "cost"))
    parser.add_argument("name", choices=tuple(RIVALS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--megabytes", type=int, default=20)
    args = parser.parse_args()
    match args.what:
        case "cases":
            run_cases(args.name, args.folder, cases=args.cases)
        case "text":
            print(json.dumps(write_text(rival_class(args.name), args.folder, args.megabytes)))
        case "cost":
            print(json.dumps(measure_cost(lambda: rival_class(args.name), args.folder)))
        case "versions":
            print(json.dumps(rival_class(args.name).versions()))


if __name__ == "__main__":
    main()
