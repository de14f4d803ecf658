"""Choice of the precision for `hardware.precision: auto` on this machine.

`layer_times.py` measures the candidates, once; the verdict is kept on disk. Everything after
`resolve` sees a precision by name.

No GPU has run its code for GPUs yet.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from megatron_ettin import distributed
from megatron_ettin.config import RunConfig
from megatron_ettin.model.backend import choose_backend
from megatron_ettin.objectives import attentions
from megatron_ettin.publication import publish_text
from megatron_ettin.training.layer_times import layer_seconds

logger = logging.getLogger(__name__)

#: Largest share of the wider precision's time at which a narrower one is taken. A smaller gain is
#: within the spread of measurements, and not worth the rounding.
CLEARLY_FASTER = 0.95
#: fp8 recipes without a history from step to step: with them a resumed run equals an uninterrupted
#: one.
STATELESS_RECIPES = ("tensorwise", "blockwise")
CPU_BF16_FLAGS = {"avx512_bf16", "amx_bf16"}
CPU_INFO = Path("/proc/cpuinfo")


def resolve(config: RunConfig) -> RunConfig:
    """Return `config` with a precision in place of auto; all ranks call this and agree."""
    if config.hardware.is_fp8 is not None:
        return config
    candidates = {_name(candidate): candidate for candidate in _candidates(config)}
    distributed.require_equal("what hardware.precision: auto can be", ", ".join(candidates))
    if len(candidates) == 1:
        (name,) = candidates
        logger.info("precision auto: %s, the only one for this machine", name)
        return candidates[name]
    key = _key(config, list(candidates))
    path = verdict_file(key)
    # Rank 0's verdict counts everywhere: machines may have other caches, but all ranks must train
    # in one precision.
    seconds = distributed.broadcast(read_verdict(path, key))
    if seconds is None:
        measured = {name: layer_seconds(candidate) for name, candidate in candidates.items()}
        seconds = distributed.broadcast(measured)
        if distributed.is_main_rank():
            write_verdict(path, key, seconds)
    name = fastest(seconds)
    numbers = ", ".join(f"{each} {1e3 * took:.2f} ms" for each, took in seconds.items())
    logger.info("precision auto: %s (two layers: %s)", name, numbers)
    return candidates[name]


def fastest(seconds: dict[str, float]) -> str:
    """Return the name with the least time if it is clearly faster than the first, else the first.

    The first is the widest precision.
    """
    widest = next(iter(seconds))
    best = min(seconds, key=lambda name: seconds[name])
    return best if seconds[best] <= CLEARLY_FASTER * seconds[widest] else widest


def _name(config: RunConfig) -> str:
    hardware = config.hardware
    return f"fp8 {hardware.fp8_recipe}" if hardware.is_fp8 else hardware.precision


def _candidates(config: RunConfig) -> list[RunConfig]:
    """Return the run in each precision that this machine can compute, the widest first."""
    if torch.cuda.is_available():
        changes = [{"precision": "bf16"}]
        changes += [{"precision": "fp8", "fp8_recipe": recipe} for recipe in STATELESS_RECIPES]
    else:
        changes = [{"precision": "fp32"}]
        changes += [{"precision": "bf16"}] if cpu_multiplies_bf16(CPU_INFO) else []
    possible = []
    for change in changes:
        hardware = dataclasses.replace(config.hardware, **change)  # type: ignore[arg-type]
        try:
            candidate = dataclasses.replace(config, hardware=hardware)
            choose_backend(candidate.model, candidate.hardware)
        except ValueError as error:
            logger.info("precision auto: without %s: %s", " ".join(change.values()), error)
            continue
        possible.append(candidate)
    return possible


def cpu_multiplies_bf16(cpu_info: Path) -> bool:
    """Tell whether the processors that Linux describes have bf16 matmuls."""
    if not cpu_info.exists():
        return False
    return bool(CPU_BF16_FLAGS & set(cpu_info.read_text().split()))


def _key(config: RunConfig, names: list[str]) -> dict[str, Any]:
    """Return everything that a verdict depends on: machine, versions, sizes and layout."""
    model, hardware = config.model, config.hardware
    phase = max(config.phases, key=lambda phase: phase.train_tokens)
    on_gpu = torch.cuda.is_available()
    return {
        "candidates": names,
        "device": torch.cuda.get_device_name() if on_gpu else _cpu_name(CPU_INFO),
        "threads": None if on_gpu else torch.get_num_threads(),
        "torch": torch.__version__,
        "megatron_core": metadata.version("megatron-core"),
        "transformer_engine": _version("transformer-engine"),
        "backend": model.backend,
        "attention": attentions(config.objective, [phase.name])[0],
        "layer": [model.hidden_size, model.ffn_hidden_size, model.num_attention_heads],
        "window": model.sliding_window,
        "rows": [hardware.micro_batch_rows(phase.seq_length), phase.seq_length],
        "ranks": [hardware.tensor_parallel_size, hardware.context_parallel_size],
        "sequence_parallel": hardware.sequence_parallel,
        # Graphs cast the weights of fp8 again in each micro-batch.
        "cuda_graphs": hardware.cuda_graphs,
        "recompute": hardware.recompute,
        "deterministic": hardware.deterministic,
    }


def _cpu_name(cpu_info: Path) -> str:
    """Return the first processor's name, as Linux gives it."""
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def verdict_file(key: dict[str, Any]) -> Path:
    """Return the file of the verdict for `key`, in XDG_CACHE_HOME if that is set, else ~/.cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache / "megatron_ettin" / f"precision-{digest[:16]}.json"


def read_verdict(path: Path, key: dict[str, Any]) -> dict[str, float] | None:
    """Return the seconds that were measured for `key`; None if there is no verdict for it."""
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    is_verdict = isinstance(document, dict) and document.get("key") == key
    return document["seconds"] if is_verdict else None


def write_verdict(path: Path, key: dict[str, Any], seconds: dict[str, float]) -> None:
    """Write a verdict; if the file cannot be written, the next run measures again."""
    text = json.dumps({"key": key, "seconds": seconds}, indent=2) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        publish_text(path, text)
    except OSError as error:
        logger.warning("precision auto: the verdict is not kept: %s", error)
