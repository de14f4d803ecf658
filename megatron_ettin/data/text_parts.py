"""Parts of long texts whose ids, end to end, are the ids of the whole text.

`tokenizers` takes 150 to 250 bytes of memory for each token, so that a text of 100 MB would take
gigabytes. A text may be cut where no step of its tokenizer looks across, and such places are known
for some tokenizers only. They are between a character that is no white space and a space (or a
line feed), because

- nothing composes with an ASCII character under NFC or NFD;
- each match of the splitting rules of GPT-2, Llama 3 and Qwen 2 that holds a character other than
  white space ends before the next space, and none looks at what stands before it;
- no added token holds such a pair of characters, or takes in what stands beside it.
"""

import functools
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_ettin.data.made_texts import made_texts
from megatron_ettin.data.tokenize import Tokenizer

#: Characters after which a text is cut at the next place.
PART_CHARACTERS = 2**16
#: Made texts that are cut at each place before a run; more would lengthen each start.
NUM_CHECKED_TEXTS = 100
# Llama 3 splits numbers into threes, Qwen 2 into digits. Their rules let a line feed join the
# punctuation before it.
_SPLITTING_RULES = tuple(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    + number
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for number in (r"\p{N}{1,3}", r"\p{N}")
)
# Characters that Unicode once called spaces, and a library's older table may still.
_NOT_SPACE = "[^\\s\u180e\u200b\ufeff]"


class TextCutter:
    """Cutter of texts for one tokenizer."""

    def __init__(self, characters: str) -> None:
        """Cut before one of `characters` that follows a character other than white space."""
        self._places = _places(characters)

    def parts(self, text: str, num_characters: int = PART_CHARACTERS) -> Iterator[str]:
        """Yield a text in parts of at least `num_characters`, cut at the next place after them."""
        begin = 0
        while place := self._places.search(text, begin + max(num_characters, 1) - 1):
            end = place.end() - 1
            yield text[begin:end]
            begin = end
        yield text[begin:]


@functools.cache
def find_cutter(tokenizer: Tokenizer) -> TextCutter | None:
    """Return the cutter for a tokenizer; None where no place to cut is known.

    Made texts, joined and cut at every place, must have the ids of the joined text.
    """
    characters = _cut_characters(json.loads(tokenizer.to_json()))
    if not characters:
        return None
    cutter = TextCutter(characters)
    # Joined in turns by each kind of white space, and by nothing.
    joints = itertools.cycle([" ", "\n", "", " \n", "\r\n", "  "])
    texts = made_texts(tokenizer)[:NUM_CHECKED_TEXTS]
    whole = "".join(text + joint for text, joint in zip(texts, joints, strict=False))
    ids = tokenizer.encode_batch([whole, *cutter.parts(whole, 1)])
    same = ids[0].tolist() == [number for of_part in ids[1:] for number in of_part.tolist()]
    return cutter if same else None


def grouped_parts(
    texts: Sequence[str], cutter: TextCutter | None, num_characters: int
) -> Iterator[tuple[list[str], list[int]]]:
    """Yield all parts of the texts in groups of at most `num_characters`, or of one larger part.

    With each group come the indices of the texts that its parts are of. Without a cutter, each text
    is one part.
    """
    group: list[str] = []
    owners: list[int] = []
    size = 0
    for index, text in enumerate(texts):
        for part in (text,) if cutter is None else cutter.parts(text):
            if group and size + len(part) > num_characters:
                yield group, owners
                group, owners, size = [], [], 0
            group.append(part)
            owners.append(index)
            size += len(part)
    if group:
        yield group, owners


def _places(characters: str) -> re.Pattern[str]:
    return re.compile(f"{_NOT_SPACE}[{characters}]")


def _cut_characters(content: dict[str, Any]) -> str:
    """Return the characters before which a tokenizer.json lets texts be cut; perhaps none."""
    if (content["normalizer"] or {"type": "NFC"})["type"] not in ("NFC", "NFD"):
        return ""
    match content["pre_tokenizer"]:
        case {"type": "ByteLevel", "use_regex": True, "add_prefix_space": prefix_space}:
            # A part that begins with a space gets no other one.
            characters = " " if prefix_space else " \n"
        case {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": rule},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
            ],
        } if rule in _SPLITTING_RULES:
            characters = " "
        case _:
            return ""
    for token in content["added_tokens"]:
        # The special ones are text, whatever else they would take in.
        if not token["special"] and (token["rstrip"] or token["single_word"]):
            return ""
        characters = "".join(c for c in characters if not _places(c).search(token["content"]))
    return characters
