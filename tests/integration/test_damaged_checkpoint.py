"""A bit flipped in any file of a checkpoint: what is said where no digest is asked."""

import json
from pathlib import Path

import pytest

from megatron_ettin import checkpoint, distributed
from megatron_ettin.checkpoint_files import REMEDY, CheckpointError
from megatron_ettin.config import ConfigError, HardwareConfig, SeedConfig
from megatron_ettin.model.ettin_model import EttinModel
from megatron_ettin.model.provider import build_stage
from tests.parity.runs import make_run, save_run

#: Bits flipped in each file, one at a time: the first byte, the last one and evenly between.
PLACES = 12


def load(folder: Path, stage: EttinModel) -> ValueError | None:
    """Load a checkpoint; return the error that refuses it, if one does."""
    try:
        checkpoint.read_config(folder)
        checkpoint.load(folder, stage, None, stage.model_config)
    except (ConfigError, CheckpointError) as error:
        return error
    return None


@pytest.mark.slow
@pytest.mark.parametrize("has_digests", [True, False], ids=["digests", "earlier version"])
def test_a_message_names_the_file_or_folder_and_the_remedy(
    has_digests: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "step_00000001"
    save_run(folder, make_run("decoder", Path("tokenizer")), "pretrain", "")
    if not has_digests:
        state = json.loads((folder / "state.json").read_text())
        state["files"] = {name: entry["bytes"] for name, entry in state["files"].items()}
        del state["files_sha256"]
        (folder / "state.json").write_text(json.dumps(state))
    refused = {}
    with distributed.process_groups(HardwareConfig()):
        saved = checkpoint.read_model(folder)
        stage = build_stage(saved.model, saved.attention, HardwareConfig(), SeedConfig())
        for path in sorted(folder.iterdir()):
            content = path.read_bytes()
            refused[path.name] = 0
            for place in range(PLACES):
                damaged = bytearray(content)
                damaged[(len(content) - 1) * place // (PLACES - 1)] ^= 1 << place % 8
                path.write_bytes(damaged)
                refusal = load(folder, stage)
                if refusal is None:
                    continue
                refused[path.name] += 1
                message = str(refusal)
                assert message.startswith(str(folder))
                if isinstance(refusal, ConfigError):
                    assert str(path) in message
                    continue
                assert REMEDY in message or "another architecture" in message
                assert message.isprintable()
                assert "trust" not in message
                if has_digests and path.name not in ("state.json", "model.json"):
                    assert f"{path}: has SHA-256" in message
            path.write_bytes(content)
        assert load(folder, stage) is None
    # Most of a shard's bits, and of common.pt's padding, are anybody's guess without a digest.
    for name in (".metadata", "metadata.json", "model.json", "config.yaml"):
        assert refused[name] >= PLACES // 2, name
