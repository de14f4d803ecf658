"""The one door to the C++ extension: nobody else imports `_native`.

The door opens on the extension's own names, whose docstrings are in csrc/bindings_*.cc; only
`permute` and `unpermute` add something. numpy in, numpy out; arrays are 1-D, C-contiguous copies
unless said otherwise. Long calls release the GIL. A bad argument raises ValueError (a bad index
IndexError, a lossy dtype TypeError) naming it; the file system raises OSError. docs/order.md
specifies what the functions compute.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megatron_ettin._native import (
    GramFinder,
    PackedRows,
    Permutation,
    PhaseOrder,
    Purpose,
    RowPieces,
    RowPlan,
    TextFinder,
    TextHasher,
    TokenBytes,
    TokenCorpus,
    TokenFile,
    TokenFileBuilder,
    WordRules,
    assemble_rows,
    blend_table,
    build_row_plan,
    counter_draws,
    counter_key,
    dropout_factors,
    find_losses_above,
    find_texts,
    initial_weights,
    mask_digests,
    mask_tokens,
    order_digests,
    page_headers,
    permutation_key,
    split_trained_losses,
    token_digests,
    uniform_weights,
    xxh3_64,
    xxh3_128,
)

__all__ = [
    "GramFinder",
    "PackedRows",
    "PhaseOrder",
    "Purpose",
    "RowPieces",
    "RowPlan",
    "TextFinder",
    "TextHasher",
    "TokenBytes",
    "TokenCorpus",
    "TokenFile",
    "TokenFileBuilder",
    "WordRules",
    "assemble_rows",
    "blend_table",
    "build_row_plan",
    "counter_draws",
    "counter_key",
    "dropout_factors",
    "find_losses_above",
    "find_texts",
    "initial_weights",
    "mask_digests",
    "mask_tokens",
    "order_digests",
    "page_headers",
    "permutation_key",
    "permute",
    "split_trained_losses",
    "token_digests",
    "uniform_weights",
    "unpermute",
    "xxh3_64",
    "xxh3_128",
]


@lru_cache(maxsize=16)
def _permutation(n: int, key: int) -> Permutation:
    # A permutation of at most 65,536 elements is a table that takes longer to fill than to use.
    return Permutation(n, key)


def permute(n: int, key: int, index: NDArray[np.int64]) -> NDArray[np.int64]:
    """Apply the keyed permutation of [0, n), n <= 2^62, to indices int64[m]."""
    return _permutation(n, key).forward(index)


def unpermute(n: int, key: int, index: NDArray[np.int64]) -> NDArray[np.int64]:
    """Map values in [0, n), int64[m], back to their indices: undo `permute`."""
    return _permutation(n, key).inverse(index)
