"""Made-up reviews, a word of which says the label."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ettin.evaluation.labelled_data import LabelledData

WORDS = ["the", "of", "and", "to", "in", "that", "was", "his", "it", "with", "as", "had"]
MARKS = {"good": "excellent", "bad": "terrible"}


def write_reviews(folder: Path, sizes: dict[str, int], **labels: Any) -> LabelledData:
    """Write texts of random words, one of which says the label; `labels` renames the labels."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, size in sizes.items():
        rows = []
        for number in range(size):
            label = "good" if number % 3 else "bad"
            words = rng.choice(WORDS, rng.integers(3, 12)).tolist()
            words.insert(int(rng.integers(0, len(words))), MARKS[label])
            rows.append({"sentence": " ".join(words), "label": labels.get(label, label)})
        (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return LabelledData(path=str(folder), test="test" if "test" in sizes else None)
