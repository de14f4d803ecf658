"""Save, resume (same run, all state) and initialise (new run, weights only).

A checkpoint is a folder: Megatron-Core's layout-free `torch_dist` shards, plus `model.json` (the
architecture), `config.yaml` (the run) and `state.json` (the run's state, and the SHA-256 of every
other file). It is written under a temporary name and renamed when complete. It holds no random
state: all randomness is a function of (seed, g).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule

from megatron_ettin import config as configuration
from megatron_ettin import distributed
from megatron_ettin.checkpoint_files import (
    MODEL_FILE,
    REMEDY,
    CheckpointError,
    check_sizes,
    describe_damage,
    read_json,
)
from megatron_ettin.config import ModelConfig, RunConfig
from megatron_ettin.file_digests import FileDigest, FileList, sha256_of_json
from megatron_ettin.objectives import Attention, Face
from megatron_ettin.order.ledger import Head
from megatron_ettin.order.run_folder import CONFIG_FILE, STATE_FILE
from megatron_ettin.publication import begin_folder, publish_folder, unfinished_folder
from megatron_ettin.shard_saver import PendingShards, RankPart, ShardSaver
from megatron_ettin.shards import ShardsError, describe_error, read_shards
from megatron_ettin.versions import package_versions

#: Fields of ModelConfig that decide the names and shapes of tensors. Weights of a model that
#: differs in one of them cannot be loaded.
ARCHITECTURE = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "vocab_size",
)


@dataclass(frozen=True, kw_only=True)
class RunState:
    """State of a run between two steps, but for weights and optimizer state."""

    g: int = 0
    """Row at which the next step starts; rows before it are consumed or skipped."""
    step: int = 0
    """Optimizer steps taken."""
    consumed_tokens: int = 0
    """Tokens consumed, with special tokens and without padding."""
    phase: str = ""
    """Name of the phase of the last step."""
    phase_tokens: int = 0
    """Tokens consumed in that phase."""
    order_digest: tuple[int, int] = (0, 0)
    """Sum of the consumed rows' order digests, low lane first."""
    token_digest: tuple[int, int] = (0, 0)
    """Sum of the consumed rows' token digests, low lane first."""
    recent_losses: tuple[float, ...] = ()
    """Mean losses of the last steps of the phase, the latest last, up to `trouble.window_steps`;
    none unless `trouble.on_spike` compares with them."""
    phase_ids: tuple[str, ...] = ()
    """Chained order ids of the phases."""
    phase_ends: tuple[int, ...] = ()
    """First row after each phase."""
    ledger_seq: int = 0
    """Number of this checkpoint's record in the ledger."""
    ledger_chain: str = ""
    """Chain hash up to that record, hexadecimal; empty before the first step."""
    tokenizer_sha256: str = ""
    initialized_from: dict[str, str | None] | None = None
    """Origin of the run's first weights: `checkpoint`, the folder as it was given, and its
    `files_sha256`. None if the weights were drawn."""

    @property
    def ledger_head(self) -> Head | None:
        """Head of the ledger at this checkpoint; None before the first step."""
        return Head(self.ledger_seq, self.ledger_chain) if self.ledger_chain else None


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """Description of a checkpoint's weights, for those of a run and of a conversion alike."""

    model: ModelConfig
    """The architecture."""
    attention: Attention
    """Direction of the attention."""
    rotary_base_global: float
    """RoPE base of the global layers, in the phase last trained."""
    rotary_base_local: float
    """RoPE base of the local layers, in the phase last trained."""
    max_seq_length: int
    """Length of the longest rows that the model is made for."""
    tokenizer: str | None
    """Tokenizer folder, as an absolute path; None if the model came without one."""
    prediction_shift: int = 0
    """Distance from a [MASK] back to the position that predicts it, as in `Objective`."""
    objective: str | None = None
    """Class of the objective that trained the weights, as `config.yaml` names it (its module and
    name), in the phase last trained; None if it is not on record, because they were imported."""
    faces: tuple[Face, ...] = ()
    """Uses of the weights, the one above first, if rows of that phase had several objectives."""
    special_ids: dict[str, int | list[int]] = field(default_factory=dict)
    """Token ids by field of config.json (`eos_token_id`) that an imported model came with."""

    @classmethod
    def of_run(cls, config: RunConfig, state: RunState) -> SavedModel:
        """Describe the model of a run in `state`."""
        phases = {phase.name: phase for phase in config.phases}
        phase = phases[state.phase] if state.phase else config.phases[0]
        faces = tuple(
            Face.of(part.objective) for part in config.objective.for_phase(phase.name).row_shares()
        )
        return cls(
            # Weights do not depend on the backend that trained them.
            model=dataclasses.replace(config.model, backend="auto"),
            attention=faces[0].attention,
            rotary_base_global=phase.rotary_bases.base_global,
            rotary_base_local=phase.rotary_bases.base_local,
            max_seq_length=max(phase.seq_length for phase in config.phases),
            tokenizer=str(Path(config.data.tokenizer).absolute()),
            prediction_shift=faces[0].prediction_shift,
            objective=faces[0].objective,
            faces=faces if len(faces) > 1 else (),
        )


