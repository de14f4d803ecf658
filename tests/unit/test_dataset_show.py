"""`tools/dataset.py show` prints a document and its origin, and nothing that steers a terminal."""

import hashlib
import json
from pathlib import Path

import pytest

from megatron_ettin.data.inspection.show import printable
from megatron_ettin.data.preprocess import preprocess
from megatron_ettin.data.preprocess_options import PreprocessOptions
from megatron_ettin.data.raw_files import expand_inputs
from megatron_ettin.data.tokenize import load_tokenizer
from tests.unit.dataset_corpora import MadeCorpus, make_folder, make_tokenizer
from tools.dataset import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> MadeCorpus:
    """Return a folder of shards."""
    return make_folder(tmp_path_factory.mktemp("shown"))


def show(capsys: pytest.CaptureFixture[str], corpus: MadeCorpus, *words: str) -> str:
    main(["show", str(corpus.prefix), "--tokenizer", str(corpus.tokenizer), *words])
    return capsys.readouterr().out


def test_a_document_is_printed_with_its_origin(
    folder: MadeCorpus, capsys: pytest.CaptureFixture[str]
) -> None:
    path, line, text = folder.stored[-1]
    document = len(folder.stored) - 1
    of_second = [place for place, *_ in folder.stored].index(folder.raw[1])
    expected = f"""\
document  {document}
shard     {folder.prefix}/00001
ordinal   {document - of_second}
id        b-{line}
url       https://x.org/{line}
file      {path}
line      {line}
sha256    {hashlib.sha256(text.encode()).hexdigest()}
tokens    {len(folder.ids()[-1])}

{text}
"""
    assert show(capsys, folder, "--doc", str(document)) == expected
    assert show(capsys, folder, "--id", f"b-{line}") == expected


def test_every_document_decodes_to_its_text(
    folder: MadeCorpus, capsys: pytest.CaptureFixture[str]
) -> None:
    for document in range(0, len(folder.stored), 25):
        (shown,) = json.loads(show(capsys, folder, "--doc", str(document), "--json"))["documents"]
        path, line, text = folder.stored[document]
        assert (shown["file"], shown["line"], shown["text"]) == (str(path), line, text)
        assert shown["ids"] == folder.ids()[document]
        assert "".join(shown["pieces"]) == text


def test_tokens_are_printed_with_their_pieces(
    folder: MadeCorpus, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = show(capsys, folder, "--doc", "3", "--tokens").splitlines()
    tokenizer = load_tokenizer(folder.tokenizer)
    rows = [line.split(maxsplit=2) for line in lines[12:]]
    assert lines[10].split() == ["position", "id", "piece"]
    assert rows == [
        [str(n), str(id_), f'"{tokenizer.decode([id_])}"'] for n, id_ in enumerate(folder.ids()[3])
    ]


def test_control_characters_are_escaped_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "red \x1b[31m, bell \a, CR \r, C1 \x9b; tab\tand\nnewline; é 漢 🎬 \\x1b"
    raw = tmp_path / "raw.jsonl"
    raw.write_text(json.dumps({"text": text, "id": "a\nb"}) + "\n")
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    output = tmp_path / "small"
    preprocess(
        PreprocessOptions(
            inputs=expand_inputs([str(raw)]), output_prefix=output, tokenizer=tokenizer
        )
    )
    words = ["show", f"{output}_text_document", "--tokenizer", str(tokenizer), "--doc", "0"]
    main(words)
    printed = capsys.readouterr().out
    escaped = r"red \x1b[31m, bell \x07, CR \x0d, C1 \x9b; tab" + "\tand\nnewline; é 漢 🎬 \\x1b"
    assert printed.endswith(f"\n\n{escaped}\n")
    assert "id        a\\x0ab\n" in printed
    main([*words, "--json"])
    assert json.loads(capsys.readouterr().out)["documents"][0]["text"] == text
    assert printable("plain é\n") == "plain é\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--doc", "9999"], r"no document 9999; it has \d+ documents, numbered from 0"),
        (["--doc", "-1"], "no document -1"),
        (["--id", "nothing"], "no document with the id 'nothing'"),
    ],
)
def test_a_document_that_is_not_there(folder: MadeCorpus, words: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["show", str(folder.prefix), "--tokenizer", str(folder.tokenizer), *words])


def test_another_tokenizer_is_refused(folder: MadeCorpus, tmp_path: Path) -> None:
    other = make_tokenizer(tmp_path / "other", 290)
    with pytest.raises(SystemExit, match=r"was made with the tokenizer of SHA-256 \w{64}, but"):
        main(["show", str(folder.prefix), "--tokenizer", str(other), "--doc", "0"])
