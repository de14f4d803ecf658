"""README.md of an exported model: its architecture, its state of training, how to load it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from megatron_ettin.checkpoint import RunState, SavedModel
from megatron_ettin.export.architecture import kind_of, local_attention, prediction
from megatron_ettin.objectives import MaskedDiffusion
from megatron_ettin.order.digest import format_digest

LIBRARY = "megatron-ettin"
#: First release of transformers with the class.
TRANSFORMERS = {"encoder": "4.48", "decoder": "4.54"}
ENCODER_USE = """\
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

name = "."  # this folder
model = AutoModelForMaskedLM.from_pretrained(name)
tokenizer = AutoTokenizer.from_pretrained(name)
pipeline("fill-mask", model=model, tokenizer=tokenizer)("The film was [MASK].")
"""
DECODER_USE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

name = "."  # this folder
model = AutoModelForCausalLM.from_pretrained(name)
tokenizer = AutoTokenizer.from_pretrained(name)
pipeline("text-generation", model=model, tokenizer=tokenizer)("The film was")
"""
SHIFTED_USE = """\
from transformers import AutoModelForMaskedLM, AutoTokenizer

name = "."  # this folder
model = AutoModelForMaskedLM.from_pretrained(name)
tokenizer = AutoTokenizer.from_pretrained(name)
inputs = tokenizer("The film was [MASK].", return_tensors="pt")
# Now row p holds the prediction of the token at p, as in other encoders.
logits = model(**inputs).logits.roll(1, dims=1)
is_mask = inputs["input_ids"] == tokenizer.mask_token_id
tokenizer.batch_decode(logits[is_mask].topk(5).indices.flatten())
"""
SHIFT = """\
**The token at position p is predicted from position p - 1**, as in a decoder
(`"prediction_shift": 1` in `config.json`). A plain `fill-mask` pipeline does not know that: it
shows the prediction of the token *after* the mask, and a loss from logits that were not shifted is
too high. Shift the logits as above. Hidden states are used as those of any encoder.
"""
DIFFUSION_USE = """\
from transformers import AutoModelForMaskedLM, AutoTokenizer
from unmasking import Unmasking  # unmasking.py is in this folder

name = "."  # this folder
model = AutoModelForMaskedLM.from_pretrained(name)
tokenizer = AutoTokenizer.from_pretrained(name)
inputs = tokenizer("The film was" + " [MASK]" * 12 + ".", return_tensors="pt")
filled = Unmasking.of(model, tokenizer).fill(inputs["input_ids"], steps=6, seed=1)
tokenizer.batch_decode(filled, skip_special_tokens=True)
"""
DIFFUSION = """\
It was trained by masked diffusion: it fills any share of a text, in several steps, each of which
sees what the steps before have filled in. `order="confidence"` (the default) fills the tokens first
of which the model is surest, `order="random"` any; more steps cost more time and make better text;
`temperature=0` takes the likeliest token everywhere. Its training loss bounds -log p(text), in nats
per token: it can be compared with a decoder's loss over the same text, not with that of an encoder
which was trained at one mask rate.
"""
FACES = """\
The weights were trained by {objectives} at once, each on rows of its own. This folder is for use as
{article} {architecture}; `tools/convert.py to-hf --as {other}` writes the other from the same
checkpoint.
"""
VERIFICATION = """\
Load it with `from_pretrained(name, revision=...)`. With the folder of the run (RUN), this verifies
the ledger's chain, that it holds the head above, and every file of every checkpoint:
"""
VERIFY = "python tools/order.py verify --run RUN --chain --weights --head"
LIMITS = """\
The card was written by a converter. How well the model does is not known to it, nor, unless it was
given above, what the model was trained on and under which terms it may be used: say so before you
publish the model.
"""


@dataclass(frozen=True, kw_only=True)
class CardMetadata:
    """Facts about a model that no checkpoint holds, in the words of the Hugging Face Hub."""

    license: str | None = None
    """Licence identifier, such as apache-2.0."""
    languages: tuple[str, ...] = ()
    """Language codes, such as en."""
    base_model: str | None = None
    """Repository of the model that the weights were first taken from."""
    datasets: tuple[str, ...] = ()
    """Repositories of the data."""


@dataclass(frozen=True, kw_only=True)
class CardRevision:
    """Place of a model among the checkpoints of its run."""

    name: str
    """Name of the revision, such as step599525."""
    files_sha256: str
    """Digest of the checkpoint's list of files; of an average, of the digests of its members."""
    averaged: tuple[str, ...] = ()
    """Revisions of whose weights it is the mean; none for a checkpoint."""


