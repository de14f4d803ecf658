"""Training on corpora of many shards: the losses of the one pair, and shards that come later."""

from pathlib import Path
from typing import Any

import pytest

from megatron_ettin.checkpoint_files import CheckpointError
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.queries.verify import verify
from tests.conftest import TinyCorpus
from tests.shards import cut_into_shards
from tests.training import RESUME, train_here

PHASES: list[dict[str, Any]] = [
    {"name": "short", "train_tokens": 8_000, "seq_length": 128, "global_batch_size": 16},
    {"name": "long", "train_tokens": 5_000, "seq_length": 256, "global_batch_size": 8},
]


def write_config(
    corpus: TinyCorpus, path: Path, alpha: str | list[str], phases: int, **data: Any
) -> str:
    sources = {"alpha": {"prefix": alpha}}
    blend = {phase["name"]: {"alpha": 1.0} for phase in PHASES}
    sections = {
        "phases": PHASES[:phases],
        "data": {**corpus.data, "sources": sources, "blend": blend, "pools": {}, **data},
    }
    return f"--config={corpus.write_config(path, objective='MaskedLM', **sections)}"


@pytest.mark.slow
def test_shards_give_the_losses_of_the_pair(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    shards = cut_into_shards(tiny_corpus.folder / "alpha", tmp_path / "alpha", [50, 50, 333])
    held_out = cut_into_shards(tiny_corpus.folder / "held_out", tmp_path / "held_out", [20])
    pair = write_config(tiny_corpus, tmp_path / "a.yaml", str(tiny_corpus.folder / "alpha"), 1)
    several = write_config(tiny_corpus, tmp_path / "b.yaml", shards, 1, validation=[held_out])
    curves = [
        train_here([config], tmp_path / name) for name, config in (("a", pair), ("b", several))
    ]
    assert curves[0].losses
    for field in ("losses", "heldout_losses", "token_digest"):
        assert getattr(curves[0], field) == getattr(curves[1], field)
    assert verify(tmp_path / "b", files=True).passed


@pytest.mark.slow
def test_a_run_is_extended_on_added_shards(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    folder = tmp_path / "alpha"
    cut_into_shards(tiny_corpus.folder / "alpha", folder, [300])
    for path in folder.glob("00001.*"):
        path.rename(tmp_path / path.name)
    config = write_config(tiny_corpus, tmp_path / "first.yaml", str(folder), 1)
    first = train_here([config], tmp_path / "run")
    recorded = RunFolder(tmp_path / "run").read_order()
    for path in tmp_path.glob("00001.*"):
        path.rename(folder / path.name)

    again = train_here([config, RESUME], tmp_path / "run")
    assert again == first, "the run has ended, and new shards are no part of it"
    assert RunFolder(tmp_path / "run").read_order() == recorded

    pools = {"long": [0.6, 1.0]}
    longer = write_config(tiny_corpus, tmp_path / "then.yaml", str(folder), 2, pools=pools)
    with pytest.raises(CheckpointError, match="amend_order"):
        train_here([longer, RESUME], tmp_path / "run")
    curve = train_here([longer, RESUME, "--checkpoint.amend_order=true"], tmp_path / "run")
    assert curve.losses[: len(first.losses)] == first.losses
    assert len(curve.losses) > len(first.losses)
    order = RunFolder(tmp_path / "run").read_order()
    assert order.phases[0] == recorded.phases[0]
    (pool,) = order.phases[1].pools
    assert (pool.documents_in_file, pool.first_document, pool.end_document) == (500, 300, 500)
    found = verify(tmp_path / "run", files=True)
    assert found.passed, (found.faults, found.changes)
