"""Disks that are slow, or that refuse to write for some steps of a run."""

import ctypes
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_ettin.hashing_files import HashingFiles
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.shard_saver import _Planner
from megatron_ettin.training.interval import Interval
from megatron_ettin.training.preparation import StepRange
from tests.ranks import pretrain_main

#: <sched.h>
CLONE_NEWNS, CLONE_NEWUSER = 0x0002_0000, 0x1000_0000
#: More than a ledger, a metrics.jsonl or a small file of a checkpoint needs, less than a shard.
SMALL_FILE_BYTES = 100_000


@contextmanager
def replaced(owner: type, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """Give a class another method inside the block."""
    original = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def before_steps(act: Callable[[int], None]) -> Iterator[None]:
    """Call `act` with the number of each step before it begins."""
    begin_step = Interval.begin_step

    def begin(interval: Interval, step: StepRange) -> None:
        act(step.step)
        begin_step(interval, step)

    with replaced(Interval, "begin_step", begin):
        yield


@contextmanager
def before_shards(act: Callable[[], None]) -> Iterator[None]:
    """Call `act`, in the thread that writes, before each file of a checkpoint."""
    create_stream = HashingFiles.create_stream

    def create(files: HashingFiles, path: Path, mode: str) -> Any:
        act()
        return create_stream(files, path, mode)

    with replaced(HashingFiles, "create_stream", create):
        yield


@contextmanager
def before_copies(act: Callable[[], None]) -> Iterator[None]:
    """Call `act`, in the thread that writes, before it copies the tensors of a checkpoint."""
    copy = _Planner.copy

    def copy_later(planner: _Planner, *arguments: Any) -> None:
        act()
        copy(planner, *arguments)

    with replaced(_Planner, "copy", copy_later):
        yield


def limit_files(num_bytes: int) -> None:
    """Let the system refuse files of this process above a size; -1 for no limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))


@contextmanager
def limited_files(num_bytes: int) -> Iterator[None]:
    """Refuse files above a size inside the block."""
    limit_files(num_bytes)
    try:
        yield
    finally:
        limit_files(-1)


@contextmanager
def small_files(steps: range) -> Iterator[None]:
    """Refuse large files from the first of `steps` to the last."""
    with (
        limited_files(-1),
        before_steps(lambda step: limit_files(SMALL_FILE_BYTES if step in steps else -1)),
    ):
        yield


def train_with_small_files(arguments: Sequence[str], rank: int, first: int, last: int) -> None:
    """Run pretrain; one rank may write no large file in some steps."""
    if os.environ["RANK"] != str(rank):
        return pretrain_main(arguments)
    with small_files(range(first, last + 1)):
        pretrain_main(arguments)


def train_slowly(arguments: Sequence[str], run_dir: Path) -> None:
    """Run pretrain; all checkpoints but the first take a minute."""

    def wait() -> None:
        if RunFolder(run_dir).newest_checkpoint() is not None:
            time.sleep(60.0)

    with before_shards(wait):
        pretrain_main(arguments)


def may_mount() -> bool:
    """Tell whether this user may mount a file system that only a process of its own sees."""
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def train_on_small_disk(
    arguments: Sequence[str], disk: Path, num_bytes: int, free: Mapping[int, int], copy: Path
) -> None:
    """Run pretrain with `disk` on a file system of its own, and then copy the disk to `copy`.

    `free` are bytes that are left for the run from a step on.
    """
    _mount(disk, num_bytes)
    ballast = disk / "ballast"

    def fill(step: int) -> None:
        if step not in free:
            return
        ballast.unlink(missing_ok=True)
        left = os.statvfs(disk)
        count = left.f_bavail * left.f_frsize - free[step]
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, count)

    try:
        with before_steps(fill):
            pretrain_main(arguments)
    finally:
        ballast.unlink(missing_ok=True)
        subprocess.run(["cp", "-r", disk, copy], check=True)


def _mount(folder: Path, num_bytes: int) -> None:
    """Mount a tmpfs that ends with this process, whose only thread this is."""
    user, group = os.getuid(), os.getgid()
    system = ctypes.CDLL(None, use_errno=True)
    if system.unshare(CLONE_NEWNS | CLONE_NEWUSER) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", folder], check=True)


def may_mount_images() -> bool:
    """Tell whether this user may mount images of disks (ext4, through a loop device)."""
    if os.getuid() != 0 or any(shutil.which(name) is None for name in ("mkfs.ext4", "e2fsck")):
        return False
    command = ["unshare", "-m", "losetup", "--find"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def train_on_failing_disk(
    arguments: Sequence[str], image: Path, disk: Path, copy: Path, *, fails: bool
) -> None:
    """Run pretrain with the file system in `image` at `disk`, and then copy the disk to `copy`.

    If it `fails`, the kernel finds an error in it after the first checkpoint and makes it
    read-only, under files that are open.
    """
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-o", "loop,errors=remount-ro", image, disk], check=True)
    mounts = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
    (device,) = (mount[0] for mount in mounts if mount[1] == str(disk))
    switch = Path("/sys/fs/ext4") / Path(device).name / "trigger_fs_error"
    run = RunFolder(disk / "run")

    def fail(_: int) -> None:
        if fails and run.newest_checkpoint() is not None:
            switch.write_text("1")

    try:
        with before_steps(fail):
            pretrain_main(arguments)
    finally:
        subprocess.run(["cp", "-r", disk, copy], check=True)
