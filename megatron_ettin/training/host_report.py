"""Check of the hosts at the start of a run: hosts that differ where they may not end it.

All ranks tell about themselves in one small dictionary each, and the first rank of a host about the
files that its host sees.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ettin import distributed
from megatron_ettin.config import RunConfig
from megatron_ettin.devices import GIB
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.order.shard_list import list_shards
from megatron_ettin.training.start_checks import StartError
from megatron_ettin.versions import package_versions

TOKEN_PREFIX = ".seen-by-all-hosts."
#: Folders above a run's in which a killed start's token is looked for.
TOKEN_LEVELS = 2
SHARED_FOLDER = (
    "mount the file system of the run on all hosts under the same path, or give a --run_dir on one "
    "that they share"
)


@dataclass(frozen=True, kw_only=True)
class HostFacts:
    """Description of a rank's host, as the rank sees it."""

    host: str
    agent: int
    """Number of the host's torchrun."""
    unix_seconds: float
    versions: dict[str, str]
    run_dir: str
    shows_token: bool
    """The rank sees the file that rank 0 has written for it."""
    corpora: dict[str, str]
    """State of each file of the corpora, by path; empty but for the first rank of a host."""


@dataclass(frozen=True, kw_only=True)
class Hosts:
    """Hosts of a run that may start on them."""

    ranks: list[str]
    """Each host with its ranks."""
    num_ranks: int
    versions: dict[str, str]
    """Installed packages, alike on all hosts."""
    clock_spread_seconds: float
    """Largest difference of two clocks, with the time that leaving a barrier takes."""
    num_corpus_files: int
    """Files that the run reads, alike on all hosts."""
    folder: Path
    """Run folder, or its nearest parent that exists."""
    free_bytes: int
    """Free space there."""
    checkpoint_bytes: int
    num_checkpoints: int
    """Checkpoints to come, at most: those that were removed are counted again."""


def check_hosts(config: RunConfig, *, checkpoint_bytes: int, num_checkpoints: int) -> Hosts:
    """Compare versions, run folder and corpora of all hosts, and look for room. All ranks call it.

    Args:
        config: the run.
        checkpoint_bytes: size of a checkpoint.
        num_checkpoints: checkpoints that a new run writes.

    Raises:
        StartError: hosts differ in versions, run folder or corpora, or the disk has no room for a
            checkpoint; the message names host and path. All ranks raise the same.
    """
    facts = _gather(config)
    _check_same(facts)
    run = RunFolder(Path(config.run_dir))
    left = max(0, num_checkpoints - len(run.complete_checkpoints()))
    there, _ = _nearest(run.path)
    free = distributed.broadcast(shutil.disk_usage(there).free)
    if left and free < checkpoint_bytes:
        raise StartError(
            f"{there} on {facts[0].host}: has {free / GIB:.2f} GiB free, but a checkpoint takes "
            f"{checkpoint_bytes / GIB:.2f} GiB: make room, or give another --run_dir"
        )
    return Hosts(
        ranks=_ranks_by_host(facts),
        num_ranks=len(facts),
        versions={k: v for k, v in facts[0].versions.items() if v != "not installed"},
        clock_spread_seconds=_clock_spread(facts),
        num_corpus_files=len(facts[0].corpora),
        folder=there,
        free_bytes=free,
        checkpoint_bytes=checkpoint_bytes,
        num_checkpoints=left,
    )


def _gather(config: RunConfig) -> list[HostFacts]:
    """Return what each rank tells, by rank; the token of rank 0 is gone when this returns."""
    run_dir = Path(config.run_dir)
    there, levels = _nearest(run_dir)
    prefix = _token_prefix(run_dir)
    name = distributed.broadcast((levels, f"{prefix}{os.urandom(8).hex()}"))
    is_first, token = distributed.local_rank()[0] == 0, there / name[1]
    corpora = corpus_states(config) if is_first else {}
    try:
        if distributed.is_main_rank():
            _remove_tokens(run_dir, prefix)
            token.touch()
        distributed.barrier()  # after it the token is there, and all clocks are read
        now = time.time()
        facts = HostFacts(
            host=platform.node(),
            agent=int(os.environ.get("GROUP_RANK", "0")),
            unix_seconds=now,
            versions={"python": platform.python_version(), **package_versions()},
            run_dir=str(run_dir.absolute()),
            shows_token=_above(run_dir, name[0]).joinpath(name[1]).exists(),
            corpora=corpora,
        )
        return distributed.all_gather(facts)
    finally:
        if distributed.is_main_rank():
            token.unlink(missing_ok=True)


