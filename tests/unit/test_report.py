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

from megatron_ettin import checkpoint, distributed
from megatron_ettin.checkpoint import RunState, SavedModel
from megatron_ettin.config import (
    FIRST_ROTARY_BASES,
    RunConfig,
    SeedConfig,
    load_config,
    with_rotary_bases,
)
from megatron_ettin.data.orders import open_order
from megatron_ettin.evaluation import figure, table
from megatron_ettin.evaluation.probe import Accuracy
from megatron_ettin.evaluation.report import page, write_report
from megatron_ettin.evaluation.samples import Sample
from megatron_ettin.evaluation.theme import DARK, LIGHT, Theme
from megatron_ettin.evaluation.twins import (
    Comparison,
    Run,
    Twin,
    check_exported,
    read_run,
)
from megatron_ettin.model.provider import build_model
from megatron_ettin.order.run_folder import RunFolder
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
        phases = with_rotary_bases(config.phases, FIRST_ROTARY_BASES, {})
        config = replace(config, phases=phases)  # as in the config.yaml of a run
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


def test_page_says_what_differs(comparison: Comparison) -> None:
    assert "between the two runs: objective." in page(comparison)
    run = comparison.decoder.run
    config = replace(run.config, seeds=SeedConfig(mask=5), run_dir="elsewhere")
    decoder = replace(comparison.decoder, run=replace(run, config=config))
    text = page(replace(comparison, decoder=decoder))
    assert "between the two runs: objective, seeds." in text


def test_figure(comparison: Comparison) -> None:
    image = figure.png(comparison)
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", image[16:24]) == (1440, 960)
    assert len(image) > 20_000  # a blank one has fewer than 10,000 bytes


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_drawing_is_reproducible_and_themed(comparison: Comparison, theme: Theme) -> None:
    drawn = figure.svg(comparison, theme)
    assert drawn == figure.svg(comparison, theme)
    ET.fromstring(drawn)
    for colour in (theme.background, theme.text, *theme.series[:2]):
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


def write_run(
    folder: Path, config: RunConfig, lines: list[dict[str, Any]], rows_missing: int = 0
) -> int:
    """Write what a run leaves, and return the rows of its order."""
    order = open_order(config)
    state = RunState(g=order.spec.num_rows - rows_missing, step=STEPS, phase="long")
    with distributed.process_groups(config.hardware):
        attention = config.objective.attention
        stage = build_model(config.model, attention, config.hardware, config.seeds)
        saved = RunFolder(folder).checkpoint(STEPS)
        files = checkpoint.write(saved, stage, None, config=config, state=state)
        checkpoint.publish(saved, files, state)
    (folder / "order.json").write_text(order.spec.to_json())
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return order.spec.num_rows


def test_run_is_read(comparison: Comparison, tmp_path: Path) -> None:
    config = comparison.decoder.run.config
    rows = write_run(tmp_path / "run", config, records(0.0))
    run = read_run(tmp_path / "run", "causal")
    assert (len(run.training), len(run.validation), run.seconds) == (STEPS, 4, 6.0)
    assert run.held_out.loss == pytest.approx(6.7)
    assert (run.config, run.state.g) == (config, rows)


def test_unfinished_run_is_refused(comparison: Comparison, tmp_path: Path) -> None:
    rows = write_run(tmp_path / "run", comparison.decoder.run.config, records(0.0), rows_missing=1)
    with pytest.raises(ValueError, match=f"run: not finished: {rows - 1} of {rows} rows; resume"):
        read_run(tmp_path / "run", "causal")


def test_run_without_held_out_loss_is_refused(comparison: Comparison, tmp_path: Path) -> None:
    write_run(tmp_path / "run", comparison.decoder.run.config, records(0.0)[:2])
    with pytest.raises(ValueError, match="run: reports no held-out loss"):
        read_run(tmp_path / "run", "causal")


def test_run_of_the_other_kind_is_refused(comparison: Comparison, tmp_path: Path) -> None:
    write_run(tmp_path / "run", comparison.decoder.run.config, records(0.0))
    with pytest.raises(ValueError, match="run: the attention is causal, expected bidirectional"):
        read_run(tmp_path / "run", "bidirectional")


def test_damaged_metrics_are_located(comparison: Comparison, tmp_path: Path) -> None:
    write_run(tmp_path / "run", comparison.decoder.run.config, records(0.0))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:17: not JSON"):
        read_run(tmp_path / "run", "causal")


def test_model_of_the_other_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json is missing; write it with tools/convert"):
        check_exported(tmp_path, "causal")
    (tmp_path / "config.json").write_text('{"model_type": "modernbert"}')
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
        check_exported(tmp_path, "causal")
    (tmp_path / "tokenizer.json").write_text("{}")
    check_exported(tmp_path, "bidirectional")
    with pytest.raises(ValueError, match="'modernbert', expected 'modernbert-decoder'"):
        check_exported(tmp_path, "causal")


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
