"""Runs over tokens: their curves and marks, the picture, the page; a browser where there is one."""

import dataclasses
import json
import re
import shutil
import struct
import subprocess
import xml.etree.ElementTree as ET
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from megatron_ettin.evaluation.curves_figure import draw_curves, phase_lanes
from megatron_ettin.evaluation.curves_page import MAX_ROWS, figure_in_page, page_of_curves
from megatron_ettin.evaluation.run_curves import (
    RunCurves,
    named_folders,
    read_curves,
    smoothed,
)
from megatron_ettin.evaluation.theme import DARK, LIGHT
from megatron_ettin.order.ledger import Ledger, LedgerWriter
from tests.conftest import TinyCorpus
from tests.runs import record_run, tiny_config
from tools import plot as tool

SCRIPT = "<script>document.title = 'owned'</script>--> $x_"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def made_curves(name: str, shift: float = 0.0, steps: int = 60) -> RunCurves:
    """Return a run of two phases that reports every thousand tokens."""
    training, validation = [], []
    for step in range(1, steps + 1):
        where = {"step": step, "phase": "short" if step <= 40 else "long", "tokens": step * 1000}
        loss = 9.0 - 0.05 * step + shift
        training.append(
            {"kind": "train", **where, "loss": loss, "lr": 1e-3 / step, "grad_norm": 0.5,
             "seconds": 0.5, "tokens_per_second": 2000.0}
        )  # fmt: skip
        if step % 20 == 0:
            held_out = {"heldout_loss": loss + 0.1, "heldout_standard_error": 0.03}
            validation.append({"kind": "validation", **where, **held_out})
    return RunCurves(name=name, training=training, validation=validation, marks=[])


