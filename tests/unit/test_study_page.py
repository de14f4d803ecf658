"""The page of a study: all its parts, escaped; opened by a browser where there is one."""

import json
import re
import shutil
import struct
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_ettin.study import tables
from megatron_ettin.study.arms import Study
from megatron_ettin.study.history import read_checkpoints, read_histories
from megatron_ettin.study.page import write_page
from tests.studies import MadeTask, made_study, write_proof, write_results, write_runs, write_series

SCRIPT = "<script>document.title = 'owned'</script>"
SHARES = {"encoder": 0.8, "decoder": 0.6, "encoder-from-decoder": 0.7, "decoder-from-encoder": 0.6}
SHARES |= {"detour": 0.8, "diffusion": 0.7}
TASKS = {
    "reviews": MadeTask(kind="classification", probabilities=SHARES, num_items=100, seeds=(0, 1)),
    "blimp": MadeTask(
        kind="minimal pairs", probabilities=SHARES, num_items=100, names=("all", SCRIPT)
    ),
}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def write(folder: Path, sizes: list[str], verdict: str = "PASS") -> Study:
    study = made_study(folder, sizes, series=["reviews"])
    write_results(study, TASKS, learning_rate=3e-5, sample=SCRIPT)
    write_runs(study, 900_000, 200_000)
    write_series(study, TASKS, [300_000, 900_000])
    write_proof(study, verdict)
    write_page(study, TASKS, Path("examples/study/nano.yaml"))
    return study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return write(tmp_path_factory.mktemp("page") / "study", ["nano"])


class Addresses(HTMLParser):
    """List of all addresses that a browser would load, and of all tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        loading = {"src", "srcset", "href", "data", "poster", "action"}
        self.found += [value or "" for name, value in attrs if name in loading]


def test_page_is_self_contained_and_escaped(study: Study) -> None:
    text = (study.page / "page.html").read_text()
    page = Addresses(text)
    assert "script" not in page.tags
    assert text.count("&lt;script&gt;") >= 8  # a score's name and a note of each result
    assert len(page.found) == 2 * 4  # four figures, light and dark
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.found)
    assert "url(" not in text


def test_page_has_every_part(study: Study) -> None:
    text = (study.page / "page.html").read_text()
    for heading in ("Findings", "Scores", "Differences between arms", "Held-out losses",
                    "Loss over tokens", "Scores over checkpoints", "Cost", "The same rows?",
                    "Settings", "How to repeat each number"):  # fmt: skip
        assert f"<h2>{heading}</h2>" in text
    assert '<span class="PASS">PASS</span>' in text
    assert "learning_rate: 3e-05" in text
    assert "torch 2.13.0" in text
    assert f"--output {study.config.output} --only train/nano/encoder/seed_0" in text
    assert "--only cross/nano/decoder-from-encoder/seed_0" in text
    folder = f"{study.config.output}/models/nano-encoder-seed_0"
    assert f"tools/evaluate.py nano-encoder-seed_0={folder} --config" in text
    names = {path.name for path in study.page.iterdir()}
    assert names == {"page.html", "page.png", "held_out.png", "results.csv", "results.md"}
    image = (study.page / "page.png").read_bytes()
    assert struct.unpack(">II", image[16:24])[0] == 1680
    assert "<script" not in (study.page / "results.md").read_text()


def test_histories_count_the_tokens_of_the_start(study: Study) -> None:
    histories = {history.model.arm: history for history in read_histories(study.models())}
    crossing, start = histories["decoder-from-encoder"], histories["encoder"]
    assert (start.start_tokens, crossing.start_tokens) == (0, 900_000)
    assert (start.tokens, crossing.tokens) == (900_000, 200_000)
    assert start.hours == pytest.approx(60 * 6.0 / 3600)
    # A decoder of the same tokens scores all positions but attends to half of them.
    assert histories["decoder"].flops > start.flops > 6 * 900_000 * 1e5


def test_held_out_losses_are_compared_within_their_kind(study: Study) -> None:
    histories = read_histories(study.models())
    kinds = {history.model.arm: history.loss_kind for history in histories}
    text = {arm for arm, kind in kinds.items() if kind == "-log p(text)"}
    # The made runs end in their first phase, in which the detour is a decoder.
    assert text == {"decoder", "decoder-from-encoder", "detour", "diffusion"}
    assert (kinds["encoder"], kinds["encoder-from-decoder"]) == ("MaskedLM", "MaskedNextToken")
    rows = {row[1]: row for row in tables.held_out_rows(histories)}
    run = histories[0].model.run
    assert run is not None
    last = json.loads(run.metrics.read_text().splitlines()[-1])
    low, high = (last["heldout_loss"] + sign * 1.96 * 0.03 for sign in (-1, 1))
    assert rows["encoder"][5:] == (
        f"{last['heldout_loss']:.3f}", f"[{low:.3f}, {high:.3f}]", "5,000"
    )  # fmt: skip


def test_checkpoints_are_in_order_of_tokens(study: Study) -> None:
    checkpoints = read_checkpoints(study, TASKS)
    assert [(c.arm, c.tokens) for c in checkpoints] == [
        (arm, tokens)
        for arm in ("encoder", "decoder", "detour", "diffusion")
        for tokens in (300_000, 900_000)
    ]


def test_only_what_is_beyond_is_bold(study: Study) -> None:
    text = (study.page / "page.html").read_text()
    rows = re.findall(r"<tr><td>nano</td><td>[^\n]*</td>\n(?:(?!</tr>).)*</tr>", text, re.DOTALL)
    not_beyond = [row for row in rows if "<td>no</td>" in row]
    assert not_beyond
    assert not any("<b>" in row for row in not_beyond)


def test_a_study_without_results_has_no_page(tmp_path: Path) -> None:
    study = made_study(tmp_path / "study", ["nano"])
    with pytest.raises(ValueError, match="no results yet"):
        write_page(study, TASKS, Path("study.yaml"))
    assert not study.page.exists()


@pytest.mark.slow
def test_scores_alone_make_a_page_at_several_sizes(tmp_path: Path) -> None:
    study = made_study(tmp_path / "study", ["17m", "32m"])
    write_results(study, TASKS)
    study.results.path("32m-encoder-seed_0", "blimp", 0).unlink()
    write_page(study, TASKS, Path("study.yaml"))
    text = (study.page / "page.html").read_text()
    assert "32m-encoder-seed_0, blimp, seed 0: no result" in text
    assert "Not proved yet" in text
    assert "Loss over tokens" not in text


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path")
def test_a_browser_shows_it(study: Study, tmp_path: Path) -> None:
    # A frame of 1000 px measures the page; the page itself has no script.
    probe = tmp_path / "probe.html"
    probe.write_text(
        f"""<body><iframe id=f style="width:1000px;height:2000px" src="file://{study.page}/page.html">
</iframe><pre id=out></pre><script>f.onload = () => {{ const d = f.contentDocument;
out.textContent = JSON.stringify({{title: d.title,
hidden: d.documentElement.scrollWidth - d.documentElement.clientWidth,
images: [...d.images].map(i => i.naturalWidth)}}); }}</script>"""
    )
    done = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}",
         "--virtual-time-budget=5000", "--dump-dom", f"file://{probe}"],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    [seen] = re.findall(r'<pre id="out">(.*?)</pre>', done.stdout)
    assert '"title":"Siblings compared"' in seen
    assert '"hidden":0' in seen  # nothing reaches beyond the right edge
    widths = re.search(r'"images":\[(\d+),(\d+),(\d+),(\d+)\]', seen)
    assert widths is not None, seen
    assert all(int(width) > 300 for width in widths.groups())
