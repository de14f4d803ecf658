"""Reading the inputs of a shard, one after the other."""

from collections.abc import Callable, Generator

from megatron_ettin.data.preprocess_options import PreprocessOptions, Shard
from megatron_ettin.data.raw_files import BadRecord, RawFile, TextBatch, TokenBatch, read_batches


def read_shard(
    options: PreprocessOptions, shard: Shard, on_bad: Callable[[BadRecord], None] | None = None
) -> Generator[tuple[RawFile, TextBatch | TokenBatch], None, None]:
    """Yield the batches of all inputs of a shard in order, each with its file."""
    for file in shard.inputs:
        for batch in read_batches(file, options.json_keys, options.origin, on_bad=on_bad):
            if isinstance(batch, TokenBatch) and len(options.json_keys) > 1:
                raise ValueError(
                    f"{file.path}: holds token ids, which are one field, not "
                    f"{len(options.json_keys)} (--json-keys)"
                )
            yield file, batch
            del batch  # a long text is not held while the next one is read
