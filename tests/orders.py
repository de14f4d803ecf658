"""Sample orders over the tiny corpus, and loaders over them."""

from typing import Any

from megatron_ettin.config import DataConfig, PhaseConfig, SourceConfig
from megatron_ettin.data.loader import Loader
from megatron_ettin.data.tokenize import load_tokenizer
from megatron_ettin.objectives import Objective
from megatron_ettin.order import SampleOrder
from megatron_ettin.rows import TokenIds
from tests.conftest import TinyCorpus

BLEND = {"alpha": 0.7, "beta": 0.3}
FIRST = PhaseConfig(name="first", train_tokens=30_000, seq_length=128, global_batch_size=8)
SECOND = PhaseConfig(name="second", train_tokens=9_000, seq_length=256, global_batch_size=4)


def make_order(
    corpus: TinyCorpus,
    *phases: PhaseConfig,
    seed: int = 21,
    ids: TokenIds | None = None,
    **data: Any,
) -> SampleOrder:
    """Return an order of `phases` over the tiny corpus; `data` replaces fields of its section."""
    folder = corpus.folder
    tokenizer = load_tokenizer(folder / "tokenizer")
    settings: dict[str, Any] = {
        "tokenizer": str(folder / "tokenizer"),
        "sources": {name: SourceConfig(prefix=str(folder / name)) for name in BLEND},
        "blend": {phase.name: BLEND for phase in phases},
        "pools": {"second": (0.6, 1.0), "first": (0.0, 0.6)},
        **data,
    }
    return SampleOrder(
        phases=phases,
        data=DataConfig(**settings),
        seed=seed,
        tokenizer_sha256=tokenizer.digest,
        ids=ids or tokenizer.ids,
    )


def make_loader(
    order: SampleOrder,
    objective: Objective,
    *,
    micro_batch_tokens: int,
    rank: int = 0,
    ranks: int = 1,
) -> Loader:
    """Return the loader of a data-parallel rank."""
    return Loader(
        order=order,
        objective=objective,
        ids=order.ids,
        mask_seed=4,
        micro_batch_tokens=micro_batch_tokens,
        data_parallel_rank=rank,
        data_parallel_size=ranks,
    )
