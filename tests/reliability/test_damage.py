"""Each kind of file that a run keeps, damaged: refused by its name, or survived; never believed.

A kind of file that is new fails the test until it is in the table.
"""

import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ettin.order.ledger import Ledger
from megatron_ettin.order.run_folder import RunFolder
from tests.conftest import TinyCorpus
from tests.training import RESUME, cut_off, steps_saved, train_here

PHASES = [
    {"name": "short", "train_tokens": 6_000, "seq_length": 128, "global_batch_size": 8},
    {"name": "long", "train_tokens": 2_500, "seq_length": 256, "global_batch_size": 4},
]
SAVES = "--checkpoint.save_every_tokens=2500"
REFUSED, SURVIVED = "refused", "survived"
EITHER = {REFUSED, SURVIVED}


@dataclass(frozen=True)
class Kind:
    """A kind of file, and the ways in which a resume may take damage to it."""

    pattern: str
    """NEWEST and OLDER are the folders of checkpoints."""
    ways: set[str]
    why: str
    """The reason that a run may go on in spite of the damage."""


IN_RUN = [
    Kind("config.yaml", {SURVIVED}, "written anew from the command line; `verify` says FAIL"),
    Kind("order.json", {REFUSED}, ""),
    Kind("metrics.jsonl", EITHER, "nothing is computed from reports, and no digest binds them"),
    Kind("ledger/records.led", EITHER, "records after the checkpoint's move to a fork"),
    Kind("ledger/events.jsonl", EITHER, "lines after the checkpoint's record move to a fork"),
    Kind("ledger/forks/fork_*.led", {SURVIVED}, "a run reads no fork; `verify` says FAIL"),
    Kind("ledger/forks/fork_*.jsonl", {SURVIVED}, "a run reads no fork; `verify` says FAIL"),
    Kind("ledger/lock", {SURVIVED}, "its text is for people; the kernel holds the lock"),
    Kind("checkpoints/OLDER/state.json", {SURVIVED}, "a run reads the newest; `verify` says FAIL"),
    Kind("checkpoints/OLDER/*.distcp", {SURVIVED}, "as above, with `verify --weights`"),
    Kind("checkpoints/NEWEST/*", EITHER, "the run goes on from the checkpoint before"),
]
IN_CORPUS = [
    Kind("corpus/alpha.bin", {REFUSED}, ""),
    Kind("corpus/beta.bin", {REFUSED}, ""),
    Kind("corpus/held_out.bin", EITHER, "no step reads it; held-out losses are of other text"),
    Kind("corpus/*.idx", {REFUSED}, ""),
    Kind("corpus/*.identity.json", EITHER, "made anew where it does not fit the corpus"),
    Kind("corpus/*.plans/*.plan", EITHER, "made anew where it does not fit the corpus"),
    Kind("corpus/*.plans/.lock", {SURVIVED}, "empty; the kernel holds the lock"),
    Kind("corpus/tokenizer/tokenizer.json", {REFUSED}, ""),
    Kind("corpus/tokenizer/tokenizer_config.json", EITHER, "only conversion reads it"),
]
#: Files that this run does not have. No step depends on any of them.
ELSEWHERE = {
    "wandb_id": "W&B's",
    "tensorboard": "TensorBoard's",
    "stop": "only its name counts",
    "hangs": "stacks, for people",
}


@dataclass(frozen=True)
class Base:
    """A run that was cut off after its last checkpoint but one, and one that was not."""

    folder: Path
    arguments: list[str]
    expected: tuple[Any, ...]

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def pattern(self, kind: Kind) -> str:
        *older, newest = (f"step_{step:08d}" for step in steps_saved(self.run))
        return kind.pattern.replace("NEWEST", newest).replace("OLDER", older[0])

    def files(self, kind: Kind) -> list[Path]:
        """List the files of a kind, relative to the run's folder or to that of its corpora."""
        top = self.run if kind in IN_RUN else self.folder
        return sorted(path.relative_to(top) for path in top.glob(self.pattern(kind)))


def end_of(run: Path) -> tuple[Any, ...]:
    """Return what must be the same at the end of a run: its weights, and the steps it took."""
    newest = RunFolder(run).newest_checkpoint()
    assert newest is not None
    state = json.loads((newest / "state.json").read_text())
    steps = Ledger.read(run / "ledger").steps
    fed = [np.asarray(steps[name]).tolist() for name in ("step", "g_end", "token_digest")]
    return state["step"], state["files"]["__0_0.distcp"], fed


