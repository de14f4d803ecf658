"""Two rows made by hand, with every kind of segment."""

import numpy as np

from megatron_ettin.rows import CUT_PIECE, LAST_PIECE, PADDING, Rows, TokenIds

IDS = TokenIds(vocab_size=100, unk=95, cls=96, sep=97, pad=98, mask=99)
SEQ_LENGTH, SEGMENTS = 16, 3


def make_rows(first_g: int = 5) -> Rows:
    """Return two rows: a cut piece that fills its row; two whole documents and padding."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 95, 2 * SEQ_LENGTH)
    for cls, sep in ((0, 15), (16, 20), (21, 27)):
        tokens[[cls, sep]] = IDS.cls, IDS.sep
    tokens[28:] = IDS.pad
    lengths = [16, 0, 0, 0, 5, 7, 4, 0]
    return Rows(
        g=np.array([first_g, first_g + 1]),
        tokens=tokens,
        position_ids=np.concatenate([np.arange(n) for n in lengths]),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        segment_kind=np.array([CUT_PIECE, 0, 0, 0, LAST_PIECE, LAST_PIECE, PADDING, 0], np.uint8),
        num_tokens=np.array([16, 12]),
        seq_length=SEQ_LENGTH,
        specials="add",
    )
