"""The order over real files: nothing repeats, nothing is lost, the past does not change."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ettin.config import SourceConfig
from megatron_ettin.data.tokenize import load_tokenizer
from megatron_ettin.native import TokenFile
from megatron_ettin.order import OrderSpec
from megatron_ettin.rows import TokenIds
from tests.conftest import TinyCorpus
from tests.orders import BLEND, FIRST, SECOND, make_order


def test_an_epoch_holds_every_token_of_the_pool_once(tiny_corpus: TinyCorpus) -> None:
    longer = dataclasses.replace(FIRST, train_tokens=80_000)
    order = make_order(tiny_corpus, longer, blend={"first": {"alpha": 1.0}}, pools={})
    pool = order.spec.phases[0].pools[0]
    assert order.spec.num_rows > pool.rows, "the phase must be longer than an epoch"
    rows = order.rows(0, np.arange(pool.rows))
    specials = set(order.ids.special)
    seen = Counter(t for t in rows.tokens.tolist() if t not in specials)
    file = TokenFile(str(tiny_corpus.folder / "alpha"))
    held = Counter(
        t for document in range(file.num_documents) for t in file.tokens(document).tolist()
    )
    assert seen == held
    assert rows.num_tokens.sum() == pool.tokens == order.row_tokens(0, pool.rows).sum()


def test_rows_do_not_depend_on_their_neighbours(tiny_corpus: TinyCorpus) -> None:
    order = make_order(tiny_corpus, FIRST)
    together = order.rows(0, np.arange(12))
    length = FIRST.seq_length
    for g in (0, 7, 11):
        alone = order.rows(0, np.array([g]))
        assert np.array_equal(alone.tokens, together.tokens[g * length : (g + 1) * length])
        assert alone.num_tokens[0] == together.num_tokens[g]


def test_an_idle_slot_is_padding(tiny_corpus: TinyCorpus) -> None:
    order = make_order(tiny_corpus, FIRST)
    rows = order.rows(0, np.array([3, -1]))
    assert (rows.tokens[128:] == order.ids.pad).all()
    assert rows.num_tokens[1] == 0
    assert not rows.segment_kind[len(rows.segment_kind) // 2 :].any()


def test_the_blend_is_realised_and_a_phase_has_the_tokens_asked_for(
    tiny_corpus: TinyCorpus,
) -> None:
    order = make_order(tiny_corpus, FIRST)
    phase = order.spec.phases[0]
    assert sum(pool.quota for pool in phase.pools) == 65_536
    assert phase.pools[0].quota / 65_536 == pytest.approx(0.7, abs=1e-4)
    trained = int(order.row_tokens(0, phase.num_rows).sum())
    assert trained == pytest.approx(FIRST.train_tokens, rel=0.01)


def test_appending_a_phase_keeps_the_past(tiny_corpus: TinyCorpus) -> None:
    short, long = make_order(tiny_corpus, FIRST), make_order(tiny_corpus, FIRST, SECOND)
    assert long.spec.phase_ids()[0] == short.spec.order_id
    assert long.spec.order_id != short.spec.order_id
    g = np.arange(20)
    assert np.array_equal(long.rows(0, g).tokens, short.rows(0, g).tokens)


def test_a_phase_with_the_same_packing_goes_on_where_the_last_stopped(
    tiny_corpus: TinyCorpus,
) -> None:
    half = dataclasses.replace(FIRST, train_tokens=10_000)
    more = dataclasses.replace(half, name="more")
    pools = {"first": (0.0, 0.6), "more": (0.0, 0.6)}
    cut = make_order(tiny_corpus, half, more, pools=pools)
    drawn = [pool.drawn for pool in cut.spec.phases[1].pools]
    assert sum(drawn) == cut.spec.phases[0].num_rows
    assert all(count > 0 for count in drawn)
    begin = cut.spec.phases[1].start_g
    first = cut.rows(0, np.arange(begin))
    second = cut.rows(1, np.arange(begin, cut.spec.num_rows))
    length = FIRST.seq_length
    rows = {bytes(first.tokens[i * length : (i + 1) * length]) for i in range(begin)}
    epoch = min(pool.rows - pool.drawn for pool in cut.spec.phases[1].pools)
    fresh = [bytes(second.tokens[i * length : (i + 1) * length]) for i in range(epoch)]
    assert not rows & set(fresh)


def test_another_packing_of_the_same_documents_is_refused(tiny_corpus: TinyCorpus) -> None:
    with pytest.raises(ValueError, match=r"second.*alpha.*allow_repeats"):
        make_order(tiny_corpus, FIRST, SECOND, pools={})
    repeats = dataclasses.replace(SECOND, allow_repeats=True)
    assert len(make_order(tiny_corpus, FIRST, repeats, pools={}).spec.phases) == 2


def test_the_identity_knows_content_and_seed_but_no_path(tiny_corpus: TinyCorpus) -> None:
    order = make_order(tiny_corpus, FIRST)
    assert make_order(tiny_corpus, FIRST, seed=22).spec.order_id != order.spec.order_id
    other_source = make_order(
        tiny_corpus,
        FIRST,
        sources={
            "alpha": SourceConfig(prefix=str(tiny_corpus.folder / "held_out")),
            "beta": SourceConfig(prefix=str(tiny_corpus.folder / "beta")),
        },
    )
    assert other_source.spec.order_id != order.spec.order_id
    assert str(tiny_corpus.folder) not in order.spec.to_json()


def test_order_json_holds_the_whole_order(tiny_corpus: TinyCorpus) -> None:
    spec = make_order(tiny_corpus, FIRST, SECOND).spec
    assert OrderSpec.from_json(spec.to_json()) == spec
    with pytest.raises(ValueError, match=r"^not the order of a run \('phases'\); restore it"):
        OrderSpec.from_json("{}")
    altered = spec.to_json().replace('"seed": 21', '"seed": 22')
    with pytest.raises(ValueError, match=r"^was altered: phase_ids\[0\] is "):
        OrderSpec.from_json(altered)
    assert OrderSpec.from_json(altered, check_ids=False).seed == 22


def test_a_token_beyond_the_vocabulary_names_file_and_document(tiny_corpus: TinyCorpus) -> None:
    ids = load_tokenizer(tiny_corpus.folder / "tokenizer").ids
    small = TokenIds(**{**vars(ids), "vocab_size": 300})
    order = make_order(tiny_corpus, FIRST, ids=small)
    with pytest.raises(ValueError, match=r"alpha\.bin: document \d+ holds token id \d+.*300"):
        order.rows(0, np.arange(40))


def test_rows_outside_the_phase_are_refused(tiny_corpus: TinyCorpus) -> None:
    order = make_order(tiny_corpus, FIRST, SECOND)
    with pytest.raises(ValueError, match="leave phase 'first'"):
        order.rows(0, np.array([order.spec.phases[1].start_g]))


def test_an_empty_pool_is_named(tiny_corpus: TinyCorpus) -> None:
    with pytest.raises(ValueError, match=r"phase 'first': source 'alpha'.*no documents"):
        make_order(tiny_corpus, FIRST, pools={"first": (0.0, 0.001)})


def test_a_longer_last_phase_is_the_same_order(tiny_corpus: TinyCorpus) -> None:
    longer = dataclasses.replace(FIRST, train_tokens=45_000)
    orders = [make_order(tiny_corpus, phase) for phase in (FIRST, longer)]
    assert orders[0].spec.order_id == orders[1].spec.order_id
    assert orders[0].num_rows < orders[1].num_rows
    end = orders[0].num_rows
    assert np.array_equal(
        orders[0].digested_tokens(0, end)[1], orders[1].digested_tokens(0, end)[1]
    )


def test_a_phase_can_be_cut_at_any_row_and_re_weighted(tiny_corpus: TinyCorpus) -> None:
    whole = make_order(tiny_corpus, FIRST)
    cut = dataclasses.replace(FIRST, train_rows=37)
    rest = dataclasses.replace(FIRST, name="rest", train_tokens=8_000)
    pools = {"first": (0.0, 0.6), "rest": (0.0, 0.6)}
    blend = {"first": BLEND, "rest": {"beta": 1.0}}
    order = make_order(tiny_corpus, cut, rest, pools=pools, blend=blend)
    assert order.spec.phases[0].num_rows == 37
    assert order.spec.phase_ids()[0] == whole.spec.phase_ids()[0]
    assert np.array_equal(order.order_digests(0, 37), whole.order_digests(0, 37))
    first, second = order.pieces(0, 37), order.pieces(37, order.num_rows)
    beta = order.source_names.index("beta")
    assert set(second.source.tolist()) == {beta}
    pool = order.spec.phases[1].pools[0]
    left = pool.rows - pool.drawn
    seen = {(d, o) for s, d, o in zip(*first[1:2], *first[5:7], strict=True) if s == beta}
    fresh = order.pieces(37, 37 + left)
    assert not seen & set(zip(fresh.document.tolist(), fresh.offset.tolist(), strict=True))


@pytest.mark.parametrize("pack", ["bfd", "concat", "none"])
@pytest.mark.parametrize("plans", ["stored", "recomputed"])
def test_pieces_and_where_are_inverse_over_phases_and_epochs(
    tiny_corpus: TinyCorpus, pack: Any, plans: Any
) -> None:
    first = dataclasses.replace(FIRST, pack=pack, train_tokens=60_000)
    second = dataclasses.replace(SECOND, pack=pack)
    order = make_order(tiny_corpus, first, second, plans=plans)
    pieces = order.pieces(0, order.num_rows)
    assert pieces.epoch.max() >= 1
    expected: dict[tuple[str, int], set[int]] = {}
    for g, source, document in zip(pieces.g, pieces.source, pieces.document, strict=True):
        key = (order.source_names[source], int(document))
        expected.setdefault(key, set()).add(int(g))
    for name in order.source_names:
        for document in range(order.corpus(name).num_documents):
            found = order.where(name, document).tolist()
            assert found == sorted(expected.get((name, document), set()))
    with pytest.raises(IndexError, match="has documents 0 to"):
        order.where("alpha", 10**6)


@pytest.mark.parametrize("pack", ["bfd", "concat", "none"])
def test_pieces_say_where_the_tokens_stand(tiny_corpus: TinyCorpus, pack: Any) -> None:
    order = make_order(tiny_corpus, dataclasses.replace(FIRST, pack=pack))
    pieces, rows = order.pieces(0, 20), order.tokens(0, 20)
    added = {order.ids.cls, order.ids.sep}
    for i in range(len(pieces.g)):
        text = rows[pieces.g[i]][pieces.position[i] : pieces.position[i] + pieces.slots[i]]
        name = order.source_names[pieces.source[i]]
        tokens = order.corpus(name).tokens(
            int(pieces.document[i]), int(pieces.offset[i]), int(pieces.length[i])
        )
        inner = [t for t in text.tolist() if t not in added]
        assert inner == tokens.tolist()
    counts = np.bincount(pieces.g, weights=pieces.slots, minlength=20)
    assert counts.tolist() == [len(row) for row in rows] == order.row_tokens(0, 20).tolist()


def test_an_epoch_cap_is_refused_before_the_run(tiny_corpus: TinyCorpus) -> None:
    sources = {
        name: SourceConfig(prefix=str(tiny_corpus.folder / name), max_epochs=1.0) for name in BLEND
    }
    assert make_order(tiny_corpus, FIRST, sources=sources)
    longer = dataclasses.replace(FIRST, train_tokens=200_000)
    with pytest.raises(
        ValueError, match=r"phase 'first': source '\w+' would be drawn .*max_epochs"
    ):
        make_order(tiny_corpus, longer, sources=sources)


def test_two_sources_with_the_same_documents_are_refused(tiny_corpus: TinyCorpus) -> None:
    twice = {name: SourceConfig(prefix=str(tiny_corpus.folder / "alpha")) for name in BLEND}
    with pytest.raises(ValueError, match="'alpha' and 'beta' hold the same documents"):
        make_order(tiny_corpus, FIRST, sources=twice)
    assert make_order(tiny_corpus, FIRST, sources=twice, allow_duplicates=True)


def test_plans_go_where_they_are_told(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    elsewhere = make_order(tiny_corpus, FIRST, plan_dir=str(tmp_path / "plans"))
    assert len(list((tmp_path / "plans").glob("*.plan"))) == 2
    beside = make_order(tiny_corpus, FIRST)
    assert np.array_equal(elsewhere.digested_tokens(0, 30)[1], beside.digested_tokens(0, 30)[1])