@pytest.fixture(scope="module")
def base(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp("base")
    corpus = tiny_corpus.copy_to(folder / "corpus")
    config = corpus.write_config(folder / "run.yaml", objective="MaskedLM", phases=PHASES)
    arguments = [f"--config={config}", SAVES, RESUME]
    train_here(arguments, folder / "alone")
    once = cut_off(folder / "alone", folder / "once", keep=1)
    train_here(arguments, once)  # leaves a fork
    cut_off(once, folder / "run", keep=len(steps_saved(once)) - 1)
    return Base(folder, arguments, end_of(folder / "alone"))


def flip(content: bytes, at: int) -> bytes:
    damaged = bytearray(content)
    damaged[at] ^= 1 << at % 8
    return bytes(damaged)


def damages(content: bytes, *, flips: int) -> Iterator[bytes]:
    """Yield a file's content with bits flipped evenly over it, and cut off."""
    for number in range(flips if content else 0):
        yield flip(content, (2 * number + 1) * len(content) // (2 * flips))
    if content:
        yield content[: len(content) // 2]
    if flips > 1:
        yield b""
        yield content + b"\0"


def way_of(base: Base, run: Path, named: Path) -> str:
    """Resume; return how the damage was taken, and fail if it was believed."""
    try:
        train_here(base.arguments, run)
    except (ValueError, OSError) as error:  # what pretrain.main turns into one message
        message = str(error)
    else:
        assert end_of(run) == base.expected
        return SURVIVED
    assert any(name in message for name in (named.name, str(named.parent))), message
    return REFUSED


def ways_in_run(base: Base, kind: Kind, copies: Path, *, flips: int) -> set[str]:
    """Damage each file of a kind in copies of the run; return the ways that were met."""
    met = set()
    for name in base.files(kind):
        for content in damages((base.run / name).read_bytes(), flips=flips):
            run = copies / "run"
            shutil.copytree(base.run, run)
            (run / name).write_bytes(content)
            met.add(way_of(base, run, run / name))
            shutil.rmtree(run)
    return met


def ways_in_corpus(base: Base, kind: Kind, copies: Path, *, flips: int) -> set[str]:
    """Damage each file of a kind where it is, and bring it back.

    Where a size and a time could stand for the content, the damage comes with the old time too.
    """
    met = set()
    for name in base.files(kind):
        path = base.folder / name
        shutil.copy2(path, copies / "kept")
        size, is_timed = path.stat().st_size, path.suffix in (".bin", ".idx")
        for content, has_old_time in itertools.product(
            damages(path.read_bytes(), flips=flips), (True, False)
        ):
            if has_old_time and not (is_timed and len(content) == size):
                continue
            run = copies / "run"
            shutil.copytree(base.run, run)
            path.write_bytes(content)
            if has_old_time:
                shutil.copystat(copies / "kept", path)
            try:
                met.add(way_of(base, run, path))
            finally:
                shutil.copy2(copies / "kept", path)
                shutil.rmtree(run)
    return met


@pytest.mark.slow
def test_every_kind_of_file_is_in_the_table(base: Base) -> None:
    kinds = {kind.pattern: base.files(kind) for kind in [*IN_RUN, *IN_CORPUS]}
    assert [pattern for pattern, files in kinds.items() if not files] == []
    listed = {base.run / file for kind in IN_RUN for file in base.files(kind)}
    listed |= {base.folder / file for kind in IN_CORPUS for file in base.files(kind)}
    of_checkpoints = base.run / "checkpoints"
    found = {
        path
        for top in (base.run, base.folder / "corpus")
        for path in top.rglob("*")
        if path.is_file() and not path.is_relative_to(of_checkpoints)
    }
    assert sorted(found - listed) == []
    properties = {
        name: getattr(RunFolder(Path()), name)
        for name, value in vars(RunFolder).items()
        if isinstance(value, property)
    }
    tops = {kind.pattern.split("/")[0] for kind in IN_RUN}
    unlisted = {name for name, path in properties.items() if path.parts[0] not in tops}
    assert unlisted == set(ELSEWHERE)


@pytest.mark.slow
@pytest.mark.parametrize("kind", IN_RUN, ids=lambda kind: kind.pattern)
def test_damage_in_a_run_is_never_believed(kind: Kind, base: Base, tmp_path: Path) -> None:
    flips = 1 if REFUSED not in kind.ways else 2
    assert ways_in_run(base, kind, tmp_path, flips=flips) <= kind.ways


@pytest.mark.slow
@pytest.mark.parametrize("kind", IN_CORPUS, ids=lambda kind: kind.pattern)
def test_damage_in_a_corpus_is_never_believed(kind: Kind, base: Base, tmp_path: Path) -> None:
    assert ways_in_corpus(base, kind, tmp_path, flips=1) <= kind.ways


@pytest.mark.long
@pytest.mark.parametrize("kind", IN_RUN, ids=lambda kind: kind.pattern)
def test_damage_anywhere_in_a_run_is_never_believed(kind: Kind, base: Base, tmp_path: Path) -> None:
    assert ways_in_run(base, kind, tmp_path, flips=100) == kind.ways
