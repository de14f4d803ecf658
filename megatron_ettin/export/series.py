"""Conversion of whole runs: every checkpoint, and averages, as revisions of local repositories."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_ettin import checkpoint, checkpoint_files
from megatron_ettin.export.architecture import kind_of
from megatron_ettin.export.card import CardMetadata, CardRevision
from megatron_ettin.export.hub_repository import FILES_TRAILER, HubRepository
from megatron_ettin.export.huggingface import NOTHING_SAID, read_weights, write_model
from megatron_ettin.export.revisions import Average, SeriesRevision, list_revisions
from megatron_ettin.export.upload import upload_repository
from megatron_ettin.export.weights import TIED, TIED_TO
from megatron_ettin.model.weight_map import Architecture
from megatron_ettin.order.run_folder import RunFolder

logger = logging.getLogger(__name__)


def write_series(
    runs: Sequence[Path],
    output: Path,
    *,
    averages: Sequence[str] = (),
    upload: str | None = None,
    check_files: bool = True,
    metadata: CardMetadata = NOTHING_SAID,
) -> Iterator[str]:
    """Make each run a repository below `output`, named encoder or decoder; yield a line a revision.

    A revision of the same files is skipped. `upload` names a repository of the Hub, OWNER/NAME; of
    two runs, each goes to OWNER/NAME-encoder or -decoder. `averages` are of the form
    last:COUNT or every:TOKENS. Nothing is written if a run is refused.

    Raises:
        ValueError, OSError: naming the run, checkpoint or revision that is refused.
    """
    planned: dict[Architecture, list[SeriesRevision]] = {}
    for run in runs:
        revisions = list_revisions(RunFolder(run), [Average.parse(text) for text in averages])
        # Of the last checkpoint: an objective by phase may have begun as the other kind.
        last = [revision for revision in revisions if not revision.averaged][-1].checkpoints[0]
        name = kind_of(checkpoint.read_model(last).attention).architecture
        if name in planned:
            raise ValueError(f"{run}: the second {name}; give it another --output")
        planned[name] = revisions
    for name, revisions in planned.items():
        with HubRepository(output, name) as repository:
            _refuse_others(repository, revisions)
    for name, revisions in planned.items():
        with HubRepository(output, name) as repository:
            yield from _write_revisions(repository, revisions, check_files, metadata)
            if upload is not None:
                target = upload if len(planned) == 1 else f"{upload}-{name}"
                yield from upload_repository(repository, target)


def _refuse_others(repository: HubRepository, revisions: Sequence[SeriesRevision]) -> None:
    """Raise ValueError for a revision that is there, but of other files."""
    there = repository.revisions()
    for revision in revisions:
        if there.get(revision.name, revision.files_sha256) != revision.files_sha256:
            raise ValueError(
                f"{repository.root}: {repository.name} has a revision {revision.name} of files with"
                f" SHA-256 {there[revision.name]}, but those of {revision.checkpoints[-1]} have "
                f"{revision.files_sha256}: it is of another run; name another folder"
            )


def _write_revisions(
    repository: HubRepository,
    revisions: Sequence[SeriesRevision],
    check_files: bool,
    metadata: CardMetadata,
) -> Iterator[str]:
    there = repository.revisions()
    for revision in revisions:
        where = f"{repository.root}: {repository.name} {revision.name}"
        if revision.name in there and repository.is_whole(revision.name):
            yield f"{where}: there already"
            continue
        folder = repository.work / "model"
        record = _convert(revision, folder, check_files, metadata)
        repository.publish(revision.name, folder, record)
        yield f"{where}: written"
    last = [revision for revision in revisions if not revision.averaged][-1]
    repository.point_main(last.name)
    yield f"{repository.root}: {repository.name} main: {last.name}"


def _convert(
    revision: SeriesRevision, folder: Path, check_files: bool, metadata: CardMetadata
) -> dict[str, str]:
    """Write the revision's model to `folder`; return what its commit records."""
    digest, last = revision.files_sha256, revision.checkpoints[-1]
    if check_files:
        for path in revision.checkpoints:
            checkpoint_files.check_files(path)
    saved, state = checkpoint.read_model(last), checkpoint.read_state(last)
    write_model(
        folder,
        saved,
        state,
        mean_weights(revision.checkpoints),
        metadata=metadata,
        revision=CardRevision(name=revision.name, files_sha256=digest, averaged=revision.averaged),
    )
    record: dict[str, Any] = {
        FILES_TRAILER: digest,
        "Tokens": state.consumed_tokens,
        "Ledger-Head": state.ledger_chain,
        "Averaged": " ".join(revision.averaged),
    }
    return {key: str(value) for key, value in record.items() if value}


def mean_weights(checkpoints: Sequence[Path]) -> dict[str, torch.Tensor]:
    """Return the mean of the checkpoints' weights in float32, by Hugging Face name.

    The sum is taken in the order of `checkpoints`; two models are in memory at a time.
    """
    mean = read_weights(checkpoints[0], checkpoint.read_model(checkpoints[0]))
    if len(checkpoints) == 1:
        return mean
    for path in checkpoints[1:]:
        weights = read_weights(path, checkpoint.read_model(path))
        for name in mean.keys() - {TIED}:
            mean[name] += weights[name]
    for name in mean.keys() - {TIED}:
        mean[name] /= len(checkpoints)
    assert mean[TIED] is mean[TIED_TO], "the tied output follows the embedding"
    return mean
