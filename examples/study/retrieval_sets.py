"""Sets for retrieval in BEIR's form, from the quickstart's leads of Wikipedia articles.

A query is a description, as in a crossword: the first sentence after its verb "is" or "was".
Its document is the article's title and the other sentences of the lead.

    Ink        a gel, sol, or solution that contains at least one colorant, such as a dye or ...
    Ink        Ink is used for drawing or writing with a pen, brush, reed pen, or quill. ...
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from examples.fetch_text import Record

TEST_ARTICLES = 1500
MIN_QUERY_WORDS = 5
MIN_DOCUMENT_WORDS = 10
SENTENCE_END = re.compile(r'(?<=[a-z0-9)\]"”]{2}[.!?])\s+(?=[A-Z"“])')
"""Space after a sentence, but not after the points of "U.S. state" and "St. Louis"."""
DEFINITION = re.compile(r"^.{1,160}?\s(?:is|are|was|were)\s+(.+)$")


@dataclass(frozen=True, kw_only=True)
class Article:
    """An article as query and document."""

    title: str
    query: str
    text: str

    def document(self) -> str:
        """Return title and text as one, in the form in which mteb encodes a BEIR document."""
        return f"{self.title} {self.text}"


def split(articles: Iterable[Record]) -> tuple[dict[str, list[Record]], str]:
    """Return the records of corpus, queries, qrels and train, and a line on what is left out.

    The test takes the 1,500 articles whose hash is smallest; training pairs are from the others.
    An article is left out if its first sentence is no definition, if query or document is short,
    or if another article has the same query.
    """
    records = list(articles)
    found = [article for record in records if (article := read_article(record["text"]))]
    times = Counter(article.query for article in found)
    usable = sorted((each for each in found if times[each.query] == 1), key=by_title)
    if len(usable) <= TEST_ARTICLES:
        raise ValueError(f"{len(usable)} usable articles: more than {TEST_ARTICLES} are needed")
    test, rest = usable[:TEST_ARTICLES], usable[TEST_ARTICLES:]
    identified = [(f"{number:04}", article) for number, article in enumerate(test)]
    sets: dict[str, list[Record]] = {
        "corpus": [{"_id": f"d{n}", "title": a.title, "text": a.text} for n, a in identified],
        "queries": [{"_id": f"q{n}", "text": a.query} for n, a in identified],
        "qrels": [{"query-id": f"q{n}", "corpus-id": f"d{n}", "score": 1} for n, _ in identified],
        "train": [{"anchor": each.query, "positive": each.document()} for each in rest],
    }
    return sets, f"left out {len(records) - len(usable)} of {len(records)} articles"


def read_article(text: str) -> Article | None:
    """Return query and document of a title and its lead; None if they are not both there."""
    title, _, lead = text.partition("\n")
    first, *others = SENTENCE_END.split(" ".join(lead.split()))
    definition = DEFINITION.match(first)
    document = " ".join(others)
    if (
        definition is None
        or len(definition[1].split()) < MIN_QUERY_WORDS
        or len(document.split()) < MIN_DOCUMENT_WORDS
    ):
        return None
    return Article(title=title, query=definition[1].replace(" .", "."), text=document)


def by_title(article: Article) -> bytes:
    """Return the hash to sort by; its prefix makes it independent of other splits."""
    return hashlib.sha256(f"retrieval\n{article.title}".encode()).digest()
