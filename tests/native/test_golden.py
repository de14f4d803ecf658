"""The test vectors of docs/order.md: the specification and the extension cannot drift apart."""

import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ettin import native
from megatron_ettin.objectives import CausalLM, MaskedDiffusion, MaskedLM, MaskedNextToken
from megatron_ettin.objectives.masked_diffusion import noise_levels
from megatron_ettin.order.digest import format_digest
from megatron_ettin.rows import Rows, TokenIds
from tests.native import reference
from tests.native.corpora import pieces_of, plan_briefly

DOCUMENT = Path(__file__).parents[2] / "docs" / "order.md"


@pytest.fixture(scope="module")
def vectors() -> dict[str, Any]:
    block = re.search(r"```json\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert block is not None
    parsed: dict[str, Any] = json.loads(block.group(1))
    return parsed


def test_draws_are_splitmix64(vectors: dict[str, Any]) -> None:
    vector = vectors["splitmix64"]
    # The published first outputs of SplitMix64 for this seed.
    assert vector["key"] == "1234567"
    assert vector["draws"][:2] == ["6457827717110365317", "3203168211198807973"]
    draws = native.counter_draws(int(vector["key"]), 0, len(vector["draws"]))
    assert [str(value) for value in draws] == vector["draws"]


def test_counter(vectors: dict[str, Any]) -> None:
    for vector in vectors["counter"]:
        words = [int(word) for word in vector["words"]]
        key = native.counter_key(int(vector["seed"]), vector["purpose"], words)
        assert str(key) == vector["key"]
        assert [str(value) for value in native.counter_draws(key, 0, 3)] == vector["draws"]


def test_permutation(vectors: dict[str, Any]) -> None:
    for vector in vectors["permutation"]:
        key = native.permutation_key(vector["seed"], vector["source"], vector["epoch"])
        assert str(key) == vector["key"]
        assert native.permute(vector["n"], key, vector["index"]).tolist() == vector["value"]
        assert native.unpermute(vector["n"], key, vector["value"]).tolist() == vector["index"]


def test_blend(vectors: dict[str, Any]) -> None:
    for vector in vectors["blend"]:
        assert native.blend_table(vector["quotas"])[0].tolist() == vector["source"]


def plan_rows(vector: dict[str, Any]) -> native.RowPlan:
    return plan_briefly(
        vector["lengths"],
        vector["seq_length"],
        pack=vector["pack"],
        specials=vector["specials"],
        min_doc_tokens=vector["min_doc_tokens"],
        max_segments=vector["max_segments_per_row"],
        block=vector["block_documents"],
    )


def test_rows(vectors: dict[str, Any]) -> None:
    assert {vector["pack"] for vector in vectors["rows"]} == {"bfd", "concat", "none"}
    for vector in vectors["rows"]:
        rows = [
            [[piece.document, piece.offset, piece.length] for piece in row]
            for row in pieces_of(plan_rows(vector))
        ]
        assert rows == vector["rows"]


def test_mask(vectors: dict[str, Any]) -> None:
    vector = vectors["mask"]
    masked, selected = native.mask_tokens(
        np.arange(100, 132),
        np.array([vector["g"]]),
        seq_length=32,
        mask_seed=vector["mask_seed"],
        mask_rate=vector["mask_rate"],
        mask_id=vector["mask_id"],
        vocab_size=vector["vocab_size"],
        special_ids=vector["special_ids"],
    )
    assert masked.tolist() == vector["masked"]
    assert np.flatnonzero(selected).tolist() == vector["selected"]


def test_noise(vectors: dict[str, Any]) -> None:
    vector = vectors["noise"]
    found = noise_levels(np.array(vector["g"]), vector["mask_seed"])
    assert [str(int((1 - level) * 2**53)) for level in found.tolist()] == vector["v"]
    of_the_text = [reference.noise_level(g, mask_seed=vector["mask_seed"]) for g in vector["g"]]
    assert of_the_text == [Fraction(level) for level in found.tolist()]


def rows_of(vector: dict[str, Any]) -> Rows:
    lengths = [length for length, _ in vector["segments"]]
    kinds = [kind for _, kind in vector["segments"]]
    return Rows(
        g=np.array([vector["g"]]),
        tokens=np.array(vector["tokens"]),
        position_ids=np.concatenate([np.arange(length) for length in lengths]),
        cu_seqlens=np.cumsum([0, *lengths], dtype=np.int32),
        segment_kind=np.array(kinds, dtype=np.uint8),
        num_tokens=np.array([sum(n for n, kind in vector["segments"] if kind)]),
        seq_length=len(vector["tokens"]),
        specials=vector["specials"],
    )


def test_labels_of_the_product(vectors: dict[str, Any]) -> None:
    block = vectors["labels"]
    unk, cls, sep, pad, mask = block["special_ids"]
    assert mask == block["mask_id"]
    ids = TokenIds(vocab_size=block["vocab_size"], unk=unk, cls=cls, sep=sep, pad=pad, mask=mask)
    rate = block["mask_rate"]
    masking = (MaskedLM(mask_rate=rate), MaskedNextToken(mask_rate=rate))
    objectives = (CausalLM(), *masking, MaskedDiffusion())
    for vector in block["rows"]:
        for objective in objectives:
            expected = vector[type(objective).__name__]
            batch = objective.make_batch(
                rows_of(vector), phase="any", mask_seed=block["mask_seed"], ids=ids
            )
            assert batch.tokens.tolist() == expected.get("inputs", vector["tokens"])
            labels = np.where(batch.loss_mask, batch.labels, -1).tolist()
            assert labels == [-1 if label is None else label for label in expected["labels"]]


def test_labels_of_the_text(vectors: dict[str, Any]) -> None:
    block = vectors["labels"]
    names = ("mask_seed", "mask_rate", "mask_id", "vocab_size", "special_ids")
    rules = {name: block[name] for name in names}
    covered = {(vector["pack"], vector["specials"]) for vector in block["rows"]}
    assert len(covered) == len(block["rows"]) == 6
    for vector in block["rows"]:
        tokens, segments, g = vector["tokens"], vector["segments"], vector["g"]
        causal = reference.causal_labels(tokens, segments, vector["specials"])
        assert causal == vector["CausalLM"]["labels"]
        masked = reference.masked_labels(tokens, g, **rules)
        assert list(masked) == list(vector["MaskedLM"].values())
        diffused = reference.diffused_labels(
            tokens, g, **{name: rule for name, rule in rules.items() if name != "mask_rate"}
        )
        assert list(diffused) == list(vector["MaskedDiffusion"].values())
        shifted = reference.masked_next_labels(tokens, segments, g, **rules)
        assert list(shifted) == list(vector["MaskedNextToken"].values())


def test_dropout(vectors: dict[str, Any]) -> None:
    vector = vectors["dropout"]
    shape = {name: vector[name] for name in ("layer", "seq_length", "channels", "rate")}
    factors = native.dropout_factors(
        np.array([vector["g"]]),
        seed=vector["dropout_seed"],
        first_slot=0,
        num_slots=vector["seq_length"],
        **shape,
    ).ravel()
    assert np.flatnonzero(factors == 0).tolist() == vector["dropped"]
    kept = Fraction(vector["kept"])
    assert set(factors[factors != 0].tolist()) == {float(np.float32(kept))}
    slow = reference.dropout_row(vector["g"], seed=vector["dropout_seed"], **shape)
    assert [e for e, factor in enumerate(slow) if factor == 0] == vector["dropped"]
    assert set(slow) == {0, kept}


def test_weights(vectors: dict[str, Any]) -> None:
    normal, uniform = vectors["normal"], vectors["uniform"]
    weights = native.initial_weights(normal["name"], normal["seed"], 0, 4, std=0.02)
    np.testing.assert_allclose(weights, np.float32(normal["weights"]), rtol=2e-7)
    assert str(reference.hash_name(uniform["name"])) == uniform["hash"]
    weights = native.uniform_weights(uniform["name"], uniform["seed"], 0, 4, -0.125, 0.125)
    np.testing.assert_array_equal(weights, np.float32(uniform["weights"]))


def test_order_digest(vectors: dict[str, Any]) -> None:
    rows, vector = vectors["rows"][0], vectors["digest"]["order"]
    plan = plan_rows(rows)
    number, source = vector["row"], int(vector["source"])
    values = native.order_digests(
        [plan],
        np.array([vector["g"]]),
        np.array([source], np.uint64),
        np.zeros(1, np.int32),
        np.array([vector["epoch"]]),
        np.array([number]),
    )
    assert format_digest(tuple(values[0].tolist())) == vector["value"]
    pieces = [
        reference.Piece(d, o, n, True, True, o + n == rows["lengths"][d])
        for d, o, n in rows["rows"][number]
    ]
    content = reference.order_row_bytes(vector["g"], source, vector["epoch"], number, pieces)
    assert content.hex() == vector["bytes"]


def test_token_digest(vectors: dict[str, Any]) -> None:
    vector = vectors["digest"]["token"]
    lengths = [len(piece) for piece in vector["pieces"]]
    tokens = np.array([token for piece in vector["pieces"] for token in piece])
    values = native.token_digests(
        np.array([vector["g"]]),
        tokens,
        np.cumsum([0, *lengths]).astype(np.int32),
        np.array([len(tokens)]),
        len(tokens),
    )
    assert format_digest(tuple(values[0].tolist())) == vector["value"]
    assert reference.token_row_bytes(vector["g"], vector["pieces"]).hex() == vector["bytes"]


def test_mask_digest(vectors: dict[str, Any]) -> None:
    vector = vectors["digest"]["mask"]
    scored = [label is not None for label in vector["labels"]]
    row = (
        np.array([vector["g"]]),
        np.array(vector["inputs"]),
        np.array([label or 0 for label in vector["labels"]]),
        np.array(scored),
        np.array([len(scored)]),
        len(scored),
    )
    assert f"{native.mask_digests(*row)[0]:016x}" == vector["value"]
    read = (vector["g"], vector["inputs"], vector["labels"])
    assert reference.mask_row_bytes(*read).hex() == vector["bytes"]
    weighted = vectors["digest"]["weights"]
    weights = np.full(len(scored), weighted["weight"], np.float32)
    assert f"{native.mask_digests(*row, weights)[0]:016x}" == weighted["value"]
    content = reference.mask_row_bytes(*read, weights.tolist())
    assert content.hex() == vector["bytes"] + weighted["bytes_after"]
