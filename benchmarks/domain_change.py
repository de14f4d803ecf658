"""Change of domain and vocabulary against a random start: tokens to the same held-out loss.

For each seed three nano models are trained: one on prose, with a tokenizer of prose; one from
random weights on Python code, with a tokenizer of code; and the first one, moved to that tokenizer
and the same rows of code, but with half of the tokens. Rates rise and fall alike in all runs.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.real_text import TextDocument, by_hash, read_code
from examples import fetch_text
from examples.fetch_text import read_json_lines
from megatron_ettin.evaluation.run_curves import RunCurves, read_curves
from megatron_ettin.export.huggingface import from_huggingface, to_huggingface
from megatron_ettin.export.vocabulary_swap import plan_swap
from tools import preprocess_data, train_tokenizer

MODEL = Path("examples/model/nano.yaml")
OBJECTIVES = {"mlm": "MaskedLM", "clm": "CausalLM"}
VOCABULARY = 4096
SLOTS = 256
ROWS_OF_A_STEP = 4
HELD_OUT_SHARE = 0.02
#: Characters of each text: a few epochs of the longest runs at most.
CHARACTERS = 12_000_000
NUM_POINTS = 25
"""Held-out losses of a run."""


@dataclass(frozen=True, kw_only=True)
class DomainChange:
    """Outcome of one seed and objective."""

    objective: str
    seed: int
    random_loss: float
    """Last held-out loss of the random start, in nats per token of code."""
    changed_loss: float
    """Last held-out loss of the changed model, after half of the tokens."""
    first_loss: float
    """Held-out loss of the changed model after the first measured tokens."""
    tokens: int
    """Tokens of the random start."""
    tokens_to_random: int | None
    """First measured tokens at which the changed model is as good as `random_loss`; None: never."""

    @property
    def share(self) -> float | None:
        """Return those tokens as a share of the random start's."""
        return None if self.tokens_to_random is None else self.tokens_to_random / self.tokens


def make_texts(folder: Path, text: Path) -> None:
    """Write prose (the quickstart's text, fetched to `text` if need be) and code, tokenised."""
    if not fetch_text.is_current(text):
        fetch_text.fetch(text)
    prose = []
    for name in ("reviews", "wikipedia"):
        content = (text / f"{name}.jsonl").read_text(encoding="utf-8")
        prose += [
            TextDocument(name=f"{name}/{number}", text=record["text"])
            for number, record in enumerate(read_json_lines(content))
        ]
    for name, documents in (("prose", by_hash(prose)), ("code", read_code())):
        path = folder / f"{name}.jsonl"
        path.write_bytes(b"".join(each.line() for each in _first(documents)))
        train_tokenizer.main(
            f"--input {path} --vocab-size {VOCABULARY} --output {folder / name}".split()
        )
        preprocess_data.main(
            f"--input {path} --tokenizer {folder / name} --output-prefix {folder / name}/tokens "
            f"--validation-share {HELD_OUT_SHARE}".split()
        )


