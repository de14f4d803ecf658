"""References of both kinds and two sizes, and their weights as checkpoints in several layouts."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ettin.export.huggingface import from_huggingface
from tests.parity.ranks import run_ranks
from tests.parity.references import (
    ETTIN_17M,
    KINDS,
    NANO,
    Packed,
    make_reference,
    reference_logits,
)

SIZES = {"nano": NANO, "17m": ETTIN_17M}
CASES = [f"{size}-{kind}" for size in SIZES for kind in KINDS]


class Case:
    """One reference: its folder, its checkpoint, its input and its logits."""

    def __init__(self, folder: Path, name: str) -> None:
        size, kind = name.split("-")
        self.name, self.kind = name, kind
        self.shape = SIZES[size]
        self.huggingface = folder / "huggingface" / name
        self.checkpoint = folder / "checkpoint" / name
        model = make_reference(kind, self.shape)
        model.save_pretrained(self.huggingface)
        self.packed = Packed.random(self.shape["vocab_size"])
        self.logits = reference_logits(model, self.packed)
        from_huggingface(self.huggingface, self.checkpoint)


@pytest.fixture(scope="package")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Return every reference by name."""
    folder = tmp_path_factory.mktemp("references")
    return {name: Case(folder, name) for name in CASES}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    """Return one reference after the other."""
    return cases[request.param]


@pytest.fixture(params=KINDS)
def nano(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    """Return the small reference of each kind."""
    return cases[f"nano-{request.param}"]


@pytest.fixture(scope="package")
def layouts(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with tp2/NAME, its logits in tp2/NAME.pt, and tp2pp2/NAME (rank_program)."""
    output = tmp_path_factory.mktemp("layouts")
    run_ranks(output, [case.checkpoint for case in cases.values()])
    return output
