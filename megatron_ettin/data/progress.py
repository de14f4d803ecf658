"""A bar over the raw bytes of many shards, with rates."""

from collections import Counter

from tqdm import tqdm


class Progress:
    """Bar of MB/s and ETA, with documents/s and tokens/s; quiet unless on a terminal."""

    def __init__(self, description: str, total_bytes: int, *, quiet: bool = False) -> None:
        """Begin at 0 of `total_bytes`."""
        self._bar = tqdm(
            total=total_bytes,
            desc=description,
            unit="B",
            unit_scale=True,
            disable=True if quiet else None,
        )
        self._files_bytes = 0
        self._totals: Counter[str] = Counter()

    def advance(self, position: int, documents: int, tokens: int) -> None:
        """Show a place in the current file, in raw bytes, and count what was made since."""
        self._totals.update(documents=documents, tokens=tokens)
        if self._bar.disable:
            return
        seconds = max(self._bar.format_dict["elapsed"], 1e-9)
        rates = {unit: f"{total / seconds:,.0f}/s" for unit, total in self._totals.items()}
        self._bar.set_postfix(rates, refresh=False)
        self._bar.update(self._files_bytes + position - self._bar.n)

    def finish_file(self, size: int) -> None:
        """Count a file of `size` bytes as done."""
        self._files_bytes += size
        if not self._bar.disable:
            self._bar.update(self._files_bytes - self._bar.n)

    def close(self) -> None:
        """End the bar."""
        self._bar.close()
