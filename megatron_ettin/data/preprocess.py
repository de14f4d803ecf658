"""Preprocessing of raw files to a corpus: read, tokenise, split, write.

Memory is constant. The result depends on the content of the inputs, the tokenizer and the options,
never on the number of workers, on machines or on interruptions. A summary beside each corpus says
which content it was made from.
"""

import functools
import glob
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from megatron_ettin.data.batch_tokenizer import (
    BatchTokenizer,
    GigatokenTokenizer,
    LibraryTokenizer,
    choose_library,
    only_tokenizers,
)
from megatron_ettin.data.corpus_summary import (
    CorpusSummary,
    add_up,
    read_summary,
    to_json,
)
from megatron_ettin.data.duplicates import find_duplicates, forget_duplicates
from megatron_ettin.data.encoding import DROPPED, PARTS, count_name
from megatron_ettin.data.output_store import staged, store_files
from megatron_ettin.data.preprocess_options import PreprocessOptions, Shard
from megatron_ettin.data.progress import Progress
from megatron_ettin.data.raw_files import TextBatch
from megatron_ettin.data.shard_maker import ShardMaker, empty_corpus
from megatron_ettin.data.shard_reading import read_shard
from megatron_ettin.data.tokenize import Tokenizer, load_tokenizer
from megatron_ettin.order.shard_list import DATASET_FILE
from megatron_ettin.publication import TEMPORARY_MARK, publish_text

DATASET_FORMAT = "megatron-ettin-dataset/1"
#: Raw bytes that keep a process busy longer than it takes to start.
MIN_BYTES_PER_WORKER = 2**26
COUNTS = ("documents", "tokens", "validation_documents", "validation_tokens")
#: What dataset.json says of each shard.
PER_SHARD = (*COUNTS, "dropped", "inputs", "sizes")
_REMEDY = "choose another --output-prefix, remove it, or run"

Summaries = dict[str, CorpusSummary]


@dataclass(frozen=True, kw_only=True)
class PreprocessResult:
    """The corpora of a run."""

    corpora: dict[Path | str, Counter[str]]
    """Counts of each corpus, of all its shards together, by prefix, folder or URL."""
    seconds: float
    """Time spent on tokenising and writing; 0 where all of it was up to date."""
    raw_bytes: int
    """Bytes of the inputs that were read in that time."""
    tokens: int
    """Tokens that were written in that time."""

    def lines(self) -> list[str]:
        """Return a line for each corpus: its counts, what was dropped, and the rates."""
        speed = "up to date"
        if self.seconds:
            megabytes, tokens = self.raw_bytes / 1e6 / self.seconds, self.tokens / self.seconds
            speed = f"{self.seconds:,.1f} s, {megabytes:,.1f} MB/s, {tokens:,.0f} tokens/s"
        lines = []
        for prefix, counts in self.corpora.items():
            dropped = [f"{counts[name]:,} {name}" for name in (*DROPPED, "bad") if counts[name]]
            lines.append(
                f"{prefix}: {counts['documents']:,} documents, {counts['tokens']:,} tokens;"
                f" validation {counts['validation_documents']:,} documents,"
                f" {counts['validation_tokens']:,} tokens;"
                f" dropped: {', '.join(dropped) or 'none'}; {speed}"
            )
        return lines


def preprocess(
    options: PreprocessOptions, say: Callable[[str], None] = lambda _: None
) -> PreprocessResult:
    """Make the corpora, unless they are there already, made from the same content.

    `say` is given a line for the user: which library tokenises.

    Raises:
        ValueError, OSError: naming the input or tokenizer that is at fault, or a corpus of another
            tokenizer or of other settings that is in the way. Corpora that were there stay as they
            were; of shards, those that are committed stay, and the next run goes on after them.
    """
    with staged(options) as local:
        result = _preprocess(local, say)
        folder = local.output_prefix.parent
    if options.store is None:
        return result
    urls: dict[Path | str, Counter[str]] = {
        f"{options.store}/{Path(corpus).relative_to(folder)}": counts
        for corpus, counts in result.corpora.items()
    }
    return replace(result, corpora=urls)


