"""The sidecars of a corpus's shards answer as the one sidecar of the pair does."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from megatron_ettin.data.provenance import Provenance
from megatron_ettin.data.sharded_provenance import (
    ShardedProvenance,
    find_digests,
    open_provenance,
)
from tests.conftest import TinyCorpus
from tests.shards import cut_into_shards, describe_shards

CUTS = [0, 10, 10, 200]


@pytest.fixture(scope="module")
def folder(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with alpha as one pair and as shards, two of them empty."""
    folder = tmp_path_factory.mktemp("described")
    for name, cuts in (("pair", []), ("shards", CUTS)):
        shards = cut_into_shards(tiny_corpus.folder / "alpha", folder / name, cuts)
        describe_shards(shards, "a" * 64)
    return folder


@pytest.fixture
def pair(folder: Path) -> Provenance:
    provenance = open_provenance([f"{folder}/pair/00000"])
    assert isinstance(provenance, Provenance)
    return provenance


@pytest.fixture
def sharded(folder: Path) -> ShardedProvenance:
    provenance = open_provenance([f"{folder}/shards/{n:05d}" for n in range(len(CUTS) + 1)])
    assert isinstance(provenance, ShardedProvenance)
    return provenance


def test_documents_are_numbered_through(pair: Provenance, sharded: ShardedProvenance) -> None:
    assert sharded.num_documents == pair.num_documents == 500
    chance = np.random.default_rng(3)
    for ordinals in (
        np.arange(500),
        chance.integers(0, 500, 200),
        np.array([9, 10, 9, 499, 0]),
        np.empty(0, np.int64),
    ):
        expected = pair.documents(ordinals)
        found = sharded.documents(ordinals)
        assert found.schema.equals(expected.schema)
        assert found.to_pylist() == expected.to_pylist()
        some = sharded.documents(ordinals, ("url", "id"))
        assert some.to_pylist() == expected.select(["url", "id"]).to_pylist()
    assert sharded.mean_bytes(["id"]) > 0


def test_documents_are_found_in_every_shard(pair: Provenance, sharded: ShardedProvenance) -> None:
    assert sharded.find_id("doc 3").tolist() == pair.find_id("doc 3").tolist() == [3, 13]
    assert sharded.find_text("doc 3").tolist() == [3, 13]
    assert sharded.find_text("doc 499").tolist() == pair.find_text("doc 499").tolist() == [499]
    assert sharded.find_id("nowhere").tolist() == []
    with pytest.raises(ValueError, match="not a SHA-256"):
        sharded.find_sha256("12")


def test_documents_are_found_by_many_hashes(pair: Provenance, sharded: ShardedProvenance) -> None:
    hashes = [hashlib.sha256(f"doc {n}".encode()).digest() for n in (499, 3, 10**6)]
    for provenance in (pair, sharded):
        assert find_digests(provenance, hashes).tolist() == [3, 13, 499]
        assert find_digests(provenance, []).tolist() == []


def test_documents_outside_are_refused(sharded: ShardedProvenance) -> None:
    for ordinal in (-1, 500):
        with pytest.raises(IndexError, match=f"document {ordinal} of 500"):
            sharded.documents(np.array([3, ordinal]))


def test_a_shard_without_a_sidecar_is_named(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    shards = cut_into_shards(tiny_corpus.folder / "alpha", tmp_path, [100])
    describe_shards(shards[:1], "a" * 64)
    with pytest.raises(FileNotFoundError, match=r"00001\.docs\.parquet: no such file"):
        open_provenance(shards)
