"""Checks of fields that several sections share."""

from __future__ import annotations


def require_positive(section: str, name: str, value: float) -> None:
    """Raise ValueError naming the field unless `value` > 0."""
    if not value > 0:
        raise ValueError(f"{section}.{name}: {value} is not positive")
