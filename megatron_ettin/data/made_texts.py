"""Made texts on which implementations of a tokenizer are compared."""

import itertools
import random  # noqa: TID251 (drawn with a fixed seed)

from megatron_ettin.data.tokenize import SPECIAL_TOKENS, Tokenizer

#: Texts that `made_texts` returns.
NUM_MADE_TEXTS = 500


def made_texts(tokenizer: Tokenizer) -> list[str]:
    """Return texts of characters and pieces at which implementations of a tokenizer may differ."""
    random_ = random.Random(0)
    added = [*SPECIAL_TOKENS, *tokenizer.added_tokens]
    pieces = [
        *added, *(f" {token} " for token in added), "'s", "'LL", "don't", " ", "  ", "\n", "\r\n",
        "\t", "\x00", "\x85", "\xa0", "\u200b", "\u2028", "\u3000", "\ufeff", "\ufb01", "\u212b",
        "\u1100\u1161\u11a8", "\u0958", "\u0915\u093c", "123", "\uff11\uff12", "\n\n b", "    ",
    ]  # fmt: skip
    kinds = [
        [chr(code) for code in range(32, 127)],
        pieces,
        [f"e{chr(code)}" for code in range(0x300, 0x370)],
        [chr(code) for code in random_.sample(range(0x80, 0x3000), 1000)],
        # All of Unicode but the surrogates.
        [chr(n + 0x800 * (n >= 0xD800)) for n in random_.sample(range(0x110000 - 0x800), 3000)],
    ]
    pool = [part for kind in kinds for part in kind]
    # Each kind is drawn as often as its share says, whatever its size.
    shares = (0.4, 0.2, 0.1, 0.15, 0.15)
    weights = [share / len(kind) for kind, share in zip(kinds, shares, strict=True) for _ in kind]
    totals = list(itertools.accumulate(weights))
    return [
        "".join(random_.choices(pool, cum_weights=totals, k=random_.randrange(1, 60)))
        for _ in range(NUM_MADE_TEXTS)
    ]
