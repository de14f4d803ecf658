"""Both orders answer alike, and no question asks which of the two it has."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_ettin import order as order_package
from megatron_ettin.order import NotRecordedError, Order
from megatron_ettin.order.mcore import McoreOrder
from tests.conftest import TinyCorpus
from tests.orders import FIRST, SECOND, make_order
from tests.unit.mcore_runs import train

QUERIES = Path(order_package.__file__).parents[1] / "queries"
#: Places where a missing configuration or ledger may be asked for: where a run is opened.
NONE_CHECKS = {"recorded_run.py": 3}


def class_checks(source: str) -> list[str]:
    """List the calls of isinstance that ask for a class of an order."""
    return [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("isinstance", "type", "issubclass")
        and "Order" in " ".join(ast.unparse(argument) for argument in node.args)
    ]


def none_checks(source: str) -> list[str]:
    """List the comparisons of a config or a ledger with None, and branches on either."""
    found = []
    for node in ast.walk(ast.parse(source)):
        asked: ast.expr | None = None
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Is | ast.IsNot):
            asked = node.left
        elif isinstance(node, ast.If | ast.IfExp):
            asked = node.test
        if asked is not None and ast.unparse(asked).split(".")[-1] in ("config", "ledger"):
            found.append(f"line {node.lineno}: {ast.unparse(asked)}")
    return found


def test_no_question_asks_for_the_class_of_an_order() -> None:
    checks = {path.name: class_checks(path.read_text()) for path in QUERIES.glob("*.py")}
    assert len(checks) > 20
    assert {name: lines for name, lines in checks.items() if lines} == {}


def test_only_opening_a_run_asks_for_a_missing_config_or_ledger() -> None:
    checks = {path.name: len(none_checks(path.read_text())) for path in QUERIES.glob("*.py")}
    assert {name: count for name, count in checks.items() if count} == NONE_CHECKS


@pytest.mark.parametrize(
    "source",
    [
        "isinstance(run.order, SampleOrder)",
        "x = 1 if isinstance(o, (A, McoreOrder)) else 2",
        "type(run.order) is order.SampleOrder or issubclass(a, SampleOrder)",
    ],
)
def test_a_check_of_the_class_is_found(source: str) -> None:
    assert class_checks(source)


@pytest.mark.parametrize(
    "source",
    [
        "if run.config is None: pass",
        "x = 1 if run.config else 2",
        "y = ledger is not None",
        "if ledger: pass",
    ],
)
def test_a_check_for_none_is_found(source: str) -> None:
    assert none_checks(source)


@pytest.fixture(scope="module")
def megatrons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[McoreOrder]:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    run = train(tmp_path_factory.mktemp("mcore") / "run", samples=200, weights=[0.7, 0.3])
    yield McoreOrder.open(run.folder)
    torch.distributed.destroy_process_group()


@pytest.fixture(params=["sample", "mcore"])
def order(request: pytest.FixtureRequest, tiny_corpus: TinyCorpus, megatrons: McoreOrder) -> Order:
    """Return an order of each class; mypy knows both as `Order`, as `open_run` uses them."""
    orders: dict[str, Order] = {
        "sample": make_order(tiny_corpus, FIRST, SECOND),
        "mcore": megatrons,
    }
    return orders[request.param]


def test_phases_cover_the_rows_without_gaps(order: Order) -> None:
    assert order.phases[0].start_g == 0
    assert order.phases[-1].end_g == order.num_rows
    for phase, following in zip(order.phases, order.phases[1:], strict=False):
        assert phase.end_g == following.start_g
    for phase in order.phases:
        for g in (phase.start_g, phase.end_g - 1):
            assert order.phase_at(g) == phase
            assert order.seq_length(g) == phase.seq_length
    with pytest.raises(ValueError, match=f"row {order.num_rows + 1} is beyond"):
        order.phase_at(order.num_rows + 1)


def test_pieces_tokens_and_where_agree(order: Order) -> None:
    end = order.num_rows
    pieces, tokens = order.pieces(0, end), order.tokens(0, end)
    assert np.array_equal(np.unique(pieces.g), np.arange(end))
    assert [len(row) for row in tokens] == order.row_tokens(0, end).tolist()
    sums = np.bincount(pieces.g, weights=pieces.slots, minlength=end)
    assert sums.tolist() == order.row_tokens(0, end).tolist()
    assert max(row.max() for row in tokens) < order.vocab_size
    for index in range(0, len(pieces.g), 37):
        g, position = int(pieces.g[index]), int(pieces.position[index])
        source, document = order.source_names[pieces.source[index]], int(pieces.document[index])
        stored = order.corpus(source).tokens(
            document, int(pieces.offset[index]), int(pieces.length[index])
        )
        slots = tokens[g][position : position + int(pieces.slots[index])].tolist()
        assert stored.tolist() in (slots, slots[1:], slots[:-1], slots[1:-1])
        assert g in order.where(source, document)
        assert order.shortest_document(source) <= len(order.corpus(source).tokens(document))


def test_sources_are_told_apart(order: Order) -> None:
    names = order.source_names
    assert len(names) == len({order.content_id(name) for name in names}) == 2
    for name in names:
        assert all(Path(f"{prefix}.bin").is_file() for prefix in order.prefixes(name))
        with pytest.raises(IndexError, match=f"source '{name}' has documents 0 to"):
            order.where(name, order.corpus(name).num_documents)


RULE: dict[str, Callable[[Order], object]] = {
    "phases and pools": lambda order: order.spec,
    "special tokens": lambda order: (order.ids, order.rows(0, np.arange(2))),
    "row plans": lambda order: (list(order.plans(0)), order.plan_paths()),
    "order digests": lambda order: (
        order.order_digests(0, 2),
        order.order_digests_of(0, np.arange(2)),
    ),
    "token digests": lambda order: order.digested_tokens(0, 2),
}


@pytest.mark.parametrize("what", RULE)
def test_what_needs_the_rule_is_answered_or_refused_by_name(
    tiny_corpus: TinyCorpus, megatrons: McoreOrder, what: str
) -> None:
    assert RULE[what](make_order(tiny_corpus, FIRST)) is not None
    message = f"^{megatrons.run.folder}: a run of Megatron; its {what} are not recorded$"
    with pytest.raises(NotRecordedError, match=message):
        RULE[what](megatrons)


def test_pools_are_known_only_to_a_rule(tiny_corpus: TinyCorpus, megatrons: McoreOrder) -> None:
    own = make_order(tiny_corpus, FIRST)
    assert sum(drawn for _, drawn in own.drawn_before(own.num_rows)) == own.num_rows
    assert list(megatrons.drawn_before(megatrons.num_rows)) == []
