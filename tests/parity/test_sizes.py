"""Every published size, as encoder and decoder, against transformers in four parallel layouts.

Each reference is made, compared and deleted before the next: the largest take gigabytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from megatron_ettin.export.huggingface import to_huggingface
from tests.parity.conftest import Case
from tests.parity.ranks import LAYOUTS, Ranks
from tests.parity.references import KINDS, SIZES, TOLERANCE, difference
from tests.parity.stages import checkpoint_logits

LONG = ("400m", "1b")
#: Of the sizes marked long: how much further from float64 than transformers' float32 we may be.
NOISE_FACTOR = 3.0
ALL_LAYOUTS = {"tp1": 1, **LAYOUTS}


class Measured(Case):
    """A reference, the checkpoints that four layouts made of it, and their distances from it."""

    def __init__(self, folder: Path, name: str, ranks: Ranks) -> None:
        is_long = name.startswith(LONG)
        super().__init__(folder, name, with_noise=is_long)
        self.expected, self.tolerance = self.logits, TOLERANCE
        if is_long:
            self.expected = self.exact_logits
            self.noise = difference(self.logits, self.exact_logits)
            self.tolerance = NOISE_FACTOR * self.noise
        self.differences = {
            "tp1": difference(checkpoint_logits(self.checkpoint, self.packed), self.expected)
        }
        self.checkpoints = {"tp1": self.checkpoint, **{name: folder / name for name in LAYOUTS}}
        torch.save(self.expected, folder / "expected.pt")
        self.differences |= ranks.run(
            self.checkpoint, folder / "expected.pt", folder, deadline=1200 if is_long else 240
        )


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(tmp_path_factory.mktemp("ranks")) as started:
        yield started


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(f"{size}-{kind}", marks=pytest.mark.long if size in LONG else pytest.mark.slow)
        for size in SIZES
        for kind in KINDS
    ],
)
def case(
    request: pytest.FixtureRequest, ranks: Ranks, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Measured]:
    folder = tmp_path_factory.mktemp(request.param)
    yield Measured(folder, request.param, ranks)
    shutil.rmtree(folder)


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_logits(
    layout: str, case: Measured, record_property: Callable[[str, object], None]
) -> None:
    record_property("difference", f"{case.differences[layout]:.1e} (at most {case.tolerance:.1e})")
    assert case.differences[layout] <= case.tolerance


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_round_trip_keeps_every_bit(layout: str, case: Measured, tmp_path: Path) -> None:
    """One process writes transformers' folder anew from what each layout's ranks have saved."""
    shards = list(case.checkpoints[layout].glob("*.distcp"))
    assert len(shards) == ALL_LAYOUTS[layout]
    to_huggingface(case.checkpoints[layout], tmp_path / "hf")
    again, first = (folder / "model.safetensors" for folder in (tmp_path / "hf", case.huggingface))
    assert differing_tensors(again, first) == []
    shutil.rmtree(tmp_path)


def differing_tensors(found: Path, expected: Path) -> list[str]:
    """Return the names of tensors that only one of two files has, or that differ in a bit."""
    with safe_open(found, framework="pt") as ours, safe_open(expected, framework="pt") as theirs:
        names = set(ours.keys()), set(theirs.keys())
        return sorted(names[0] ^ names[1]) + [
            name
            for name in sorted(names[0] & names[1])
            if not torch.equal(ours.get_tensor(name), theirs.get_tensor(name))
        ]