def _preprocess(options: PreprocessOptions, say: Callable[[str], None]) -> PreprocessResult:
    tokenizer = load_tokenizer(options.tokenizer)
    _refuse_what_is_in_the_way(options)
    shards = options.outputs()
    to_do = [shard for shard in shards if current_summaries(options, shard, tokenizer) is None]
    tokens = 0
    begin = time.monotonic()
    if to_do:
        library, why = _choose(options, to_do[0], tokenizer)
        say(why)
        if options.deduplicate:
            find_duplicates(options)
        raw_bytes = sum(shard.raw_bytes for shard in to_do)
        with closing(Progress(options.output_prefix.name, raw_bytes)) as progress:
            for made in _make(options, to_do, tokenizer, library, progress):
                tokens += sum(s.tokens + s.validation_tokens for s in made.values())
    seconds = time.monotonic() - begin if to_do else 0.0
    return PreprocessResult(
        corpora=dict(_finish(options).items()),
        seconds=seconds,
        raw_bytes=sum(shard.raw_bytes for shard in to_do),
        tokens=tokens,
    )


def preprocess_shard(options: PreprocessOptions, index: int) -> None:
    """Make one shard unless it is there, as a task of a larger job does; raises as `preprocess`.

    With `deduplicate`, `find_duplicates` must have run before. `finish_dataset` completes the job.
    """
    tokenizer = load_tokenizer(options.tokenizer)
    shard = options.outputs()[index]
    with staged(options) as local:
        if current_summaries(local, shard, tokenizer) is None:
            library, _ = _choose(local, shard, tokenizer)
            with closing(Progress(f"shard {index}", shard.raw_bytes)) as progress:
                ShardMaker(local, tokenizer, library).make(shard, progress)


def current_summaries(
    options: PreprocessOptions, shard: Shard, tokenizer: Tokenizer
) -> Summaries | None:
    """Return the summary of each field of a shard; None unless all are made, from this content.

    Raises:
        OtherSettingsError: a corpus of other settings or of another tokenizer is in the way.
    """
    current: Summaries = {}
    for json_key in options.json_keys:
        prefix = options.prefix(json_key, "document", shard)
        summary = read_summary(prefix)
        if summary is None:
            continue
        settings = options.settings(json_key)
        summary.require_settings(prefix, settings, options.tokenizer, tokenizer.digest)
        if summary.dropped["bad"] and not options.quarantines:
            continue
        if summary.is_of(prefix, shard.inputs, [shard.before, shard.stamps]):
            current[json_key] = summary
    return current if len(current) == len(options.json_keys) else None


def finish_dataset(options: PreprocessOptions) -> None:
    """Complete a corpus whose shards are all there: publish dataset.json in its folders.

    Raises:
        ValueError: a shard is not made, or a corpus has no document at all.
    """
    with staged(options) as local:
        _finish(local)


def _finish(options: PreprocessOptions) -> dict[Path, Counter[str]]:
    """Return the counts of each corpus, when all of it is complete."""
    shards = options.outputs()
    corpora = {}
    for json_key in options.json_keys:
        summaries = []
        for shard in shards:
            prefix = options.prefix(json_key, "document", shard)
            summary = read_summary(prefix)
            if summary is None:
                raise ValueError(f"{prefix}: is not made; run the same command again")
            summaries.append(summary)
        counts = add_up(summaries)
        for part in options.parts:
            corpus = options.corpus(json_key, part)
            if not counts[count_name(part, "documents")]:
                raise ValueError(empty_corpus(json_key, corpus, counts))
            if options.shards:
                _publish_dataset(options, corpus, summaries, counts)
            _remove_leftovers(options, corpus)
        corpora[options.corpus(json_key, "document")] = counts
    forget_duplicates(options)
    return corpora


def _publish_dataset(
    options: PreprocessOptions,
    corpus: Path,
    summaries: Sequence[CorpusSummary],
    counts: Counter[str],
) -> None:
    """Write dataset.json into the folder of the shards of a corpus."""
    shards = [
        {
            "name": path.stem,
            **{name: of for name, of in asdict(summary).items() if name in PER_SHARD},
        }
        for path, summary in zip(_shard_paths(options, corpus), summaries, strict=True)
    ]
    dataset = {
        "format": DATASET_FORMAT,
        "settings": summaries[0].settings,
        "tokenizer_digest": summaries[0].tokenizer_digest,
        **{name: counts[name] for name in COUNTS},
        "dropped": {reason: counts[reason] for reason in (*DROPPED, "bad")},
        "shards": shards,
    }
    text = to_json(dataset)
    path = corpus / DATASET_FILE
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        publish_text(path, text)
        store_files(options, [path])


