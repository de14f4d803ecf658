"""Run a program of this folder as a stranger would: a process that cannot import the project."""

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
# -I ignores PYTHONPATH and the working directory. A None in sys.modules makes an import fail even
# where the project is installed.
_ALONE = """
import runpy, sys
sys.modules["megatron_ettin"] = None
sys.path.insert(0, sys.argv[1])
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_alone(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program of files beside it and of packages that are not this project's."""
    return subprocess.run(
        [sys.executable, "-I", "-c", _ALONE, str(FOLDER), str(program), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def rebuild(run_dir: Path) -> str:
    """Rebuild a run; return what the program found, PASS or FAIL first."""
    done = run_alone(FOLDER / "rebuild.py", str(run_dir))
    answer = done.stdout or done.stderr
    assert answer.startswith(("PASS ", "FAIL ")), answer
    assert (done.returncode == 0) == answer.startswith("PASS ")
    return answer
