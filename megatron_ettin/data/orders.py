"""The two orders of a run, made from its configuration: of training rows and of held-out rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megatron_ettin.config import PhaseConfig, RunConfig, SourceConfig
from megatron_ettin.data.tokenize import load_tokenizer
from megatron_ettin.order import OrderSpec, SampleOrder


def open_order(config: RunConfig, recorded: OrderSpec | None = None) -> SampleOrder:
    """Open the corpora and fix the order of the whole run.

    `recorded` is the order of a run that has begun: its phases draw no shard that came later.

    Raises:
        OSError: a corpus, a plan or the tokenizer cannot be read.
        ValueError: the tokenizer has more ids than the model, or the order cannot be made
            (`SampleOrder`).
    """
    tokenizer = load_tokenizer(Path(config.data.tokenizer))
    if tokenizer.ids.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"{config.data.tokenizer}: the tokenizer has {tokenizer.ids.vocab_size} ids but "
            f"model.vocab_size is {config.model.vocab_size}"
        )
    return SampleOrder(
        phases=config.phases,
        data=config.data,
        seed=config.seeds.order,
        tokenizer_sha256=tokenizer.digest,
        ids=tokenizer.ids,
        recorded=recorded,
    )


def open_held_out_order(config: RunConfig) -> SampleOrder:
    """Return the order of the held-out rows: `data.validation` in equal shares, as one phase."""
    settings = config.validation
    phase = PhaseConfig(
        name="validation",
        train_tokens=settings.num_rows * settings.seq_length,
        seq_length=settings.seq_length,
        global_batch_size=settings.num_rows,
    )
    # A source's name is a key of its permutation. Named by place in the list, held-out rows do
    # not depend on the folder of the files.
    sources = {
        f"validation_{place}": SourceConfig(prefix=prefix)
        for place, prefix in enumerate(config.data.validation)
    }
    data = dataclasses.replace(
        config.data,
        sources=sources,
        blend={phase.name: dict.fromkeys(sources, 1.0)},
        pools={},
        skip_rows=[],
    )
    return open_order(dataclasses.replace(config, phases=[phase], data=data))
