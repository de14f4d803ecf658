"""Damage to corpora, as it happens: what a check must find."""

from pathlib import Path

import numpy as np

from megatron_ettin.native import TokenFile, TokenFileBuilder


def change_token(prefix: Path, *, document: int, offset: int = 0) -> None:
    """Change one token of a document in the `.bin`; ids are uint16."""
    with_tokens(prefix, document, offset, [(TokenFile(str(prefix)).tokens(document)[offset] ^ 1)])


def swap_documents(prefix: Path, one: int, other: int) -> None:
    """Swap two documents; those of other lengths change the `.idx` too."""
    file = TokenFile(str(prefix))
    documents = [file.tokens(i) for i in range(file.num_documents)]
    documents[one], documents[other] = documents[other], documents[one]
    if len(documents[one]) == len(documents[other]):
        for document in (one, other):
            with_tokens(prefix, document, 0, documents[document].tolist())
        return
    builder = TokenFileBuilder(str(prefix), "uint16")
    for tokens in documents:
        builder.add(tokens)
    builder.commit()


def with_tokens(prefix: Path, document: int, offset: int, tokens: list[int]) -> None:
    """Write tokens into a document, in place."""
    begin = int(TokenFile(str(prefix)).lengths[:document].sum()) + offset
    with Path(f"{prefix}.bin").open("r+b") as file:
        file.seek(2 * begin)
        file.write(np.array(tokens, dtype="<u2").tobytes())
