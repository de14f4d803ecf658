"""The list in docs/architecture.md of the files that a reader of one step opens is the true one."""

import ast
import inspect
import re
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from megatron_ettin.config import parse_args
from megatron_ettin.pretrain import pretrain
from megatron_ettin.training import loop
from tests.conftest import TinyCorpus

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_ettin"
START = "pretrain.py"
#: Files that assemble a step; their functions run before the first one.
ASSEMBLY = {START, "training/set_up.py"}
SECTION = "## A step, for a reader"
PATH, CALLED, BEFORE, CHOSEN = "opens", "calls", "before", "chosen"


def section() -> dict[str, list[str]]:
    """Return the backticked files and folders of the section's lines, by the line's first word."""
    text = (ROOT / "docs" / "architecture.md").read_text().split(SECTION)[1].split("\n## ")[0]
    tables = re.findall(r"^\| \*\*(\w+)\*\* \|(.*)\|$", text, flags=re.MULTILINE)
    return {name: re.findall(r"`([\w/.]+)`", row) for name, row in tables}


def expand(names: Iterable[str]) -> set[str]:
    """Return the files that are named, or lie in a folder that is."""
    found: set[str] = set()
    for name in names:
        paths = (PACKAGE / name).rglob("*.py") if name.endswith("/") else [PACKAGE / name]
        found |= {path.relative_to(PACKAGE).as_posix() for path in paths}
    return {name for name in found if not name.endswith("__init__.py")}


def imported(path: Path) -> Iterator[str]:
    """Yield the modules and names that a file imports anywhere but for type checkers."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def reachable() -> set[str]:
    """Return the files of the package that pretrain.py imports, directly or not."""
    found: set[str] = set()
    waiting = [PACKAGE / START]
    while waiting:
        path = waiting.pop()
        if path.relative_to(PACKAGE).as_posix() in found or not path.is_file():
            continue
        found.add(path.relative_to(PACKAGE).as_posix())
        for name in imported(path):
            if name.split(".")[0] == PACKAGE.name:
                place = PACKAGE.joinpath(*name.split(".")[1:])
                waiting += [place / "__init__.py", PACKAGE / f"{place.relative_to(PACKAGE)}.py"]
    return {name for name in found if not name.endswith("__init__.py")}


def test_every_module_that_a_run_imports_has_its_place() -> None:
    rooms = {name: expand(names) for name, names in section().items()}
    assert set(rooms) == {PATH, CALLED, BEFORE, CHOSEN}
    placed = [file for files in rooms.values() for file in files]
    assert sorted(placed) == sorted(set(placed)), "a file has two places"
    assert set(placed) == reachable()


def test_a_reader_of_a_step_opens_24_files_of_5000_lines_in_all_at_most() -> None:
    files = section()[PATH]
    lines = [len((PACKAGE / name).read_text().splitlines()) for name in files]
    print(f"{len(files)} files, {sum(lines)} lines")
    assert len(files) <= 24
    assert sum(lines) <= 5000


@pytest.mark.slow
def test_a_step_runs_the_files_of_the_path_and_no_other_room(
    tiny_corpus: TinyCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train one step on a CPU, report it and save it; note the files whose functions run."""
    entered: set[str] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        code, path = frame.f_code, Path(frame.f_code.co_filename)
        # The bodies of modules and classes, which run when they are imported, are not optimized.
        is_function = code.co_flags & inspect.CO_OPTIMIZED
        if event == "call" and is_function and path.is_relative_to(PACKAGE):
            entered.add(path.relative_to(PACKAGE).as_posix())

    def train(*arguments: Any) -> Any:
        # Only from here: what runs before builds the parts. A thread prepares micro-batches.
        threading.setprofile(note)
        sys.setprofile(note)
        try:
            return real_train(*arguments)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    real_train = loop.train
    monkeypatch.setattr(loop, "train", train)
    phase = {"name": "short", "train_tokens": 2_000, "seq_length": 128, "global_batch_size": 16}
    data = {**tiny_corpus.data, "validation": []}
    sections = {"objective": "MaskedLM", "phases": [phase], "data": data}
    config = tiny_corpus.write_config(tmp_path / "run.yaml", **sections)
    pretrain(parse_args([f"--config={config}", f"--run_dir={tmp_path / 'run'}"]))
    rooms = {name: expand(names) for name, names in section().items()}
    assert (tmp_path / "run" / "checkpoints" / "step_00000001").is_dir()
    assert entered - rooms[CALLED] == rooms[PATH] - ASSEMBLY
