"""The documents are complete: a program that knows nothing else rebuilds runs."""

import ast
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_ettin import distributed
from megatron_ettin.config import HardwareConfig, ModelConfig, SeedConfig
from megatron_ettin.model import weight_map
from megatron_ettin.model.provider import build_model, logical_parameters
from megatron_ettin.native import TokenFile, TokenFileBuilder
from megatron_ettin.order.ledger import Ledger
from megatron_ettin.order.ledger.format import GENESIS, Kind, format_event, seal
from tests.conftest import TinyCorpus
from tests.independent.program import FOLDER, rebuild, run_alone
from tests.mutations import change_token
from tests.runs import record_run, tiny_config
from tests.shards import cut_into_shards

ALLOWED = {"numpy", "order", "record", "xxhash", "yaml"}
PROGRAMS = [FOLDER / f"{name}.py" for name in ("order", "rebuild", "record", "weights")]
RAMP = {"batch_ramp_start": 3, "batch_ramp_tokens": 9_000}


def phase(name: str, train_tokens: int, seq_length: int, **settings: Any) -> dict[str, Any]:
    return {
        "name": name,
        "train_tokens": train_tokens,
        "seq_length": seq_length,
        "global_batch_size": 16,
        **settings,
    }


@pytest.fixture(scope="module")
def corpus(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> TinyCorpus:
    """Return the tiny corpora, with [SEP] at the end of documents and within some."""
    folder = tmp_path_factory.mktemp("present")
    shutil.copytree(tiny_corpus.folder / "tokenizer", folder / "tokenizer")
    tokenizer = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    (sep,) = (t["id"] for t in tokenizer["added_tokens"] if t["content"] == "[SEP]")
    for name in ("alpha", "beta", "held_out"):
        file = TokenFile(tiny_corpus.folder / name)
        builder = TokenFileBuilder(str(folder / name), "uint16")
        for document in range(file.num_documents):
            tokens = file.tokens(document).astype(np.int32)
            tokens[7::29] = sep
            builder.add(np.append(tokens, sep).astype(np.int32))
        builder.commit()
    return TinyCorpus(folder=folder, vocab_size=tiny_corpus.vocab_size)


def sections(name: str, tiny: TinyCorpus, present: TinyCorpus) -> dict[str, Any]:
    """Return a run's configuration; together they have every rule that decides a digest."""
    blend = {"alpha": 0.7, "beta": 0.3}
    if name == "encoder":
        # Several epochs of each pool, a rate of its own by phase, skipped rows over the border.
        return {
            "objective": {
                "class_path": "MaskedLM",
                "init_args": {"mask_rate": 0.3, "mask_rate_by_phase": {"decay": 0.15}},
            },
            "phases": [
                phase("short", 60_000, 128, **RAMP),
                phase("decay", 20_000, 256, max_segments_per_row=3),
                phase("again", 10_000, 128),
            ],
            "data": {
                **tiny.data,
                "blend": {
                    "short": blend,
                    "decay": {"alpha": 1.0},
                    "again": {"beta": 1, "alpha": 3},
                },
                "pools": {"short": [0, 0.6], "decay": [0.6, 1], "again": [0, 0.6]},
                "skip_rows": [[20, 25], [25, 31], [470, 480]],
            },
            "seeds": {"order": 5, "mask": 2**63 + 11, "init": 3},
        }
    if name == "composed":
        return {
            "objective": {
                "class_path": "ByPhase",
                "init_args": {
                    "objective": "MaskedDiffusion",
                    "by_phase": {
                        "long": {
                            "class_path": "Mixture",
                            "init_args": {
                                "objectives": ["CausalLM", "MaskedDiffusion", "MaskedNextToken"],
                                "shares": [0.3, 0.1, 0.2],
                            },
                        }
                    },
                },
            },
            "phases": [phase("short", 8_000, 64), phase("long", 9_000, 128, pack="concat")],
            "data": {
                **tiny.data,
                "blend": {"short": blend, "long": blend},
                "pools": {"short": [0, 0.5], "long": [0.5, 0.8]},
            },
            "seeds": {"mask": 2**64 - 1},
        }
    if name == "decoder":
        # Cut pieces, whose [SEP] is not scored, and rows across documents.
        return {
            "objective": "CausalLM",
            "phases": [
                phase("short", 8_000, 64, pack="none"),
                phase("long", 12_000, 128, pack="concat", **RAMP),
                phase("tails", 6_000, 64),
            ],
            "data": {
                **tiny.data,
                "blend": {"short": blend, "long": blend, "tails": {"beta": 1}},
                "pools": {"short": [0, 0.5], "long": [0.5, 0.8], "tails": [0.8, 1]},
            },
        }
    sources = {
        "alpha": {"prefix": str(present.folder / "alpha"), "specials": "present"},
        "beta": {
            "prefix": str(present.folder / "beta"),
            "specials": "present",
            "min_doc_tokens": 20,
        },
    }
    return {
        "objective": {
            "class_path": "CausalLM" if name == "present decoder" else "MaskedNextToken",
            **({} if name == "present decoder" else {"init_args": {"mask_rate": 0.4}}),
        },
        "phases": [
            phase("short", 12_000, 128),
            phase("long", 12_000, 128, pack="concat"),
            phase("pieces", 6_000, 64, pack="none"),
        ],
        "data": {
            **present.data,
            "sources": sources,
            "blend": {"short": blend, "long": blend, "pieces": blend},
            "pools": {"short": [0, 0.4], "long": [0.4, 0.8], "pieces": [0.8, 1]},
        },
    }


@pytest.fixture(
    scope="module", params=["encoder", "decoder", "present decoder", "shifted", "composed"]
)
def run(
    request: pytest.FixtureRequest,
    tiny_corpus: TinyCorpus,
    corpus: TinyCorpus,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("runs") / request.param.replace(" ", "_")
    config = tiny_config(tiny_corpus, folder, **sections(request.param, tiny_corpus, corpus))
    return record_run(config, save_steps=(4,))


def test_the_programs_import_nothing_of_the_project() -> None:
    for program in PROGRAMS:
        imported = set()
        for node in ast.walk(ast.parse(program.read_text())):
            if isinstance(node, ast.Import):
                imported |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0
                imported.add(str(node.module).split(".")[0])
        assert imported - sys.stdlib_module_names <= ALLOWED, program.name


def test_a_program_run_alone_cannot_import_the_project(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import megatron_ettin")
    done = run_alone(program)
    assert done.returncode == 1
    assert "ModuleNotFoundError" in done.stderr


def test_a_run_is_rebuilt(run: Path) -> None:
    ledger = Ledger.read(run / "ledger")
    head = f"head {ledger.head.chain} (record {ledger.head.seq})"
    answer = rebuild(run)
    assert answer.startswith("PASS "), answer
    assert f"{len(ledger.steps)} steps, {ledger.steps['n_tokens'].sum()} tokens" in answer
    assert head in answer


@pytest.mark.parametrize("run", ["encoder"], indirect=True)
def test_a_rebuilt_run_has_what_is_hard(run: Path) -> None:
    short, _, again = json.loads((run / "order.json").read_text())["phases"]
    alpha, beta = short["pools"]
    assert beta["rows"] < short["num_rows"] * beta["quota"] // 65_536, "an epoch ends in the phase"
    assert again["pools"][0]["drawn"] > alpha["rows"], "a phase goes on where another has stopped"
    records = Ledger.read(run / "ledger").records
    skips = records[records["kind"] == Kind.SKIP]
    assert (skips["g_end"] - skips["g_begin"]).tolist() == [11, 2, 8], "one over two phases"
    steps = records[records["kind"] == Kind.STEP]
    assert len(set((steps["g_end"] - steps["g_begin"]).tolist())) > 8, "a ramp"


def chained_anew(folder: Path, change: Callable[[Any, dict[int, dict[str, Any]]], None]) -> None:
    """Change records and payloads of a ledger, and give it a chain that is right."""
    ledger = Ledger.read(folder)
    records, lines = ledger.records.copy(), b""
    change(records, ledger.events)
    for seq, payload in ledger.events.items():
        line = format_event(seq, Kind(int(records["kind"][seq])), payload)
        digest = np.frombuffer(hashlib.sha256(line).digest(), "<u8")
        records["order_digest"][seq], records["token_digest"][seq] = digest[:2], digest[2:]
        records["mask_digest"][seq] = digest[0]
        lines += line + b"\n"
    content = bytearray(records.tobytes())
    seal(content, GENESIS)
    (folder / "records.led").write_bytes(content)
    (folder / "events.jsonl").write_bytes(lines)
    Ledger.read(folder)


def steps_of(records: Any) -> Any:
    return np.flatnonzero(records["kind"] == Kind.STEP)


def other_digest(name: str) -> Callable[[Any, dict[int, dict[str, Any]]], None]:
    def change(records: Any, _: dict[int, dict[str, Any]]) -> None:
        records[name][steps_of(records)[3]] += np.uint64(1)

    return change


def other_cut(records: Any, _: dict[int, dict[str, Any]]) -> None:
    first, second = steps_of(records)[1:3]
    records["g_end"][first] += np.uint64(1)
    records["g_begin"][second] += np.uint64(1)


def other_mask_seed(_: Any, events: dict[int, dict[str, Any]]) -> None:
    events[0]["seeds"]["mask"] += 1


def other_mask_rate(_: Any, events: dict[int, dict[str, Any]]) -> None:
    events[0]["objective"]["mask_rate_by_phase"]["decay"] = 0.3


def other_vocabulary(_: Any, events: dict[int, dict[str, Any]]) -> None:
    events[0]["token_ids"]["vocab_size"] += 1


def other_end(_: Any, events: dict[int, dict[str, Any]]) -> None:
    events[max(events)]["tokens"] += 1


@pytest.mark.parametrize("run", ["encoder"], indirect=True)
@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (other_digest("order_digest"), r"FAIL step 4, rows \[\d+, \d+\): another order digest"),
        (other_digest("token_digest"), r"FAIL step 4, rows \[\d+, \d+\): another token digest"),
        (other_digest("mask_digest"), r"FAIL step 4, rows \[\d+, \d+\): another mask digest"),
        (other_cut, r"FAIL step 2, rows \[\d+, \d+\): \d+ tokens, recorded \d+"),
        (other_mask_seed, "FAIL step 1, .*: another mask digest"),
        (other_mask_rate, r"FAIL step \d\d, .*: another mask digest"),
        (other_vocabulary, "FAIL the tokenizer has other special ids"),
        (other_end, r"FAIL record \d+: other sums"),
    ],
)
def test_a_record_that_was_chained_anew_is_not_rebuilt(
    change: Callable[[Any, dict[int, dict[str, Any]]], None], fault: str, run: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    chained_anew(copy / "ledger", change)
    assert re.match(fault, rebuild(copy))


@pytest.mark.parametrize("run", ["encoder"], indirect=True)
def test_a_changed_byte_is_found(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    path = copy / "ledger" / "records.led"
    content = bytearray(path.read_bytes())
    content[5 * 128 + 16] ^= 1
    path.write_bytes(content)
    assert rebuild(copy) == "FAIL record 5: wrong chain\n"


@pytest.mark.parametrize("run", ["encoder"], indirect=True)
def test_another_order_or_corpus_is_found(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    order = json.loads((copy / "order.json").read_text())
    order["phases"][0]["pools"][0]["drawn"] += 1
    (copy / "order.json").write_text(json.dumps(order))
    assert rebuild(copy) == "FAIL order.json: its phases have other ids\n"

    shutil.copy(run / "order.json", copy / "order.json")
    config_text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(
        config_text.replace("batch_ramp_start: 3", "batch_ramp_start: 4")
    )
    assert rebuild(copy) == "FAIL config.yaml: not the one that the ledger binds\n"

    config = yaml.safe_load((copy / "config.yaml").read_text())
    prefix = config["data"]["sources"]["alpha"]["prefix"]
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{prefix}{suffix}", tmp_path / f"alpha{suffix}")
    tokens = np.memmap(tmp_path / "alpha.bin", "<u2", "r+")
    tokens[1234] ^= 1
    tokens.flush()
    config["data"]["sources"]["alpha"]["prefix"] = str(tmp_path / "alpha")
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    assert rebuild(copy).startswith("FAIL alpha: tokens_sha256 is ")


def test_a_run_over_shards_is_rebuilt(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    folder = tmp_path / "alpha"
    cut_into_shards(tiny_corpus.folder / "alpha", folder, [0, 200, 480])
    later = list(folder.glob("00003.*"))
    for path in later:
        path.rename(tmp_path / path.name)
    sources = {**tiny_corpus.data["sources"], "alpha": {"prefix": str(folder)}}
    config = tiny_config(
        tiny_corpus,
        tmp_path / "run",
        phases=[phase("short", 8_000, 64), phase("long", 12_000, 128, pack="concat")],
        data={**tiny_corpus.data, "sources": sources},
    )
    run = record_run(config)
    assert rebuild(run).startswith("PASS")
    for path in later:
        (tmp_path / path.name).rename(path)
    assert rebuild(run).startswith("PASS"), "what came later is no part of the order"
    change_token(folder / "00001", document=3)
    assert rebuild(run).startswith("FAIL alpha: tokens_sha256 is ")


@pytest.mark.parametrize("run", ["encoder"], indirect=True)
def test_initial_weights_are_rebuilt_bit_for_bit(run: Path, tmp_path: Path) -> None:
    done = run_alone(FOLDER / "weights.py", str(run), str(tmp_path / "weights.npz"))
    assert done.returncode == 0, done.stderr
    start = Ledger.read(run / "ledger").events[0]
    model = ModelConfig(**start["model"])
    with distributed.process_groups(HardwareConfig()):
        stage = build_model(
            model, "causal", HardwareConfig(precision="fp32"), SeedConfig(**start["seeds"])
        )
    entries = weight_map.entries(model.num_layers)
    with np.load(tmp_path / "weights.npz") as rebuilt:
        parameters = dict(logical_parameters(stage))
        assert {entries[name].encoder for name in parameters} == set(rebuilt)
        for name, parameter in parameters.items():
            ours = weight_map.to_huggingface(entries[name], parameter.detach(), model).numpy()
            theirs = rebuilt[entries[name].encoder]
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
            assert np.array_equal(ours.view(np.uint32), theirs.view(np.uint32)), name
