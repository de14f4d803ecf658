import os
from collections.abc import Callable, Sequence
from typing import type_check_only

import numpy as np
from numpy.typing import NDArray

@type_check_only
class _ExtensionType(type): ...

class TokenFileBuilder(metaclass=_ExtensionType):
    def __init__(self, prefix: str | os.PathLike[str], dtype: str) -> None: ...
    def add(
        self,
        tokens: NDArray[np.int64] | NDArray[np.int32] | NDArray[np.uint32] | NDArray[np.uint16],
    ) -> None: ...
    def add_many(
        self,
        tokens: NDArray[np.int64] | NDArray[np.int32] | NDArray[np.uint32] | NDArray[np.uint16],
        lengths: NDArray[np.int64] | NDArray[np.int32],
    ) -> None: ...
    def commit(self, companion: str | os.PathLike[str] | None = None) -> None: ...
    def abort(self) -> None: ...
    @property
    def num_documents(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...

class TokenFile(metaclass=_ExtensionType):
    def __init__(self, prefix: str | os.PathLike[str], *, check: bool = True) -> None: ...
    @property
    def prefix(self) -> str: ...
    @property
    def num_documents(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def lengths(self) -> NDArray[np.int32] | NDArray[np.int64]: ...
    def read_lengths(self, first: int, end: int) -> NDArray[np.int64]: ...
    def tokens(
        self, document: int, offset: int = 0, length: int | None = None
    ) -> NDArray[np.int64]: ...
    def check_tokens(self, vocab_size: int) -> None: ...

class Permutation(metaclass=_ExtensionType):
    def __init__(self, n: int, key: int) -> None: ...
    def forward(self, index: NDArray[np.int64]) -> NDArray[np.int64]: ...
    def inverse(self, index: NDArray[np.int64]) -> NDArray[np.int64]: ...

class PhaseOrder(metaclass=_ExtensionType):
    def __init__(
        self,
        *,
        seed: int,
        source_ids: Sequence[int],
        quotas: Sequence[int],
        rows: Sequence[int],
        drawn: Sequence[int],
    ) -> None: ...
    def locate(
        self, n: NDArray[np.int64]
    ) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]: ...
    def find(
        self,
        source_slot: NDArray[np.int32],
        epoch: NDArray[np.int64],
        row: NDArray[np.int64],
    ) -> NDArray[np.int64]: ...
    def drawn_after(self, n: int) -> NDArray[np.int64]: ...

class RowPlan(metaclass=_ExtensionType):
    def __init__(self, path: str | os.PathLike[str], file: TokenFile) -> None: ...
    @property
    def seq_length(self) -> int: ...
    @property
    def pack(self) -> str: ...
    @property
    def specials(self) -> str: ...
    @property
    def min_doc_tokens(self) -> int: ...
    @property
    def max_segments_per_row(self) -> int: ...
    @property
    def block_documents(self) -> int: ...
    @property
    def first_document(self) -> int: ...
    @property
    def end_document(self) -> int: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_documents(self) -> int: ...
    @property
    def dropped_documents(self) -> int: ...
    @property
    def dropped_tokens(self) -> int: ...
    @property
    def cut_documents(self) -> int: ...
    def segments(
        self, rows: NDArray[np.int64]
    ) -> tuple[
        NDArray[np.int64],
        NDArray[np.int64],
        NDArray[np.int64],
        NDArray[np.int32],
        NDArray[np.bool_],
        NDArray[np.bool_],
        NDArray[np.bool_],
    ]: ...
    def row_tokens(self, rows: NDArray[np.int64]) -> NDArray[np.int32]: ...
    def find(self, document: int) -> NDArray[np.int64]: ...

def build_row_plan(
    file: TokenFile,
    path: str | os.PathLike[str],
    *,
    first_document: int,
    end_document: int,
    seq_length: int,
    pack: str,
    specials: str,
    min_doc_tokens: int,
    max_segments_per_row: int,
    block_documents: int = 65536,
    bodies: bool = True,
    threads: int = 0,
    progress: Callable[[int], object] | None = None,
) -> None: ...
def counter_key(seed: int, purpose: int, words: Sequence[int]) -> int: ...
def counter_draws(key: int, first: int, count: int) -> NDArray[np.uint64]: ...
def permutation_key(seed: int, source: int, epoch: int) -> int: ...
def blend_table(quotas: Sequence[int]) -> tuple[NDArray[np.int32], NDArray[np.int32]]: ...
def assemble_rows(
    plans: Sequence[RowPlan],
    source_slot: NDArray[np.int32],
    row: NDArray[np.int64],
    *,
    seq_length: int,
    max_segments_per_row: int,
    cls_id: int,
    sep_id: int,
    pad_id: int,
) -> tuple[
    NDArray[np.int64],
    NDArray[np.int64],
    NDArray[np.int32],
    NDArray[np.uint8],
    NDArray[np.int64],
]: ...
def mask_tokens(
    tokens: NDArray[np.int64],
    g: NDArray[np.int64],
    *,
    seq_length: int,
    mask_seed: int,
    mask_rate: float,
    mask_id: int,
    vocab_size: int,
    special_ids: Sequence[int],
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]: ...
def dropout_factors(
    g: NDArray[np.int64],
    *,
    seq_length: int,
    channels: int,
    seed: int,
    layer: int,
    rate: float,
    first_slot: int = 0,
    num_slots: int | None = None,
) -> NDArray[np.float32]: ...
def initial_weights(
    name: str,
    seed: int,
    begin: int,
    count: int,
    *,
    std: float,
    cutoff_std: float = 2.0,
) -> NDArray[np.float32]: ...
def uniform_weights(
    name: str, seed: int, begin: int, count: int, low: float, high: float
) -> NDArray[np.float32]: ...
def xxh3_64(data: bytes | bytearray | memoryview | NDArray[np.generic]) -> int: ...
def xxh3_128(data: bytes | bytearray | memoryview | NDArray[np.generic]) -> int: ...
def order_digests(
    plans: Sequence[RowPlan],
    g: NDArray[np.int64],
    source_ids: NDArray[np.uint64],
    source_slot: NDArray[np.int32],
    epoch: NDArray[np.int64],
    row: NDArray[np.int64],
) -> NDArray[np.uint64]: ...
def token_digests(
    g: NDArray[np.int64],
    tokens: NDArray[np.int64],
    cu_seqlens: NDArray[np.int32],
    num_tokens: NDArray[np.int64],
    seq_length: int,
) -> NDArray[np.uint64]: ...
def mask_digests(
    g: NDArray[np.int64],
    inputs: NDArray[np.int64],
    labels: NDArray[np.int64],
    loss_mask: NDArray[np.bool_],
    num_tokens: NDArray[np.int64],
    seq_length: int,
) -> NDArray[np.uint64]: ...