@pytest.fixture(scope="module")
def forked(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that skipped rows and went back from step 7 to step 4."""
    data = {**tiny_corpus.data, "skip_rows": [[32, 40]]}
    config = tiny_config(tiny_corpus, tmp_path_factory.mktemp("forked") / "run", data=data)
    run = record_run(config, steps=7, save_steps=[4])
    (saved,) = Ledger.read(run / "ledger").checkpoints()
    LedgerWriter.open(run / "ledger", saved.head).close()
    steps = Ledger.read(run / "ledger").steps
    lines = [
        {"kind": "train", "step": int(step["step"]), "phase": "short", "tokens": int(tokens),
         "loss": 5.0, "lr": 1e-3, "seconds": 1.0, "tokens_per_second": 1.0}
        for step, tokens in zip(steps, np.cumsum(steps["n_tokens"]), strict=True)
    ]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_marks_are_where_the_ledger_has_them(forked: Path) -> None:
    run = read_curves("forked", forked)
    at = {line["step"]: line["tokens"] for line in run.training}
    assert [(mark.kind, mark.step, mark.tokens) for mark in run.marks] == [
        ("skip", 2, at[2]), ("checkpoint", 4, at[4]), ("fork", 4, at[4])
    ]  # fmt: skip
    texts = [mark.text for mark in run.marks]
    assert texts == [
        "rows 32 to 39 were skipped (data.skip_rows)",
        "checkpoint step_00000004",
        "resumed from here: 3 steps were undone",
    ]


def test_a_smoothed_point_is_the_mean_around_it() -> None:
    values = np.random.default_rng(0).normal(size=500)
    found = smoothed(values)
    for place in (0, 1, 2, 4, 5, 250, 497, 499):
        reach = min(5, place, 499 - place)
        expected = values[place - reach : place + reach + 1].mean()
        assert found[place] == pytest.approx(expected, abs=1e-12)
    line = np.linspace(9.0, 4.0, 500)
    np.testing.assert_allclose(smoothed(line), line, atol=1e-12)
    assert smoothed(np.array([3.0])).tolist() == [3.0]


def test_runs_are_called_after_their_folders(tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in ("a/run", "b/run", "c/other"))
    assert named_folders([str(a), str(b), str(c)]) == {"a/run": a, "b/run": b, "other": c}
    assert named_folders([f"low lr={a}", f"high={b}"]) == {"low lr": a, "high": b}
    odd = tmp_path / "lr=1e-3"
    odd.mkdir()
    assert named_folders([str(odd)]) == {"lr=1e-3": odd}
    with pytest.raises(ValueError, match="given twice"):
        named_folders([str(a), f"{a}/"])
    with pytest.raises(ValueError, match="two runs are called 'other'"):
        named_folders([f"other={a}", str(c)])


def test_runs_of_the_same_phases_share_a_lane() -> None:
    whole, part, early = (made_curves(name, steps=n) for name, n in
                          (("whole", 60), ("part", 50), ("early", 20)))  # fmt: skip
    assert list(phase_lanes([early, whole, part]).values()) == [["early", "whole", "part"]]
    other = made_curves("other", steps=20)
    other = dataclasses.replace(other, training=[{**t, "phase": "cross"} for t in other.training])
    assert list(phase_lanes([whole, other]).values()) == [["whole"], ["other"]]


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_the_legend_is_off_the_panels(theme: object) -> None:
    runs = [made_curves(f"run of a long name {index}", index / 5) for index in range(9)]
    figure = draw_curves(runs, theme)  # type: ignore[arg-type]
    figure.canvas.draw()
    (legend,) = figure.legends
    lowest = legend.get_window_extent().y0
    assert all(axes.get_window_extent().y1 <= lowest for axes in figure.axes)
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
    looks = {(line.get_color(), line.get_linestyle()) for line in legend.legend_handles[:9]}
    assert len(looks) == 9


def test_the_figure_of_the_page_names_its_parts(forked: Path) -> None:
    runs = [read_curves("forked", forked), made_curves(SCRIPT)]
    root = ET.fromstring(figure_in_page(runs))
    space = "{http://www.w3.org/2000/svg}"
    titles = {
        group.get("id"): (group.get("class"), group.findtext(f"{space}title"))
        for group in root.iter(f"{space}g")
        if (group.get("id") or "").startswith("run")
    }
    assert titles["run1-loss"] == ("run1", f"{SCRIPT}: training loss")
    assert titles["run0-mark-2"][0] == "run0"
    assert (titles["run0-mark-2"][1] or "").startswith("forked: resumed from here: 3 steps were")
    assert titles["run1-point-0"][1] == f"{SCRIPT}: held-out loss 8.1000 ± 0.0300 at 20,000 tokens"
    text = figure_in_page(runs)
    assert "#" + LIGHT.series[0][1:] not in text.lower()
    assert "var(--series-0)" in text


class OpenedPage(HTMLParser):
    """Tags of a page, and the addresses that a browser would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        loading = {"src", "srcset", "href", "xlink:href", "data", "poster", "action"}
        self.found += [value or "" for name, value in attrs if name in loading]


def test_the_page_is_self_contained_and_escaped(forked: Path) -> None:
    runs = [made_curves(SCRIPT, steps=2 * MAX_ROWS + 1), read_curves("forked", forked)]
    text = page_of_curves(runs)
    page = OpenedPage(text)
    assert page.tags["script"] == 0
    assert page.tags["input"] == page.tags["details"] == 2
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 4
    assert all(address.startswith("#") for address in page.found)
    assert set(re.findall(r"url\((.)", text)) == {"#"}
    assert "At most 200 of the reports" in text
    assert page.tags["tr"] < MAX_ROWS + 100
    assert "resumed from here: 3 steps were undone" in text


def test_the_tool_writes_both_files(
    forked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("first.png", "second.html"):
        tool.main([f"<b>$x_{{={forked}", "--output", str(tmp_path / "new" / name)])
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {"first.png", "first.html", "second.png", "second.html"}
    image = (tmp_path / "new" / "first.png").read_bytes()
    assert "&lt;b&gt;$x_{" in (tmp_path / "new" / "first.html").read_text()
    assert struct.unpack(">II", image[16:24])[0] == 1680
    assert image == (tmp_path / "new" / "second.png").read_bytes()
    assert "first.png and " in capsys.readouterr().out


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    output = ["--output", str(tmp_path / "plot.png")]
    with pytest.raises(SystemExit, match=r"error: .*nothing.metrics\.jsonl: no such file"):
        tool.main([str(tmp_path / "nothing"), *output])
    (tmp_path / "metrics.jsonl").write_text('{"kind": "validation", "step": 1}\n')
    with pytest.raises(SystemExit, match="no line of training yet"):
        tool.main([str(tmp_path), *output])
    with pytest.raises(SystemExit):
        tool.main([str(tmp_path), "--output", "plot.pdf"])
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path")
def test_a_browser_shows_it_and_hides_a_run(tmp_path: Path) -> None:
    (tmp_path / "plot.html").write_text(page_of_curves([made_curves("a"), made_curves(SCRIPT)]))
    # A frame of 1000 px measures the page; the page itself has no script.
    probe = tmp_path / "probe.html"
    probe.write_text(
        """<body><iframe id=f style="width:1000px;height:2000px" src="plot.html"></iframe>
<pre id=out></pre><script>f.onload = () => { const d = f.contentDocument, w = f.contentWindow;
const shown = id => w.getComputedStyle(d.getElementById(id)).display !== "none";
const before = shown("run1-loss"); d.getElementById("show1").click();
out.textContent = JSON.stringify({title: d.title,
hidden: d.documentElement.scrollWidth - d.documentElement.clientWidth,
width: Math.round(d.querySelector("svg").getBoundingClientRect().width) > 800,
before: before, after: shown("run1-loss"), other: shown("run0-loss"),
stroke: w.getComputedStyle(d.querySelector("#run0-loss path")).stroke}); }</script>"""
    )
    done = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}",
         "--virtual-time-budget=5000", "--dump-dom", f"file://{probe}"],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    [seen] = re.findall(r'<pre id="out">(.*?)</pre>', done.stdout)
    assert json.loads(seen) == {
        "title": "Runs over tokens", "hidden": 0, "width": True, "before": True, "after": False,
        "other": True, "stroke": "rgb(10, 110, 189)",
    }  # fmt: skip
