"""Other ways from JSON lines to token ids on disk, each a program: `python -m ... NAME`.

They begin where our tool begins, with a process. The last line of their output is a JSON object:
`seconds` from opening the first file to the last byte written, without the start of the interpreter
and imports, `documents` and `tokens`.

    gigatoken      the bare library: reads and encodes, writes nothing
    megatron_fast  as Megatron-LM's tools/preprocess_data_fast.py is described: gigatoken encodes a
                   file as a whole, megatron-core's builder gets one document after the other
    megatron       as its tools/preprocess_data.py is described: processes encode one document at a
                   time with `tokenizers`, megatron-core's builder writes
    datatrove      JsonlReader and DocumentTokenizer, without its shuffling

No line of these programs is theirs; where there was a choice, the faster way was taken. All of them
take a special token that a text spells out as text, if they can be told to, as our tool does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LINES_PER_MESSAGE = 32
"""Lines that a process of the pool gets at a time."""


@dataclass(frozen=True, kw_only=True)
class EncodingResult:
    """Outcome of a program."""

    seconds: float
    documents: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class EncodingTask:
    """Work of a program."""

    files: tuple[Path, ...]
    tokenizer: Path
    """Folder with tokenizer.json."""
    output: Path
    """Start of the paths of what it writes."""
    processes: int


def without_specials(tokenizer: Path) -> str:
    """Return the content of tokenizer.json without special tokens, matched in text or added."""
    content = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    content["added_tokens"] = [each for each in content["added_tokens"] if not each["special"]]
    content["post_processor"] = None
    return json.dumps(content)


def vocab_size(tokenizer: Path) -> int:
    """Return the number of ids, those of special tokens included."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(tokenizer / "tokenizer.json")).get_vocab_size()


def encode_with_gigatoken(task: EncodingTask) -> EncodingResult:
    """Read and encode all files in one call; its answer stays in memory."""
    from gigatoken.gigatoken_rs import JsonlFileSource, load_hf_json

    tokenizer = load_hf_json(without_specials(task.tokenizer))
    begin = time.perf_counter()
    answer = tokenizer.encode_files(JsonlFileSource([str(path) for path in task.files]))
    seconds = time.perf_counter() - begin
    offsets, _ = flat(answer)
    return EncodingResult(
        seconds=seconds, documents=len(offsets) - 1, tokens=int(offsets[-1] - offsets[0])
    )


def flat(answer: Any) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Return the offsets of gigatoken's documents, and their ids end to end; copies nothing."""
    layout = answer.layout
    return np.asarray(layout.offsets.data), np.asarray(layout.content.data)


def build_from_gigatoken(task: EncodingTask) -> EncodingResult:
    """Encode file by file, and hand each document to megatron-core's builder."""
    from gigatoken.gigatoken_rs import JsonlFileSource, load_hf_json

    tokenizer = load_hf_json(without_specials(task.tokenizer))
    open_builder = builder_of(task)
    begin = time.perf_counter()
    builder = open_builder()
    documents = tokens = 0
    for path in task.files:
        offsets, ids = flat(tokenizer.encode_files(JsonlFileSource([str(path)])))
        for first, end in itertools.pairwise(offsets.tolist()):
            builder.add_document(ids[first:end], [end - first])
        documents += len(offsets) - 1
        tokens += int(offsets[-1] - offsets[0])
    builder.finalize(f"{task.output}.idx")
    return EncodingResult(seconds=time.perf_counter() - begin, documents=documents, tokens=tokens)


