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


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that decide numbers, as installed."""
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            installed[package] = "not installed"
    return installed
