"""Records that cannot be read, set aside in a file of their own."""

import json
from pathlib import Path
from typing import TextIO

from megatron_ettin.data.raw_files import BadRecord
from megatron_ettin.publication import rename_durably, sync

#: Records after which a share of bad ones says something.
MIN_RECORDS_JUDGED = 1000


class Quarantine:
    """Side file of the records that cannot be read; there is none without such records."""

    def __init__(self, path: Path, max_share: float) -> None:
        """Begin; `max_share` is the largest share of bad records that is accepted."""
        self._path = path
        self._temporary = Path(f"{path}.tmp")
        self._max_share = max_share
        self._file: TextIO | None = None
        self.records = 0

    def add(self, record: BadRecord) -> None:
        """Write one record as a JSON line, to PATH.tmp."""
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._temporary.open("w", encoding="utf-8")
        content = record.content.decode("utf-8", "backslashreplace")
        entry = {"path": record.path, "line": record.line, "reason": record.reason}
        self._file.write(json.dumps({**entry, "content": content}) + "\n")
        self.records += 1

    def judge(self, good: int, *, at_end: bool) -> None:
        """Raise ValueError if the share of bad records is above the limit."""
        total = self.records + good
        if self.records > self._max_share * total and (at_end or total >= MIN_RECORDS_JUDGED):
            raise ValueError(
                f"{self.records} of {total} records cannot be read, more than the share "
                f"{self._max_share} of --max-bad-share; {self._temporary} names them"
            )

    def publish(self) -> None:
        """Give the file its name; without one, remove what an earlier run left."""
        if self._file is None:
            for left in (self._path, self._temporary):
                left.unlink(missing_ok=True)
            return
        self.close()
        sync(self._temporary)
        rename_durably(self._temporary, self._path)

    def close(self) -> None:
        """Close the file; unpublished, it stays under its temporary name for the user to read."""
        if self._file is not None:
            self._file.close()
