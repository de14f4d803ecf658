"""Row groups of a sidecar that may hold a name, by the Bloom filters that Parquet keeps."""

import glob
from collections.abc import Sequence
from pathlib import Path


def groups_that_may_hold(paths: Sequence[Path], column: str, value: str | bytes) -> list[list[int]]:
    """Return for each sidecar the row groups whose Bloom filter admits a value.

    Sidecars of earlier versions have no filters: all their groups are returned. DuckDB compares no
    checksums; the groups are read with theirs afterwards. ValueError names a damaged sidecar.
    """
    probe = (
        "SELECT row_group_id FROM parquet_bloom_probe(?, ?, ?) "
        "WHERE NOT bloom_filter_excludes ORDER BY row_group_id"
    )
    admitted = []
    # One connection for all: it takes longer to make than a probe.
    import duckdb  # by look-ups only: a machine that trains need not have it

    with duckdb.connect() as database:
        for path in paths:
            try:
                found = database.execute(probe, [glob.escape(str(path)), column, value])
                admitted.append([group for (group,) in found.fetchall()])
            except duckdb.Error as error:
                raise damaged_sidecar(path, str(error)) from error
    return admitted


def damaged_sidecar(path: Path, what: str) -> ValueError:
    """Return the error of a sidecar that is damaged, which says what to do."""
    return ValueError(
        f"{path}: damaged, or not written by tools/preprocess_data.py ({what}); remove it and run"
        " tools/preprocess_data.py again"
    )
