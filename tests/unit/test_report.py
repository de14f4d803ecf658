"""The report of any runs: every number is in it, and it needs nothing from elsewhere."""

import json
import re
import warnings
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ettin import checkpoint, distributed
from megatron_ettin.checkpoint import RunState
from megatron_ettin.config import FIRST_ROTARY_BASES, RunConfig, with_rotary_bases
from megatron_ettin.data.orders import open_order
from megatron_ettin.data.tokenize import load_tokenizer
from megatron_ettin.evaluation import table
from megatron_ettin.evaluation.comparison import Comparison, ProbeDocuments, Questions, compare
from megatron_ettin.evaluation.config_differences import config_differences
from megatron_ettin.evaluation.probe import Accuracy
from megatron_ettin.evaluation.report import page, write_report
from megatron_ettin.evaluation.reported_run import Measured, ReportedRun, read_run
from megatron_ettin.evaluation.run_curves import RunCurves
from megatron_ettin.evaluation.samples import Sample, visible
from megatron_ettin.evaluation.trained_on import trained_on
from megatron_ettin.model.counts import parameters
from megatron_ettin.model.provider import build_model
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.training.validation import HeldOutLoss
from tests.conftest import TinyCorpus
from tests.runs import add_provenance, record_run, tiny_config
from tests.unit.queried import Queried
from tools import report as tool

VOID_TAGS = {"img", "meta", "source"}
OBJECTIVES = {"masked": "MaskedLM", "causal": "CausalLM"}
STEPS = 12
DIGEST = "0000000000000def0000000000000abc"


def records(shift: float, num_rows: int = 300) -> list[dict[str, Any]]:
    """Return metrics of twelve reports in two phases, with a held-out loss every third."""
    lines: list[dict[str, Any]] = []
    for step in range(1, STEPS + 1):
        where = {"step": step, "phase": "short" if step <= 8 else "long", "tokens": step * 1000}
        loss = 9.0 - 0.2 * step + shift
        state = {"g": num_rows * step // STEPS, "token_digest": DIGEST}
        lines.append(
            {"kind": "train", **where, **state, "loss": loss, "lr": 1e-3 / step, "seconds": 0.5,
             "tokens_per_second": 2000.0}
        )  # fmt: skip
        if step % 3 == 0:
            held_out = {"heldout_loss": loss + 0.1, "heldout_standard_error": 0.0321}
            lines.append({"kind": "validation", **where, **held_out, "scored_tokens": 777})
    return lines


def accuracy(right: int) -> Accuracy:
    return Accuracy(correct=np.arange(1000) < right)


def made_run(name: str, config: RunConfig, shift: int) -> ReportedRun:
    """Return a run with a probe and a sample."""
    lines = records(shift / 10)
    curves = RunCurves(
        name=name,
        training=[line for line in lines if line["kind"] == "train"],
        validation=[line for line in lines if line["kind"] == "validation"],
        marks=[],
        unigram=7.0 + shift / 4,
    )
    return ReportedRun(
        folder=Path(config.run_dir),
        config=config,
        curves=curves,
        num_rows=300,
        unigram=HeldOutLoss(loss=7.0 + shift / 4, standard_error=0.0123, scored_tokens=777),
        measured=Measured(
            step=STEPS,
            probe=accuracy(711 + shift),
            untrained_probe=accuracy(633 + shift),
            samples=(Sample(given=f"{name} <given>", answer=f"{name} & answer"),),
        ),
    )


@pytest.fixture
def comparison(tiny_corpus: TinyCorpus, tmp_path: Path) -> Comparison:
    configs = {
        name: tiny_config(tiny_corpus, tmp_path / name, objective=objective)
        for name, objective in OBJECTIVES.items()
    }
    return Comparison(
        runs=[made_run(name, config, n) for n, (name, config) in enumerate(configs.items())],
        differences=config_differences(list(configs.values())),
        probe=ProbeDocuments(
            num_documents=2010,
            seen={"masked": 10, "causal": 4},
            left_out=10,
            unknown=["causal: alpha"],
            words=accuracy(820),
            majority=accuracy(505),
        ),
        versions={"torch": "9.8.7"},
    )


def with_other_digest(comparison: Comparison) -> Comparison:
    first, second = comparison.runs
    training = [{**line, "token_digest": "1" * 32} for line in second.curves.training]
    second = replace(second, curves=replace(second.curves, training=training))
    return replace(comparison, runs=[first, second])


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
    *("12,000", "6", "2,000"),  # tokens, seconds, tokens a second
    *("8.800", "8.900", "6.600", "6.700"),  # first and last training loss
    *("6.700 ± 0.032", "6.800 ± 0.032", "7.000 ± 0.012", "7.250 ± 0.012"),
    *("0.711 ± 0.014", "0.712 ± 0.014", "0.633 ± 0.015", "0.634 ± 0.015"),
    *("+0.078 ± 0.008", "0.820 ± 0.012", "0.505 ± 0.016"),
    *("10 of 2,010", "4 of 2,010"),  # documents trained on
)


