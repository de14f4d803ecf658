"""Folders that other versions of transformers saved compute here what those versions computed."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_ettin import checkpoint
from megatron_ettin.export.huggingface import from_huggingface, to_huggingface
from tests.parity.references import TOLERANCE, Packed, difference
from tests.parity.stages import checkpoint_logits

FOLDERS = sorted(path for path in (Path(__file__).parent / "saved_by").iterdir() if path.is_dir())
#: With the decoder; the encoder is there from 4.48 on.
VERSIONS = ("4.54.1", "4.57.3", "5.23.0")
LENGTHS = (40, 5)
#: Keys that a local layer of the decoder sees to the left: `local_attention // 2 - 1`.
WINDOW = {"encoder": 8, "decoder": 7}


def test_every_version_is_there() -> None:
    assert [folder.name for folder in FOLDERS] == [
        "4.48.3-encoder",
        *(f"{version}-{kind}" for version in VERSIONS for kind in sorted(WINDOW)),
    ]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_logits_are_those_of_the_version_that_saved_it(folder: Path, tmp_path: Path) -> None:
    saved = from_huggingface(folder, tmp_path / "c")
    assert saved.model.sliding_window == WINDOW[folder.name.partition("-")[2]]
    local = 10_000.0 if saved.attention == "bidirectional" else 160_000.0
    assert (saved.rotary_base_global, saved.rotary_base_local) == (160_000.0, local)
    said = load_file(folder / "said.safetensors")
    for length in LENGTHS:
        found = checkpoint_logits(tmp_path / "c", Packed.of_one(said[f"tokens_{length}"]))
        assert difference(found, said[f"logits_{length}"]) <= TOLERANCE


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_the_way_back_keeps_weights_and_token_ids(folder: Path, tmp_path: Path) -> None:
    from_huggingface(folder, tmp_path / "c")
    to_huggingface(tmp_path / "c", tmp_path / "hf")
    again = from_huggingface(tmp_path / "hf", tmp_path / "again")
    assert again == checkpoint.read_model(tmp_path / "c")
    assert again.special_ids == {
        "pad_token_id": 3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
    }
