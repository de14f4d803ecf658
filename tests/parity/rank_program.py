"""What one of four ranks of the parity tests runs: the same checkpoints in two layouts.

Arguments: OUTPUT PORT CHECKPOINT... TP=2 x PP=2 ranks save each checkpoint again as
OUTPUT/tp2pp2/<its name>. Then the first two of them, meeting at PORT, save it as OUTPUT/tp2/<its
name> and write its logits to OUTPUT/tp2/<its name>.pt. One start for both, because a rank's imports
take longer than its work.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_ettin import checkpoint, distributed
from megatron_ettin.config import HardwareConfig
from tests.parity.references import Packed, load_stage, stage_logits


def main() -> None:
    output, port = Path(sys.argv[1]), sys.argv[2]
    folders = [Path(argument) for argument in sys.argv[3:]]
    hardware = HardwareConfig(tensor_parallel_size=2, pipeline_parallel_size=2)
    with distributed.process_groups(hardware):
        for _ in save_again(folders, output / "tp2pp2", hardware):
            pass
    if int(os.environ["RANK"]) >= 2:
        return
    os.environ |= {"WORLD_SIZE": "2", "MASTER_PORT": port}
    hardware = HardwareConfig(tensor_parallel_size=2)
    with distributed.process_groups(hardware):
        for name, stage in save_again(folders, output / "tp2", hardware):
            logits = stage_logits(stage, Packed.random(stage.model_config.vocab_size))
            if distributed.is_main_rank():
                torch.save(logits, output / "tp2" / f"{name}.pt")


def save_again(
    folders: list[Path], output: Path, hardware: HardwareConfig
) -> Iterator[tuple[str, Any]]:
    """Load each checkpoint in this layout, save it, and yield its name and this rank's stage."""
    for folder in folders:
        stage = load_stage(folder, hardware)
        checkpoint.save_weights(
            output / folder.name,
            stage,
            saved=checkpoint.read_model(folder),
            config_yaml=(folder / checkpoint.CONFIG_FILE).read_text(),
            tokenizer_sha256="",
        )
        yield folder.name, stage


if __name__ == "__main__":
    main()