@dataclass(frozen=True, kw_only=True)
class PendingCheckpoint:
    """A checkpoint whose shards threads write, in `folder` with `.unfinished`."""

    folder: Path
    shards: PendingShards
    texts: Mapping[str, str]
    """Content of the small files beside the shards, by name."""

    def complete(self) -> FileList:
        """Wait for the threads of all ranks, write the other files, and list them all.

        All ranks call this, and get the same list. `publish` adds the state.

        Raises:
            ShardsError, OSError: the disk refuses, on all ranks; the message says why.
        """
        parts = self.shards.gather()
        return distributed.from_main_rank(lambda: self._complete(parts))

    def _complete(self, parts: list[RankPart]) -> FileList:
        every = self.shards.finish(parts)
        unfinished = unfinished_folder(self.folder)
        for name, text in self.texts.items():
            (unfinished / name).write_bytes(text.encode())
            every[name] = FileDigest.of_content(text.encode())
        # Versions of Megatron-Core write different small files beside the shards: list what is
        # there, and hash what this project has not hashed while writing.
        others = [path for path in unfinished.iterdir() if path.name not in every]
        return FileList(every | {path.name: FileDigest.of_file(path) for path in others})


def begin(
    folder: Path,
    stage: MegatronModule,
    optimizer: MegatronOptimizer | None,
    writer: ShardSaver,
    *,
    config: RunConfig,
    state: RunState,
) -> PendingCheckpoint:
    """Begin to copy a run's state and to write it to `folder` with `.unfinished`.

    All ranks call this. `stage` is the unwrapped module (a DDP wrapper would prefix every name).
    Training may go on when the call returns, up to an update, before which the caller calls
    `shards.wait_for_copy`; then it calls `complete` and `publish`.

    Raises:
        CheckpointError: `folder` exists.
        ShardsError, OSError: the disk has no room, or refuses, on all ranks. Nothing is left then.
    """
    saved, text = SavedModel.of_run(config, state), configuration.to_yaml(config)
    return _begin(folder, stage, optimizer, writer, saved=saved, config_yaml=text)


def write(
    folder: Path,
    stage: MegatronModule,
    optimizer: MegatronOptimizer | None,
    *,
    config: RunConfig,
    state: RunState,
) -> FileList:
    """Write all files of a checkpoint but its state, as `begin` and `complete` do together."""
    writer = ShardSaver(copies=False)
    return begin(folder, stage, optimizer, writer, config=config, state=state).complete()


def publish(folder: Path, files: FileList, state: RunState) -> None:
    """Add the state to files that are complete, and name their folder `folder`.

    All ranks call this. Nobody takes an unfinished folder for a checkpoint, so `state` may name a
    record of the ledger that holds the digest of the list.

    Raises:
        OSError: the disk refuses, on all ranks.
    """
    distributed.from_main_rank(lambda: _publish(folder, files, state))


def add_state(folder: Path, files: FileList, state: RunState) -> None:
    """Add the state to files that are complete; the main rank calls this.

    The folder then lacks its name alone: `publication.publish_folder`.

    Raises:
        OSError: the disk refuses.
    """
    fields = {"versions": package_versions(), **dataclasses.asdict(state)}
    document = {**files.to_document(), **fields, "state_sha256": sha256_of_json(fields)}
    text = json.dumps(document, indent=2) + "\n"
    (unfinished_folder(folder) / STATE_FILE).write_text(text)


def discard(folder: Path) -> None:
    """Remove what was written of a checkpoint that is not published, as far as the disk allows."""
    if distributed.is_main_rank():
        shutil.rmtree(unfinished_folder(folder), ignore_errors=True)


def save_weights(
    folder: Path,
    stage: MegatronModule,
    *,
    saved: SavedModel,
    config_yaml: str,
    tokenizer_sha256: str,
) -> None:
    """Write a checkpoint of weights that no run has trained: `initialize_from` takes it.

    `config_yaml` holds the sections of a run that the weights decide.
    """
    writer = ShardSaver(copies=False)
    pending = _begin(folder, stage, None, writer, saved=saved, config_yaml=config_yaml)
    publish(folder, pending.complete(), RunState(tokenizer_sha256=tokenizer_sha256))


