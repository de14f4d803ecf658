"""Every published size, as encoder and decoder, against transformers in four parallel layouts.

Each reference is made, compared and deleted before the next: the largest take gigabytes. What is
measured is printed with -v; docs/parity.md has the last result.
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
from tests.parity.ranks import LAYOUTS, compare_layouts
from tests.parity.references import KINDS, SIZES, TOLERANCE, difference
from tests.parity.stages import checkpoint_logits

#: Sizes of which every layout saves a checkpoint; of the others TP=2 x PP=2 does, for its time.
SAVED_BY_ALL = ("nano", "17m")
LARGEST = ("400m", "1b")
#: Sizes that take half a minute or more.
LONG = ("150m", *LARGEST)
#: Of the largest: how much further from float64 than transformers' float32 ours may be.
NOISE_FACTOR = 3.0


class Measured(Case):
    """A reference, the checkpoints that four layouts made of it, and their distances from it."""

    def __init__(self, folder: Path, name: str) -> None:
        is_large = name.startswith(LARGEST)
        super().__init__(folder, name, with_noise=is_large)
        self.expected, self.tolerance = self.logits, TOLERANCE
        self.noise: float | None = None
        if is_large:
            self.expected = self.exact_logits
            self.noise = difference(self.logits, self.exact_logits)
            self.tolerance = NOISE_FACTOR * self.noise
        self.differences = {
            "tp1": difference(checkpoint_logits(self.checkpoint, self.packed), self.expected)
        }
        torch.save(self.expected, folder / "expected.pt")
        saving = list(LAYOUTS) if name.startswith(SAVED_BY_ALL) else ["tp2pp2"]
        self.differences |= compare_layouts(
            self.checkpoint,
            folder / "expected.pt",
            folder,
            saving=saving,
            deadline=3600 if is_large else 600,
        )
        self.saved = {layout: folder / layout for layout in saving}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(f"{size}-{kind}", marks=pytest.mark.long if size in LONG else pytest.mark.slow)
        for size in SIZES
        for kind in KINDS
    ],
)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Measured]:
    folder = tmp_path_factory.mktemp(request.param)
    yield Measured(folder, request.param)
    shutil.rmtree(folder)


@pytest.mark.parametrize("layout", ["tp1", *LAYOUTS])
def test_logits(
    layout: str, case: Measured, record_property: Callable[[str, object], None]
) -> None:
    record_property("difference", f"{case.differences[layout]:.1e} (at most {case.tolerance:.1e})")
    if case.noise is not None:
        record_property("transformers float32 to float64", f"{case.noise:.1e}")
    assert case.differences[layout] <= case.tolerance


def test_round_trip_keeps_every_bit(case: Measured, tmp_path: Path) -> None:
    """One process writes transformers' folder anew from what each layout's ranks have saved."""
    for layout, folder in case.saved.items():
        assert len(list(folder.glob("*.distcp"))) == LAYOUTS[layout]
        to_huggingface(folder, tmp_path / layout)
        again = tmp_path / layout / "model.safetensors"
        assert differing_tensors(again, case.huggingface / "model.safetensors") == []
        shutil.rmtree(tmp_path / layout)


def differing_tensors(found: Path, expected: Path) -> list[str]:
    """Return the names of tensors that only one of two files has, or that differ in a bit."""
    with safe_open(found, framework="pt") as ours, safe_open(expected, framework="pt") as theirs:
        names = set(ours.keys()), set(theirs.keys())
        return sorted(names[0] ^ names[1]) + [
            name
            for name in sorted(names[0] & names[1])
            if not torch.equal(ours.get_tensor(name), theirs.get_tensor(name))
        ]
