"""Corpora, weights and a run agree on the tokenizer, or the run does not start."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_ettin.config import RunConfig, SourceConfig
from megatron_ettin.data.corpus_tokenizer import (
    MixedTokenizersError,
    recorded_tokenizer,
    require_one_tokenizer,
    require_tokenizer_of_weights,
)
from megatron_ettin.data.encoding import SelectionRules
from megatron_ettin.data.preprocess import preprocess
from megatron_ettin.data.preprocess_options import PreprocessOptions
from megatron_ettin.data.raw_files import expand_inputs
from megatron_ettin.data.tokenize import load_tokenizer, train_tokenizer, write_tokenizer
from megatron_ettin.native import TokenFileBuilder
from megatron_ettin.pretrain import pretrain
from megatron_ettin.queries.import_ettin import import_ettin
from megatron_ettin.queries.verify import verify
from tests.conftest import TinyCorpus
from tests.runs import record_run, tiny_config

TEXTS = {
    "one": ["the film was long and the plot was thin", "a good film"] * 40,
    "other": ["rain fell on the hills all night", "the sea was grey"] * 40,
}


@dataclasses.dataclass(frozen=True)
class Corpora:
    """A corpus and a held-out one of each of two tokenizers, and a corpus without a record."""

    folder: Path

    def digest(self, name: str) -> str:
        return load_tokenizer(self.folder / name).digest

    def config(self, training: str, held_out: str, tokenizer: str = "one") -> RunConfig:
        """Return a run of one phase with the tokenizer "one", over corpora by their names."""
        corpus = TinyCorpus(self.folder, load_tokenizer(self.folder / tokenizer).ids.vocab_size)
        phase = {"name": "all", "train_tokens": 400, "seq_length": 64, "global_batch_size": 2}
        data = {
            "tokenizer": str(self.folder / tokenizer),
            "sources": {"text": {"prefix": str(self.folder / f"{training}_text_document")}},
            "blend": {"all": {"text": 1.0}},
            "validation": [str(self.folder / f"{held_out}_text_validation")],
        }
        run_dir = self.folder / f"run_{training}_{held_out}_{tokenizer}"
        return tiny_config(corpus, run_dir, phases=[phase], data=data)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Corpora:
    folder = tmp_path_factory.mktemp("tokenizers")
    for name, texts in TEXTS.items():
        write_tokenizer(train_tokenizer(texts, 270), folder / name)
        raw = folder / f"{name}.txt"
        raw.write_text("\n".join(f"{text} {number}" for number, text in enumerate(texts)))
        preprocess(
            PreprocessOptions(
                inputs=expand_inputs([str(raw)]),
                output_prefix=folder / name,
                tokenizer=folder / name,
                rules=SelectionRules(validation_share=0.2),
            )
        )
    builder = TokenFileBuilder(str(folder / "bare_text_document"), "uint16")
    for _ in range(40):
        builder.add(np.arange(5, 25))
    builder.commit()
    return Corpora(folder)


def test_a_corpus_records_its_tokenizer(corpora: Corpora) -> None:
    for name in TEXTS:
        for part in ("document", "validation"):
            prefix = str(corpora.folder / f"{name}_text_{part}")
            assert recorded_tokenizer(prefix) == corpora.digest(name)
    assert corpora.digest("one") != corpora.digest("other")
    assert recorded_tokenizer(str(corpora.folder / "bare_text_document")) is None


def test_a_run_over_its_own_tokenizer_is_accepted_without_a_word(
    corpora: Corpora, caplog: pytest.LogCaptureFixture
) -> None:
    config = corpora.config("one", "one")
    # No phase draws from it.
    unused = SourceConfig(prefix=str(corpora.folder / "other_text_document"))
    data = dataclasses.replace(config.data, sources=config.data.sources | {"unused": unused})
    require_one_tokenizer(dataclasses.replace(config, data=data))
    assert caplog.records == []


@pytest.mark.parametrize(
    ("training", "held_out", "field"),
    [("other", "one", "data.sources.text"), ("one", "other", r"data.validation\[0\]")],
)
def test_training_refuses_a_corpus_of_another_tokenizer(
    corpora: Corpora, training: str, held_out: str, field: str
) -> None:
    config = corpora.config(training, held_out)
    digests = f"{corpora.digest('other')}, not with {corpora.digest('one')}"
    with pytest.raises(MixedTokenizersError, match=f"^{field}: .*{digests}.*allow_other_tokenizer"):
        pretrain(config)
    assert not Path(config.run_dir).exists()
    known = dataclasses.replace(config.data, allow_other_tokenizers=True)
    require_one_tokenizer(dataclasses.replace(config, data=known))


def test_corpora_without_a_record_are_named_in_one_warning(
    corpora: Corpora, caplog: pytest.LogCaptureFixture
) -> None:
    config = corpora.config("bare", "one")
    bare = config.data.sources["text"].prefix
    data = dataclasses.replace(config.data, validation=[bare, *config.data.validation])
    with caplog.at_level(logging.WARNING):
        require_one_tokenizer(dataclasses.replace(config, data=data))
    (record,) = caplog.records
    assert f"{bare}, {bare}" in record.getMessage()


def test_weights_of_another_tokenizer_are_refused(corpora: Corpora) -> None:
    config = corpora.config("one", "one")
    start = dataclasses.replace(config.checkpoint, initialize_from="weights")
    config = dataclasses.replace(config, checkpoint=start)
    with pytest.raises(MixedTokenizersError, match=r"initialize_from: weights .*allow_other"):
        require_tokenizer_of_weights(config, corpora.digest("other"), corpora.digest("one"))
    for unknown_or_equal in ("", corpora.digest("one")):
        require_tokenizer_of_weights(config, unknown_or_equal, corpora.digest("one"))


def test_verify_finds_a_run_over_two_tokenizers(corpora: Corpora) -> None:
    config = corpora.config("other", "one")
    known = dataclasses.replace(config.data, allow_other_tokenizers=True)
    for data, passes in ((config.data, False), (known, True)):
        run_dir = f"{config.run_dir}_{passes}"
        folder = record_run(dataclasses.replace(config, data=data, run_dir=run_dir))
        found = verify(folder)
        assert found.passed is passes
        said = found.notes if passes else [str(fault) for fault in found.faults]
        assert any(corpora.digest("other") in line for line in said)
    assert verify(record_run(corpora.config("one", "one"))).passed


def test_an_imported_record_has_the_tokenizer(corpora: Corpora, tmp_path: Path) -> None:
    rows = tmp_path / "record" / "checkpoint_000001"
    rows.mkdir(parents=True)
    table = pa.table({"input_ids": [[1, 5, 6, 2]] * 3, "step": [1, 1, 2]})
    pq.write_table(table, rows / "steps_000001_to_000002.parquet")
    import_ettin(rows.parent, tmp_path / "imported", tokenizer=corpora.folder / "one")
    assert recorded_tokenizer(str(tmp_path / "imported")) == corpora.digest("one")
    import_ettin(rows.parent, tmp_path / "unknown")
    assert recorded_tokenizer(str(tmp_path / "unknown")) is None


def test_a_tokenizer_is_not_written_over_another(corpora: Corpora) -> None:
    same, other = (train_tokenizer(TEXTS[name], 270) for name in ("one", "other"))
    before = corpora.digest("one")
    write_tokenizer(same, corpora.folder / "one")
    with pytest.raises(FileExistsError, match=r"one/tokenizer\.json: is another tokenizer"):
        write_tokenizer(other, corpora.folder / "one")
    assert corpora.digest("one") == before
