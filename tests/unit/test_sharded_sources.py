"""Sources of many shards: the rows of the one pair, their identity, and shards that come later."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_ettin.config import RunConfig
from megatron_ettin.data.corpus_tokenizer import MixedTokenizersError, require_one_tokenizer
from megatron_ettin.data.orders import open_held_out_order, open_order
from megatron_ettin.data.tokenize import load_tokenizer
from megatron_ettin.evaluation.unigram import token_counts
from megatron_ettin.order import OrderSpec, corpus_identity
from megatron_ettin.study import stages
from tests.conftest import TinyCorpus
from tests.runs import add_provenance, tiny_config
from tests.shards import cut_into_shards, list_in_dataset_file

PHASES: list[dict[str, Any]] = [
    {"name": "first", "train_tokens": 20_000, "seq_length": 128, "global_batch_size": 4},
    {"name": "then", "train_tokens": 10_000, "seq_length": 256, "global_batch_size": 4},
]


def config_of(
    corpus: TinyCorpus, run_dir: Path, prefix: str | list[str], **changes: Any
) -> RunConfig:
    """Return a run over alpha, which `prefix` names; `changes` are of the data section."""
    phases = changes.pop("phases", PHASES[:1])
    data = {
        **corpus.data,
        "sources": {"alpha": {"prefix": prefix}},
        "blend": {phase["name"]: {"alpha": 1.0} for phase in phases},
        "pools": {},
        **changes,
    }
    return tiny_config(corpus, run_dir, phases=phases, data=data)


def without_hashes(spec: OrderSpec) -> dict[str, Any]:
    fields = spec.to_dict()
    fields.pop("shards", None)
    for phase in fields["phases"]:
        for pool in phase["pools"]:
            del pool["lengths_sha256"], pool["tokens_sha256"]
    return fields


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    cuts=st.lists(st.integers(0, 500), max_size=5).map(sorted),
    pack=st.sampled_from(["bfd", "concat", "none"]),
    plans=st.sampled_from(["stored", "recomputed"]),
)
def test_shards_give_the_rows_of_the_pair(
    tiny_corpus: TinyCorpus,
    tmp_path_factory: pytest.TempPathFactory,
    cuts: list[int],
    pack: str,
    plans: str,
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    shards = cut_into_shards(tiny_corpus.folder / "alpha", folder / "alpha", cuts)
    settings_ = {"phases": [{**PHASES[0], "pack": pack}], "plans": plans}
    settings_ |= {"plan_dir": str(folder / "plans")}
    pair, sharded = (
        open_order(config_of(tiny_corpus, folder / name, prefix, **settings_))
        for name, prefix in (("a", str(tiny_corpus.folder / "alpha")), ("b", shards))
    )
    assert without_hashes(pair.spec) == without_hashes(sharded.spec)
    assert (pair.spec.order_id == sharded.spec.order_id) == (not cuts)
    end = pair.num_rows
    for columns in zip(pair.pieces(0, end), sharded.pieces(0, end), strict=True):
        np.testing.assert_array_equal(*columns)
    tokens = [order.digested_tokens(0, end) for order in (pair, sharded)]
    np.testing.assert_array_equal(tokens[0][1], tokens[1][1])
    np.testing.assert_array_equal(*(np.concatenate(of_rows) for of_rows, _ in tokens))
    np.testing.assert_array_equal(*(o.order_digests(0, end) for o in (pair, sharded)))
    for document in range(0, 500, 7):
        assert pair.where("alpha", document).tolist() == sharded.where("alpha", document).tolist()


def test_the_hash_of_several_is_that_of_their_list(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    shards = cut_into_shards(tiny_corpus.folder / "alpha", tmp_path / "alpha", [100, 100])
    spec = open_order(config_of(tiny_corpus, tmp_path / "run", shards)).spec
    for field in ("lengths_sha256", "tokens_sha256"):
        own = [json.loads(Path(f"{shard}.identity.json").read_text())[field] for shard in shards]
        text = "[" + ",".join(f'"{value}"' for value in own) + "]"
        expected = hashlib.sha256(text.encode()).hexdigest()
        assert getattr(spec.phases[0].pools[0], field) == expected
        assert [getattr(shard, field) for shard in spec.shards["alpha"]] == own
    assert [shard.documents for shard in spec.shards["alpha"]] == [100, 0, 400]
    assert OrderSpec.from_json(spec.to_json()) == spec


def test_a_list_of_one_is_that_pair(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    alpha = str(tiny_corpus.folder / "alpha")
    named = [
        open_order(config_of(tiny_corpus, tmp_path / str(n), prefix)).spec.to_json()
        for n, prefix in enumerate((alpha, [alpha]))
    ]
    assert named[0] == named[1]
    assert "shards" not in json.loads(named[0])


def test_a_folder_is_its_list(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    folder = tmp_path / "alpha"
    shards = cut_into_shards(tiny_corpus.folder / "alpha", folder, [10, 200])
    list_in_dataset_file(folder, ["00000", "00001", "00002"])
    orders = [
        open_order(config_of(tiny_corpus, tmp_path / str(n), prefix))
        for n, prefix in enumerate((shards, str(folder), f"{folder}/"))
    ]
    assert len({order.spec.to_json() for order in orders}) == 1
    assert {path.parent for path in orders[1].plan_paths()} == {tmp_path / "alpha.plans"}
    assert orders[1].prefixes("alpha") == shards
    Path(f"{shards[1]}.idx").unlink()
    with pytest.raises(ValueError, match=r"00001\.idx: no such file"):
        open_order(config_of(tiny_corpus, tmp_path / "run", str(folder)))
    with pytest.raises(FileNotFoundError, match=r"00001\.idx"):
        open_order(config_of(tiny_corpus, tmp_path / "run", shards))


def test_a_new_shard_alone_is_hashed(
    tiny_corpus: TinyCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = cut_into_shards(tiny_corpus.folder / "alpha", tmp_path / "alpha", [10, 200])
    open_order(config_of(tiny_corpus, tmp_path / "a", shards[:2]))
    hashed = []
    hash_corpus = corpus_identity.hash_corpus
    monkeypatch.setattr(
        corpus_identity, "hash_corpus", lambda shard: hashed.append(shard) or hash_corpus(shard)
    )
    open_order(config_of(tiny_corpus, tmp_path / "b", shards))
    assert hashed == shards[2:]


def test_the_same_documents_in_two_shards_are_refused(
    tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    cuts = [10, 10, 10, 300]  # two shards are empty, which are no copies
    shards = cut_into_shards(tiny_corpus.folder / "alpha", tmp_path / "alpha", cuts)
    copy = cut_into_shards(tiny_corpus.folder / "alpha", tmp_path / "copy", [10])[0]
    open_order(config_of(tiny_corpus, tmp_path / "a", shards))
    with pytest.raises(ValueError, match=r"alpha: two of its shards .*alpha/00000 and .*copy/0"):
        open_order(config_of(tiny_corpus, tmp_path / "b", [*shards, copy]))
    open_order(config_of(tiny_corpus, tmp_path / "c", [*shards, copy], allow_duplicates=True))


@pytest.fixture
def shards(tiny_corpus: TinyCorpus, tmp_path: Path) -> list[str]:
    """Return four shards of documents [0, 100), [100, 300), none and [300, 500)."""
    return cut_into_shards(tiny_corpus.folder / "alpha", tmp_path / "alpha", [100, 300, 300])


def test_later_shards_change_no_recorded_phase(
    tiny_corpus: TinyCorpus, tmp_path: Path, shards: list[str]
) -> None:
    recorded = open_order(config_of(tiny_corpus, tmp_path / "a", shards[:2]))
    grown = config_of(tiny_corpus, tmp_path / "b", shards)
    assert open_order(grown, recorded.spec).spec.to_json() == recorded.spec.to_json()
    assert open_order(grown, recorded.spec).corpus("alpha").num_documents == 300
    assert open_order(grown).spec.order_id != recorded.spec.order_id

    pools = {"then": [0.6, 1.0]}
    longer = config_of(tiny_corpus, tmp_path / "c", shards, phases=PHASES, pools=pools)
    order = open_order(longer, recorded.spec)
    assert order.spec.phases[0] == recorded.spec.phases[0]
    assert order.spec.phase_ids()[0] == recorded.spec.order_id
    (pool,) = order.spec.phases[1].pools
    assert (pool.documents_in_file, pool.first_document, pool.end_document) == (500, 300, 500)
    assert [shard.documents for shard in order.spec.shards["alpha"]] == [100, 200, 0, 200]
    np.testing.assert_array_equal(
        order.digested_tokens(0, recorded.num_rows)[1],
        recorded.digested_tokens(0, recorded.num_rows)[1],
    )
    again = open_order(longer, order.spec)
    assert again.spec.to_json() == order.spec.to_json()


def test_a_pair_may_grow(tiny_corpus: TinyCorpus, tmp_path: Path, shards: list[str]) -> None:
    recorded = open_order(config_of(tiny_corpus, tmp_path / "a", shards[1])).spec
    grown = config_of(tiny_corpus, tmp_path / "b", [shards[1], shards[0]])
    assert open_order(grown, recorded).spec.to_json() == recorded.to_json()
    other = config_of(tiny_corpus, tmp_path / "c", [shards[3], shards[0]])
    with pytest.raises(ValueError, match=r"first 200 documents \(.*00003\) have other hashes"):
        open_order(other, recorded)


def test_an_overlap_with_a_recorded_pool_is_refused(
    tiny_corpus: TinyCorpus, tmp_path: Path, shards: list[str]
) -> None:
    recorded = open_order(config_of(tiny_corpus, tmp_path / "a", shards[:2])).spec
    longer = config_of(tiny_corpus, tmp_path / "b", shards, phases=PHASES)
    with pytest.raises(ValueError, match=r"'then' packs documents .*allow_repeats"):
        open_order(longer, recorded)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ([1, 0], r"shard 0, .*00001, had documents 100, and now has 200"),
        ([0, 3], r"shard 1, .*00003, had tokens \d+, and now has"),
        ([0], r"it had 2 shards, and now has 1: the last 1 are gone"),
        ([0, 2, 1], r"shard 1, .*00002, had documents 200, and now has 0"),
    ],
)
def test_other_shards_than_the_recorded_are_named(
    tiny_corpus: TinyCorpus, tmp_path: Path, shards: list[str], chosen: list[int], message: str
) -> None:
    recorded = open_order(config_of(tiny_corpus, tmp_path / "a", shards[:2])).spec
    today = config_of(tiny_corpus, tmp_path / "b", [shards[n] for n in chosen])
    with pytest.raises(ValueError, match=f"source 'alpha': .*{message}.*a source of their own"):
        open_order(today, recorded)


def test_a_count_that_is_no_boundary_is_refused(
    tiny_corpus: TinyCorpus, tmp_path: Path, shards: list[str]
) -> None:
    pair = str(tiny_corpus.folder / "alpha")
    recorded = open_order(config_of(tiny_corpus, tmp_path / "a", pair)).spec
    (phase,) = recorded.phases
    (pool,) = phase.pools
    short = dataclasses.replace(pool, documents_in_file=150)
    recorded = dataclasses.replace(recorded, phases=(dataclasses.replace(phase, pools=(short,)),))
    with pytest.raises(ValueError, match="had 150 documents, and no first shards have as many"):
        open_order(config_of(tiny_corpus, tmp_path / "b", shards), recorded)


def test_altered_shards_of_an_order_are_refused(
    tiny_corpus: TinyCorpus, tmp_path: Path, shards: list[str]
) -> None:
    spec = open_order(config_of(tiny_corpus, tmp_path / "a", shards)).spec
    document = json.loads(spec.to_json())
    document["shards"]["alpha"][0]["tokens_sha256"] = "0" * 64
    with pytest.raises(ValueError, match="hashes of source 'alpha' in phase 'first'"):
        OrderSpec.from_json(json.dumps(document))
    document["shards"] = [1]
    with pytest.raises(ValueError, match="not the order of a run"):
        OrderSpec.from_json(json.dumps(document))


def test_held_out_corpora_may_have_shards(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    held_out = tiny_corpus.folder / "held_out"
    shards = cut_into_shards(held_out, tmp_path / "held_out", [0, 20])
    alpha = str(tiny_corpus.folder / "alpha")
    orders = [
        open_held_out_order(config_of(tiny_corpus, tmp_path / str(n), alpha, validation=named))
        for n, named in enumerate(([str(held_out)], [shards], [str(tmp_path / "held_out")]))
    ]
    digests = [order.digested_tokens(0, 8)[1] for order in orders]
    np.testing.assert_array_equal(digests[0], digests[1])
    np.testing.assert_array_equal(digests[0], digests[2])


def test_an_unknown_token_is_named_by_its_shard(
    tiny_corpus: TinyCorpus, tmp_path: Path, shards: list[str]
) -> None:
    config = config_of(tiny_corpus, tmp_path / "a", shards)
    order = open_order(config)
    order.ids = dataclasses.replace(order.ids, vocab_size=1)
    with pytest.raises(ValueError, match=r"alpha/0000\d\.bin: document \d+ holds token id"):
        order.rows(0, np.arange(4))


def test_token_counts_are_of_all_shards(
    tiny_corpus: TinyCorpus, tmp_path: Path, shards: list[str]
) -> None:
    ids = load_tokenizer(tiny_corpus.folder / "tokenizer").ids
    counts = [
        token_counts(config_of(tiny_corpus, tmp_path / str(n), prefix).data.sources, ids)
        for n, prefix in enumerate((str(tiny_corpus.folder / "alpha"), shards))
    ]
    np.testing.assert_array_equal(*counts)


def test_the_tokenizer_of_every_shard_is_compared(
    tiny_corpus: TinyCorpus, tmp_path: Path, shards: list[str]
) -> None:
    digest = load_tokenizer(tiny_corpus.folder / "tokenizer").digest
    for number, shard in enumerate(shards[:2]):
        add_provenance(Path(shard), digest if number == 0 else "f" * 64)
    config = config_of(tiny_corpus, tmp_path / "a", shards[:2])
    with pytest.raises(MixedTokenizersError, match=r"data\.sources\.alpha, shard 1: .*00001 was"):
        require_one_tokenizer(config)


def test_a_study_names_the_shard_that_is_missing(
    tiny_corpus: TinyCorpus, tmp_path: Path, shards: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tiny_corpus, tmp_path / "a", [*shards, str(tmp_path / "gone")])
    monkeypatch.setattr(stages, "training_config", lambda *_: config)
    stage = stages.TrainingStage(study=None, model=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"gone\.bin: no such file"):
        stage.check()
    config.data.sources["alpha"].prefix[:] = shards  # type: ignore[index]
    stage.check()
