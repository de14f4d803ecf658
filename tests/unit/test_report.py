"""The report of two made-up runs: every number is in it, and it needs nothing from elsewhere."""

import json
import re
import struct
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ettin import checkpoint
from megatron_ettin.checkpoint import RunState, SavedModel
from megatron_ettin.config import RunConfig, load_config, to_yaml
from megatron_ettin.evaluation import figure, table
from megatron_ettin.evaluation.probe import Accuracy
from megatron_ettin.evaluation.report import page, write_report
from megatron_ettin.evaluation.samples import Sample
from megatron_ettin.evaluation.twins import Comparison, Run, Twin, read_run
from megatron_ettin.training.validation import HeldOutLoss
from tests.conftest import TinyCorpus
from tools import report as tool

VOID_TAGS = {"img", "meta", "source"}
OBJECTIVES = {"encoder": "MaskedLM", "decoder": "CausalLM"}
STEPS = 12


def records(shift: float) -> list[dict[str, Any]]:
    """Return metrics of twelve reports in two phases, with a held-out loss every third."""
    lines: list[dict[str, Any]] = []
    for step in range(1, STEPS + 1):
        where = {
            "step": step,
            "phase": "short" if step <= 8 else "long",
            "tokens": step * 1000,
        }
        loss = 9.0 - 0.2 * step + shift
        lines.append({"kind": "train", **where, "loss": loss, "lr": 1e-3 / step, "seconds": 0.5})
        if step % 3 == 0:
            held_out = {"heldout_loss": loss + 0.1, "heldout_standard_error": 0.0321}
            lines.append({"kind": "validation", **where, **held_out, "scored_tokens": 777})
    return lines


def accuracy(right: int) -> Accuracy:
    return Accuracy(correct=np.arange(1000) < right)


@pytest.fixture
def comparison(tiny_corpus: TinyCorpus, tmp_path: Path) -> Comparison:
    twins = {}
    for shift, (name, objective) in enumerate(OBJECTIVES.items()):
        sections = {"objective": objective, "run_dir": "run"}
        config = load_config(tiny_corpus.write_config(tmp_path / f"{name}.yaml", **sections))
        lines = records(shift / 10)
        state = RunState(
            g=300, step=STEPS, consumed_tokens=12_345, phase="long", token_digest=(0xABC, 0xDEF)
        )
        run = Run(
            config=config,
            model=SavedModel.of_run(config, state),
            state=state,
            training=[line for line in lines if line["kind"] == "train"],
            validation=[line for line in lines if line["kind"] == "validation"],
        )
        twins[name] = Twin(
            run=run,
            unigram=HeldOutLoss(loss=7.0 + shift / 4, standard_error=0.0123, scored_tokens=777),
            probe=accuracy(711 + shift),
            untrained_probe=accuracy(633 + shift),
            samples=[Sample(given=f"{name} <given>", answer=f"{name} & answer")],
        )
    return Comparison(
        **twins, words=accuracy(820), majority=accuracy(505), versions={"torch": "9.8.7"}
    )


def with_other_digest(comparison: Comparison) -> Comparison:
    run = comparison.decoder.run
    state = replace(run.state, token_digest=(1, 2))
    return replace(comparison, decoder=replace(comparison.decoder, run=replace(run, state=state)))


