"""Words of a text as they are compared between benchmarks and documents (decision 0023).

Letters are lowered, punctuation and symbols are left out, white space ends a word: GPT-3's rule
for 13-grams, and that of lm-evaluation-harness, for all of Unicode. A character of a script that
puts no spaces between words is a word of its own.
"""

from __future__ import annotations

import sys
import unicodedata
from functools import lru_cache

import numpy as np

from megatron_ettin.native import WordRules

#: Rules of native.WordRules.
LETTER, BREAK, DROPPED, WORD = range(4)
#: Characters of scripts without spaces: Thai and Lao, Myanmar, Khmer, then Han, kana and their
#: extensions.
SPACELESS = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x2E80, 0x312F),
    (0x31A0, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)


@lru_cache(maxsize=1)
def word_rules() -> WordRules:
    """Return the rules of all characters, by the Unicode tables of this Python."""
    rules = np.zeros(sys.maxunicode + 1, dtype=np.uint8)
    for first, last in SPACELESS:
        rules[first : last + 1] = WORD
    replaced = {}
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        if character.isspace():
            rules[code] = BREAK
        elif unicodedata.category(character)[0] in "PS":
            rules[code] = DROPPED
        elif (lowered := character.lower()) != character:
            replaced[code] = lowered
    return WordRules(rules, replaced)
