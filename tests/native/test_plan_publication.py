"""Publication of plans: complete or absent, never replaced, whatever ends the builder."""

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from megatron_ettin import native
from tests.native.corpora import build_plan, write_lengths

ROOT = Path(__file__).parents[2]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> native.TokenFile:
    rng = np.random.default_rng(8)
    lengths = np.clip(rng.lognormal(3, 1, 300_000), 0, 500).astype(np.int64)
    return write_lengths(tmp_path_factory.mktemp("corpus") / "c", lengths)


@pytest.mark.slow
def test_sigkill_leaves_a_whole_plan_or_none_and_stops_nobody(
    tmp_path: Path, file: native.TokenFile
) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.native.kill_plan_builders",
            file.prefix,
            str(tmp_path / "plan"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    left = done.stdout.splitlines()
    assert len(left) == 60
    assert len(set(left)) > 1, "every kill came at the same moment: the test shows little"
    assert "plan.tmp" in left


def test_an_existing_file_stays(tmp_path: Path, file: native.TokenFile) -> None:
    (tmp_path / "plan").write_bytes(b"somebody's")
    with pytest.raises(ValueError, match="truncated"):
        build_plan(file, tmp_path / "plan", 64)
    assert (tmp_path / "plan").read_bytes() == b"somebody's"


def test_builders_at_the_same_time_agree(tmp_path: Path, file: native.TokenFile) -> None:
    plan = build_plan(file, tmp_path / "alone", 64)
    opened: list[native.RowPlan] = []
    threads = [
        threading.Thread(target=lambda: opened.append(build_plan(file, tmp_path / "plan", 64)))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [other.num_rows for other in opened] == [plan.num_rows] * 6
    assert (tmp_path / "plan").read_bytes() == (tmp_path / "alone").read_bytes()
    assert names(tmp_path) == ["alone", "plan"]


def test_progress_counts_documents_and_may_give_up(tmp_path: Path, file: native.TokenFile) -> None:
    seen: list[int] = []
    rules = {
        "first_document": 0,
        "end_document": file.num_documents,
        "seq_length": 64,
        "pack": "bfd",
        "specials": "add",
        "min_doc_tokens": 1,
        "max_segments_per_row": 4,
    }
    native.build_row_plan(file, tmp_path / "plan", progress=seen.append, **rules)  # type: ignore[arg-type]
    assert seen == sorted(seen)
    assert seen[-1] == file.num_documents
    (tmp_path / "plan").unlink()

    def give_up(documents: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        native.build_row_plan(file, tmp_path / "plan", progress=give_up, **rules)  # type: ignore[arg-type]
    assert names(tmp_path) == []


def test_missing_folder_is_named(tmp_path: Path, file: native.TokenFile) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        build_plan(file, tmp_path / "nowhere" / "plan", 64)


SCRIPT = """
import resource
import sys
from pathlib import Path
from megatron_ettin import native
from tests.native.corpora import build_plan
file = native.TokenFile(sys.argv[1], check=False)
"""

FULL_DISK = """
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    build_plan(file, Path(sys.argv[2]), 64, block=5_000, threads=3)
except OSError as error:
    print(type(error).__name__, error.errno, error.filename)
"""


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, "-c", SCRIPT + script, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_a_full_disk_is_an_os_error_that_names_the_file(
    tmp_path: Path, file: native.TokenFile
) -> None:
    path = str(tmp_path / "plan")
    kind, code, name = run(FULL_DISK, file.prefix, path).split()
    assert (kind, code) == ("OSError", "27")
    assert name.startswith(path + ".tmp.")
    assert names(tmp_path) == []


MEMORY = """
def resident() -> int:
    values = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()
    return int(values[0]) * 1024
build_plan(file, Path(sys.argv[2] + "0"), 1024, end=1_000)
Path("/proc/self/clear_refs").write_text("5")  # start the high-water mark anew
before = resident()
build_plan(file, Path(sys.argv[2]), 1024, threads=2)
print(resident() - before)
"""


@pytest.mark.slow
def test_memory_is_bounded_by_the_documents_in_flight(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.9, 1.2, 4_000_000), 8, 200_000).astype(np.int64)
    write_lengths(tmp_path / "c", lengths)
    peak = int(run(MEMORY, str(tmp_path / "c"), str(tmp_path / "plan")))
    assert peak <= 32 * 2 * 65_536
