"""JSON lines: the compiled decoder of blocks against the standard one of lines."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_ettin.data import batches, blocks
from megatron_ettin.data.batches import ReadRequest
from megatron_ettin.data.json_records import BlockDecoder
from megatron_ettin.data.raw_files import OriginFields
from tests.raw_data import Row, raw_file, read_rows

ORIGINS = (None, OriginFields(), OriginFields(id="id"), OriginFields("x", "url"))

STRINGS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["", "\x00", "\u2028", "\ufeff", "🎬", "é" * 9, "\\", '"', "}\n{", "\x7f\x85"]),
)
VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**30), 10**30),
        st.floats(),
        STRINGS,
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(STRINGS, inner, max_size=3)
    ),
    max_leaves=5,
)
RAW_VALUES = st.sampled_from(
    [
        *("-0", "1E5", "1.50", "1e400", "01", "1.", "tru", "{}", "'a'", '"\\x"', '"\t"'),
        *('"\\ud83d"', '"\\ud83c\\udfac"', '"\\/\\u0041"'),
        *("[" * 3000 + "]" * 3000, "9" * 4300, "9" * 4301),
    ]
)


@st.composite
def records(draw: st.DrawFn) -> str:
    """Draw a JSON object, whose keys may come twice."""
    usual = st.sampled_from(["text", "text", "id", "url"])
    names = [*draw(st.lists(st.one_of(usual, usual, STRINGS), max_size=4))]
    if draw(st.integers(0, 20)):
        names.append("text")
    parts = []
    for name in names:
        kind = draw(st.integers(0, 9))
        value = draw(STRINGS if kind < 6 or (name == "text" and kind < 9) else VALUES)
        ascii_only = draw(st.booleans())
        written = json.dumps(value, ensure_ascii=ascii_only)
        if kind == 9 and not draw(st.integers(0, 5)):
            written = draw(RAW_VALUES)
        key = "te\\u0078t" if name == "text" and not draw(st.integers(0, 9)) else name
        key = json.dumps(name, ensure_ascii=ascii_only) if key == name else f'"{key}"'
        parts.append(f"{key}:{written}")
    return "{" + draw(st.sampled_from([",", ", "])).join(parts) + "}"


@st.composite
def lines(draw: st.DrawFn) -> bytes:
    """Draw a line: mostly an object, sometimes with a fault, or something else."""
    line = draw(records()).encode("utf-8", "surrogatepass")
    fault = draw(st.integers(0, 59))
    if fault == 0:
        place = draw(st.integers(0, len(line)))
        damage = st.sampled_from(
            [b"", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\x00", b"\n", b"}", b'"']
        )
        return line[:place] + draw(damage) + line[place + draw(st.integers(0, 1)) :]
    if fault == 1:
        return line + draw(st.sampled_from([b"\r", b" ", b"\x0c", line, b"{}", "\u00a0".encode()]))
    if fault == 2:
        others = [
            "",
            " ",
            "\r",
            "[]",
            "null",
            '"a"',
            "NaN",
            '\ufeff{"text": "a"}',
            '{"text":\n"a"}',
        ]
        return draw(st.sampled_from(others)).encode()
    return line


def read_all(path: Path, *request: Any) -> tuple[list[Row], str | None]:
    """Return the documents before an error, and the error."""
    rows: list[Row] = []
    try:
        rows.extend(read_rows(raw_file(path), *request))
    except ValueError as error:
        return rows, str(error)
    return rows, None


@pytest.mark.slow
@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    content=st.lists(lines(), min_size=1, max_size=6),
    end=st.sampled_from([b"", b"\n"]),
    mark=st.sampled_from([b"", b"", b"", b"\xef\xbb\xbf"]),
    origin=st.sampled_from(ORIGINS),
    fields=st.sampled_from([("text",), ("text",), ("url", "text"), ("id",)]),
    size=st.sampled_from([50, 400, 2**22]),
)
def test_both_decoders_agree(
    tmp_path: Path,
    content: list[bytes],
    end: bytes,
    mark: bytes,
    origin: OriginFields | None,
    fields: tuple[str, ...],
    size: int,
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(mark + b"\n".join(content) + end)
    with pytest.MonkeyPatch.context() as patch:
        for module in (batches, blocks):
            patch.setattr(module, "BATCH_BYTES", size)
        found = read_all(path, fields, origin)
        patch.setattr(BlockDecoder, "of", lambda request: None)
        assert read_all(path, fields, origin) == found


def decodes(path: Path, content: str | bytes, *fields: str) -> bool:
    """Say whether the compiled decoder reads the file, and check what it reads."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    request = ReadRequest(file=raw_file(path), fields=fields or ("text",), origin=OriginFields())
    decoder = BlockDecoder.of(request)
    (block,) = blocks.read_blocks(request.file)
    columns = decoder.decode(block) if decoder else None
    if columns is None:
        return False
    rows = [json.loads(line) for line in block.content.splitlines()]
    assert columns.texts == tuple([row[field] for row in rows] for field in request.fields)
    return True


def test_usual_lines_take_the_compiled_decoder(tmp_path: Path) -> None:
    usual = [
        '{"text": "a"}\n',
        '{"text": "a"}\n{"text": "b"}',
        '{"id": 7, "text": "café 🎬 \\u00e9\\ud83c\\udfac\\n", "meta": {"a": [1, null, {}]}}\n' * 9,
        '{"url": null, "text": "", "id": "x"}\n',
        '{"text": "a", "text": "b"}\n',
    ]
    assert all(decodes(tmp_path / "a.jsonl", content) for content in usual)
    assert decodes(tmp_path / "a.jsonl", '{"a b": "1", "é": "2"}\n', "a b", "é")


@pytest.mark.parametrize(
    "content",
    [
        '{"text": "a"}\r\n',
        '{"text": "a"}\n\n',
        '\ufeff{"text": "a"}\n',
        ' {"text": "a"}\n',
        '{"text":\n"a"}\n{"text": "a"}{"text": "b"}\n',
        '{"text": "a"}{"text": "b"}\n{"text": "c"}\n',
        '{"text": "a", "x": "\\ud83d"}\n',
        '{"text": "a", "x": ' + "9" * 4301 + "}\n",
        b'{"text": "a", "x": "\xff"}\n',
        '{"text": "a", "x": NaN}\n',
    ],
)
def test_unusual_lines_do_not(tmp_path: Path, content: str | bytes) -> None:
    assert not decodes(tmp_path / "a.jsonl", content)


def test_a_field_that_the_compiled_decoder_cannot_name(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({'a"b': "text", "id": 1.50}) + "\n")
    (row,) = read_rows(path, ['a"b'], OriginFields())
    assert (row.texts, row.id) == (("text",), "1.5")
