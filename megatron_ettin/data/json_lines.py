"""Objects of JSON Lines files, with the file and line of each for messages."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatron_ettin.data.lines import read_lines


class JsonLine(NamedTuple):
    """A line of a JSON Lines file."""

    where: str
    """File and line, for messages."""
    fields: dict[str, Any]

    def text(self, name: str) -> str:
        """Return a field that must be a string; raise ValueError if it is not."""
        if name not in self.fields:
            raise ValueError(f'{self.where}: no field "{name}"; there are {", ".join(self.fields)}')
        if not isinstance(value := self.fields[name], str):
            raise ValueError(f'{self.where}: field "{name}" is {value!r:.40}, not a string')
        return value


def read_json_lines(path: Path) -> Iterator[JsonLine]:
    """Yield the object of each line; blank lines are skipped. The file may be .gz or .zst too.

    Raises:
        ValueError: a line is no JSON object; the message names file and line.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        for number, line in read_lines(path, file):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: invalid JSON: {error}") from None
            if not isinstance(fields, dict):
                raise ValueError(f"{where}: a JSON object is needed, found {line.strip():.40}")
            yield JsonLine(where, fields)
