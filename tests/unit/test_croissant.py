"""The description of a run's corpora is one that mlcroissant accepts."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import mlcroissant
import pytest

from megatron_ettin.config import SourceConfig
from megatron_ettin.native import TokenFile, TokenFileBuilder
from megatron_ettin.order.run_folder import RunFolder
from megatron_ettin.queries.croissant import write_croissant
from tests.conftest import TinyCorpus
from tests.runs import record_run, tiny_config
from tests.shards import cut_into_shards

# mlcroissant's own use of rdflib.
pytestmark = pytest.mark.filterwarnings("ignore:ConjunctiveGraph is deprecated:DeprecationWarning")


def test_mlcroissant_reads_the_corpora_with_their_hashes(
    tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    run = record_run(tiny_config(tiny_corpus, tmp_path / "run"), steps=2)
    output = tmp_path / "corpora.json"
    answer = write_croissant(run, output, license="CC-BY-4.0")
    metadata = mlcroissant.Dataset(jsonld=json.loads(output.read_text())).metadata
    assert metadata.ctx.issues.errors == set()
    assert metadata.license == ["CC-BY-4.0"]
    sources = {p.source for phase in RunFolder(run).read_order().phases for p in phase.pools}
    assert answer.corpora == answer.files == len(sources)
    files = {file.name: file for file in metadata.distribution}
    assert set(files) == {f"{source}/{source}.bin" for source in sources}
    for source in sources:
        content = (tiny_corpus.folder / f"{source}.bin").read_bytes()
        assert files[f"{source}/{source}.bin"].sha256 == hashlib.sha256(content).hexdigest()
        assert files[f"{source}/{source}.bin"].content_size == f"{len(content)} B"
    assert RunFolder(run).read_order().order_id in metadata.description


def test_every_shard_is_described_with_its_own_hash(
    tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    shards = cut_into_shards(tiny_corpus.folder / "alpha", tmp_path / "shards", [50, 120])
    config = tiny_config(tiny_corpus, tmp_path / "run")
    sources = {**config.data.sources, "alpha": SourceConfig(prefix=str(tmp_path / "shards"))}
    config = replace(config, data=replace(config.data, sources=sources))
    run = record_run(config, steps=2)
    assert write_croissant(run, tmp_path / "out.json").files == len(shards) + len(sources) - 1
    document = json.loads((tmp_path / "out.json").read_text())
    hashes = {file["name"]: file["sha256"] for file in document["distribution"]}
    for shard in map(Path, shards):
        content = shard.with_suffix(".bin").read_bytes()
        assert hashes[f"alpha/{shard.name}.bin"] == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("grows", [False, True])
def test_a_corpus_that_has_changed_is_refused(
    grows: bool, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    corpus = tmp_path / "alpha"
    for end in (".bin", ".idx"):
        shutil.copy(tiny_corpus.folder / f"alpha{end}", f"{corpus}{end}")
    config = tiny_config(tiny_corpus, tmp_path / "run")
    sources = {**config.data.sources, "alpha": SourceConfig(prefix=str(corpus))}
    run = record_run(replace(config, data=replace(config.data, sources=sources)), steps=2)
    if grows:
        tokens = TokenFile(corpus)
        builder = TokenFileBuilder(corpus, tokens.dtype)
        for document in (*range(tokens.num_documents), 0):
            builder.add(tokens.tokens(document))
        builder.commit()
    else:
        content = bytearray(Path(f"{corpus}.bin").read_bytes())
        content[-1] ^= 1
        Path(f"{corpus}.bin").write_bytes(content)
    with pytest.raises(ValueError, match="the order is not the recorded one any more"):
        write_croissant(run, tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_what_is_recommended_and_not_given_is_said(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    run = record_run(tiny_config(tiny_corpus, tmp_path / "run"), steps=1)
    with_license = write_croissant(run, tmp_path / "with.json", license="CC0-1.0").recommended
    without = write_croissant(run, tmp_path / "without.json").recommended
    assert set(without) - set(with_license) == {"https://schema.org/license"}