def test_text_has_every_number(comparison: Comparison) -> None:
    text = table.as_text(comparison)
    assert [number for number in NUMBERS if number not in text] == []
    assert f"{parameters(comparison.runs[0].config.model).total:,}" in text
    assert "not comparable with each other" in text
    assert "10 documents of the probe are left out for all runs" in text
    assert "record of preprocessing: causal: alpha" in text
    assert text.count(DIGEST) == 2
    assert "consumed: equal" in text
    assert "consumed: different" in table.as_text(with_other_digest(comparison))
    assert not re.search("film|movie|review|twin", text)


def test_losses_that_measure_the_text_are_named(
    comparison: Comparison, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    """A decoder's loss and a diffusion model's bound, also where only the last phase is of it."""
    detour = {
        "class_path": "ByPhase",
        "init_args": {"objective": "MaskedDiffusion", "by_phase": {"other": "MaskedLM"}},
    }
    runs = list(comparison.runs)
    for name, objective in (("diffusion", "MaskedDiffusion"), ("detour", detour)):
        config = tiny_config(tiny_corpus, tmp_path / name, objective=objective)
        runs.append(made_run(name, config, 0))
    several = replace(comparison, runs=runs, probe=None, differences=[])
    text = " ".join(table.as_text(several).split())
    assert "losses of causal, diffusion, detour measure one quantity" in text
    assert "that of masked is with no other's" in text
    assert "ByPhase, last MaskedDiffusion" in text
    alike = table.as_text(replace(several, runs=runs[1:]))
    assert "not comparable" not in alike


def test_columns_are_aligned(comparison: Comparison) -> None:
    heading, *lines = table.as_text(comparison).splitlines()[: len(table.rows(comparison)) + 1]
    for name in OBJECTIVES:
        start = heading.index(name)
        assert all(line[start - 1] == " " and line[start] != " " for line in lines)


def test_page_has_every_number_and_needs_nothing(comparison: Comparison) -> None:
    source = page(comparison)
    parsed = Page(source)
    assert parsed.open == []
    assert [number for number in NUMBERS if number not in parsed.text] == []
    for text in ("causal <given>", "masked & answer", "torch 9.8.7", "equal", "masked fills masks",
                 "causal continues, step 12"):  # fmt: skip
        assert text in parsed.text
    assert "different" in Page(page(with_other_digest(comparison))).text
    assert not re.search("film|movie|review|twin", parsed.text)
    assert len(parsed.addresses) == 2
    assert all(address.startswith("data:image/svg+xml;base64,") for address in parsed.addresses)
    assert not re.search(r"https?:|url\(|@import|<script", source)
    assert "prefers-color-scheme: dark" in source


def test_one_run_has_a_report_of_its_own(comparison: Comparison) -> None:
    alone = replace(comparison, runs=[replace(comparison.runs[0], measured=None)], probe=None)
    text = table.as_text(replace(alone, differences=[]))
    assert "probe" not in text
    assert "differs" not in text
    assert "not comparable" not in text
    assert f"digest of the tokens consumed\n  masked {DIGEST}" in text
    assert Page(page(alone)).open == []


def test_an_unfinished_run_says_how_far_it_is(comparison: Comparison) -> None:
    run = replace(comparison.runs[0], num_rows=1200)
    assert "12,000 (25% of the rows)" in table.as_text(
        replace(comparison, runs=[run], differences=[])
    )


def test_configurations_are_compared_key_by_key(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    first = tiny_config(tiny_corpus, tmp_path / "a")
    assert config_differences([first, replace(first, run_dir="b")]) == []
    second = replace(
        tiny_config(tiny_corpus, tmp_path / "b", objective="CausalLM"),
        optimizer=replace(first.optimizer, lr=0.004),
        phases=(replace(first.phases[0], train_tokens=77), replace(first.phases[1], name="else")),
        data=replace(first.data, blend={**first.data.blend, "else": {"alpha": 1.0}}),
    )
    found = {each.key: each.values for each in config_differences([first, second, first])}
    short, long = first.phases
    assert found.pop("optimizer.lr") == (str(first.optimizer.lr), "0.004", str(first.optimizer.lr))
    assert found.pop("objective") == ("MaskedLM", "CausalLM", "MaskedLM")
    tokens = str(short.train_tokens)
    assert found.pop(f"phases.{short.name}.train_tokens") == (tokens, "77", tokens)
    assert found.pop("phases.else.seq_length") == ("-", str(long.seq_length), "-")
    assert found.pop("data.blend.else.alpha") == ("-", "1.0", "-")
    others = ("objective.", f"phases.{long.name}.", "phases.else.")
    assert [key for key in found if not key.startswith(others)] == []


def test_files(comparison: Comparison, tmp_path: Path) -> None:
    output = tmp_path / "made" / "report"
    write_report(comparison, output)
    names = {path.name for path in output.iterdir()}
    assert names == {"report.html", "report.png", "summary.json"}
    assert (output / "report.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    summary = json.loads((output / "summary.json").read_text())
    assert summary["runs"]["masked"] == {
        "first_loss": pytest.approx(8.8),
        "last_loss": pytest.approx(6.6),
        "heldout_loss": pytest.approx(6.7),
        "unigram_loss": 7.0,
        "probe_accuracy": 0.711,
        "untrained_probe_accuracy": 0.633,
        "token_digest": DIGEST,
        "tokens": 12_000,
        "rows": 300,
        "rows_of_run": 300,
        "seconds": 6.0,
        "tokens_per_s": 2000.0,
    }
    assert summary["runs"]["causal"]["unigram_loss"] == 7.25
    assert summary["differences"]["objective"] == OBJECTIVES
    assert summary["probe"]["trained_on"] == {"masked": 10, "causal": 4}
    assert summary["probe"]["majority_accuracy"] == 0.505


def with_metrics(run_dir: Path, num_rows: int) -> Path:
    """Write metrics as training leaves them into a run's folder; return it."""
    lines = "".join(json.dumps(line) + "\n" for line in records(0.0, num_rows))
    (run_dir / "metrics.jsonl").write_text(lines)
    return run_dir


def save(config: RunConfig, run_dir: Path) -> None:
    """Write a checkpoint of initial weights into a run's folder."""
    phases = with_rotary_bases(config.phases, FIRST_ROTARY_BASES, {})
    config = replace(config, phases=phases)  # as in the config.yaml of a run
    order = open_order(config)
    state = RunState(
        g=order.num_rows, step=STEPS, phase="long", tokenizer_sha256=order.spec.tokenizer_sha256
    )
    with distributed.process_groups(config.hardware):
        attention = config.objective.attention
        stage = build_model(config.model, attention, config.hardware, config.seeds)
        saved = RunFolder(run_dir).checkpoint(STEPS)
        files = checkpoint.write(saved, stage, None, config=config, state=state)
        checkpoint.publish(saved, files, state)


def test_run_is_read(queried: Queried, tmp_path: Path) -> None:
    """Nothing but the folder is needed; the unigram loss needs the corpora too."""
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("config.yaml", "order.json"):
        (copy / name).write_text((queried.folder / name).read_text())
    run = read_run("copy", with_metrics(copy, num_rows=77))
    assert (run.name, run.last["g"], run.curves.seconds) == ("copy", 77, 6.0)
    assert run.num_rows == queried.run.order.num_rows
    assert run.held_out is not None
    assert run.held_out.loss == pytest.approx(6.7)
    assert run.config == queried.run.config


def test_documents_that_were_trained_on_are_told(queried: Queried) -> None:
    """Document 4 is a copy of document 3, and `beta` has no record."""
    seen = {p.document for p in queried.before(queried.done) if p.source == "alpha"}
    answer = trained_on(queried.folder, [f"alpha {n}" for n in range(510)])
    expected = [n in seen or (n == 3 and 4 in seen) for n in range(510)]
    expected[4] = False  # no document has this text
    assert answer.is_seen.tolist() == expected
    assert 0 < sum(expected) < 499
    assert answer.unknown == ["beta"]


def test_what_was_trained_on_is_left_out(
    tiny_corpus: TinyCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tiny_corpus.copy_to(tmp_path / "corpus")
    for source in ("alpha", "beta"):
        add_provenance(corpus.folder / source, load_tokenizer(corpus.folder / "tokenizer").digest)
    config = tiny_config(corpus, tmp_path / "run")
    run_dir = with_metrics(record_run(config, steps=2), open_order(config).num_rows)
    save(config, run_dir)
    texts = [*(f"alpha {n}" for n in range(0, 500, 3)), *(f"unseen {n}" for n in range(40))]
    probe = tmp_path / "probe.jsonl"
    probe.write_text(
        "".join(json.dumps({"text": t, "label": "ab"[n % 2]}) + "\n" for n, t in enumerate(texts))
    )
    left_out = int(trained_on(run_dir, texts).is_seen.sum())
    assert 0 < left_out < 167
    found = compare({"run": run_dir}, Questions(probe=probe, masked_texts=["alpha [MASK] beta"]))
    assert found.probe is not None
    assert (found.probe.left_out, found.probe.seen, found.probe.unknown) == (
        left_out, {"run": left_out}, []
    )  # fmt: skip
    (run,) = found.runs
    assert run.measured is not None
    assert run.measured.probe is not None
    kept = len(run.measured.probe.correct)
    assert 0 < kept < len(texts) - left_out
    assert [sample.given for sample in run.measured.samples] == ["alpha [MASK] beta"]
    tool.main([f"--run=run={run_dir}", f"--output={tmp_path / 'report'}", "--prompt=unused"])
    assert "fills masks" not in (tmp_path / "report" / "report.html").read_text()
    assert "probe" not in capsys.readouterr().out


def test_what_cannot_be_seen_is_visible() -> None:
    assert visible(" the") == "the"
    assert visible("\n") == r"\n"
    assert visible("a\n\tb \x1b") == r"a\n\tb \x1b"
    assert visible("  ") == "␣␣"
    assert visible("") == ""


def test_tool_says_what_is_wrong(queried: Queried, tmp_path: Path) -> None:
    output = ["--output", str(tmp_path / "report")]
    with pytest.raises(SystemExit, match=r"error: .*none.metrics\.jsonl: no such file"):
        tool.main(["--run", str(tmp_path / "none"), *output])
    with pytest.raises(SystemExit, match=r"has 2 of .*; it needs exactly one"):
        tool.main(["--run", str(queried.folder), "--masked-text", "[MASK] [MASK]", *output])
    assert not (tmp_path / "report").exists()


def test_warnings_of_megatron_core_are_not_printed(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        with pytest.raises(SystemExit, match="error: "):
            tool.main(["--run", str(tmp_path / "none"), "--output", str(tmp_path / "report")])
        warnings.warn_explicit("no apex", UserWarning, "optimizer.py", 1, "megatron.core.optimizer")
        with pytest.raises(UserWarning, match="ours"):
            warnings.warn_explicit("ours", UserWarning, "report.py", 1, "megatron_ettin.report")


def test_weights_are_needed_for_samples(queried: Queried, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("config.yaml", "order.json"):
        (copy / name).write_text((queried.folder / name).read_text())
    with_metrics(copy, num_rows=77)
    with pytest.raises(ValueError, match="run: no checkpoint, and a probe or texts need weights"):
        compare({"run": copy}, Questions(masked_texts=["a [MASK]"]))
