"""The bar of preprocessing: rates and the rest of the time on a terminal, nothing elsewhere."""

import io
import re
import sys
import time

import pytest

from megatron_ettin.data.progress import Progress


class Terminal(io.StringIO):
    """Stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()])
def test_a_terminal_sees_rates_and_the_rest(
    stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    bar = Progress("books", 40_000_000)
    time.sleep(0.11)  # tqdm draws ten times a second
    bar.advance(8_000_000, 3_000, 2_000_000)
    bar.finish_file(10_000_000)
    bar.advance(10_000_000, 1_000, 1_000_000)  # of the second file
    bar.close()
    lines = stream.getvalue().split("\r")
    if not stream.isatty():
        assert lines == [""]
        return
    found = re.search(
        r"books:  50%.* (\d+)\.?\dM/40\.0M \[\d\d:\d\d<\d\d:\d\d, *([\d.]+)MB/s, "
        r"documents=([\d,]+)/s, tokens=([\d,]+)/s\]",
        lines[-1],
    )
    assert found, lines
    _, documents, tokens = (float(number.replace(",", "")) for number in found.groups()[1:])
    assert tokens / documents == pytest.approx(3_000_000 / 4_000, rel=0.01)
