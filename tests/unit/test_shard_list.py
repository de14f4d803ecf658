"""Names of a corpus: a pair, several, or a folder, and every way in which a folder is not whole."""

from pathlib import Path

import pytest

from megatron_ettin.order.shard_list import list_shards, plans_folder
from tests.shards import list_in_dataset_file


def make_shards(folder: Path, *names: str) -> list[str]:
    folder.mkdir(exist_ok=True)
    for name in names:
        for suffix in (".bin", ".idx"):
            (folder / f"{name}{suffix}").touch()
    return [f"{folder}/{name}" for name in sorted(names)]


def test_a_pair_or_several_are_taken_as_named(tmp_path: Path) -> None:
    assert list_shards("corpora/web") == ["corpora/web"]
    assert list_shards(["b", "a"]) == ["b", "a"]
    (tmp_path / "web").mkdir()
    (tmp_path / "web.idx").touch()
    assert list_shards(str(tmp_path / "web")) == [str(tmp_path / "web")], "the pair comes first"


def test_a_folder_is_its_shards_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "web"
    shards = make_shards(folder, "00001", "00000", "00010")
    (folder / "00000.identity.json.tmp.0123").touch()
    assert list_shards(str(folder)) == shards
    assert list_shards(f"{folder}/") == shards
    assert list_shards(["first", str(folder)]) == ["first", *shards]
    list_in_dataset_file(folder, ["00000", "00001", "00010"])
    assert list_shards(str(folder)) == shards


def test_a_folder_has_the_shards_that_its_list_names(tmp_path: Path) -> None:
    folder = tmp_path / "web"
    make_shards(folder, "00000", "00001")
    list_in_dataset_file(folder, ["00000", "00001", "00002"])
    with pytest.raises(ValueError, match=r"00002\.idx: no such file, but dataset\.json lists"):
        list_shards(str(folder))
    list_in_dataset_file(folder, ["00000"])
    with pytest.raises(ValueError, match=r"00001\.idx: dataset\.json does not list this shard"):
        list_shards(str(folder))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"shards": [1]}', '{"shards": [{}]}'])
def test_a_damaged_list_is_named(tmp_path: Path, content: str) -> None:
    make_shards(tmp_path / "web", "00000")
    (tmp_path / "web" / "dataset.json").write_text(content)
    with pytest.raises(ValueError, match=r"dataset\.json: does not list the names of its shards"):
        list_shards(str(tmp_path / "web"))


@pytest.mark.parametrize("name", ["00001.bin.tmp", "00001.idx.tmp", "00001.docs.parquet.tmp"])
def test_an_unfinished_folder_is_refused(tmp_path: Path, name: str) -> None:
    make_shards(tmp_path / "web", "00000")
    (tmp_path / "web" / name).touch()
    with pytest.raises(ValueError, match=rf"{name}: belongs to a preprocessing .* finish it"):
        list_shards(str(tmp_path / "web"))


def test_a_shard_without_an_index_is_refused(tmp_path: Path) -> None:
    make_shards(tmp_path / "web", "00000")
    (tmp_path / "web" / "00001.bin").touch()
    with pytest.raises(ValueError, match=r"00001\.bin: has no \.idx"):
        list_shards(str(tmp_path / "web"))


def test_no_shard_and_the_same_shard_are_refused(tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    with pytest.raises(ValueError, match="web: a folder without shards"):
        list_shards(str(tmp_path / "web"))
    with pytest.raises(ValueError, match="an empty list"):
        list_shards([])
    with pytest.raises(ValueError, match="a: is named twice"):
        list_shards(["a", "b", "a"])


def test_plans_are_beside_the_corpus(tmp_path: Path) -> None:
    assert plans_folder("corpora/web") == Path("corpora/web.plans")
    assert plans_folder("corpora/web/") == Path("corpora/web.plans")
    assert plans_folder(["x/a", "x/b"]) == Path("x/a.plans")
