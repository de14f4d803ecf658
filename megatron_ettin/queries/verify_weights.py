"""Comparison of every file of a run's checkpoints with what was saved.

The list of files that a checkpoint's state holds is compared with the ledger by the chain's check;
here the files are hashed and compared with the list.
"""

from __future__ import annotations

import json
from pathlib import Path

from megatron_ettin.file_digests import FileList, differences, unlisted
from megatron_ettin.queries.faults import Check
from megatron_ettin.queries.verify_checkpoints import checkpoint_states


def check_weights(folder: Path) -> Check:
    """Hash every file of every checkpoint that is there, those of steps gone back on included."""
    check = Check(name="weights")
    for state in checkpoint_states(folder):
        try:
            document = json.loads(state.read_bytes())
            if "files_sha256" not in document:  # a fault of the chain's check, or an old checkpoint
                check.notes.append(f"the files of {state.parent.name} cannot be checked")
                continue
            listed = FileList.from_document(document)
        except (ValueError, TypeError, OSError) as error:
            check.fail(f"{state}: {error}")
            continue
        check.items += len(listed.files)
        for difference in [
            *differences(state.parent, listed, listed.files),
            *unlisted(state.parent, listed, beside=[state.name]),
        ]:
            check.fail(difference)
    return check