class Page(HTMLParser):
    """Collects text and addresses; fails on tags that do not nest."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.addresses: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [v or "" for k, v in attrs if k in {"href", "src", "srcset"}]
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


NUMBERS = (
    *("12,345", "6", "2,058"),  # tokens, seconds, tokens a second
    *("8.800", "8.900", "6.600", "6.700"),  # first and last training loss
    *("6.700 ± 0.032", "6.800 ± 0.032", "7.000 ± 0.012", "7.250 ± 0.012"),
    *("0.711 ± 0.014", "0.712 ± 0.014", "0.633 ± 0.015", "0.634 ± 0.015"),
    *("+0.078 ± 0.008", "0.820 ± 0.012", "0.505 ± 0.016"),
)


def test_text_has_every_number(comparison: Comparison) -> None:
    text = table.as_text(comparison)
    assert [number for number in NUMBERS if number not in text] == []
    assert "not comparable with each other" in text
    assert "nothing is claimed" in text
    digest = "0000000000000def0000000000000abc"
    assert text.count(digest) == 2
    assert "consumed: equal" in text
    assert "consumed: DIFFERENT" in table.as_text(with_other_digest(comparison))


def test_columns_are_aligned(comparison: Comparison) -> None:
    heading, *lines = table.as_text(comparison).splitlines()[: len(table.rows(comparison)) + 1]
    for twin in OBJECTIVES:
        start = heading.index(twin)
        assert all(line[start - 1] == " " and line[start] != " " for line in lines)


def test_page_has_every_number_and_needs_nothing(comparison: Comparison) -> None:
    source = page(comparison)
    parsed = Page(source)
    assert parsed.open == []
    assert [number for number in NUMBERS if number not in parsed.text] == []
    assert "decoder <given>" in parsed.text
    assert "encoder & answer" in parsed.text
    assert "torch 9.8.7" in parsed.text
    assert "equal" in parsed.text
    assert "DIFFERENT" in Page(page(with_other_digest(comparison))).text
    assert len(parsed.addresses) == 2
    assert all(address.startswith("data:image/svg+xml;base64,") for address in parsed.addresses)
    assert not re.search(r"https?:|url\(|@import|<script", source)
    assert "prefers-color-scheme: dark" in source


def test_figure(comparison: Comparison) -> None:
    image = figure.png(comparison)
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", image[16:24]) == (1440, 960)
    assert len(image) > 20_000  # a blank one has fewer than 10,000 bytes


@pytest.mark.parametrize("theme", [figure.LIGHT, figure.DARK])
def test_drawing_is_reproducible_and_themed(comparison: Comparison, theme: figure.Theme) -> None:
    drawn = figure.svg(comparison, theme)
    assert drawn == figure.svg(comparison, theme)
    ET.fromstring(drawn)
    for colour in (theme.background, theme.text, *theme.twins.values()):
        assert colour in drawn.decode()


def test_files(comparison: Comparison, tmp_path: Path) -> None:
    output = tmp_path / "made" / "report"
    write_report(comparison, output)
    names = {path.name for path in output.iterdir()}
    assert names == {"report.html", "report.png", "summary.json"}
    summary = json.loads((output / "summary.json").read_text())
    assert summary == {
        "encoder": {
            "first_loss": pytest.approx(8.8),
            "last_loss": pytest.approx(6.6),
            "heldout_loss": pytest.approx(6.7),
            "unigram_loss": 7.0,
            "probe_accuracy": 0.711,
            "untrained_probe_accuracy": 0.633,
            "token_digest": "0000000000000def0000000000000abc",
            "tokens": 12_345,
            "seconds": 6.0,
            "tokens_per_s": 2057.5,
        },
        "decoder": summary["decoder"],
        "majority_accuracy": 0.505,
        "versions": {"torch": "9.8.7"},
    }
    assert summary["decoder"].keys() == summary["encoder"].keys()
    assert summary["decoder"]["unigram_loss"] == 7.25


def write_run(folder: Path, config: RunConfig, lines: list[dict[str, Any]], g: int) -> None:
    """Write what a run leaves, without weights."""
    state = RunState(g=g, step=STEPS, phase="long")
    saved = checkpoint.folder_of(folder, STEPS)
    saved.mkdir(parents=True)
    model = SavedModel.of_run(config, state)
    for name, text in (
        ("state.json", json.dumps({"versions": {}, **vars(state)})),
        ("model.json", json.dumps({**vars(model), "model": vars(model.model)})),
        ("config.yaml", to_yaml(config)),
    ):
        (saved / name).write_text(text)
    phases = [{"name": "short", "num_rows": 200}, {"name": "long", "num_rows": 100}]
    (folder / "order.json").write_text(json.dumps({"phases": phases}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_run_is_read(comparison: Comparison, tmp_path: Path) -> None:
    config = comparison.decoder.run.config
    write_run(tmp_path / "run", config, records(0.0), 300)
    run = read_run(tmp_path / "run", "causal")
    assert (len(run.training), len(run.validation), run.seconds) == (STEPS, 4, 6.0)
    assert run.held_out.loss == pytest.approx(6.7)
    assert run.config == config


@pytest.mark.parametrize(
    ("lines", "g", "attention", "message"),
    [
        (records(0.0), 299, "causal", "run: not finished: 299 of 300 rows; resume it"),
        (records(0.0)[:2], 300, "causal", "run: reports no held-out loss"),
        (records(0.0), 300, "bidirectional", "run: the attention is causal, expected bidirect"),
    ],
)
def test_bad_run_is_refused(
    comparison: Comparison, tmp_path: Path, lines: Any, g: int, attention: Any, message: str
) -> None:
    write_run(tmp_path / "run", comparison.decoder.run.config, lines, g)
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path / "run", attention)


def test_tool_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "probe.jsonl").write_text(
        "".join(f'{{"text": "film {n}", "label": "{"ab"[n % 2]}"}}\n' for n in range(20))
    )
    folders = [str(tmp_path / "none"), str(tmp_path / "none")]
    arguments = ["--encoder", *folders, "--decoder", *folders]
    arguments += ["--probe", str(tmp_path / "probe.jsonl"), "--output", str(tmp_path / "report")]
    with pytest.raises(SystemExit, match=r"error: .*none: no checkpoint of a run here"):
        tool.main(arguments)
    assert not (tmp_path / "report").exists()