def measure(
    folder: Path, objective: str, seed: int, *, general_tokens: int, tokens: int
) -> DomainChange:
    """Train three models below `folder`, which `make_texts` has filled; compare the last two."""
    runs = folder / f"{objective}-{seed}"
    train(folder, "prose", objective, seed, general_tokens, runs / "general", num_points=1)
    (checkpoint,) = (runs / "general/checkpoints").glob("step_????????")
    to_huggingface(checkpoint, runs / "hf")
    swap = plan_swap(runs / "hf", folder / "code", [str(folder / "code.jsonl")])
    from_huggingface(runs / "hf", runs / "swapped", swap=swap)
    start = ["--checkpoint.initialize_from", str(runs / "swapped")]
    changed = train(folder, "code", objective, seed, tokens // 2, runs / "changed", start)
    random = train(folder, "code", objective, seed, tokens, runs / "random")
    return compare(objective, seed, random, changed)


def compare(objective: str, seed: int, random: RunCurves, changed: RunCurves) -> DomainChange:
    """Return when the changed model is as good as the random start is at its end."""
    _, goals = random.series("heldout_loss")
    at, losses = changed.series("heldout_loss")
    reached = [int(place) for place, loss in zip(at, losses, strict=True) if loss <= goals[-1]]
    return DomainChange(
        objective=objective,
        seed=seed,
        random_loss=float(goals[-1]),
        changed_loss=float(losses[-1]),
        first_loss=float(losses[0]),
        tokens=random.tokens,
        tokens_to_random=reached[0] if reached else None,
    )


def train(
    folder: Path,
    text: str,
    objective: str,
    seed: int,
    tokens: int,
    run: Path,
    options: Sequence[str] = (),
    *,
    num_points: int = NUM_POINTS,
) -> RunCurves:
    """Train a nano model on a text in a process of its own; return its curves."""
    run.parent.mkdir(parents=True, exist_ok=True)
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(_sections(folder / text, objective, seed, tokens, num_points)))
    subprocess.run(
        [
            *(sys.executable, "-m", "megatron_ettin.pretrain", "--config", str(MODEL)),
            *("--config", str(path), "--run_dir", str(run), *options),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return read_curves(run.name, run)


def _sections(
    corpus: Path, objective: str, seed: int, tokens: int, num_points: int
) -> dict[str, Any]:
    return {
        "objective": OBJECTIVES[objective],
        "model": {"vocab_size": VOCABULARY},
        "phases": [
            {
                "name": "phase",
                "train_tokens": tokens,
                "seq_length": SLOTS,
                "global_batch_size": ROWS_OF_A_STEP,
                "lr_end": 0.02,
                "lr_decay": "linear",
                "lr_decay_tokens": tokens // 5,
            }
        ],
        "data": {
            "tokenizer": str(corpus),
            "sources": {"text": {"prefix": str(corpus / "tokens_text_document")}},
            "blend": {"phase": {"text": 1.0}},
            "validation": [str(corpus / "tokens_text_validation")],
        },
        "hardware": {"micro_batch_tokens": SLOTS * ROWS_OF_A_STEP, "threads_per_rank": 1},
        "validation": {"every_tokens": tokens // num_points, "num_rows": 32},
        "seeds": {"order": seed, "mask": seed, "init": seed, "dropout": seed},
    }


def _first(documents: Iterable[TextDocument]) -> list[TextDocument]:
    """Return the first documents of about CHARACTERS characters."""
    chosen, characters = [], 0
    for document in documents:
        if characters >= CHARACTERS:
            break
        chosen.append(document)
        characters += len(document.text)
    return chosen


def table(outcomes: Sequence[DomainChange]) -> list[str]:
    """Return lines of a table in Markdown: a line for each seed, then the mean and the spread."""
    lines = [
        "| objective | seed | random start: last loss | changed: first | last | share of tokens |",
        "|---|---|---|---|---|---|",
    ]
    for one in outcomes:
        share = "not reached" if one.share is None else f"{one.share:.0%}"
        lines.append(
            f"| {one.objective} | {one.seed} | {one.random_loss:.3f} | {one.first_loss:.3f} "
            f"| {one.changed_loss:.3f} | {share} |"
        )
    for objective in dict.fromkeys(one.objective for one in outcomes):
        shares = [one.share for one in outcomes if one.objective == objective]
        known = [share for share in shares if share is not None]
        if len(known) == len(shares) > 1:
            mean, spread = statistics.mean(known), statistics.stdev(known)
            lines.append(f"| {objective} | all | | | | {mean:.0%} ± {spread:.0%} |")
    return lines


def as_json(outcomes: Sequence[DomainChange]) -> str:
    """Return all outcomes as a JSON array."""
    return json.dumps([{**vars(one), "share": one.share} for one in outcomes])