def _token_prefix(run_dir: Path) -> str:
    """Return the beginning of the names of a run's tokens: folders above it hold others' too."""
    return f"{TOKEN_PREFIX}{hashlib.sha256(os.fsencode(run_dir.absolute())).hexdigest()[:12]}."


def _remove_tokens(run_dir: Path, prefix: str) -> None:
    """Remove the tokens that starts of this run left when they were killed."""
    # The first start finds no run folder, and its token is in a folder above.
    for folder in (run_dir, *run_dir.absolute().parents[:TOKEN_LEVELS]):
        for token in folder.glob(f"{prefix}*"):
            token.unlink(missing_ok=True)


def _nearest(folder: Path) -> tuple[Path, int]:
    """Return the folder, or its nearest parent that exists, and the levels between them."""
    paths = (folder.absolute(), *folder.absolute().parents)
    return next((path, level) for level, path in enumerate(paths) if path.is_dir())


def _above(folder: Path, levels: int) -> Path:
    """Return the folder `levels` above; the root, if there are fewer."""
    return [folder.absolute(), *folder.absolute().parents][: levels + 1][-1]


def corpus_states(config: RunConfig) -> dict[str, str]:
    """Return size and time of each .idx and .bin that the run reads, by path as it is configured.

    A time is in whole seconds: not every program that copies files keeps more. What cannot be read
    has its error; if all hosts have the same, the corpora's own checks report it.
    """
    named = [*(source.prefix for source in config.data.sources.values()), *config.data.validation]
    states = {}
    for prefix in named:
        try:
            shards = list_shards(prefix)
        except (ValueError, OSError) as error:
            states[str(prefix)] = str(error)
            continue
        for path in (f"{shard}{suffix}" for shard in shards for suffix in (".idx", ".bin")):
            states[path] = _file_state(path)
    return states


def _file_state(path: str) -> str:
    try:
        found = os.stat(path)
    except OSError as error:
        return error.strerror or str(error)
    changed = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(int(found.st_mtime)))
    return f"{found.st_size:,} bytes of {changed} UTC"


def _check_same(facts: Sequence[HostFacts]) -> None:
    """Raise StartError, naming host and path, if a rank's host differs from rank 0's."""
    first = facts[0]
    for other in facts[1:]:
        if not other.shows_token:
            raise StartError(
                f"{other.run_dir} on {other.host}: is not the folder {first.run_dir} on "
                f"{first.host}, where rank 0 writes: {SHARED_FOLDER}"
            )
        _refuse_difference(first, other, "version", first.versions, other.versions)
        if other.corpora:
            _refuse_difference(first, other, "file", first.corpora, other.corpora)


def _refuse_difference(
    first: HostFacts,
    other: HostFacts,
    kind: str,
    expected: Mapping[str, str],
    found: Mapping[str, str],
) -> None:
    for name in {**expected, **found}:
        was, now = expected.get(name, "not there"), found.get(name, "not there")
        if was != now:
            remedy = (
                "install the same on all hosts"
                if kind == "version"
                else "share one copy, or copy it again and keep its time (cp -p, rsync -t)"
            )
            raise StartError(f"{name} on {other.host}: {now}, but on {first.host}: {was}: {remedy}")


def _clock_spread(facts: Sequence[HostFacts]) -> float:
    """Return the largest difference of two clocks, in seconds, with the time that leaving takes."""
    times = [fact.unix_seconds for fact in facts]
    return max(times) - min(times)


def _ranks_by_host(facts: Sequence[HostFacts]) -> list[str]:
    numbered = itertools.groupby(enumerate(facts), key=lambda item: (item[1].agent, item[1].host))
    ranks = {key: [rank for rank, _ in group] for key, group in numbered}
    return [
        f"{host} (rank {own[0]})" if len(own) == 1 else f"{host} (ranks {own[0]}-{own[-1]})"
        for (_, host), own in ranks.items()
    ]
