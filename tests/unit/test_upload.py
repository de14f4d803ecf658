"""Upload of a repository through huggingface_hub itself, to a stand-in for the Hub."""

from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants

from megatron_ettin.export.hub_repository import FILES_TRAILER, HubRepository
from megatron_ettin.export.upload import upload_repository
from tests.unit.hub_stand_in import hub_stand_in


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubRepository:
    """Write two revisions; let huggingface_hub reach this machine."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with HubRepository(tmp_path, "encoder") as repository:
        for name in ("step10", "decay5"):
            folder = repository.work / "model"
            folder.mkdir()
            (folder / "config.json").write_text(name)
            (folder / "model.safetensors").write_bytes(name.encode() * 100)
            repository.publish(name, folder, {FILES_TRAILER: "0"})
        repository.point_main("decay5")
    return repository


def test_every_revision_arrives_at_its_branch(repository: HubRepository) -> None:
    with hub_stand_in() as hub:
        api = HfApi(endpoint=hub.endpoint, token="none")
        lines = list(upload_repository(repository, "owner/name", api))
    assert lines == [f"owner/name {name}: uploaded" for name in ("decay5", "step10", "main")]
    (created,) = hub.created
    assert created.get("visibility", "private" if created.get("private") else "") == "private"
    assert hub.branches == ["decay5", "step10"]
    assert hub.titles == {"decay5": "decay5", "step10": "step10", "main": "decay5"}
    for branch, name in (("decay5", "decay5"), ("step10", "step10"), ("main", "decay5")):
        files = hub.files[branch]
        assert files["config.json"] == name.encode()
        assert files["model.safetensors"] == name.encode() * 100


def test_a_refusal_is_one_message(repository: HubRepository) -> None:
    with hub_stand_in() as hub:
        hub.lacks_commits = True
        api = HfApi(endpoint=hub.endpoint, token="none")
        with pytest.raises(ValueError, match=r"owner/name: not uploaded: .*403"):
            list(upload_repository(repository, "owner/name", api))


def test_no_connection_is_one_message(repository: HubRepository) -> None:
    with hub_stand_in() as hub:
        api = HfApi(endpoint=hub.endpoint, token="none")
    with pytest.raises(ValueError, match="owner/name: not uploaded: "):
        list(upload_repository(repository, "owner/name", api))
