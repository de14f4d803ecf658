"""A question imports what it uses: those to ledgers alone start without parsers and Arrow."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TinyCorpus
from tests.runs import record_run, tiny_config

ROOT = Path(__file__).parents[2]
HEAVY = {
    "duckdb",
    "jsonargparse",
    "logging",
    "matplotlib",
    "megatron.core",
    "pyarrow",
    "tokenizers",
    "torch",
    "tqdm",
    "transformers",
    "yaml",
}
PROGRAM = """
import json, sys
from tools import order
try:
    order.main(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
print(json.dumps([*sys.modules]))
"""


@pytest.fixture(scope="module")
def run(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imports") / "run"
    return record_run(tiny_config(tiny_corpus, folder), save_steps=(2,))


def heavy_modules(*words: object) -> set[str]:
    """Ask in a process of its own; return which of the heavy modules it has imported."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    modules = json.loads(done.stdout.splitlines()[-1])
    assert "megatron_ettin.order.ledger.reader" in modules, "the question was not asked"
    return HEAVY.intersection(modules)


def test_twins_imports_what_reads_ledgers(run: Path) -> None:
    assert heavy_modules("twins", "--run", run, "--run", run) == set()


def test_the_check_of_the_chain_imports_what_reads_ledgers(run: Path) -> None:
    assert heavy_modules("verify", "--run", run, "--chain") == set()


@pytest.mark.parametrize(
    "words",
    [("where", "--doc", "alpha:1"), ("exposures", "--doc", "alpha:1"), ("plan",), ("batch",)],
    ids=lambda words: str(words[0]),
)
def test_questions_about_corpora_without_provenance_do_without_arrow(
    run: Path, words: tuple[str, ...]
) -> None:
    more = ["--step", 1] if words == ("batch",) else []
    found = heavy_modules(*words, *more, "--run", run)
    assert not found & {"duckdb", "matplotlib", "megatron.core", "pyarrow", "torch", "transformers"}
