"""References and their checkpoints, and a summary of what the tests here have measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ettin.export.huggingface import from_huggingface
from tests.parity.references import KINDS, SIZES, Packed, make_reference, reference_logits


class Case:
    """One reference: its folder, its checkpoint, its input and its logits."""

    def __init__(self, folder: Path, name: str, *, with_noise: bool = False) -> None:
        """Make the reference NAME ("17m-encoder"); its noise is what float32 costs transformers."""
        size, self.kind = name.split("-")
        self.name, self.shape = name, SIZES[size]
        self.huggingface = folder / "huggingface"
        self.checkpoint = folder / "checkpoint"
        self.packed = Packed.random(self.shape["vocab_size"])
        self._write(with_noise)
        from_huggingface(self.huggingface, self.checkpoint)

    def _write(self, with_noise: bool) -> None:
        model = make_reference(self.kind, self.shape)
        model.save_pretrained(self.huggingface)
        self.logits = reference_logits(model, self.packed)
        if with_noise:
            self.exact_logits = reference_logits(model.double(), self.packed)


@pytest.fixture(scope="package")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Return the small reference of each kind, "nano-encoder" and "nano-decoder"."""
    names = [f"nano-{kind}" for kind in KINDS]
    return {name: Case(tmp_path_factory.mktemp(name), name) for name in names}


@pytest.fixture(params=KINDS)
def nano(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    """Return the small reference of each kind."""
    return cases[f"nano-{request.param}"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """With -v, print what tests have recorded with `record_property`: docs/parity.md quotes it."""
    if terminalreporter.verbosity < 1:
        return
    reports = [report for group in terminalreporter.stats.values() for report in group]
    lines = [
        f"{report.nodeid.rpartition('/')[2]} {name}: {value}"
        for report in reports
        if isinstance(report, pytest.TestReport) and report.when == "call"
        for name, value in report.user_properties
    ]
    if lines:
        terminalreporter.section("measured")
        for line in sorted(lines):
            terminalreporter.line(line)
