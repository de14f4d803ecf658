"""Lines of metrics.jsonl on a disk that refuses them for a while."""

import json
from pathlib import Path

import pytest

from megatron_ettin.training.metrics_file import MetricsFile
from tests.disks import limited_files


def steps(path: Path) -> list[int]:
    """Return the steps of all lines, which are whole."""
    text = path.read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line)["step"] for line in text.splitlines()]


@pytest.mark.parametrize("room", [0, 5])
def test_lines_that_the_disk_refuses_are_written_later(
    room: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.append({"step": 1})
    with limited_files(path.stat().st_size + room):
        file.append({"step": 2})
        file.append({"step": 3})
        assert steps(path) == [1], "a part of a line would damage the next"
    assert caplog.messages == [
        f"{path}: File too large: {count} lines wait in memory" for count in (1, 2)
    ]
    file.append({"step": 4})
    assert steps(path) == [1, 2, 3, 4]
    file.close()
    assert steps(path) == [1, 2, 3, 4]


def test_lines_that_wait_are_written_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    with limited_files(1):
        file.append({"step": 1})
        assert steps(path) == []
    file.close()
    assert steps(path) == [1]
