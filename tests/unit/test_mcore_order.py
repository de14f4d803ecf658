"""The order of a Megatron run, against the caches and the __getitem__ of the real megatron.core."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from megatron.core import num_microbatches_calculator as calculator

from megatron_ettin.indexed import IndexedWriter
from megatron_ettin.order.mcore import McoreOrder, McoreRun
from megatron_ettin.order.mcore.schedule import BatchSchedule, parse_step_sizes, ramp_up
from tests.unit.mcore_runs import SEQ_LENGTH, Trained, amend, train

pytestmark = pytest.mark.usefixtures("megatron_rank")

RUNS: dict[str, dict[str, Any]] = {
    "less than an epoch": {"samples": 60},
    "several epochs": {"samples": 600},
    "a last epoch of its own": {"samples": 420},
    "no extra token": {"samples": 400, "extra": False},
    "documents of a split": {"samples": 200, "split": "70,20,10"},
    "a blend of two": {"samples": 500, "weights": [0.8, 0.2]},
    "a blend of one": {"samples": 100, "weights": [1.0]},
}


@pytest.fixture(scope="module", params=RUNS, ids=lambda name: name.replace(" ", "_"))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    settings = dict(RUNS[request.param])
    trained = train(tmp_path_factory.mktemp("run"), **settings)
    # Relative to config.yaml, as a person would write them.
    names = ("web", "books")[: len(trained.parts)]
    amend(trained, prefixes={name: name for name in names})
    return trained


def test_tokens_are_those_that_megatron_reads(run: Trained) -> None:
    order = McoreOrder.open(run.folder)
    assert order.num_rows <= len(run.dataset)
    for g, tokens in enumerate(order.tokens(0, order.num_rows)):
        assert np.array_equal(tokens, run[g]), g
    assert np.array_equal(order.tokens(17, 18)[0], run[17])


def test_pieces_are_the_documents_that_megatron_names(run: Trained) -> None:
    order = McoreOrder.open(run.folder)
    pieces = order.pieces(0, order.num_rows)
    assert np.array_equal(np.unique(pieces.g), np.arange(order.num_rows))
    for g in range(order.num_rows):
        here = pieces.g == g
        file = order.corpus(order.source_names[pieces.source[here][0]])
        # Megatron also names documents of which it reads nothing.
        named = run.documents(g)
        assert [d for d in named if d in set(pieces.document[here])] == pieces.document[
            here
        ].tolist()
        slices = [
            file.tokens(d)[o : o + n]
            for d, o, n in zip(
                pieces.document[here], pieces.offset[here], pieces.length[here], strict=True
            )
        ]
        assert np.array_equal(np.concatenate(slices), run[g])
        before = np.cumsum(pieces.length[here]) - pieces.length[here]
        assert np.array_equal(pieces.position[here], before)
        reaches = pieces.offset[here] + pieces.length[here]
        lengths = np.array([file.length(d) for d in pieces.document[here].tolist()])
        assert np.array_equal(pieces.ends_document[here], reaches == lengths)
    assert np.array_equal(pieces.slots, pieces.length)
    assert np.array_equal(
        order.row_tokens(0, order.num_rows), [len(run[g]) for g in range(order.num_rows)]
    )


def test_epoch_and_row_are_megatrons(run: Trained) -> None:
    order = McoreOrder.open(run.folder)
    pieces = order.pieces(0, order.num_rows)
    for source, part in enumerate(run.parts):
        here = pieces.source == source
        blended = hasattr(run.dataset, "datasets")
        drawn = run.dataset.dataset_sample_index[pieces.g[here]] if blended else pieces.g[here]
        assert np.array_equal(pieces.row[here], part.shuffle_index[drawn])
        first = part.sample_index[pieces.row[here], 0]
        last = part.sample_index[pieces.row[here] + 1, 0]
        of_split = len(part.indices)
        assert (pieces.epoch[here] >= first // of_split).all()
        assert (pieces.epoch[here] <= last // of_split).all()


def test_where_is_the_inverse_of_pieces(run: Trained) -> None:
    order = McoreOrder.open(run.folder)
    pieces = order.pieces(0, order.num_rows)
    for source, name in enumerate(order.source_names):
        for document in range(order.corpus(name).num_documents):
            holding = pieces.g[(pieces.source == source) & (pieces.document == document)]
            assert np.array_equal(order.where(name, document), np.unique(holding)), document
    with pytest.raises(IndexError, match="documents 0 to 89, not 90"):
        order.where("web", 90)


def test_an_order_shows_only_the_rows_of_its_iterations(tmp_path: Path) -> None:
    run = train(tmp_path / "run", samples=300)
    order = McoreOrder.open(amend(run, train_steps=2))
    assert order.num_rows == 20
    found = {g for document in range(90) for g in order.where("web", document).tolist()}
    assert found == set(range(20))
    with pytest.raises(ValueError, match=r"rows \[15, 21\) are not within the run's 20"):
        order.pieces(15, 21)


def test_a_partial_last_row_of_validation_is_short(tmp_path: Path) -> None:
    run = train(tmp_path / "run", split="50,50,0")
    valid = next((run.folder / "cache").glob("*-valid-description.txt"))
    samples = np.load(str(valid).replace("description.txt", "sample_index.npy"))
    order = McoreOrder.open(amend(run, split="valid", train_steps=1, global_batch_size=8))
    assert order.num_rows == 8 <= len(samples) - 1
    assert order.row_tokens(0, 8).max() == SEQ_LENGTH + 1


def test_a_run_longer_than_its_cache_is_refused(tmp_path: Path) -> None:
    run = train(tmp_path / "run", samples=60)
    with pytest.raises(ValueError, match=r"1000 steps are 10000 rows, but the cache has"):
        McoreOrder.open(amend(run, train_steps=1000))


@pytest.mark.parametrize("table", ["document_index", "sample_index", "shuffle_index"])
@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_table_cut_short_is_refused(tmp_path: Path, table: str, kept: int) -> None:
    run = train(tmp_path / "run", samples=60)
    path = next((run.folder / "cache").glob(f"*-GPTDataset-train-{table}.npy"))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"{path.name}: truncated or damaged.*delete the files"):
        McoreOrder.open(run.folder)


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    run = train(tmp_path / "run", samples=60)
    path = next((run.folder / "cache").glob("*-GPTDataset-train-shuffle_index.npy"))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{path.name}: missing"):
        McoreOrder.open(run.folder)


def test_a_description_that_was_changed_is_refused(tmp_path: Path) -> None:
    run = train(tmp_path / "run", samples=60)
    path = next((run.folder / "cache").glob("*-train-description.txt"))
    path.write_text(path.read_text().replace("1234", "1235"))
    with pytest.raises(ValueError, match=f"{path.name}: its MD5 is not"):
        McoreOrder.open(run.folder)


def test_a_cache_of_another_corpus_is_refused(tmp_path: Path) -> None:
    run = train(tmp_path / "run", samples=60)
    folder = run.folder

    def replace_corpus(lengths: list[int]) -> None:
        for suffix in ("bin", "idx"):
            (folder / f"web.{suffix}").unlink()
        with IndexedWriter(str(folder / "web"), "uint16") as writer:
            for length in lengths:
                writer.add(np.full(length, 9))

    tokens = int(run.parts[0].dataset.sequence_lengths.sum())
    replace_corpus([3] * 89)
    with pytest.raises(ValueError, match=r"90 entries are no whole number of epochs of the 89"):
        McoreOrder.open(folder)
    replace_corpus([3] * 90)
    with pytest.raises(ValueError, match=r"samples, but 1 epochs of 270 tokens in .*web make 8"):
        McoreOrder.open(folder)
    replace_corpus([tokens - 89] + [1] * 89)
    order = McoreOrder.open(folder)
    with pytest.raises(ValueError, match=r"sample_index.*the cache is of another corpus"):
        order.pieces(0, 60)


def test_documents_beyond_the_corpus_are_refused(tmp_path: Path) -> None:
    run = train(tmp_path / "run", samples=60)
    path = next((run.folder / "cache").glob("*-GPTDataset-train-document_index.npy"))
    documents = np.load(path)
    documents[::3] = 90
    np.save(path, documents)
    order = McoreOrder.open(run.folder)
    with pytest.raises(ValueError, match=r"document 90 is not in \[0, 90\) of"):
        order.pieces(0, 60)


def test_several_fitting_caches_are_listed_and_one_can_be_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    runs = [train(folder, samples=60)]
    prefixes = {"web": str(folder / "web")}
    runs.append(train(folder, prefixes=prefixes, samples=600))
    keys = [run.dataset.unique_description_hash for run in runs]
    assert keys[0] != keys[1]
    with pytest.raises(ValueError, match=f"several caches fit.*cache_key(.|\n)*{min(keys)}"):
        McoreOrder.open(folder)
    for run, key in zip(runs, keys, strict=True):
        order = McoreOrder.open(amend(run, cache_key=key, train_steps=6))
        assert np.array_equal(order.tokens(9, 10)[0], run[9])
    other_seed = train(folder, prefixes=prefixes, samples=60, seed=99)
    order = McoreOrder.open(amend(other_seed, seed=99, train_steps=6))
    assert np.array_equal(order.tokens(9, 10)[0], other_seed[9])


def test_caches_that_do_not_fit_are_listed_with_the_reason(tmp_path: Path) -> None:
    run = train(tmp_path / "run", samples=60)
    key = run.dataset.unique_description_hash
    with pytest.raises(ValueError, match=rf"no cache fits(.|\n)*{key}.*sequence_length 32, not 64"):
        McoreOrder.open(amend(run, seq_length=64))
    with pytest.raises(ValueError, match="random_seed 1234, not 7"):
        McoreOrder.open(amend(run, seq_length=SEQ_LENGTH, seed=7))


def test_a_corpus_that_has_moved_is_found_under_its_former_path(tmp_path: Path) -> None:
    run = train(tmp_path / "run", samples=60)
    before = run.parts[0].dataset_path
    moved = tmp_path / "elsewhere"
    shutil.move(run.folder, moved)
    moved_run = Trained(moved, run.dataset)
    amend(moved_run, prefixes={"web": "web"})
    with pytest.raises(ValueError, match=r"if it has moved: `cached_as: \{web: "):
        McoreOrder.open(moved)
    order = McoreOrder.open(amend(moved_run, cached_as={"web": before}))
    assert order.prefixes("web") == [str(moved / "web")]
    assert np.array_equal(order.tokens(5, 6)[0], run[5])


def test_a_blend_without_its_table_says_why(tmp_path: Path) -> None:
    run = train(tmp_path / "run", samples=60, weights=[0.5, 0.5])
    for path in (run.folder / "cache").glob("*-BlendedDataset-*"):
        path.unlink()
    with pytest.raises(ValueError, match="saves the table of a blend only where --data-cache-path"):
        McoreOrder.open(run.folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"order": "order/1"}, "order: expected `mcore`"),
        ({"cache": None}, "the following arguments are required: cache"),
        ({"seq_length": "32"}, "seq_length: expected 32, found '32'"),
        ({"seq_length": True}, "seq_length: Expected a <class 'int'>. Got value: True"),
        ({"global_batch_size": 0}, "global_batch_size: expected an integer >= 1, found 0"),
        ({"prefixes": ["web"]}, "prefixes: Expected a <class 'dict'>"),
        ({"train_samples": 60}, "train_steps: expected either this or train_samples"),
        ({"train_steps": None, "train_samples": 9}, "train_samples: 9 is less than one batch"),
        ({"split": "dev"}, r"split: Expected a .*'train', 'valid', 'test'\]. Got value: dev"),
        ({"add_extra_token": 1}, "add_extra_token: Expected a <class 'bool'>. Got value: 1"),
        ({"rampup_batch_size": [4, 4]}, r"rampup_batch_size: expected \[first batch size"),
        (
            {"rampup_batch_size": [4, 4, 40]},
            "rampup_batch_size: from 4 by 4 does not lead up to the global",
        ),
        ({"step_batch_size_schedule": "0:8"}, "global_batch_size: give either this or step"),
        (
            {"step_batch_size_schedule": "8", "global_batch_size": None},
            "step_batch_size_schedule: '8' is not TOKENS:BATCH_SIZE",
        ),
        (
            {"step_batch_size_schedule": "1K:8", "global_batch_size": None},
            "step_batch_size_schedule: '1K:8' must begin at 0",
        ),
        ({"checkpoints": [0]}, "checkpoints: expected a list of integers >= 1"),
        ({"checkpoint_dir": "nowhere"}, "checkpoint_dir: .*nowhere is not a folder"),
        ({"checkpoints": ["4"]}, r"checkpoints: expected \[4\], found \['4'\]"),
        ({"add_extra_token": "true"}, "add_extra_token: expected True, found 'true'"),
        ({"seed": -1}, "seed: expected an integer >= 0, found -1"),
        ({"cache": ""}, "cache: missing"),
        ({"prefixes": {}}, "prefixes: missing"),
        ({"prefixes": {1: "web"}}, "prefixes: expected `NAME: PATH` entries, found 1: 'web'"),
        ({"cached_as": {"wob": "x"}}, "cached_as: 'wob' is not one of the prefixes"),
        (
            {"global_batchsize": 4},
            "global_batchsize: no such name; did you mean global_batch_size?",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_field_that_is_wrong_is_named(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    described = {
        "order": "mcore",
        "cache": "cache",
        "prefixes": {"web": "web"},
        "seq_length": 32,
        "global_batch_size": 10,
        "train_steps": 6,
        **values,
    }
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump({k: v for k, v in described.items() if v is not None}, sort_keys=False)
    )
    with pytest.raises(ValueError, match=f"^{path}: {message}"):
        McoreRun.read(tmp_path)


def test_checkpoints_are_listed_or_looked_up(tmp_path: Path) -> None:
    described = {
        "order": "mcore",
        "cache": "cache",
        "prefixes": {"web": "web"},
        "seq_length": 32,
        "global_batch_size": 10,
        "train_samples": 69,
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**described, "checkpoints": [4, 2]}))
    assert McoreRun.read(tmp_path).checkpoints == (2, 4)
    assert McoreRun.read(tmp_path).train_steps == 6
    for name in ("iter_0000003", "iter_0012000", "iter_x", "tensorboard"):
        (tmp_path / "saved" / name).mkdir(parents=True)
    path.write_text(yaml.safe_dump({**described, "checkpoint_dir": "saved"}))
    assert McoreRun.read(tmp_path).checkpoints == (3, 12000)


@pytest.mark.parametrize(
    ("size", "rampup"),
    [
        (8, None),
        (8, (2, 2, 30)),
        (8, (2, 3, 30)),
        (8, (2, 2, 2)),
        (768, (32, 32, 9765)),
        (100, (1, 1, 10_007)),
        (12, (3, 9, 1)),
        (7, (1, 1, 1)),
    ],
)
def test_the_ramp_is_megatrons(size: int, rampup: tuple[int, int, int] | None) -> None:
    if rampup is None:
        schedule = BatchSchedule([(0, size)])
        theirs: Any = calculator.ConstantNumMicroBatchesCalculator(size, 1, 1, False, 1)
    else:
        schedule = ramp_up(size, rampup)
        if not hasattr(calculator, "RampupBatchsizeNumMicroBatchesCalculator"):
            pytest.skip("this megatron.core has no ramp any more")
        theirs = calculator.RampupBatchsizeNumMicroBatchesCalculator(size, 1, 1, False, 1, *rampup)
    check_schedule(schedule, theirs)


@pytest.mark.parametrize("text", ["0:4 1k:8 2.5K:100", "0:3", "0:2 64:50 100:60 6400:61 6500:7"])
def test_the_step_schedule_is_megatrons(text: str) -> None:
    schedule = parse_step_sizes(text, 32)
    if not hasattr(calculator, "StepBatchsizeNumMicroBatchesCalculator"):
        pytest.skip("this megatron.core has no step schedule yet")
    theirs = calculator.StepBatchsizeNumMicroBatchesCalculator(1, 1, False, 1, text, 32)
    check_schedule(schedule, theirs)


def test_a_step_schedule_changes_at_the_first_step_beyond_its_tokens() -> None:
    schedule = parse_step_sizes("0:4 1K:10", 100)
    rows = [schedule.rows_of_step(step) for step in range(1, 6)]
    assert rows == [(0, 4), (4, 8), (8, 12), (12, 22), (22, 32)]


def check_schedule(schedule: BatchSchedule, theirs: Any) -> None:
    consumed = 0
    for step in range(1, 700):
        theirs.update(consumed, consistency_check=False)
        end = consumed + theirs.get_current_running_global_batch_size()
        assert schedule.rows_of_step(step) == (consumed, end)
        for g in (consumed, end - 1):
            assert schedule.step_of_row(g) == step
        consumed = end
