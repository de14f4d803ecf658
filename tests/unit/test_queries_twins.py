"""Twins: equal data is proven whatever the batches were, and anything else is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ettin.queries.recorded_run import open_run
from megatron_ettin.queries.twins import TwinsProof, prove_twins
from tests.conftest import TinyCorpus
from tests.mutations import change_token
from tests.runs import record_run, tiny_config
from tools import order as order_tool

PHASES: list[dict[str, Any]] = [
    {"name": "short", "train_tokens": 20_000, "seq_length": 128, "global_batch_size": 16},
    {"name": "long", "train_tokens": 10_000, "seq_length": 256, "global_batch_size": 8},
]


def other_batches() -> list[dict[str, Any]]:
    """Return phases of the same rows in other steps, with a ramp in the first."""
    ramp = {"global_batch_size": 24, "batch_ramp_start": 4, "batch_ramp_tokens": 12_000}
    return [{**PHASES[0], **ramp}, {**PHASES[1], "global_batch_size": 12}]


def make(corpus: TinyCorpus, folder: Path, *, steps: int | None = None, **sections: Any) -> Path:
    config = tiny_config(corpus, folder, **{"phases": PHASES, **sections})
    return record_run(config, steps=steps)


@pytest.fixture(scope="module")
def encoder(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tiny_corpus, tmp_path_factory.mktemp("twins") / "encoder")


@pytest.fixture
def compare(encoder: Path, tiny_corpus: TinyCorpus, tmp_path: Path) -> Callable[..., TwinsProof]:
    """Compare the encoder with a decoder of other settings."""

    def compare(**settings: Any) -> TwinsProof:
        settings = {"objective": "CausalLM", **settings}
        return prove_twins(encoder, make(tiny_corpus, tmp_path / "decoder", **settings))

    return compare


def test_other_batches_and_a_ramp_do_not_matter(compare: Callable[..., TwinsProof]) -> None:
    proof = compare(phases=other_batches())
    encoder, decoder = proof.runs
    assert proof.passed, proof.reasons
    assert encoder.steps != decoder.steps
    assert (encoder.objective, decoder.objective) == ("MaskedLM", "CausalLM")
    assert proof.last_shared_g == encoder.end_g == decoder.end_g
    assert encoder.tokens == decoder.tokens == encoder.compared_tokens
    assert encoder.token_digest == decoder.token_digest
    assert 1 < proof.shared_boundaries < min(encoder.steps, decoder.steps)
    assert proof.notes == []


def test_a_shorter_run_is_a_twin_up_to_its_end(compare: Callable[..., TwinsProof]) -> None:
    proof = compare(steps=6)
    assert proof.passed, proof.reasons
    assert proof.shared_boundaries == 6
    assert proof.last_shared_g == proof.runs[1].end_g < proof.runs[0].end_g


def test_an_end_inside_the_others_step_is_not_covered(
    compare: Callable[..., TwinsProof], tmp_path: Path
) -> None:
    phases = [{**PHASES[0], "global_batch_size": 12}, PHASES[1]]
    proof = compare(steps=5, phases=phases)
    assert proof.runs[1].end_g == 60
    assert proof.last_shared_g == 48
    assert proof.reasons == [
        f"rows [48, 60) of {tmp_path / 'decoder'} are not covered: no step of the other run ends "
        f"at 60"
    ]


def test_nothing_shared_is_no_proof(compare: Callable[..., TwinsProof]) -> None:
    phases = [{**PHASES[0], "global_batch_size": 15}, PHASES[1]]
    proof = compare(steps=2, phases=phases)
    assert not proof.passed
    assert proof.shared_boundaries == proof.last_shared_g == 0
    assert "nothing to compare" in proof.reasons[0]


def test_another_order_is_named_with_its_first_step(compare: Callable[..., TwinsProof]) -> None:
    proof = compare(seeds={"order": 22})
    first, second = proof.disagreement
    assert not proof.passed
    assert proof.phase_id is None
    assert proof.reasons[0] == "the orders differ: order: seed 21 and 22"
    assert "other rows or documents" in proof.reasons[-1]
    assert (first.step, first.g_begin, first.g_end, first.agree_up_to) == (1, 0, 16, 0)
    assert first.seq == second.seq == 2  # after START and PHASE


def test_another_second_phase_agrees_on_the_first(
    compare: Callable[..., TwinsProof], tiny_corpus: TinyCorpus
) -> None:
    data = tiny_corpus.data
    data["blend"] = {**data["blend"], "long": {"alpha": 0.5, "beta": 0.5}}
    proof = compare(data=data)
    start = proof.disagreement[0]
    assert not proof.passed
    assert start.agree_up_to == start.g_begin == 158
    assert start.step == 11


def test_the_same_first_phase_is_enough_for_runs_that_ended_in_it(
    compare: Callable[..., TwinsProof], tiny_corpus: TinyCorpus
) -> None:
    data = tiny_corpus.data
    data["blend"] = {**data["blend"], "long": {"alpha": 0.5, "beta": 0.5}}
    assert compare(data=data, steps=10).passed


def test_rows_skipped_in_one_only(
    compare: Callable[..., TwinsProof], tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    proof = compare(data={**tiny_corpus.data, "skip_rows": [[32, 40]]})
    assert proof.reasons[0] == f"rows [32, 40) were skipped in {tmp_path / 'decoder'} only"
    assert proof.disagreement[0].agree_up_to == 32


def test_rows_skipped_in_both(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    data = {**tiny_corpus.data, "skip_rows": [[32, 40]]}
    encoder = make(tiny_corpus, tmp_path / "encoder", data=data)
    decoder = make(tiny_corpus, tmp_path / "decoder", data=data, phases=other_batches())
    proof = prove_twins(encoder, decoder)
    assert proof.passed, proof.reasons
    assert "no encoder and decoder" in proof.notes[0]


def test_other_tokens_in_the_same_documents(
    encoder: Path, own_corpus: TinyCorpus, tmp_path: Path
) -> None:
    """The same lengths, but a token is another: only the token digests can tell."""
    pieces = open_run(encoder).order.pieces(40, 60)
    source = own_corpus.folder / ["alpha", "beta"][pieces.source[0]]
    document = int(pieces.document[0])
    change_token(source, document=document)
    decoder = make(own_corpus, tmp_path / "decoder", objective="CausalLM")
    proof = prove_twins(encoder, decoder)
    assert not proof.passed
    assert "tokens_sha256" in proof.reasons[0]
    assert "other tokens in the same documents" in proof.reasons[-1]
    first = open_run(encoder).order.where(source.name, document)[0]
    assert proof.disagreement[0].g_begin <= first < proof.disagreement[0].g_end


def test_an_altered_order_file_is_refused(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    encoder = make(tiny_corpus, tmp_path / "encoder", steps=3)
    path = encoder / "order.json"
    path.write_text(path.read_text().replace('"seed": 21', '"seed": 22'))
    with pytest.raises(ValueError, match=r"order\.json: was altered: phase_ids\[0\]"):
        prove_twins(encoder, encoder)


def test_a_run_without_ledger_is_refused(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    encoder = make(tiny_corpus, tmp_path / "encoder", steps=1)
    shutil.rmtree(encoder / "ledger")
    with pytest.raises(FileNotFoundError, match="keep a ledger"):
        prove_twins(encoder, encoder)


def test_any_number_of_runs_is_compared(
    encoder: Path, tiny_corpus: TinyCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first is the shortest: the others must be compared with each other beyond its end."""
    short = make(tiny_corpus, tmp_path / "short", objective="CausalLM", steps=4)
    halves = [{**phase, "global_batch_size": phase["global_batch_size"] // 2} for phase in PHASES]
    diffusion = make(
        tiny_corpus, tmp_path / "diffusion", objective="MaskedDiffusion", phases=halves
    )
    proof = prove_twins(short, encoder, diffusion)
    assert proof.passed, proof.reasons
    assert [run.objective for run in proof.runs] == ["CausalLM", "MaskedLM", "MaskedDiffusion"]
    assert len({run.token_digest for run in proof.runs}) == 1
    assert proof.last_shared_g == proof.runs[0].end_g == 64
    data = tiny_corpus.data
    data["blend"] = {**data["blend"], "long": {"alpha": 0.5, "beta": 0.5}}
    other = make(tiny_corpus, tmp_path / "other", data=data)
    proof = prove_twins(short, encoder, diffusion, other)
    assert not proof.passed
    assert all(str(encoder) in reason and str(other) in reason for reason in proof.reasons)
    assert proof.disagreement[0].agree_up_to == 158
    arguments = [f"--run={run}" for run in (short, encoder, diffusion)]
    order_tool.main(["twins", *arguments])
    assert capsys.readouterr().out.startswith("PASS\n")


def test_the_command_says_fail_with_its_status(
    tiny_corpus: TinyCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [make(tiny_corpus, tmp_path / name, steps=2) for name in ("one", "other")]
    make(tiny_corpus, tmp_path / "third", steps=2, seeds={"order": 3})
    arguments = ["twins", "--json", "--run", str(folders[0]), "--run"]
    order_tool.main([*arguments, str(folders[1])])
    assert json.loads(capsys.readouterr().out)["verdict"] == "PASS"
    with pytest.raises(SystemExit) as status:
        order_tool.main([*arguments, str(tmp_path / "third")])
    assert status.value.code == 1
    assert json.loads(capsys.readouterr().out)["verdict"] == "FAIL"
    with pytest.raises(SystemExit, match="--run: give it twice or more, not 1 times"):
        order_tool.main(arguments[:-1])
