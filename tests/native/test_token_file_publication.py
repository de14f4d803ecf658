"""Publication: a pair is complete or absent, whatever ends the writer."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_ettin import native

ROOT = Path(__file__).parents[2]
OLD = [[1, 2, 3], [4]]
TEMPORARY = ["c.bin.tmp", "c.idx.tmp"]


def write(prefix: Path, documents: list[list[int]]) -> None:
    builder = native.TokenFileBuilder(prefix, "uint16")
    for document in documents:
        builder.add(np.array(document))
    builder.commit()


def read(prefix: Path) -> list[list[int]]:
    file = native.TokenFile(prefix)
    return [file.tokens(i).tolist() for i in range(file.num_documents)]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_nothing_has_its_final_name_before_commit(tmp_path: Path) -> None:
    builder = native.TokenFileBuilder(tmp_path / "c", "uint16")
    builder.add(np.array([1]))
    assert names(tmp_path) == TEMPORARY
    builder.commit()
    assert names(tmp_path) == ["c.bin", "c.idx"]


def test_a_companion_takes_its_name_with_the_pair(tmp_path: Path) -> None:
    for content in ("first", "second"):
        builder = native.TokenFileBuilder(tmp_path / "c", "uint16")
        builder.add(np.array([1]))
        (tmp_path / "c.note.tmp").write_text(content)
        builder.commit(companion=tmp_path / "c.note")
        assert names(tmp_path) == ["c.bin", "c.idx", "c.note"]
        assert (tmp_path / "c.note").read_text() == content


def test_without_its_companion_no_index_appears(tmp_path: Path) -> None:
    write(tmp_path / "c", OLD)
    builder = native.TokenFileBuilder(tmp_path / "c", "uint16")
    builder.add(np.array([1]))
    with pytest.raises(FileNotFoundError, match=r"c\.note"):
        builder.commit(companion=tmp_path / "c.note")
    assert not (tmp_path / "c.idx").exists()


def test_abort_removes_everything(tmp_path: Path) -> None:
    builder = native.TokenFileBuilder(tmp_path / "c", "uint16")
    builder.add(np.arange(1000))
    builder.abort()
    builder.abort()
    assert names(tmp_path) == []
    for call in (builder.commit, lambda: builder.add(np.array([1]))):
        with pytest.raises(ValueError, match="already committed or aborted"):
            call()


def test_a_dropped_builder_removes_everything(tmp_path: Path) -> None:
    write(tmp_path / "c", OLD)
    builder = native.TokenFileBuilder(tmp_path / "c", "uint16")
    builder.add(np.arange(1000))
    del builder
    assert names(tmp_path) == ["c.bin", "c.idx"]
    assert read(tmp_path / "c") == OLD


def test_commit_replaces_an_existing_pair(tmp_path: Path) -> None:
    write(tmp_path / "c", OLD)
    write(tmp_path / "c", [[9], [8, 7]])
    assert read(tmp_path / "c") == [[9], [8, 7]]
    assert names(tmp_path) == ["c.bin", "c.idx"]


def test_an_open_reader_keeps_what_it_opened(tmp_path: Path) -> None:
    write(tmp_path / "c", OLD)
    file = native.TokenFile(tmp_path / "c")
    write(tmp_path / "c", [[9]])
    assert [file.tokens(i).tolist() for i in (0, 1)] == OLD


def test_two_writers_of_one_prefix_are_refused(tmp_path: Path) -> None:
    first = native.TokenFileBuilder(tmp_path / "c", "uint16")
    first.add(np.array([1]))
    with pytest.raises(ValueError, match=r"c\.bin\.tmp: another writer is at work"):
        native.TokenFileBuilder(tmp_path / "c", "uint16")
    first.commit()
    assert read(tmp_path / "c") == [[1]]
    write(tmp_path / "c", OLD)
    assert read(tmp_path / "c") == OLD


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        native.TokenFileBuilder(tmp_path / "nowhere" / "c", "uint16")


FILL = """
import sys
import numpy as np
from megatron_ettin import native
builder = native.TokenFileBuilder(sys.argv[1], "uint16")
"""

FORK = """
import os
builder.add(np.array([1, 2]))
child = os.fork()
if child == 0:
    builder.abort()
    os._exit(0)
os.waitpid(child, 0)
builder.commit()
"""


def test_a_forked_child_does_not_remove_its_parents_files(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", FILL + FORK, str(tmp_path / "c")], cwd=ROOT, check=True)
    assert read(tmp_path / "c") == [[1, 2]]


FULL_DISK = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
try:
    for _ in range(100):
        builder.add(np.arange(60_000))
    builder.commit()
except OSError as error:
    print(type(error).__name__, error.errno, error.filename)
"""


def test_a_full_disk_is_an_os_error_that_names_the_file(tmp_path: Path) -> None:
    write(tmp_path / "c", OLD)
    done = subprocess.run(
        [sys.executable, "-c", FILL + FULL_DISK, str(tmp_path / "c")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["OSError", "27", str(tmp_path / "c.bin.tmp")]
    assert names(tmp_path) == ["c.bin", "c.idx"]
    assert read(tmp_path / "c") == OLD


@pytest.mark.slow
def test_sigkill_never_leaves_an_index_of_another_file(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.native.kill_writers", str(tmp_path / "c")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    left = set(done.stdout.splitlines())
    assert len(left) > 1, "every kill came at a quiet moment: the test shows nothing"
    write(tmp_path / "c", OLD)
    assert read(tmp_path / "c") == OLD
    assert [name for name in names(tmp_path) if ".note" not in name] == ["c.bin", "c.idx"]


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    script = FILL + (
        "import resource\n"
        "lengths = np.ones(100_000, np.int64)\n"
        "tokens = np.zeros(100_000, np.int64)\n"
        "builder.add_many(tokens, lengths)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for _ in range(40):\n"
        "    builder.add_many(tokens, lengths)\n"
        "builder.commit()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "c")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    # Kept for 4 million documents: 32 MB of offsets, as much of boundaries, 16 MB of lengths.
    assert int(done.stdout) < 8_000  # kilobytes
