"""Upload of a local repository to the Hugging Face Hub, revision by revision."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from megatron_ettin.export.hub_repository import MAIN, HubRepository

#: Errors of a transfer; which HTTP library they come from depends on huggingface_hub's version.
TRANSFER_ERRORS: Any = HfHubHTTPError.__bases__


def upload_repository(
    repository: HubRepository, name: str, api: HfApi | None = None
) -> Iterator[str]:
    """Upload every revision to a branch of OWNER/NAME, main last; yield a line for each.

    A repository that is not there is created, private. Files that a branch has already are not
    sent again, and others than the revision's are removed from it.

    Raises:
        ValueError, OSError: the Hub refuses, or cannot be reached.
    """
    api = HfApi() if api is None else api
    names = sorted(repository.revisions(), key=lambda revision: (revision == MAIN, revision))
    try:
        api.create_repo(name, private=True, exist_ok=True)
        for revision in names:
            if revision != MAIN:
                api.create_branch(name, branch=revision, exist_ok=True)
            title, _, description = repository.description(revision).partition("\n\n")
            api.upload_folder(
                repo_id=name,
                folder_path=repository.snapshot(revision),
                revision=revision,
                commit_message=title,
                commit_description=description,
                delete_patterns="*",
            )
            yield f"{name} {revision}: uploaded"
    except TRANSFER_ERRORS as error:
        raise ValueError(f"{name}: not uploaded: {error}") from error
