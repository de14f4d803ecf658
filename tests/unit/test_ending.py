"""A rank whose launcher has ended before the rank could ask the kernel for its own end."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ettin import ending

#: Waits to be adopted, then begins as a rank does; DONE tells that it lives on.
PROGRAM = """
import os, pathlib, sys, time
from megatron_ettin.ending import end_with_launcher
parent = int(sys.argv[2])
pathlib.Path(sys.argv[1], "ready").touch()
while os.getppid() == parent:
    time.sleep(0.01)
pathlib.Path(sys.argv[1], "adopter").write_text(str(os.getppid()))
end_with_launcher()
pathlib.Path(sys.argv[1], "done").touch()
"""


@pytest.mark.parametrize("is_rank", [True, False])
def test_orphan_ends_if_it_is_a_rank(is_rank: bool, tmp_path: Path) -> None:
    rank = f'"{sys.executable}" -c "$PROGRAM" "{tmp_path}" $$ &'
    launcher = f'{rank} until [ -e "{tmp_path}/ready" ]; do sleep 0.05; done'
    variables = {ending.LAUNCHER_VARIABLE: "1"} if is_rank else {}
    environment = {name: os.environ[name] for name in os.environ if "TORCHELASTIC" not in name}
    # The shell ends as soon as its child runs, like a torchrun that is killed.
    subprocess.run(
        ["sh", "-c", launcher], env={**environment, "PROGRAM": PROGRAM, **variables}, check=True
    )
    deadline = time.monotonic() + 60
    adopter = tmp_path / "adopter"
    while not (adopter.exists() and adopter.read_text()):
        assert time.monotonic() < deadline, "nobody adopted the orphan"
        time.sleep(0.02)
    if adopter.read_text() != "1":
        pytest.skip("orphans here are adopted by another process than the first")
    time.sleep(0.5)
    assert (tmp_path / "done").exists() != is_rank
