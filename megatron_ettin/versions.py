"""Versions of the packages that decide a run's numbers."""

from importlib import metadata

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
