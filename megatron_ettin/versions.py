"""Versions of the packages that decide a run's numbers, and the revision of this one."""

import json
import subprocess
from importlib import metadata
from pathlib import Path

#: Packages whose versions a checkpoint records.
PACKAGES = (
    "megatron-ettin",
    "torch",
    "megatron-core",
    "transformer-engine",
    "numpy",
    "tokenizers",
)


def installed_version(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that decide numbers, as installed."""
    return {name: installed_version(name) or "not installed" for name in PACKAGES}


def source_revision(folder: Path = Path(__file__).parent) -> str | None:
    """Return the Git commit of this package's source, 40 hexadecimal digits.

    "-dirty" follows if files that Git knows were altered. It is the commit of the checkout that the
    package runs from, or of the repository that pip installed it from; None if there is neither.
    """
    try:
        # A package that lies in somebody else's checkout, such as an environment in it, is unknown.
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")
        return _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return _installed_commit()


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, check=True, text=True
    )
    return done.stdout.strip()


def _installed_commit() -> str | None:
    """Return the commit that pip has recorded (PEP 610); None if it installed a release."""
    try:
        recorded = metadata.distribution("megatron-ettin").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None
    commit: str | None = json.loads(recorded or "{}").get("vcs_info", {}).get("commit_id")
    return commit
