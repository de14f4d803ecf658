"""A run for the query tests, and a slow list of all that it feeds."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megatron_ettin.data.tokenize import load_tokenizer
from megatron_ettin.queries.recorded_run import RecordedRun, open_run
from tests.conftest import TinyCorpus
from tests.runs import add_provenance, record_run, tiny_config

STEPS, SAVES, SKIPPED = 50, (4, 30), (20, 25)


class Piece(NamedTuple):
    g: int
    step: int
    slot: int
    position: int
    source: str
    epoch: int
    document: int
    offset: int
    length: int


@dataclass(frozen=True)
class Queried:
    """A run of several epochs that has not ended, with one that has as the truth of its future.

    The last phase is packed otherwise. Of its two sources only alpha has provenance.
    """

    folder: Path
    run: RecordedRun
    whole: RecordedRun
    pieces: list[Piece]
    """Pieces of all steps, future ones included, without skipped rows."""

    @property
    def done(self) -> int:
        return int(self.run.done[-1, 1])

    def before(self, g: int) -> list[Piece]:
        return [piece for piece in self.pieces if piece.g < g]


def make_queried(corpus: TinyCorpus, folder: Path) -> Queried:
    corpus = corpus.copy_to(folder / "corpus")
    add_provenance(corpus.folder / "alpha", load_tokenizer(corpus.folder / "tokenizer").digest)
    sections = {
        "phases": [
            {"name": "short", "train_tokens": 90_000, "seq_length": 128, "global_batch_size": 16},
            {
                "name": "long",
                "train_tokens": 20_000,
                "seq_length": 256,
                "global_batch_size": 8,
                "pack": "concat",
            },
        ],
        "data": {**corpus.data, "skip_rows": [list(SKIPPED)]},
        "logging": {"row_losses": True},
    }
    runs = [
        open_run(record_run(tiny_config(corpus, folder / name, **sections), **how))
        for name, how in (("run", {"steps": STEPS, "save_steps": SAVES}), ("whole", {}))
    ]
    return Queried(runs[0].folder, *runs, pieces=_scan(runs[1]))


def _scan(run: RecordedRun) -> list[Piece]:
    """List what each step holds, row by row, from the tokens' own positions."""
    names, found = run.order.source_names, []
    for record in run.ledger.steps:
        for g in range(int(record["g_begin"]), int(record["g_end"])):
            columns = run.order.pieces(g, g + 1)
            (tokens,) = run.order.tokens(g, g + 1)
            for piece in zip(*(column.tolist() for column in columns), strict=True):
                _, source, epoch, _, position, document, offset, length, slots, _ = piece
                body = run.order.corpus(names[source]).tokens(document)[offset : offset + length]
                occupied = tokens[position : position + slots].tolist()
                assert (
                    any(
                        occupied[skip : skip + length] == body.tolist()
                        for skip in range(len(occupied))
                    )
                    or not length
                ), "the table of pieces is not what the row holds"
                found.append(
                    Piece(
                        g=g,
                        step=int(record["step"]),
                        slot=g - int(record["g_begin"]),
                        position=position,
                        source=names[source],
                        epoch=epoch,
                        document=document,
                        offset=offset,
                        length=length,
                    )
                )
    return found
