"""Training in this process, as torchrun with one process would: its start costs ten seconds."""

from collections.abc import Sequence
from pathlib import Path

from megatron_ettin.config import parse_args
from megatron_ettin.evaluation.layouts import Curve, read_curve
from megatron_ettin.pretrain import pretrain


def train_here(arguments: Sequence[str], run_dir: Path) -> Curve:
    """Train with pretrain's `arguments`, a report a step, and read the curve."""
    pretrain(parse_args([*arguments, f"--run_dir={run_dir}", "--logging.log_every_steps=1"]))
    return read_curve(run_dir)
