"""Records that cannot be read, set aside in a file of their own."""

import json
from pathlib import Path

from megatron_ettin.data.raw_files import BadRecord
from megatron_ettin.publication import rename_durably, sync

#: Records after which a share of bad ones says something.
MIN_RECORDS_JUDGED = 1000


class Quarantine:
    """Side file of the records that cannot be read; an empty one is not published."""

    def __init__(self, path: Path, max_share: float) -> None:
        """Start PATH.tmp; `max_share` is the largest share of bad records that is accepted."""
        self._path = path
        self._temporary = Path(f"{path}.tmp")
        self._max_share = max_share
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._temporary.open("w", encoding="utf-8")
        self.records = 0

    def add(self, record: BadRecord) -> None:
        """Write one record."""
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
        """Give the file its name; remove one of an earlier run if there is nothing to write."""
        self._file.close()
        if self.records:
            sync(self._temporary)
            rename_durably(self._temporary, self._path)
        else:
            self._temporary.unlink()
            self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file, which stays under its temporary name for the user to read."""
        self._file.close()