def model_card(
    saved: SavedModel,
    state: RunState,
    *,
    num_parameters: int,
    has_tokenizer: bool,
    metadata: CardMetadata,
    revision: CardRevision | None = None,
) -> str:
    """Return the card, with front matter as the Hugging Face Hub reads it.

    `num_parameters` counts the tied output once. A `state` with step 0 belongs to weights that no
    run here has trained. `revision` says which of a run's models it is, if it is one of several.
    """
    kind = kind_of(saved.attention)
    is_encoder, is_shifted = kind.architecture == "encoder", saved.prediction_shift != 0
    if fills_texts(saved):
        use, task = DIFFUSION_USE, "fill-mask"
    elif is_shifted:
        use, task = SHIFTED_USE, "feature-extraction"
    elif is_encoder:
        use, task = ENCODER_USE, "fill-mask"
    else:
        use, task = DECODER_USE, "text-generation"
    sections = [
        _front_matter(task, kind.config_class.model_type, metadata),
        f"# {kind.architecture.capitalize()} of {_short(num_parameters)} parameters\n",
        _table(_model_rows(saved, num_parameters)),
        "## Training\n",
        _training(state),
        *_revision(revision, state),
        "## Use\n",
        f"With transformers {TRANSFORMERS[kind.architecture]} or newer:\n",
        f"```python\n{use}```\n",
    ]
    if fills_texts(saved):
        sections.append(DIFFUSION)
    if is_shifted:
        sections.append(SHIFT)
    if len({face.attention for face in saved.faces}) > 1:
        sections.append(_other_face(saved))
    if not has_tokenizer:
        sections.append(
            "This folder holds no tokenizer; take the one that the model was made for.\n"
        )
    return "\n".join([*sections, "## Not said here\n", LIMITS])


def fills_texts(saved: SavedModel) -> bool:
    """Tell whether the model fills texts of any share of masks, which takes `Unmasking`."""
    return (saved.objective or "").rpartition(".")[2] == MaskedDiffusion.__name__


def _other_face(saved: SavedModel) -> str:
    kinds = {"encoder": "decoder", "decoder": "encoder"}
    own = kind_of(saved.attention).architecture
    names = [face.objective.rpartition(".")[2] for face in saved.faces]
    return FACES.format(
        objectives=" and ".join(names),
        article={"encoder": "an", "decoder": "a"}[own],
        architecture=own,
        other=kinds[own],
    )


def _front_matter(task: str, model_type: str, metadata: CardMetadata) -> str:
    fields: dict[str, Any] = {
        "license": metadata.license,
        "language": list(metadata.languages),
        "library_name": "transformers",
        "pipeline_tag": task,
        "base_model": metadata.base_model,
        "datasets": list(metadata.datasets),
        "tags": [model_type, LIBRARY],
    }
    known = {name: value for name, value in fields.items() if value}
    return f"---\n{yaml.safe_dump(known, sort_keys=False)}---\n"


def _model_rows(saved: SavedModel, num_parameters: int) -> dict[str, str]:
    model = saved.model
    objective = saved.objective.rsplit(".", 1)[-1] if saved.objective else "not on record"
    window = model.sliding_window
    sides = "on each side" if saved.attention == "bidirectional" else "to the left"
    written = local_attention(kind_of(saved.attention), window)
    return {
        "objective": objective,
        "attention": f"{saved.attention}; a position predicts {prediction(saved)}",
        "parameters": f"{num_parameters:,} (the output layer is the embedding, counted once)",
        "layers": f"{model.num_layers} of width {model.hidden_size}, "
        f"{model.num_attention_heads} heads of {model.head_size}, gated MLPs of "
        f"{model.ffn_hidden_size}",
        "vocabulary": f"{model.vocab_size:,}",
        "global layers": f"0 and every {model.global_attention_every}. from there: attend to the "
        "whole text",
        "local layers": f"the others: {window} tokens {sides}, and their own (`local_attention: "
        f"{written}`, as transformers counts)",
        "RoPE bases": f"{saved.rotary_base_global:g} in global layers, "
        f"{saved.rotary_base_local:g} in local ones",
        "longest rows": f"{saved.max_seq_length:,} tokens",
    }


def _training(state: RunState) -> str:
    if not state.step:
        return "The weights were converted; no training of theirs is on record.\n"
    rows = {
        "step": f"{state.step:,}",
        "tokens": f"{state.consumed_tokens:,}, special tokens counted, padding not",
        "phase": f"{state.phase} ({state.phase_tokens:,} tokens of it)",
        "rows": f"{state.g:,} of the order below",
    }
    # A phase's id covers all rows up to its end, so the first phase that reaches g is the one.
    for identity, end in zip(state.phase_ids, state.phase_ends, strict=True):
        if state.g <= end:
            rows["order id"] = f"`{identity}`"
            break
    rows["token digest"] = f"`{format_digest(state.token_digest)}`"
    if state.ledger_chain:
        rows["ledger head"] = f"`{state.ledger_chain}` (record {state.ledger_seq})"
    return _table(rows)


def _revision(revision: CardRevision | None, state: RunState) -> list[str]:
    """Return which revision the model is, and the command that verifies its record."""
    if revision is None:
        return []
    rows = {"revision": f"`{revision.name}`"}
    if revision.averaged:
        names = ", ".join(f"`{name}`" for name in revision.averaged)
        rows["averaged"] = f"mean of the weights of {names}; the table above is the last one's"
    rows["checkpoint files"] = f"SHA-256 `{revision.files_sha256}`"
    parts = ["## Revision\n", _table(rows)]
    if state.ledger_chain:
        parts += [VERIFICATION, f"```bash\n{VERIFY} {state.ledger_chain}\n```\n"]
    return parts


def _table(rows: dict[str, str]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines]) + "\n"


def _short(count: int) -> str:
    """Return a number of parameters in the form of model names: 17M, 1.03B."""
    return f"{count / 1e9:.3g}B" if count >= 1e9 else f"{count / 1e6:.3g}M"
