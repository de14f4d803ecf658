"""Turn raw text into a tokenised corpus, Megatron's PREFIX_text_document.bin and .idx.

PREFIX_text_document.docs.parquet beside them holds the provenance of each document.
"""

from collections.abc import Sequence

from megatron_ettin.data.command_line import parse_options
from megatron_ettin.data.preprocess import preprocess


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, preprocess, print which library tokenises and a line for each corpus."""
    try:
        for options in parse_options(str(__doc__), arguments):
            result = preprocess(options, say=print)
            print(*result.lines(), sep="\n")
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
