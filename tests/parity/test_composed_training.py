"""Objectives with weights, by phase and by row against plain PyTorch on transformers' module.

One encoder of transformers attends in both directions: plain_training.py gives it the masks. Both
sides take the same batches; tests/independent rebuilds what is in these.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ettin.export.huggingface import from_huggingface
from tests.conftest import TinyCorpus
from tests.parity import plain_training
from tests.parity.paired_runs import WINDOW, batches, make_model, run_config, train_here

#: Relative, each step. Measured: see the property "losses apart".
LOSS_TOLERANCE = 1e-5
COMPOSED = {
    "diffusion": "MaskedDiffusion",
    "detour": {
        "class_path": "ByPhase",
        "init_args": {"objective": "MaskedLM", "by_phase": {"short": "CausalLM"}},
    },
    "mixture": {
        "class_path": "Mixture",
        "init_args": {
            "objectives": ["MaskedNextToken", "CausalLM", "MaskedDiffusion"],
            "shares": [0.4, 0.4, 0.2],
        },
    },
}

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", COMPOSED)
def test_losses_of_20_steps(
    name: str,
    tiny_corpus: TinyCorpus,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    model = make_model("encoder", tiny_corpus.vocab_size)
    model.save_pretrained(tmp_path / "hf")
    from_huggingface(tmp_path / "hf", tmp_path / "start")
    config = run_config(tiny_corpus, tmp_path, name=name, objective=COMPOSED[name], steps=[10, 10])
    ours = train_here(config)
    theirs = plain_training.train(
        model, batches(config), rate=plain_training.constant_rate, window=WINDOW
    )
    assert len(ours.losses) == len(theirs.losses) == 20
    apart = max(abs(a - b) / b for a, b in zip(ours.losses, theirs.losses, strict=True))
    record_property("losses", f"{ours.losses[0]:.3f} ... {ours.losses[-1]:.3f}")
    record_property("losses apart", f"{apart:.1e}")
    print(f"{name}: {ours.losses[0]:.3f} ... {ours.losses[-1]:.3f}, {apart:.1e} apart")
    assert apart <= LOSS_TOLERANCE
