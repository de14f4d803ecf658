"""Every objective there is, rows to try it on, and a hash of its batches.

As a program it prints the hashes by class, for a comparison with another process.
"""

import dataclasses
import hashlib
import importlib
import json
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_ettin import objectives
from megatron_ettin.objectives import Batch, Objective
from megatron_ettin.rows import CUT_PIECE, LAST_PIECE, PADDING, Rows, TokenIds

ROOT = Path(__file__).parents[2]
IDS = TokenIds(vocab_size=500, unk=495, cls=496, sep=497, pad=498, mask=499)
SEQ_LENGTH, NUM_ROWS, SEGMENTS = 256, 12, 5


def classes(above: type[Objective] = Objective) -> Iterator[type[Objective]]:
    """Yield the concrete classes in `objectives/` below `above`."""
    for module in pkgutil.iter_modules(objectives.__path__, f"{objectives.__name__}."):
        importlib.import_module(module.name)
    for found in above.__subclasses__():
        if not found.__abstractmethods__ and found.__module__.startswith(objectives.__name__):
            yield found
        yield from classes(found)


CLASSES = sorted(set(classes()), key=lambda found: found.__name__)


def built(section: Any) -> Any:
    """Build what a section of YAML names: an objective, with those that it consists of."""
    names = {found.__name__: found for found in CLASSES}
    if isinstance(section, list):
        return [built(entry) for entry in section]
    if isinstance(section, str):
        return names[section]() if section in names else section
    if not isinstance(section, dict):
        return section
    if "class_path" not in section:
        return {name: built(value) for name, value in section.items()}
    wanted = names[section["class_path"].rpartition(".")[2]]
    return wanted(**built(section.get("init_args", {})))


def example(wanted: type[Objective]) -> Objective:
    """Build the objective as the file in examples/objective/ that names it says."""
    for path in sorted((ROOT / "examples" / "objective").glob("*.yaml")):
        objective: Objective = built(yaml.safe_load(path.read_text())["objective"])
        if type(objective) is wanted:
            return objective
    raise AssertionError(f"no file in examples/objective names {wanted.__name__}")


def rows(first_g: int = 40, specials: Any = "add") -> Rows:
    """Make rows of a cut piece, several whole ones and padding; the first is idle."""
    draw = np.random.default_rng(first_g)
    tokens, lengths, kinds, counts = [], [], [], []
    for row in range(NUM_ROWS):
        cuts = np.sort(draw.choice(np.arange(8, SEQ_LENGTH - 8), SEGMENTS - 1, replace=False))
        pieces = np.diff([0, *cuts]) if row else np.zeros(SEGMENTS - 1, dtype=np.int64)
        used = int(pieces.sum())
        content = draw.integers(0, 495, SEQ_LENGTH)
        ends = np.cumsum(pieces)
        for begin, end in zip(ends - pieces, ends, strict=True):
            if end > begin + 1:
                content[[begin, end - 1]] = IDS.cls, IDS.sep
        content[used:] = IDS.pad
        tokens.append(content)
        lengths += [*pieces, SEQ_LENGTH - used]
        kinds += [CUT_PIECE, *[LAST_PIECE] * (SEGMENTS - 2), PADDING]
        counts.append(used)
    return Rows(
        g=np.array([-1, *range(first_g, first_g + NUM_ROWS - 1)]),
        tokens=np.concatenate(tokens),
        position_ids=np.concatenate([np.arange(length) for length in lengths]),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        segment_kind=np.array(kinds, np.uint8),
        num_tokens=np.array(counts),
        seq_length=SEQ_LENGTH,
        specials=specials,
    )


def one_row(many: Rows, row: int) -> Rows:
    """Return a row as a micro-batch of its own."""
    slots = slice(row * SEQ_LENGTH, (row + 1) * SEQ_LENGTH)
    borders = many.cu_seqlens[row * SEGMENTS : (row + 1) * SEGMENTS + 1]
    return dataclasses.replace(
        many,
        g=many.g[row : row + 1],
        tokens=many.tokens[slots],
        position_ids=many.position_ids[slots],
        cu_seqlens=borders - borders[0],
        segment_kind=many.segment_kind[row * SEGMENTS : (row + 1) * SEGMENTS],
        num_tokens=many.num_tokens[row : row + 1],
    )


def make(objective: Objective, of: Rows, *, seed: int = 3, phase: str = "pretrain") -> Batch:
    return objective.make_batch(of, phase=phase, mask_seed=seed, ids=IDS)


def seen(batch: Batch) -> dict[str, Any]:
    """Return all that a model sees of a batch: labels count only where they are scored."""
    rows, slots = batch.rows, len(batch.tokens)
    labels = np.where(batch.loss_mask, batch.labels, -1)
    weights = np.ones(slots) if batch.weights is None else batch.weights
    is_causal: Any = [None] * slots
    if batch.is_causal is not None:
        by_row = np.broadcast_to(batch.is_causal, len(rows.g))
        # An idle row holds nothing, so its direction says nothing.
        is_causal = np.where(rows.g < 0, False, by_row).repeat(rows.seq_length).tolist()
    return {
        "tokens": batch.tokens.tolist(),
        "labels": labels.tolist(),
        "scored": batch.loss_mask.tolist(),
        "weights": np.where(batch.loss_mask, weights, 0.0).tolist(),
        "averaged": batch.averaged.tolist(),
        "is_causal": is_causal,
    }


def fingerprint(objective: Objective) -> str:
    """Return a hash of the batches of many rows and both rules of special tokens."""
    batches = [
        seen(make(objective, rows(g, rule))) for g in (40, 90) for rule in ("add", "present")
    ]
    return hashlib.sha256(json.dumps(batches).encode()).hexdigest()


if __name__ == "__main__":
    print(json.dumps({found.__name__: fingerprint(example(found)) for found in CLASSES}))
