"""What a run prints: its own lines and no other program's, the first before the slow imports."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ettin.data.anchor import Anchor
from megatron_ettin.queries.verify import verify
from tests.conftest import TinyCorpus

TIME = r"\d\d:\d\d:\d\d "
PLACE = r"(short|long) step \d+ · [\d.]+M of 0\.03M tokens \(\d+\.\d%\) · "
LEFT = r" · left: phase .+, run .+"
#: Every line of a run, in the order in which they may come.
LINES = [
    r"MaskedLM, 30,000 tokens, into .+: loading torch and Megatron-Core",
    r"no record of the tokenizer that made .+",
    r" *(run|model|hosts|layout|software|phase short|phase long|held out|checkpoints)  .+",
    r"phase long: RoPE bases .+",
    PLACE + r"loss .+" + LEFT,
    PLACE + r"held-out loss .+" + LEFT,
    r".*saved .+ in [\d.]+ s.*",
    r"finished: 30,\d+ tokens, 15 steps in .+",
    r"30,\d+ tokens consumed, digest [0-9a-f]{32}",
    r"ledger head [0-9a-f]{64} \(record \d+\)",
]
FIRST_LINE_SECONDS = 5.0
#: A run whose slow part only tells whether the slow imports have come.
BEFORE_IMPORTS = """
import sys
from megatron_ettin import pretrain

pretrain.pretrain = lambda config: print(sorted({"torch", "megatron"} & set(sys.modules)))
pretrain.main()
"""


@pytest.fixture(scope="module")
def config(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("output") / "run.yaml"
    return tiny_corpus.write_config(path, objective="MaskedLM")


@pytest.mark.slow
def test_a_run_under_torchrun_prints_its_own_lines_only(config: Path, tmp_path: Path) -> None:
    """Started as in README.md."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("-m", "megatron_ettin.pretrain", f"--config={config}", f"--run_dir={tmp_path / 'run'}"),
        f"--logging.anchor={tmp_path / 'anchor'}",
    ]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    known = re.compile(f"{TIME}({'|'.join(LINES)})")
    assert [line for line in lines if not known.fullmatch(line)] == []
    for pattern in LINES:
        assert any(re.fullmatch(TIME + pattern, line) for line in lines), f"no line: {pattern}"
    # Silently, the main rank has anchored the ledger.
    (head,) = [line.split()[3] for line in lines if " ledger head " in line]
    anchored, _ = Anchor(str(tmp_path / "anchor")).heads()
    assert anchored[-1].head.chain == head
    assert verify(
        tmp_path / "run", order=False, tokens=False, anchor=str(tmp_path / "anchor")
    ).passed


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_line_comes_before_the_slow_imports(
    rank: int, config: Path, tmp_path: Path
) -> None:
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", BEFORE_IMPORTS, f"--config={config}", f"--run_dir={tmp_path}"],
        env={**os.environ, "RANK": str(rank)},
        capture_output=True,
        text=True,
        check=True,
    )
    seconds = time.monotonic() - begin
    assert done.stdout == "[]\n"
    if rank:
        assert done.stderr == ""
        return
    assert re.fullmatch(TIME + LINES[0] + "\n", done.stderr)
    assert seconds < FIRST_LINE_SECONDS
