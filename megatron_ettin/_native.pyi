"""
C++ algorithms of megatron_ettin; use megatron_ettin.native.
"""

from __future__ import annotations

import collections.abc
import enum
import os
import typing

import numpy
import numpy.typing

__all__: list[str] = [
    "GramFinder",
    "PackedRows",
    "Permutation",
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
    "split_trained_losses",
    "token_digests",
    "uniform_weights",
    "xxh3_128",
    "xxh3_64",
]

class TokenFileBuilder:
    """
    Write a Megatron .bin/.idx pair, streaming, in constant memory.

    PREFIX.bin.tmp and PREFIX.idx.tmp are written; commit() renames them, the .idx last. An object that
    is destroyed uncommitted removes them. dtype: 'uint16' or 'int32'. For one thread at a time. Raises
    OSError for the file system, ValueError if another writer holds the prefix.
    """
    def __init__(self, prefix: os.PathLike[str] | str, dtype: str) -> None: ...
    def abort(self) -> None:
        """
        Remove what was written; no effect after commit() or a second time.
        """
    def add(
        self,
        tokens: numpy.typing.NDArray[numpy.uint16]
        | numpy.typing.NDArray[numpy.int32]
        | numpy.typing.NDArray[numpy.uint32]
        | numpy.typing.NDArray[numpy.int64],
    ) -> None:
        """
        Add one document: its token ids, 1-D.

        Raises ValueError naming document, position and id if an id does not fit the dtype; nothing is added
        then.
        """
    def add_many(
        self,
        tokens: numpy.typing.NDArray[numpy.uint16]
        | numpy.typing.NDArray[numpy.int32]
        | numpy.typing.NDArray[numpy.uint32]
        | numpy.typing.NDArray[numpy.int64],
        lengths: numpy.typing.NDArray[numpy.int64],
    ) -> None:
        """
        Add documents stored end to end: ids as in add(), lengths that sum to their number.
        """
    def commit(self, companion: os.PathLike[str] | str | None = None) -> None:
        """
        Publish the pair durably, the .idx last; replaces an existing pair.

        companion: a file of the same folder that describes the pair. COMPANION.tmp, written and synced by
        the caller, takes its name before the .idx does.
        """
    @property
    def num_documents(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...

class TokenFile:
    """
    Read a Megatron .bin/.idx pair through memory maps.

    Opening checks the index against itself and the size of the .bin; check=False reads the header and
    the sizes only, for a pair that was checked before. Raises OSError if a file cannot be opened,
    ValueError naming file, byte and remedy if the pair is not valid.
    """
    def __init__(self, prefix: os.PathLike[str] | str, *, check: bool = True) -> None: ...
    def check_tokens(self, vocab_size: int) -> None:
        """
        Read the whole .bin; ValueError naming file, byte, document, position and id of the first id outside
        [0, vocab_size).
        """
    def read_lengths(self, first: int, end: int) -> numpy.typing.NDArray[numpy.int64]:
        """
        Copy the tokens per document of documents [first, end): int64[end - first].

        For passes over many: the file is read ahead and stays out of this process's memory. IndexError
        outside.
        """
    def tokens(
        self, document: int, offset: int = 0, length: int | None = None
    ) -> numpy.typing.NDArray[numpy.int64]:
        """
        Copy `length` tokens of one document from `offset` on, or all that follow: int64[length].

        IndexError outside of the document.
        """
    @property
    def dtype(self) -> str:
        """
        'uint16' or 'int32'.
        """
    @property
    def lengths(self) -> numpy.typing.NDArray[numpy.int32] | numpy.typing.NDArray[numpy.int64]:
        """
        Tokens per document, read-only.

        An int32 view of the .idx if each document is one sequence, else int64 sums that are computed on
        each access. For single documents: each page that is touched is read alone.
        """
    @property
    def num_documents(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def prefix(self) -> str: ...

class TokenCorpus:
    """
    Read one .bin/.idx pair or several, its shards, as one corpus: documents are numbered through.

    Shards may be empty, and may have different dtypes. ValueError if there is none.
    """
    def __init__(self, shards: collections.abc.Sequence[TokenFile]) -> None: ...
    def length(self, document: int) -> int:
        """
        Return the tokens of one document; IndexError if there is no such document.
        """
    def read_lengths(self, first: int, end: int) -> numpy.typing.NDArray[numpy.int64]:
        """
        Copy the tokens per document of documents [first, end), as TokenFile.read_lengths does.
        """
    def tokens(
        self, document: int, offset: int = 0, length: int | None = None
    ) -> numpy.typing.NDArray[numpy.int64]:
        """
        Copy tokens of one document, as TokenFile.tokens does.
        """
    @property
    def dtype(self) -> str:
        """
        'int32' if a shard has it, else 'uint16'.
        """
    @property
    def num_documents(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def shards(self) -> list[TokenFile]:
        """
        The pairs, in the order of their documents.
        """

class Purpose(enum.IntEnum):
    """
    Uses of a key of the counter generator (docs/order.md, section 1).

    A purpose never changes its meaning; a new use takes a new number.
    """

    PERMUTATION = 1
    MASK = 2
    NORMAL_WEIGHTS = 3
    UNIFORM_WEIGHTS = 4
    DROPOUT = 5
    UNSEEN = 6
    VERIFY = 7
    NOISE = 8
    MIXTURE = 9

class Permutation:
    """
    Keyed permutation of [0, n), 1 <= n <= 2^62, with O(1) inverse (docs/order.md, section 2).

    Raises ValueError for another n. Up to n = 65,536 it is a table that takes about 0.3 ms to fill.
    """
    def __init__(self, n: int, key: int) -> None: ...
    def forward(
        self, index: numpy.typing.NDArray[numpy.int64]
    ) -> numpy.typing.NDArray[numpy.int64]:
        """
        Map indices int64[m] in [0, n) to values int64[m]; IndexError outside.
        """
    def inverse(
        self, index: numpy.typing.NDArray[numpy.int64]
    ) -> numpy.typing.NDArray[numpy.int64]:
        """
        Map values back to their indices: undo `forward`.
        """

class PhaseOrder:
    """
    The order of rows inside one phase: a blend table, then a keyed permutation per epoch.

    One value per source: `source_ids` (u64, enter the key), `quotas` (rows per blend period; they
    sum to the period, a power of two), `rows` (of the source's pool), `drawn` (rows drawn from that
    pool before the phase). Raises ValueError naming the bad entry (docs/order.md, section 4).
    """
    def __init__(
        self,
        *,
        seed: int,
        source_ids: collections.abc.Sequence[int],
        quotas: collections.abc.Sequence[int],
        rows: collections.abc.Sequence[int],
        drawn: collections.abc.Sequence[int],
    ) -> None: ...
    def drawn_after(self, n: int) -> numpy.typing.NDArray[numpy.int64]:
        """
        Count the rows drawn from each pool after the first n rows of the phase, `drawn` included.
        """
    def find(
        self,
        source_index: numpy.typing.NDArray[numpy.int32],
        epoch: numpy.typing.NDArray[numpy.int64],
        row: numpy.typing.NDArray[numpy.int64],
    ) -> numpy.typing.NDArray[numpy.int64]:
        """
        Undo `locate`: n, int64[m], -1 where the row was drawn before the phase.

        ValueError names the entry that is out of range.
        """
    def locate(
        self, n: numpy.typing.NDArray[numpy.int64]
    ) -> tuple[
        numpy.typing.NDArray[numpy.int32],
        numpy.typing.NDArray[numpy.int64],
        numpy.typing.NDArray[numpy.int64],
    ]:
        """
        Return (source_index, epoch, row) of the rows n >= 0 of the phase, int64[m].

        source_index: int32[m], which of the phase's sources. epoch: int64[m], passes over the source's pool
        that were complete before. row: int64[m], row of the pool. ValueError names an n that is < 0.
        """

class RowPieces:
    """
    Pieces of m rows, by document inside a row: n pieces in all.

    Row i has the pieces splits[i] to splits[i + 1].
    """
    @property
    def cls(self) -> numpy.typing.NDArray[numpy.bool]:
        """
        bool[n]: it carries an added [CLS] too.
        """
    @property
    def document(self) -> numpy.typing.NDArray[numpy.int64]:
        """
        int64[n]: document of the corpus.
        """
    @property
    def ends_document(self) -> numpy.typing.NDArray[numpy.bool]:
        """
        bool[n]: it holds the last slot of its document.
        """
    @property
    def length(self) -> numpy.typing.NDArray[numpy.int32]:
        """
        int32[n]: its corpus tokens, without specials.
        """
    @property
    def offset(self) -> numpy.typing.NDArray[numpy.int64]:
        """
        int64[n]: its first token of the document.
        """
    @property
    def sep(self) -> numpy.typing.NDArray[numpy.bool]:
        """
        bool[n]: it carries an added [SEP] too.
        """
    @property
    def splits(self) -> numpy.typing.NDArray[numpy.int64]:
        """
        int64[m + 1]: first piece of each row, then n.
        """

class RowPlan:
    """
    A plan file, memory-mapped, with the corpus whose documents it packs into rows.

    Opening checks all but the rows themselves; those of 65,536 documents are checked when first used.
    Raises OSError if the file cannot be opened, ValueError naming file, byte and remedy if it is
    damaged or was built for other documents. Threads may share a plan.
    """
    def __init__(self, path: os.PathLike[str] | str, corpus: TokenFile | TokenCorpus) -> None: ...
    def find(self, document: int) -> numpy.typing.NDArray[numpy.int64]:
        """
        Return the rows that hold a piece of a document, ascending: int64[k], empty if it was dropped.

        IndexError if the plan is for other documents.
        """
    def pieces(self, rows: numpy.typing.NDArray[numpy.int64]) -> RowPieces:
        """
        Return the pieces of rows, int64[m]; IndexError outside the plan.
        """
    def row_tokens(
        self, rows: numpy.typing.NDArray[numpy.int64]
    ) -> numpy.typing.NDArray[numpy.int32]:
        """
        Count the slots of rows, int64[m], that are not padding: int32[m].
        """
    @property
    def block_documents(self) -> int: ...
    @property
    def cut_documents(self) -> int:
        """
        Number of documents of more than one piece.
        """
    @property
    def dropped_documents(self) -> int: ...
    @property
    def dropped_tokens(self) -> int: ...
    @property
    def end_document(self) -> int: ...
    @property
    def first_document(self) -> int: ...
    @property
    def max_segments_per_row(self) -> int: ...
    @property
    def min_doc_tokens(self) -> int: ...
    @property
    def num_documents(self) -> int:
        """
        Number of documents that were kept.
        """
    @property
    def num_rows(self) -> int: ...
    @property
    def num_tokens(self) -> int:
        """
        Count of slots that are not padding: corpus tokens and added specials.
        """
    @property
    def pack(self) -> str: ...
    @property
    def seq_length(self) -> int: ...
    @property
    def specials(self) -> str: ...

class PackedRows:
    """
    Packed stream of m rows of L slots, each of S + 1 segments.

    The segments of a row are its pieces (one segment for all of them if its plan's pack is 'concat'),
    its padding tail, and empty ones.
    """
    @property
    def cu_seqlens(self) -> numpy.typing.NDArray[numpy.int32]:
        """
        int32[m*(S+1) + 1], non-decreasing, over the whole stream.
        """
    @property
    def num_tokens(self) -> numpy.typing.NDArray[numpy.int64]:
        """
        int64[m], slots that are not padding.
        """
    @property
    def position_ids(self) -> numpy.typing.NDArray[numpy.int64]:
        """
        int64[m*L], from 0 in each segment, the padding tail included.
        """
    @property
    def segment_kind(self) -> numpy.typing.NDArray[numpy.uint8]:
        """
        uint8[m*(S+1)]: 0 padding or empty, 1 a piece that does not end its document, 2 one that does.
        """
    @property
    def tokens(self) -> numpy.typing.NDArray[numpy.int64]:
        """
        int64[m*L].
        """

class TextHasher:
    """
    SHA-256 of many texts in one call, by the OpenSSL that `library`, a loaded library, is linked to.

    OSError if it is not loaded or offers no SHA-256. The path is that of Python's own `_hashlib`.
    """
    def __init__(self, library: str) -> None: ...
    def sha256(self, texts: list[str]) -> numpy.typing.NDArray[numpy.uint8]:
        """
        Return [n, 32]: the SHA-256 of the UTF-8 of each text. The list must not change meanwhile.
        """

class TokenBytes:
    """
    The bytes of each token of a vocabulary, whose texts are the joined bytes of their tokens.

    None stands for an id without text: a special token, or a hole.
    """
    def __init__(self, tokens: collections.abc.Iterable[bytes | None]) -> None: ...
    def __len__(self) -> int: ...

class TextFinder:
    """
    Find the documents of a corpus that contain a text, however it was cut into tokens.

    counts: int64, one for each token: how often it occurs, roughly; for speed only. ValueError if the
    text is empty.
    """
    def __init__(
        self, vocabulary: TokenBytes, text: bytes, counts: numpy.typing.NDArray[numpy.int64]
    ) -> None: ...
    def find(
        self, corpus: TokenCorpus, first: int, end: int, threads: int = 0
    ) -> numpy.typing.NDArray[numpy.int64]:
        """
        Return [n, 2]: each of the documents [first, end) that contains the text, and how often it does.

        Occurrences may overlap. A token without text is part of none. threads: 0 for one a core. ValueError
        naming file, document, position and id of a token outside the vocabulary; IndexError outside.
        """
    def find_in(self, corpus: TokenCorpus, document: int) -> numpy.typing.NDArray[numpy.int64]:
        """
        Return [n, 2]: for each occurrence in a document its tokens [begin, end), the fewest that hold it.
        """

class WordRules:
    """
    Rules by which a text becomes words, character by character.

    rules: uint8[0x110000], for each character 0: a letter of a word, 1: ends a word, 2: left out, 3: a
    word of its own. replaced: what stands in a word in place of a character.
    """
    def __init__(
        self, rules: numpy.typing.NDArray[numpy.uint8], replaced: collections.abc.Mapping[int, str]
    ) -> None: ...
    def words(self, text: str) -> str:
        """
        Return the words of a text with a space between two of them.
        """

class GramFinder:
    """
    Find sequences of n words of some passages in the documents of a corpus, all in one pass.

    Equal sequences have one number; they are counted from 0 in the order in which they first occur.
    Memory: 24 bytes, 8 to 16 of a table and 2 to 4 of a filter for each, and the words of the passages.
    ValueError if n is not 1 to 1,024.
    """
    def __init__(
        self,
        vocabulary: TokenBytes,
        rules: WordRules,
        passages: collections.abc.Sequence[str],
        n: int,
    ) -> None: ...
    def find(
        self, corpus: TokenCorpus, first: int, end: int, threads: int = 0
    ) -> numpy.typing.NDArray[numpy.int64]:
        """
        Return [m, 4]: document, number of the sequence, tokens [begin, end), for each occurrence.

        By documents [first, end), then by the last word; the tokens are the fewest that hold it. A token
        without text ends a sequence. threads and errors as in TextFinder.find.
        """
    def grams(self, passage: int) -> numpy.typing.NDArray[numpy.int64]:
        """
        Return int64[max(0, words - n + 1)]: the number of the sequence that begins at each word.
        """
    def words(self, passage: int) -> str:
        """
        Return the words of a passage with a space between two of them.
        """
    @property
    def num_grams(self) -> int:
        """
        Number of different sequences.
        """

def assemble_rows(
    plans: collections.abc.Sequence[RowPlan],
    source_index: numpy.typing.NDArray[numpy.int32],
    row: numpy.typing.NDArray[numpy.int64],
    *,
    seq_length: int,
    max_segments_per_row: int,
    cls_id: int,
    sep_id: int,
    pad_id: int,
) -> PackedRows:
    """
    Build the packed stream of m rows of L = seq_length slots, S = max_segments_per_row.

    `plans` holds one entry per source. Row r is row[r] (int64[m]) of plans[source_index[r]] (int32[m]),
    or idle (padding only) where both are -1. Special tokens are added where the plan says so
    (docs/order.md, section 6).

    Raises:
        ValueError: naming the plan that disagrees with the shape, or the row without a source.
        IndexError: a row is outside of its plan.
    """

def blend_table(
    quotas: collections.abc.Sequence[int],
) -> tuple[numpy.typing.NDArray[numpy.int32], numpy.typing.NDArray[numpy.int32]]:
    """
    Return (source, rank) at each position of a blend period: int32[sum(quotas)] each.

    `rank` counts the earlier positions of the same source (docs/order.md, section 3).

    Raises:
        ValueError: a quota is < 1, or they do not sum to a power of two <= 2^20.
    """

def build_row_plan(
    corpus: TokenFile | TokenCorpus,
    path: os.PathLike[str] | str,
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
    progress: collections.abc.Callable[[int], typing.Any] | None = None,
) -> None:
    """
    Plan the rows of documents [first_document, end_document) of a corpus, into the file `path`.

    It appears when it is complete; a file that is there already stays. Its bytes depend on the lengths
    and the rules alone, whatever the number of threads (0: one per processor). Memory does not grow
    with the corpus: at most 32 bytes per document of the blocks at work, one of 65,536 documents per
    thread (docs/order.md, sections 5 and 11).

    Args:
        pack: 'bfd' (best-fit decreasing), 'concat' (one stream, cut into rows) or 'none' (each piece
            is a row).
        specials: 'add' puts [CLS] and [SEP] around pieces (concat: documents), 'present' nothing.
        max_segments_per_row: most pieces of a row; 1 for concat and none.
        bodies: False stores a table of the blocks only; RowPlan computes their rows when needed.
        progress: called about ten times a second with the number of documents done; may raise to
            give up.

    Raises:
        ValueError: naming the rule that is out of range or the document with an impossible length.
        OSError: the file cannot be written. Nothing is left then.
    """

def counter_draws(key: int, first: int, count: int) -> numpy.typing.NDArray[numpy.uint64]:
    """
    Return draws number first, first + 1, ... of a key: uint64[count].
    """

def counter_key(seed: int, purpose: int, words: collections.abc.Sequence[int]) -> int:
    """
    Return the 64-bit key of a family of draws (docs/order.md, section 1).

    All arguments are unsigned 64-bit; `purpose` is a Purpose.
    """

def dropout_factors(
    g: numpy.typing.NDArray[numpy.int64],
    *,
    seq_length: int,
    channels: int,
    seed: int,
    layer: int,
    rate: float,
    first_slot: int = 0,
    num_slots: int | None = None,
) -> numpy.typing.NDArray[numpy.float32]:
    """
    Return the factors of a layer's dropout for a stream of m rows of L = seq_length slots.

    A factor is a function of (seed, layer, g, position in the row, channel) alone: 0 with probability
    `rate` (rounded up to a multiple of 2^-16), else the reciprocal of the probability to be kept. In
    an idle row, g < 0 of int64[m], it is 1 (docs/order.md, section 7).

    Returns:
        float32[n * channels], slot by slot, for the n = num_slots slots from first_slot on; without
        num_slots, for all that follow first_slot.

    Raises:
        ValueError: naming the argument that is out of range.
    """

def find_losses_above(
    entries: numpy.typing.NDArray[numpy.uint64], limits: numpy.typing.NDArray[numpy.float32]
) -> tuple[numpy.typing.NDArray[numpy.int64], bool]:
    """
    Find rows by their mean loss in the entries of a file of row losses, uint64[n], in one pass.

    Returns:
        places: int64[k], ascending: rows with sum > tokens * limits[place], in float32.
        are_trained: as of split_trained_losses.

    Raises:
        ValueError: `limits`, float32[n], has another size.
    """

def find_texts(texts: list[str], characters: numpy.typing.NDArray[numpy.bool]) -> list[int]:
    """
    Return the indices of the texts with a character whose entry in bool[0x110000] is true.

    No ASCII character may be among them; the list must not change meanwhile.
    """

def initial_weights(
    name: str, seed: int, begin: int, count: int, *, std: float, cutoff_std: float = 2.0
) -> numpy.typing.NDArray[numpy.float32]:
    """
    Return elements [begin, begin + count) of a tensor drawn from a truncated normal: float32[count].

    The tensor is a function of (seed, name) alone: a slice equals the same range of the whole. The
    distribution is N(0, std^2) cut at +-cutoff_std * std; the cut lowers the variance, which is not
    corrected (docs/order.md, section 8).

    Raises:
        ValueError: begin or count is < 0, std is <= 0, or cutoff_std is outside (0, 7].
    """

def mask_digests(
    g: numpy.typing.NDArray[numpy.int64],
    inputs: numpy.typing.NDArray[numpy.int64],
    labels: numpy.typing.NDArray[numpy.int64],
    loss_mask: numpy.typing.NDArray[numpy.bool],
    num_tokens: numpy.typing.NDArray[numpy.int64],
    seq_length: int,
    weights: numpy.typing.NDArray[numpy.float32] | None = None,
) -> numpy.typing.NDArray[numpy.uint64]:
    """
    Hash what each of m rows shows a model and scores: uint64[m], low lanes.

    inputs, labels: int64[m*L]; loss_mask: bool[m*L]; g, num_tokens: int64[m]; weights: float32[m*L],
    all 1 if not given. Labels and weights are read where loss_mask is set. Padding is left out, and an
    idle row (g < 0) has value 0. The bytes are those of docs/order.md, section 10.

    Raises:
        ValueError: naming the row and slot of an id that is no u32, or of a scored label 2^32 - 1.
    """

def mask_tokens(
    tokens: numpy.typing.NDArray[numpy.int64],
    g: numpy.typing.NDArray[numpy.int64],
    *,
    seq_length: int,
    mask_seed: int,
    mask_rate: float,
    mask_id: int,
    vocab_size: int,
    special_ids: collections.abc.Sequence[int],
) -> tuple[numpy.typing.NDArray[numpy.int64], numpy.typing.NDArray[numpy.bool]]:
    """
    Mask m rows of L = seq_length slots by (mask_seed, g, position in the row) alone.

    A token of `tokens`, int64[m*L], is selected with probability `mask_rate` unless it is in
    `special_ids`, which must hold the padding id. Of the selected, 80 % become `mask_id`, 10 % a
    random id in [0, vocab_size), and 10 % stay. A row with g < 0, int64[m], is idle and stays as it is
    (docs/order.md, section 7).

    Returns:
        masked: int64[m*L], the input with its replacements.
        selected: bool[m*L]; the labels are the input tokens there.

    Raises:
        ValueError: naming the argument that is out of range or has another size.
    """

def order_digests(
    plans: collections.abc.Sequence[RowPlan],
    g: numpy.typing.NDArray[numpy.int64],
    source_ids: numpy.typing.NDArray[numpy.uint64],
    source_index: numpy.typing.NDArray[numpy.int32],
    epoch: numpy.typing.NDArray[numpy.int64],
    row: numpy.typing.NDArray[numpy.int64],
) -> numpy.typing.NDArray[numpy.uint64]:
    """
    Hash where each of m rows comes from: uint64[m, 2], low lane first; no token is read.

    `plans` and `source_ids` (uint64) hold one entry per source. Row i of the batch, number g[i] of the
    run, is row[i] of plans[source_index[i]] in epoch[i]: int64[m], but int32[m] for `source_index`. An
    idle row (g < 0) has value 0. The bytes are those of docs/order.md, section 10.

    Raises:
        ValueError: naming the entry that is out of range.
        IndexError: `row` is outside of its plan.
    """

def page_headers(
    path: os.PathLike[str] | str, begin: int, end: int
) -> numpy.typing.NDArray[numpy.int64]:
    """
    Read the headers of the data pages of a column chunk, the bytes [begin, end) of a Parquet file.

    Returns:
        int64[n, 5]: the header's first byte in the file, its bytes, those of the page after it,
        compressed and not, and the page's rows.

    Raises:
        ValueError: naming the byte where no header of a data page is.
        OSError: the file cannot be read.
    """

def permutation_key(seed: int, source: int, epoch: int) -> int:
    """
    Return the key of the permutation that orders one epoch of one source (u64 each).
    """

def split_trained_losses(
    entries: numpy.typing.NDArray[numpy.uint64],
) -> tuple[numpy.typing.NDArray[numpy.float32], numpy.typing.NDArray[numpy.uint32], bool]:
    """
    Split the entries of a file of row losses, uint64[n], in one pass (docs/ledger.md, section 7).

    Returns:
        sums: float32[n], summed losses.
        tokens: uint32[n], the tokens over which they are averaged.
        are_trained: every row was trained on, and has tokens and a finite sum; if not, the arrays mean
            nothing.
    """

def token_digests(
    g: numpy.typing.NDArray[numpy.int64],
    tokens: numpy.typing.NDArray[numpy.int64],
    cu_seqlens: numpy.typing.NDArray[numpy.int32],
    num_tokens: numpy.typing.NDArray[numpy.int64],
    seq_length: int,
) -> numpy.typing.NDArray[numpy.uint64]:
    """
    Hash the unmasked tokens of each of m rows: uint64[m, 2], low lane first.

    tokens: int64[m*L], with L = seq_length. cu_seqlens (int32[m*K + 1], the same number of segments K
    in each row) and num_tokens (int64[m]) are those of `assemble_rows`. Padding is left out, and an
    idle row (g < 0, int64[m]) has value 0. The bytes are those of docs/order.md, section 10.

    Raises:
        ValueError: naming the row whose segments do not end at its num_tokens, or whose token is no
            u32.
    """

def uniform_weights(
    name: str, seed: int, begin: int, count: int, low: float, high: float
) -> numpy.typing.NDArray[numpy.float32]:
    """
    Return elements [begin, begin + count) of a tensor uniform on [low, high]: float32[count].

    Raises:
        ValueError: begin or count is < 0, or low <= high does not hold.
    """

def xxh3_128(data: bytes | bytearray | memoryview | numpy.typing.NDArray[typing.Any]) -> int:
    """
    Return XXH3-128 (seed 0) of bytes or of any buffer that lies in one piece; else ValueError.
    """

def xxh3_64(data: bytes | bytearray | memoryview | numpy.typing.NDArray[typing.Any]) -> int:
    """
    Return XXH3-64 (seed 0) of bytes or of any buffer that lies in one piece; else ValueError.
    """
