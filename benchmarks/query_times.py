"""Time and memory of questions to a run, each in a process of its own, as users ask them."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.full_run import EARLY
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.text_table import text_table

TOOL = Path(__file__).parents[1] / "tools" / "order.py"
POLL_SECONDS = 0.02
#: Questions to RUN, which has a copy called TWIN; those that read all tokens are left out. CKPT is
#: a checkpoint in the middle, NEXT the one after it, FUTURE a step to come: the tokens of a step
#: that was taken would not be those of the made up record. EARLY is the run of the first steps, and
#: LAST its last checkpoint.
QUESTIONS = (
    "where --run RUN --doc web:1234",
    "where --run RUN --id ID",
    "where --run RUN --sha 00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff",
    "exposures --run RUN --doc code:1234",
    "unseen --run RUN --at CKPT --num 100 --seed 1",
    "batch --run RUN --step FUTURE --rank 0 --data-parallel-size 128 --masked --tokenizer-text",
    "batch --run RUN --step FUTURE",
    "sql --run RUN 'select phase, count(*), sum(n_tokens) from steps group by phase'",
    "skips --run RUN",
    "plan --run RUN",
    "twins --run RUN --run TWIN",
    "diff --run RUN --run TWIN",
    "verify --run RUN --chain",
    "losses --run RUN --figure OUT/losses.png",
    "losses --run RUN --doc web:1234",
    "spikes --run RUN --skip OUT/skip.yaml",
    "spikes --run RUN --from CKPT --to NEXT",
    "verify --run EARLY --order",
    "docs --run EARLY --from 0 --to LAST --output OUT/docs.parquet",
    "export --run EARLY --layout ettin --output OUT/exported",
    "import-ettin --input OUT/exported --output OUT/imported",
    "attest --run RUN --output OUT/attestation.json",
    "croissant --run RUN --output OUT/corpora.json",
    "training-content --run RUN --output OUT/content.md",
)


@dataclass(frozen=True, kw_only=True)
class Answered:
    """Cost of a question."""

    question: str
    seconds: float
    cpu_seconds: float
    private_bytes: int
    """Largest memory of its own, without pages of files that the kernel can drop."""
    resident_bytes: int
    """Largest memory, mapped files counted."""
    status: int
    """Exit status: 0, and 1 of a FAIL or of an error."""


def ask_all(run: Path, output: Path) -> Iterator[Answered]:
    """Ask the questions, one after the other."""
    twin = run.with_name("twin")
    if not twin.exists():
        subprocess.run(["cp", "-rl", str(run), str(twin)], check=True)
    early = run.with_name(EARLY)
    last = RunFolder(early).read_ledger().checkpoints()[-1].payload["name"]
    places = {"RUN": run, "TWIN": twin, "EARLY": early, "LAST": last, "OUT": output}
    places |= _middle(run)
    for question in QUESTIONS:
        yield ask(question, [_filled(word, places) for word in shlex.split(question)])


def ask(question: str, words: list[str]) -> Answered:
    """Run `tools/order.py` with these words; its output goes nowhere."""
    began, private = time.perf_counter(), 0
    process = subprocess.Popen(
        [sys.executable, str(TOOL), *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while True:
        pid, code, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        private = max(private, _private_bytes(process.pid))
        time.sleep(POLL_SECONDS)
    process.returncode = os.waitstatus_to_exitcode(code)
    return Answered(
        question=question,
        seconds=time.perf_counter() - began,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        private_bytes=private,
        resident_bytes=usage.ru_maxrss * 1024,
        status=process.returncode,
    )


def as_text(answers: list[Answered]) -> str:
    """Return a table of the answers."""
    names = ["question", "seconds", "CPU seconds", "private GB", "resident GB", "status"]
    rows = [
        [
            answer.question,
            f"{answer.seconds:.1f}",
            f"{answer.cpu_seconds:.1f}",
            f"{answer.private_bytes / 1e9:.2f}",
            f"{answer.resident_bytes / 1e9:.2f}",
            str(answer.status),
        ]
        for answer in answers
    ]
    return "\n".join(text_table(names, rows, numbers=names[1:]))


def as_json(answers: list[Answered]) -> str:
    """Return one JSON object: the costs by question."""
    return json.dumps({answer.question: asdict(answer) for answer in answers})


def _middle(run: Path) -> dict[str, str]:
    """Return what the questions name, from the middle of the run."""
    from megatron_ettin.data.provenance import Provenance

    folder = RunFolder(run)
    points = folder.read_ledger().checkpoints()
    here, following = points[len(points) // 2 : len(points) // 2 + 2]
    prefix = folder.read_config().data.sources["web"].prefix[0]
    with Provenance.open(prefix) as sidecar:
        (row,) = sidecar.documents(np.array([sidecar.num_documents // 2]), ["id"]).to_pylist()
    names = {"CKPT": here.payload["name"], "NEXT": following.payload["name"]}
    return {**names, "FUTURE": str(points[-1].step + 1), "ID": row["id"]}


def _filled(word: str, places: dict[str, object]) -> str:
    for place, value in places.items():
        word = word.replace(place, str(value))
    return word


def _private_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = [line for line in status.splitlines() if line.startswith("RssAnon")]
    return int(found[0].split()[1]) * 1024 if found else 0
