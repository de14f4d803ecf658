"""Turn raw text into a tokenised corpus, Megatron's PREFIX_text_document.bin and .idx.

PREFIX_text_document.docs.parquet beside them holds the provenance of each document.
"""

from collections.abc import Sequence

from megatron_ettin.data.command_line import parse_command
from megatron_ettin.data.preprocess import preprocess


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, preprocess, print which library tokenises and a line for each corpus."""
    try:
        corpora, execution = parse_command(str(__doc__), arguments)
        for options in corpora:
            if execution.executor is not None:
                # datatrove is an optional dependency.
                from megatron_ettin.data.datatrove_step import run_on

                job = run_on(execution.executor, options, execution.tasks, **execution.options)
                if job is not None:
                    print(f"{options.output_prefix}: complete when job {job} has ended")
                    continue
            result = preprocess(options, say=print)
            print(*result.lines(), sep="\n")
    except (ImportError, RuntimeError, ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
