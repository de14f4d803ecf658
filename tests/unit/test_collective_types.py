"""spmd_types on a stage: its types agree, and planted faults are refused."""

import json
from pathlib import Path

import pytest
import torch

from tests.integration.planted_faults import FAULTS
from tests.ranks import run_ranks
from tests.unit.collective_types import main

#: Faults in who calls a collective, and in the marks of parameters. Those inside a collective are
#: declared away.
REFUSED = (
    "embedding scatters the first share to all",
    "head's gathered gradient summed",
    "norms unmarked",
    "replicated head marked",
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Megatron-Core puts tensors on the GPU")
def test_types_agree_and_faults_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("spmd_types", reason="in the extra dev")
    faults = [fault.what for fault in FAULTS if fault.what in REFUSED]
    assert sorted(faults) == sorted(REFUSED)
    run_ranks(
        main,
        [faults, tmp_path / "verdicts.json"],
        ranks=1,
        logs=tmp_path,
        deadline_seconds=300.0,
    )
    verdicts = json.loads((tmp_path / "verdicts.json").read_text())
    assert (verdicts.pop("tp2"), verdicts.pop("tp2sp")) == ("", "")
    assert set(verdicts) == set(REFUSED)
    for what, said in verdicts.items():
        print(f"{what}: {said}")
        assert "cannot mix" in said or "expects its input" in said, what
