"""What the layout tests would find: faults planted one at a time, by the tests' own tolerances."""

import json
from pathlib import Path

import pytest
import torch

from megatron_ettin import distributed
from megatron_ettin.config import HardwareConfig, parse_args
from megatron_ettin.data.orders import open_order
from tests.conftest import TinyCorpus
from tests.integration.fault_program import LAYOUTS, main, take_steps
from tests.integration.planted_faults import FAULTS
from tests.ranks import run_ranks


@pytest.mark.long
def test_planted_faults_show(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    model = {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "vocab_size": tiny_corpus.vocab_size,
        "sliding_window": 8,
    }
    phase = {"name": "short", "train_tokens": 6_000, "seq_length": 64, "global_batch_size": 8}
    arguments = [
        "--config",
        str(
            tiny_corpus.write_config(
                tmp_path / "run.yaml",
                objective="MaskedLM",
                model=model,
                phases=[phase],
                hardware={"micro_batch_tokens": 256, "threads_per_rank": 1, "precision": "fp32"},
            )
        ),
        f"--run_dir={tmp_path / 'run'}",
    ]
    config = parse_args(arguments)
    order = open_order(config)
    with distributed.process_groups(HardwareConfig()):
        alone = take_steps(config, order)._asdict()
    alone["weights"] = {name: weight.detach() for name, weight in alone["weights"].items()}
    torch.save(alone, tmp_path / "alone.pt")
    arrangement = [arguments, tmp_path / "alone.pt", tmp_path / "found.json"]
    run_ranks(main, arrangement, ranks=4, logs=tmp_path, deadline_seconds=1800.0)
    found = json.loads((tmp_path / "found.json").read_text())
    for what, shown in found.items():
        print(f"{what}: {', '.join(shown) or 'nothing'}")
    assert len(found) == len(FAULTS) + len(LAYOUTS)
    assert {f"no fault in {layout}": [] for layout in LAYOUTS}.items() <= found.items()
    assert [what for what, shown in found.items() if "never ran" in shown] == []
    hidden = [fault.what for fault in FAULTS if not found[fault.what]]
    assert hidden == []
