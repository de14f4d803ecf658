"""Sets for classification in GLUE's form, from the quickstart's held-out film reviews."""

import re
import unicodedata
from collections.abc import Iterable

from examples.fetch_text import Record
from megatron_ettin.data.encoding import in_validation

LABELS = {"negative": 0, "positive": 1}
"""Numbers of the classes, those of SST-2."""
TRAIN_SHARE = 0.6
VALIDATION_SHARE = 0.15
MIN_QUOTED_CHARACTERS = 25
"""Letters and digits that a sentence needs to be found inside of a longer review: fewer of them are
common phrases ("a masterpiece"), not quotations."""


def split(reviews: Iterable[Record], sst2: Iterable[str]) -> tuple[dict[str, list[Record]], str]:
    """Return the records of train, validation and test, and a line on what is left out.

    Reviews of Rotten Tomatoes are also in SST-2: those that are, or contain, a sentence of SST-2's
    validation set are left out, and so is each copy of a review. The split is by hash of the text.
    """
    sentences = {letters(sentence) for sentence in sst2}
    long = [each for each in sentences if len(each) >= MIN_QUOTED_CHARACTERS]
    sides: dict[str, list[Record]] = {"train": [], "validation": [], "test": []}
    seen: set[str] = set()
    shared = copies = 0
    for review in reviews:
        text = letters(review["text"])
        if text in sentences or any(sentence in text for sentence in long):
            shared += 1
        elif text in seen:
            copies += 1
        else:
            record = {"sentence": review["text"], "label": LABELS[review["label"]]}
            sides[side(text)].append(record)
        seen.add(text)
    return sides, (
        f"left out {shared} reviews with a sentence of SST-2's validation set, {copies} copies"
    )


def side(text: str) -> str:
    """Return the name of a text's split; the prefix makes it independent of other splits."""
    key = f"study\n{text}"
    if in_validation(key, TRAIN_SHARE):
        return "train"
    return "validation" if in_validation(key, TRAIN_SHARE + VALIDATION_SHARE) else "test"


def letters(text: str) -> str:
    """Return a text's letters and digits, small and without accents.

    SST-2 and the reviews differ in case, accents and the spaces around punctuation.
    """
    plain = unicodedata.normalize("NFKD", text.casefold()).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]", "", plain)
