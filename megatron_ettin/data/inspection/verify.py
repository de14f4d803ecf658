"""Verify a corpus: its files, hashes, sidecar and inputs, and a sample of its documents.

The sample is tokenised again from the raw files. Sources that are gone are reported as not checked.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_ettin.data.corpus_tokenizer import recorded_tokenizer
from megatron_ettin.data.inspection.check import FAIL, PASS, CorpusCheck
from megatron_ettin.data.inspection.raw_text import find_raw_file
from megatron_ettin.data.inspection.shards import (
    ShardSummary,
    corpus_shards,
    is_validation,
    read_dataset,
    read_json,
    read_shard_summary,
    text_field,
)
from megatron_ettin.data.inspection.verify_sample import SMALL_SAMPLE, SampleCheck
from megatron_ettin.data.provenance import GROUP_DOCUMENTS, Provenance, sidecar_path
from megatron_ettin.data.tokenize import Tokenizer, load_tokenizer
from megatron_ettin.file_digests import FileDigest
from megatron_ettin.native import TokenFile
from megatron_ettin.order.corpus_identity import CorpusIdentity, hash_corpus
from megatron_ettin.order.shard_list import DATASET_FILE

EXAMPLE = "verify corpora/small_text_document --tokenizer tokenizer"
#: Fields of PREFIX.identity.json that the content decides.
HASHED = ("documents", "tokens", "lengths_sha256", "tokens_sha256")


@dataclass(frozen=True, kw_only=True)
class CorpusVerification:
    """Verdict on a corpus, and the results of the checks."""

    prefix: str
    shards: int
    documents: int
    """Documents in the shards that could be read."""
    tokens: int
    checks: list[CorpusCheck]

    @property
    def passed(self) -> bool:
        """True if no check failed."""
        return not any(check.failures for check in self.checks)

    def lines(self) -> Iterator[str]:
        """Yield a line for the corpus, the results of the checks, and the verdict."""
        shards = "1 shard" if self.shards == 1 else f"{self.shards:,} shards"
        yield f"{self.prefix}: {shards}, {self.documents:,} documents, {self.tokens:,} tokens"
        for check in self.checks:
            yield from check.lines()
        yield PASS if self.passed else FAIL

    def to_json(self) -> dict[str, Any]:
        """Return the same as values of JSON."""
        checks = [{**dataclasses.asdict(check), "verdict": check.verdict} for check in self.checks]
        verdict = PASS if self.passed else FAIL
        return {**dataclasses.asdict(self), "checks": checks, "verdict": verdict}


def verify(
    prefix: str,
    *,
    tokenizer: Path | None = None,
    share: float = SMALL_SAMPLE,
    sources: Path | None = None,
    field: str | None = None,
) -> CorpusVerification:
    """Check every shard of a corpus, with a progress bar on a terminal; write nothing.

    `tokenizer` is a folder; without one no text is tokenised. `sources` is where the raw files are
    today, and `field` the field of their records, if it is not the one that is recorded.

    Raises:
        FileNotFoundError: there is no corpus, or no tokenizer.
        ValueError: the share is none, or the tokenizer's folder is damaged.
    """
    if not 0 < share <= 1:
        raise ValueError(f"--sample: {share} is no share in (0, 1]")
    shards = corpus_shards(prefix)
    loaded = None if tokenizer is None else load_tokenizer(tokenizer)
    verifier = _Verifier(loaded, sources, SampleCheck(loaded, share, sources))
    with verifier.dataset.faults_of():
        verifier.check_dataset(prefix, shards)
    for shard in tqdm(shards, desc="verifying shards", unit=" shards", leave=False, disable=None):
        verifier.check_shard(shard, field, text_field(prefix))
    return CorpusVerification(
        prefix=prefix,
        shards=len(shards),
        documents=sum(file.documents for file in verifier.hashed.values()),
        tokens=sum(file.tokens for file in verifier.hashed.values()),
        checks=verifier.finished_checks(),
    )


class _Verifier:
    """Checks of a corpus, which its shards go through one after the other."""

    def __init__(
        self, tokenizer: Tokenizer | None, sources: Path | None, sample: SampleCheck
    ) -> None:
        self._given = tokenizer
        self._sources = sources
        self.dataset = CorpusCheck(name="dataset")
        self._summary = CorpusCheck(name="summary")
        self._hashes = CorpusCheck(name="hashes")
        self._sidecar = CorpusCheck(name="sidecar")
        self._tokenizer = CorpusCheck(name="tokenizer")
        self._inputs = CorpusCheck(name="inputs")
        self._sample = sample
        self._recorded: dict[str, Any] = {}
        self._part = ""
        self.hashed: dict[str, CorpusIdentity] = {}

    def check_dataset(self, prefix: str, shards: list[str]) -> None:
        """Compare the shards of a folder with dataset.json; ValueError if that is damaged."""
        content = read_dataset(prefix)
        if content is None:
            if shards != [prefix]:
                self.dataset.skip(f"{prefix}/{DATASET_FILE}: no such file")
            return
        try:
            self._compare_dataset(prefix, {Path(shard).name for shard in shards}, content)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{prefix}/{DATASET_FILE}: damaged ({error!r})") from None

    def _compare_dataset(self, prefix: str, today: set[str], content: dict[str, Any]) -> None:
        recorded = {shard["name"]: shard for shard in content["shards"]}
        self.dataset.compared += len(recorded.keys() | today)
        for name in sorted(recorded.keys() - today):
            self.dataset.fail(f"{prefix}/{name}.idx: is missing, but {DATASET_FILE} names it")
        for name in sorted(today - recorded.keys()):
            self.dataset.fail(f"{prefix}/{name}.idx: {DATASET_FILE} does not name it")
        self._part = "validation_" if is_validation(prefix) else ""
        for name in (f"{self._part}documents", f"{self._part}tokens"):
            total = sum(shard[name] for shard in recorded.values())
            what = f"{prefix}/{DATASET_FILE}: sum of {name} of its shards"
            self.dataset.compare(total, content[name], what)
        self._recorded = {f"{Path(prefix) / name}": shard for name, shard in recorded.items()}
        self._recorded[""] = {"tokenizer_digest": content.get("tokenizer_digest")}

    def check_shard(self, shard: str, field: str | None, named_field: str) -> None:
        """Make all checks of a shard; an error of one does not keep the others from being made.

        `field` of the raw records is None if the shard's own record of it counts; `named_field` is
        for shards without one.
        """
        summary = None
        with self._summary.faults_of():
            summary = read_shard_summary(shard)
            if summary is None:
                self._summary.skip(f"{shard}.json: no such file")
        with self._hashes.faults_of():
            self._check_hashes(shard)
        with self._summary.faults_of():
            self._check_summary(shard, summary)
        with self._tokenizer.faults_of():
            self._check_tokenizer(shard, summary)
        with self._inputs.faults_of():
            self._check_inputs(summary)
        if not sidecar_path(shard).is_file():
            self._sidecar.skip(f"{sidecar_path(shard)}: no such file")
            self._sample.check.skip(f"{shard}: without a sidecar its sources are unknown")
            return
        with self._sidecar.faults_of(), Provenance.open(shard) as provenance:
            self._check_sidecar(shard, provenance)
            with self._sample.check.faults_of():
                settings = {} if summary is None else summary.settings
                field = field or settings.get("json_key", named_field)
                self._sample.add(shard, provenance, field, settings.get("append_eod"))

    def finished_checks(self) -> list[CorpusCheck]:
        """Return the checks; that of the dataset only where there is one."""
        has_dataset = self.dataset.compared or self.dataset.skipped or self.dataset.failures
        checks = [self._summary, self._hashes, self._sidecar, self._tokenizer, self._inputs]
        return [*([self.dataset] if has_dataset else []), *checks, self._sample.check]

    def _check_summary(self, shard: str, summary: ShardSummary | None) -> None:
        """Compare sizes and counts; those of dataset.json too."""
        hashed, listed = self.hashed.get(shard), self._recorded.get(shard, {})
        for name in ("documents", "tokens") if hashed is not None else ():
            today, said = getattr(hashed, name), getattr(summary, name, None)
            if listed:
                what = f"{shard}: {self._part}{name} in {DATASET_FILE}"
                self.dataset.compare(today, listed.get(f"{self._part}{name}"), what)
            if summary is not None and said is not None:
                self._summary.compare(today, said, f"{shard}: {name} in {summary.path}")
        if summary is None:
            return
        for name, size in summary.sizes.items():
            path = summary.path.parent / name
            if path.is_file():
                self._summary.compare(path.stat().st_size, size, f"{path}: size in bytes")
            else:
                self._summary.compared += 1
                self._summary.fail(f"{path}: is missing; {size} bytes are recorded")

    def _check_hashes(self, shard: str) -> None:
        """Hash the pair anew, and compare with its identity file."""
        self.hashed[shard] = hash_corpus(shard)
        path = Path(f"{shard}.identity.json")
        if not path.is_file():
            self._hashes.skip(f"{path}: no such file")
            return
        content = read_json(path)
        seal = content.pop("sha256", None)
        today = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        self._hashes.compare(today, seal, f"{path}: SHA-256 of its fields")
        for name in HASHED:
            file = "bin" if name == "tokens_sha256" else "idx"
            what = f"{shard}.{file}: {name}"
            self._hashes.compare(getattr(self.hashed[shard], name), content.get(name), what)

    def _check_tokenizer(self, shard: str, summary: ShardSummary | None) -> None:
        """Compare all records of the tokenizer with each other and with the one that is given."""
        first = self._recorded.get("", {}).get("tokenizer_digest")
        recorded = {
            f"{shard}.docs.parquet": recorded_tokenizer(shard),
            f"{shard}.json": summary.tokenizer_sha256 if summary is not None else None,
        }
        found = {path: sha256 for path, sha256 in recorded.items() if sha256 is not None}
        if not found:
            self._tokenizer.skip(f"{shard}: no record of its tokenizer")
        expected = first or next(iter(found.values()), None)
        for path, sha256 in found.items():
            self._tokenizer.compare(sha256, expected, f"{path}: SHA-256 of the tokenizer")
        if self._given is None or expected is None:
            return
        what = f"{self._given.folder / 'tokenizer.json'}: SHA-256"
        self._tokenizer.compare(self._given.digest, expected, what)
        if self._given.digest != expected:
            self._sample.forget_tokenizer()

    def _check_inputs(self, summary: ShardSummary | None) -> None:
        for file in summary.inputs if summary is not None else ():
            path = find_raw_file(file.path, self._sources)
            if path is None:
                self._inputs.skip(f"{file.path}: no such file here (--sources)")
            else:
                today = FileDigest.of_file(path).sha256
                self._inputs.compare(today, file.sha256, f"{path}: SHA-256")

    def _check_sidecar(self, shard: str, provenance: Provenance) -> None:
        """Read all columns, whose pages carry checksums, and compare with the .idx."""
        file = TokenFile(shard, check=False)
        what = f"{sidecar_path(shard)}: count of documents"
        self._sidecar.compare(provenance.num_documents, file.num_documents, what)
        end = min(provenance.num_documents, file.num_documents)
        begins = range(0, end, GROUP_DOCUMENTS)
        for begin in tqdm(
            begins, desc="reading sidecar", unit=" groups", leave=False, disable=None
        ):
            ordinals = np.arange(begin, min(begin + GROUP_DOCUMENTS, end))
            rows = provenance.documents(ordinals)  # refuses rows in another order
            lengths = file.read_lengths(begin, int(ordinals[-1]) + 1)
            self._sidecar.compared += len(lengths)
            for place in np.flatnonzero(rows["n_tokens"].to_numpy() != lengths):
                self._sidecar.fail(
                    f"{sidecar_path(shard)}: document {begin + place} has "
                    f"{rows['n_tokens'][place]} tokens, but {lengths[place]} in {shard}.idx"
                )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add("prefix", metavar="PREFIX", help="corpus, without a suffix; or a folder of shards")
    add("--tokenizer", type=Path, metavar="FOLDER", help="tokenise the sample again with this one")
    sample = f"share of the documents that is tokenised again; default: {SMALL_SAMPLE}"
    add("--sample", type=float, default=SMALL_SAMPLE, metavar="SHARE", help=sample)
    add("--sources", type=Path, metavar="ROOT", help="folder of the raw files, if they were moved")
    key = "field of the raw records, if it is not the one that the corpus was made with"
    add("--json-key", metavar="FIELD", help=key)


def answer(args: argparse.Namespace) -> CorpusVerification:
    """Return what the command prints."""
    return verify(
        args.prefix,
        tokenizer=args.tokenizer,
        share=args.sample,
        sources=args.sources,
        field=args.json_key,
    )
