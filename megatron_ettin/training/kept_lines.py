"""Lines of metrics.jsonl that a run keeps when it goes on from a checkpoint."""

from __future__ import annotations

import json

from megatron_ettin.checkpoint import RunState
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.publication import publish_bytes
from megatron_ettin.shards import describe_error
from megatron_ettin.training.console import Totals


def cut_metrics(folder: RunFolder, state: RunState) -> Totals:
    """Drop lines about steps or rows after `state`, and a torn one; return the others' totals.

    Raises:
        ValueError: a line is damaged; the message names it, and the file stays as it is.
    """
    totals = Totals()
    kept = []
    for number, line in enumerate(folder.metrics_lines(), start=1):
        try:
            report = json.loads(line)
            # Rows that were left out after a checkpoint belong to its step too.
            if report["step"] <= state.step and report.get("rows", [0])[-1] <= state.g:
                totals.add(report)
                kept.append(line)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{folder.metrics}:{number}: not what a run reports ({describe_error(error)}): "
                f"restore the line, or remove it"
            ) from error
    content = "".join(line + "\n" for line in kept).encode()
    # Not where nothing goes: two starts of a run that has ended may come here at the same time.
    if not folder.metrics.is_file() or folder.metrics.read_bytes() != content:
        publish_bytes(folder.metrics, content)
    return totals