def builder_of(task: EncodingTask) -> Callable[[], Any]:
    """Import megatron-core's builder; return a function that opens PREFIX.bin with it."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(vocab_size(task.tokenizer))
    return lambda: IndexedDatasetBuilder(f"{task.output}.bin", dtype=dtype)


class LineEncoder:
    """Function of a process: a line of JSON to the ids of its text."""

    tokenizer: Any

    @classmethod
    def load(cls, content: str) -> None:
        """Load the tokenizer, once in each process."""
        from tokenizers import Tokenizer

        cls.tokenizer = Tokenizer.from_str(content)

    @classmethod
    def encode(cls, line: str) -> list[int]:
        """Return the ids of the text of a line."""
        ids: list[int] = cls.tokenizer.encode(
            json.loads(line)["text"], add_special_tokens=False
        ).ids
        return ids


def build_from_pool(task: EncodingTask) -> EncodingResult:
    """Let processes encode lines, and hand each document to megatron-core's builder."""
    content, open_builder = without_specials(task.tokenizer), builder_of(task)
    begin = time.perf_counter()
    builder = open_builder()
    documents = tokens = 0
    with multiprocessing.Pool(task.processes, LineEncoder.load, (content,)) as pool:
        for ids in pool.imap(LineEncoder.encode, lines_of(task.files), LINES_PER_MESSAGE):
            builder.add_document(ids, [len(ids)])
            documents += 1
            tokens += len(ids)
    builder.finalize(f"{task.output}.idx")
    return EncodingResult(seconds=time.perf_counter() - begin, documents=documents, tokens=tokens)


def lines_of(files: Sequence[Path]) -> Iterator[str]:
    """Yield the lines of all files."""
    for path in files:
        with path.open(encoding="utf-8") as file:
            yield from file


def encode_with_datatrove(task: EncodingTask) -> EncodingResult:
    """Run datatrove's reader and tokenizer, as many tasks as processes."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    folder = task.output
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(without_specials(task.tokenizer), encoding="utf-8")
    (folder / "paths").write_text("".join(f"{path.name}\n" for path in task.files))
    steps = [
        JsonlReader(str(task.files[0].parent), paths_file=str(folder / "paths")),
        DocumentTokenizer(
            str(folder / "tokens"),
            str(folder / "tokenizer.json"),
            shuffle_documents=False,
            save_final_metadata=False,
        ),
    ]
    executor = LocalPipelineExecutor(
        steps,
        tasks=task.processes,
        workers=task.processes,
        logging_dir=str(folder / "logs"),
        start_method="fork",  # so that no process imports again, which is not counted
    )
    begin = time.perf_counter()
    executor.run()
    seconds = time.perf_counter() - begin
    sizes = [path.stat().st_size for path in (folder / "tokens").glob("*.index")]
    width = 2 if vocab_size(task.tokenizer) <= 2**16 else 4
    tokens = sum(path.stat().st_size for path in (folder / "tokens").glob("*.ds")) // width
    return EncodingResult(seconds=seconds, documents=sum(sizes) // 8, tokens=tokens)


def rebuild(task: EncodingTask) -> EncodingResult:
    """Read a corpus, `files[0]` without its suffix, and write it anew, both with megatron-core."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    begin = time.perf_counter()
    corpus = IndexedDataset(str(task.files[0].with_suffix("")))
    builder = IndexedDatasetBuilder(f"{task.output}.bin", dtype=corpus.index.dtype)
    tokens = 0
    for first, end in itertools.pairwise(corpus.document_indices.tolist()):
        sequences = [corpus[number] for number in range(first, end)]
        builder.add_document(np.concatenate(sequences), [len(each) for each in sequences])
        tokens += sum(map(len, sequences))
    builder.finalize(f"{task.output}.idx")
    seconds = time.perf_counter() - begin
    return EncodingResult(
        seconds=seconds, documents=len(corpus.document_indices) - 1, tokens=tokens
    )


PROGRAMS: dict[str, Callable[[EncodingTask], EncodingResult]] = {
    "gigatoken": encode_with_gigatoken,
    "megatron_fast": build_from_gigatoken,
    "megatron": build_from_pool,
    "datatrove": encode_with_datatrove,
    "rebuild": rebuild,
}


def main() -> None:
    """Run the named program."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("--files", nargs="+", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--processes", type=int, required=True)
    options = vars(parser.parse_args())
    program = PROGRAMS[options.pop("program")]
    options["files"] = tuple(options["files"])
    print(json.dumps(asdict(program(EncodingTask(**options)))))


if __name__ == "__main__":
    main()
