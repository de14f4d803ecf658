"""plan: what it reports against a slow count; plans built ahead of a run; the picture."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from megatron_ettin.config import RunConfig
from megatron_ettin.data.orders import open_order
from megatron_ettin.queries import plan_figure
from megatron_ettin.queries.plan import build_plans
from tests.conftest import TinyCorpus
from tests.runs import tiny_config

MIN_TOKENS = 12


def make_config(corpus: TinyCorpus, folder: Path, **data: Any) -> RunConfig:
    sources = {
        name: {**source, "min_doc_tokens": MIN_TOKENS}
        for name, source in corpus.data["sources"].items()
    }
    data = {**corpus.data, "sources": sources, "plan_dir": str(folder / "plans"), **data}
    phases = [
        {"name": "short", "train_tokens": 90_000, "seq_length": 128, "global_batch_size": 16},
        {"name": "long", "train_tokens": 9_000, "seq_length": 256, "global_batch_size": 8},
    ]
    return tiny_config(corpus, folder / "run", data=data, phases=phases)


def test_report_counts_what_is_there(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    config = make_config(tiny_corpus, tmp_path)
    answer = build_plans(config)
    order = open_order(config)
    assert (answer.order_id, answer.rows) == (order.spec.order_id, order.num_rows)
    assert [(pool.phase, pool.source) for pool in answer.pools] == [
        (phase, source) for phase in ("short", "long") for source in ("alpha", "beta")
    ]
    for report in answer.pools:
        index = 0 if report.phase == "short" else 1
        spec = order.spec.phases[index]
        (pool,) = [pool for pool in spec.pools if pool.source == report.source]
        corpus = order.corpus(report.source)
        lengths = corpus.read_lengths(pool.first_document, pool.end_document)
        kept = lengths[lengths >= MIN_TOKENS]
        body = spec.seq_length - 2
        pieces = -(-kept // body)
        assert report.kept == len(kept)
        assert report.dropped == (lengths < MIN_TOKENS).sum() > 0
        assert report.dropped_tokens == lengths[lengths < MIN_TOKENS].sum()
        assert report.cut == (pieces > 1).sum()
        assert report.tokens == kept.sum() + 2 * pieces.sum()
        assert report.tokens + report.padding == report.rows * report.seq_length
        assert report.fill == report.tokens / (report.rows * report.seq_length)
        columns = order.pieces(spec.start_g, spec.end_g)
        drawn = np.unique(columns.g[columns.source == order.source_names.index(report.source)])
        assert report.epochs == len(drawn) / report.rows
    files = [path for path in (tmp_path / "plans").iterdir() if path.suffix == ".plan"]
    assert len(files) == 4
    assert answer.plan_bytes == sum(path.stat().st_size for path in files)
    exact = int(order.row_tokens(0, order.num_rows).sum())
    assert answer.tokens == pytest.approx(exact, rel=0.01)


def test_epochs_go_on_from_phase_to_phase(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    phases = [
        {"name": name, "train_tokens": 30_000, "seq_length": 128, "global_batch_size": 16}
        for name in ("short", "long")
    ]
    data = {**tiny_corpus.data, "pools": {}, "plan_dir": str(tmp_path / "plans")}
    config = tiny_config(tiny_corpus, tmp_path / "run", phases=phases, data=data)
    answer = build_plans(config)
    order = open_order(config)
    for report, phase in zip(answer.pools, [0, 0, 1, 1], strict=True):
        columns = order.pieces(0, order.spec.phases[phase].end_g)
        drawn = np.unique(columns.g[columns.source == order.source_names.index(report.source)])
        assert report.epochs == len(drawn) / report.rows
    files = [path for path in (tmp_path / "plans").iterdir() if path.suffix == ".plan"]
    assert len(files) == 2, "both phases share the plans"
    assert answer.plan_bytes == sum(path.stat().st_size for path in files)


def test_plans_are_built_once_and_ahead_of_the_run(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    config = make_config(tiny_corpus, tmp_path)
    build_plans(config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "plans").glob("*.plan")}
    build_plans(config)
    open_order(config)
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "plans").glob("*.plan")}
    assert before == after != {}


def test_table_in_place_of_a_plan_is_smaller(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    stored = build_plans(make_config(tiny_corpus, tmp_path))
    shutil.rmtree(tmp_path / "plans")
    config = make_config(tiny_corpus, tmp_path, plans="recomputed")
    recomputed = build_plans(config)
    assert 0 < recomputed.plan_bytes < stored.plan_bytes
    assert dataclasses.replace(recomputed, plan_bytes=stored.plan_bytes) == stored


def test_figure_counts_every_row_or_every_nth(
    tiny_corpus: TinyCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tiny_corpus, tmp_path)
    order = open_order(config)
    tokens, pieces, stride = plan_figure.sample_rows(order, 0)
    pools = order.spec.phases[0].pools
    assert stride == 1
    assert tokens.sum() == sum(pool.tokens for pool in pools)
    assert len(tokens) == len(pieces) == sum(pool.rows for pool in pools)
    monkeypatch.setattr(plan_figure, "MAX_ROWS", 100)
    monkeypatch.setattr(plan_figure, "CHUNK_ROWS", 7)
    some, some_pieces, stride = plan_figure.sample_rows(order, 0)
    assert 50 < len(some) <= 102
    first = pools[0].rows
    both = np.concatenate([tokens[:first:stride], tokens[first::stride]])
    assert some.tolist() == both.tolist()
    assert some_pieces.sum() == np.concatenate([pieces[:first:stride], pieces[first::stride]]).sum()
    assert f"every {stride}th of" in plan_figure.draw(order).axes[0].get_title(loc="left")


def test_figure_is_grey(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    answer = build_plans(make_config(tiny_corpus, tmp_path), figure=tmp_path / "rows.png")
    assert answer.figure == str(tmp_path / "rows.png")
    pixels = matplotlib.image.imread(tmp_path / "rows.png")[:, :, :3]
    assert pixels.shape[0] > 500
    assert np.ptp(pixels, axis=2).max() < 0.02
    assert np.ptp(pixels) > 0.9