def _begin(
    folder: Path,
    stage: MegatronModule,
    optimizer: MegatronOptimizer | None,
    writer: ShardSaver,
    *,
    saved: SavedModel,
    config_yaml: str,
) -> PendingCheckpoint:
    distributed.from_main_rank(lambda: _begin_folder(folder))
    try:
        shards = writer.begin(unfinished_folder(folder), stage, optimizer)
    except ShardsError:
        discard(folder)
        raise
    model = json.dumps(dataclasses.asdict(saved), indent=2) + "\n"
    texts = {CONFIG_FILE: config_yaml, MODEL_FILE: model}
    return PendingCheckpoint(folder=folder, shards=shards, texts=texts)


def _begin_folder(folder: Path) -> None:
    if folder.exists():
        raise CheckpointError(f"{folder}: exists already; a checkpoint is never replaced")
    begin_folder(folder)


def _publish(folder: Path, files: FileList, state: RunState) -> None:
    add_state(folder, files, state)
    publish_folder(folder)


def load(
    folder: Path, stage: MegatronModule, optimizer: MegatronOptimizer | None, model: ModelConfig
) -> RunState:
    """Load weights, and the optimizer's state if it is given, into this rank's layout.

    The files' digests are not compared: call `checkpoint_files.check_files` first.

    Raises:
        CheckpointError: no checkpoint, an incomplete one, or one of another architecture.
    """
    check_architecture(folder, model)
    state = read_state(folder)
    check_sizes(folder)
    try:
        loaded = read_shards(folder, stage, optimizer)
    except ShardsError as error:
        raise CheckpointError(f"{error}{describe_damage(folder)}; {REMEDY}") from error
    stage.load_state_dict(loaded["model"])
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
    return state


def check_architecture(folder: Path, model: ModelConfig) -> None:
    """Raise CheckpointError if `folder` holds a model of another shape than `model`."""
    saved = read_model(folder).model
    differing = [
        f"{name} {getattr(saved, name)} (here {getattr(model, name)})"
        for name in ARCHITECTURE
        if getattr(saved, name) != getattr(model, name)
    ]
    if differing:
        raise CheckpointError(
            f"{folder}: a checkpoint of another architecture: {', '.join(differing)}"
        )


def read_state(folder: Path) -> RunState:
    """Return the state of the run at the checkpoint `folder`.

    Raises:
        CheckpointError: it is damaged, or not of this version.
    """
    document = read_json(folder / STATE_FILE)
    for name in ("files", "files_sha256"):
        document.pop(name, None)
    expected = document.pop("state_sha256", None)  # earlier versions have none
    if expected is not None and sha256_of_json(document) != expected:
        raise CheckpointError(
            f"{folder / STATE_FILE}: its fields have not the SHA-256 that state_sha256 says; "
            f"{REMEDY}"
        )
    document.pop("versions", None)
    try:
        for name in ("order_digest", "token_digest", "phase_ids", "phase_ends"):
            document[name] = tuple(document[name])
        document["recent_losses"] = tuple(document.get("recent_losses", ()))
        return RunState(**document)
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / STATE_FILE}: not the state of a run of this version: "
            f"{describe_error(error)}; {REMEDY}"
        ) from error


def read_model(folder: Path) -> SavedModel:
    """Return what the weights in `folder` are."""
    if not (folder / MODEL_FILE).is_file():
        raise CheckpointError(f"{folder}: no checkpoint here ({MODEL_FILE} is missing)")
    document = read_json(folder / MODEL_FILE)
    if "objective" not in document:  # saved by an earlier version, which named it in config.yaml
        document["objective"] = _trained_by(folder)
    try:
        document["model"] = ModelConfig(**document["model"])
        document["faces"] = tuple(Face(**face) for face in document.get("faces", ()))
        return SavedModel(**document)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / MODEL_FILE}: not a saved model: {describe_error(error)}; {REMEDY}"
        ) from error


def _trained_by(folder: Path) -> str | None:
    """Return the class of the objective of the run that saved `folder`, which need not be at hand.

    None for weights that no run had trained when they were saved.
    """
    if not read_state(folder).step:
        return None
    path = folder / CONFIG_FILE
    try:
        objective: str = yaml.safe_load(path.read_text())["objective"]["class_path"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: does not name the objective: {describe_error(error)}; {REMEDY}"
        ) from error
    return objective


def read_config(folder: Path) -> RunConfig:
    """Return the configuration of the run that saved `folder`."""
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f"{folder}: no checkpoint here ({CONFIG_FILE} is missing)")
    return configuration.load_config(folder / CONFIG_FILE)
