"""Dataset card of an export: its origin, its columns, and how to check it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ettin import __version__
from megatron_ettin.order import NotRecordedError
from megatron_ettin.queries.recorded_run import RecordedRun


@dataclass(frozen=True, kw_only=True)
class ExportedFolder:
    """Folder of an export: the rows between a checkpoint and the one before it."""

    folder: str
    checkpoint: str
    first_step: int
    last_step: int
    rows: int
    tokens: int
    files: int
    files_kept: int
    """Files among them that an earlier call wrote."""


_HEADER = """\
---
pretty_name: Training data order
tags:
- training-data-order
configs:
- config_name: default
  data_files: "*/steps_*.parquet"
---

# What a model was trained on, in order

One folder for each checkpoint: the rows between it and the checkpoint before. Files hold at most
100 steps; a row of a file is a row of a batch, in the order of `step`, then `slot`.

| column | meaning |
|---|---|
| step | optimizer step of the run, from 1; it does not begin anew in later phases |
| input_ids | token ids of the row, special tokens included, padding left out, before any masking |
| g | number of the row in the run |
| slot | number of the row in its step |
| source | corpus that the row was drawn from |
| epoch | how often the rows of the corpus had all been drawn before |
| documents | ordinals of the documents in the corpus, one for each piece of the row |
| offsets | first token of the document in each piece |
| lengths | tokens of the document in each piece, added special tokens not counted |
| positions | where each piece begins in `input_ids` |
| ids, urls | of the documents, if the corpora were made with a record of them |

Folders of phases whose names begin with `ext` or `decay` begin so too. The number counts the
checkpoints of the run.
"""

_DIFFERENCES = """
## What differs from the published Ettin order

That record is exact between checkpoints only: its steps are not the batches of the models. Here
each step is what the optimizer step was fed{exact}.
`input_ids` and `step` mean the same; all other columns, and the files' metadata, are additions.
`step` counts through all phases.
"""


def dataset_card(run: RecordedRun, folders: Sequence[ExportedFolder]) -> str:
    """Return the text of README.md."""
    lines = ["", "| folder | checkpoint | steps | rows | tokens |", "|---|---|---|---|---|"]
    for folder in folders:
        steps = f"{folder.first_step} to {folder.last_step}"
        lines.append(
            f"| {folder.folder} | {folder.checkpoint} | {steps} | {folder.rows} | {folder.tokens} |"
        )
    exact = ", as the run's ledger has recorded it" if len(run.ledger.records) else ""
    return _HEADER + "\n".join(lines) + "\n" + _DIFFERENCES.format(exact=exact) + _identity(run)


def _identity(run: RecordedRun) -> str:
    lines = ["", "## Identity", "", f"Written by megatron-ettin {__version__}."]
    try:
        spec = run.order.spec
        lines += ["", f"* order id: `{spec.order_id}`"]
        lines += [
            f"* phase {phase.name}: rows {phase.start_g} to {phase.end_g - 1}, {phase.seq_length} "
            f"slots each, pack {phase.pack}, id `{phase_id}`"
            for phase, phase_id in zip(spec.phases, spec.phase_ids(), strict=True)
        ]
    except NotRecordedError:
        lines += [
            "",
            "The order is that of a run of Megatron-LM, read from its index caches; a row",
        ]
        lines += ["holds the one token more that Megatron reads for the labels."]
    if not len(run.ledger.records):
        return "\n".join(lines) + "\n"
    head = run.ledger.head
    lines += [
        f"* head of the ledger's chain: `{head.chain}` (record {head.seq})",
        "",
        "The metadata of each file hold the sums of its steps' order and token digests "
        "(`megatron_ettin.order_digest`, `megatron_ettin.token_digest`). Before a file appeared, "
        "the token digest of its rows was compared with the run's ledger. To check the run itself: "
        "`python tools/order.py verify --run RUN_DIR --tokens`.",
    ]
    return "\n".join(lines) + "\n"