def _remove_leftovers(options: PreprocessOptions, corpus: Path) -> None:
    """Remove the temporary files of small ones that killed runs left; no run is at work now."""
    folder, names = (
        (corpus, "*") if options.shards else (corpus.parent, f"{glob.escape(corpus.name)}.*")
    )
    for path in folder.glob(f"{names}{TEMPORARY_MARK}*"):
        path.unlink()


def _choose(
    options: PreprocessOptions, shard: Shard, tokenizer: Tokenizer
) -> tuple[BatchTokenizer, str]:
    """Return the library for the text at the beginning of a shard, and a sentence saying why."""
    if options.library == "tokenizers":
        return only_tokenizers(tokenizer)
    # A record that cannot be read is reported when the shard is made.
    batches = read_shard(options, shard, lambda _: None)
    with closing(batches):
        first = next((batch for _, batch in batches), None)
    sample = first.texts[0] if isinstance(first, TextBatch) else []
    return choose_library(tokenizer, sample)


def _make(
    options: PreprocessOptions,
    shards: Sequence[Shard],
    tokenizer: Tokenizer,
    library: BatchTokenizer,
    progress: Progress,
) -> Iterator[Summaries]:
    """Make shards, in as many processes as are wanted and worth their start; yield summaries."""
    raw_bytes = sum(shard.raw_bytes for shard in shards)
    workers = min(options.workers, len(shards), 1 + raw_bytes // MIN_BYTES_PER_WORKER)
    if workers == 1:
        maker = ShardMaker(options, tokenizer, library)
        for shard in shards:
            yield maker.make(shard, progress)
        return
    # Not forked: the libraries of the readers have threads, and a fork copies their locks.
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // workers)
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(threads,)
    )
    # A task carries its shard, and of the options not the inputs of all others.
    make = partial(
        _make_in_worker,
        replace(options, inputs=()),
        tokenizer.digest,
        isinstance(library, GigatokenTokenizer),
    )
    try:
        futures = {pool.submit(make, shard): shard for shard in shards}
        for future in as_completed(futures):
            shard, made = futures[future], future.result()
            for summary in made.values():
                progress.advance(0, summary.documents, summary.tokens)
            for file in shard.inputs:
                progress.finish_file(file.size)
            yield made
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a tokenising process died, perhaps for want of memory; try fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(threads: int) -> None:
    """Give this process its share of the cores, and end it with its parent."""
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    # The parent gets Ctrl-C too and ends its workers; theirs would only print tracebacks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """End this worker when its parent is killed: it would wait for its next task for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _make_in_worker(
    options: PreprocessOptions, tokenizer_digest: str, fast: bool, shard: Shard
) -> Summaries:
    with closing(Progress("", shard.raw_bytes, quiet=True)) as progress:
        return _worker_maker(options, tokenizer_digest, fast).make(shard, progress)


@functools.cache
def _worker_maker(options: PreprocessOptions, tokenizer_digest: str, fast: bool) -> ShardMaker:
    tokenizer = load_tokenizer(options.tokenizer)
    if tokenizer.digest != tokenizer_digest:
        raise ValueError(f"{options.tokenizer}: tokenizer.json was changed while it was in use")
    library = GigatokenTokenizer(tokenizer) if fast else LibraryTokenizer(tokenizer)
    return ShardMaker(options, tokenizer, library)


def _shard_paths(options: PreprocessOptions, corpus: Path) -> list[Path]:
    return [corpus / f"{index:05d}" for index in range(len(options.inputs))]


def _refuse_what_is_in_the_way(options: PreprocessOptions) -> None:
    """Raise ValueError if files of an earlier run would be mixed with those of this one."""
    for json_key in options.json_keys:
        for part in PARTS:
            corpus = options.corpus(json_key, part)
            pair, folder = Path(f"{corpus}.idx"), corpus.is_dir()
            there = pair if pair.exists() else corpus
            if part not in options.parts and (pair.exists() or folder):
                raise ValueError(
                    f"{there}: made by an earlier run, and without --validation-share its documents"
                    " would be trained on too; remove it, or choose another --output-prefix"
                )
            if options.shards and pair.exists():
                raise ValueError(f"{pair}: is a corpus in one piece; {_REMEDY} without --shards")
            if folder and not options.shards:
                raise ValueError(f"{corpus}: is a folder of shards; {_REMEDY} with --shards")
            known = {path.name for path in _shard_paths(options, corpus)}
            for path in sorted(corpus.glob("*.idx")):
                if path.stem not in known:
                    raise ValueError(
                        f"{path}: is a shard of no input; remove the shard, name all inputs, or"
                        " choose another --output-prefix"
                    )
