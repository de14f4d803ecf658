"""Models of examples/model/, by the sizes that benchmarks are asked for."""

from __future__ import annotations

from pathlib import Path

import yaml

from megatron_ettin.config import ModelConfig

EXAMPLES = Path(__file__).parents[1] / "examples"
SIZES = tuple(sorted(path.stem for path in (EXAMPLES / "model").glob("*.yaml")))


def model_of_size(size: str) -> ModelConfig:
    """Return the model of examples/model/SIZE.yaml."""
    content = yaml.safe_load((EXAMPLES / "model" / f"{size}.yaml").read_text())
    return ModelConfig(**content["model"])
