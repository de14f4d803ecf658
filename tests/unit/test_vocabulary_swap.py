"""Vocabulary swap (`from-hf --tokenizer`) against a slow computation from tokenizer.json alone."""

import json
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, decoders, models, normalizers

from megatron_ettin.data.tokenize import SPECIAL_TOKENS, train_tokenizer, write_tokenizer
from megatron_ettin.export.huggingface import to_huggingface
from megatron_ettin.export.vocabulary import Vocabulary
from megatron_ettin.export.vocabulary_swap import plan_swap
from tests.models import Kind, write_random_model
from tools.convert import main

GENERAL = [
    "the patient reader of the old book walked home through the rain",
    "a café in the old town, naïve and quiet; the river ran on — slowly",
]
DOMAIN = [
    "def walk(path): return [patient for patient in path if patient.home]",
    "the café's naïve class: return self.path + self.home  # the rain — 日本",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Write a general and a domain tokenizer of other sizes."""
    folder = tmp_path_factory.mktemp("vocabularies")
    write_tokenizer(train_tokenizer(GENERAL, 290), folder / "general")
    write_tokenizer(train_tokenizer(DOMAIN, 311), folder / "domain")
    return folder / "general", folder / "domain"


def vocabulary(folder: Path) -> dict[str, int]:
    document = json.loads((folder / "tokenizer.json").read_text())
    added = {token["content"]: token["id"] for token in document["added_tokens"]}
    return {**document["model"]["vocab"], **added}


def slow_pieces(folder: Path, spelled: str) -> list[int]:
    """Cut a byte-level spelling by the merges of tokenizer.json, one merge at a time."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    parts = list(spelled)
    for left, right in model["merges"]:
        place = 0
        while place < len(parts) - 1:
            if (parts[place], parts[place + 1]) == (left, right):
                parts[place : place + 2] = [left + right]
            place += 1
    return [model["vocab"][part] for part in parts]


def slow_shares(old: Path, new: Path) -> dict[int, dict[int, float]]:
    """Return the weights of old ids for each new id."""
    before, shares = vocabulary(old), {}
    for token, i in vocabulary(new).items():
        pieces = [before[token]] if token in before else slow_pieces(old, token)
        shares[i] = {piece: pieces.count(piece) / len(pieces) for piece in pieces}
    return shares


def slow_sample_shares(old: Path, new: Path, texts: list[str]) -> dict[int, dict[int, float]]:
    """Return the same with a sample, by sets of characters of all pairs of tokens."""
    shares, before = slow_shares(old, new), vocabulary(old)
    cut = [tokenizers.Tokenizer.from_file(str(each / "tokenizer.json")) for each in (old, new)]
    for token, i in vocabulary(new).items():
        counts: dict[int, float] = {}
        for text in texts:
            olds, news = (each.encode(text, add_special_tokens=False) for each in cut)
            for j, span in zip(news.ids, news.offsets, strict=True):
                for piece, other in zip(olds.ids, olds.offsets, strict=True):
                    covered = set(range(*other))
                    shared = len(covered & set(range(*span))) / len(covered)
                    if i == j and shared:
                        counts[piece] = counts.get(piece, 0) + shared
        if counts and token not in before:
            shares[i] = {piece: count / sum(counts.values()) for piece, count in counts.items()}
    return shares


def slow_rows(shares: dict[int, dict[int, float]], table: torch.Tensor) -> torch.Tensor:
    rows = []
    for i in range(len(shares)):
        row = torch.zeros(table.shape[1:], dtype=torch.float64)
        for piece, share in shares[i].items():
            row += share * table[piece].double()
        rows.append(row.float())
    return torch.stack(rows)


def test_rows_are_those_of_a_slow_computation(folders: tuple[Path, Path]) -> None:
    table = torch.randn(300, 8, generator=torch.Generator().manual_seed(1))
    swap = plan_swap(*folders)
    expected = slow_rows(slow_shares(*folders), table)
    assert (swap.size, swap.old_size) == (311, 290)
    torch.testing.assert_close(swap.rows(table), expected, rtol=0, atol=1e-7)
    both = vocabulary(folders[0]).keys() & vocabulary(folders[1]).keys()
    assert swap.num_kept == len(both)
    assert len(both) < 311
    for token in both:  # bit for bit, the special tokens at their new ids
        place = vocabulary(folders[1])[token]
        assert torch.equal(swap.rows(table)[place], table[vocabulary(folders[0])[token]])


def test_a_sample_weighs_the_pieces_by_their_occurrences(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    texts = [*DOMAIN, "path path patients return returned"]
    sample = tmp_path / "sample.jsonl"
    sample.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    table = torch.randn(290, 4, generator=torch.Generator().manual_seed(2))
    found = plan_swap(*folders, [str(sample)]).rows(table)
    expected = slow_rows(slow_sample_shares(*folders, texts), table)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert not torch.equal(found, plan_swap(*folders).rows(table))


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_the_converted_model_has_the_new_vocabulary(
    kind: Kind, folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    general, domain = folders
    start = write_random_model(tmp_path / "hf", kind, general)
    main(f"from-hf --input {start} --tokenizer {domain} --output {tmp_path / 'checkpoint'}".split())
    assert "of 311 tokens" in capsys.readouterr().out
    to_huggingface(tmp_path / "checkpoint", tmp_path / "again")
    before, after = (
        load_file(folder / "model.safetensors") for folder in (start, tmp_path / "again")
    )
    shares = slow_shares(general, domain)
    for name, tensor in before.items():
        is_table = name in {"model.embeddings.tok_embeddings.weight", "decoder.bias"}
        expected = slow_rows(shares, tensor) if is_table else tensor
        torch.testing.assert_close(after[name], expected, rtol=0, atol=1e-7)
    config = json.loads((tmp_path / "again/config.json").read_text())
    ids = vocabulary(domain)
    assert config["vocab_size"] == 311
    assert (config["cls_token_id"], config["pad_token_id"]) == (ids["[CLS]"], ids["[PAD]"])
    assert vocabulary(tmp_path / "again") == ids


def test_spellings_of_sentencepiece_and_other_names_of_roles(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    specials = ["<unk>", "<s>", "</s>", "<pad>", "<mask>"]
    alphabet = [*"▁abcdefghijklmnopqrstuvwxyz", *(f"<0x{byte:02X}>" for byte in range(256))]
    names = [*specials, *alphabet, "▁t", "he", "▁the", "▁r", "▁re"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "r"), ("▁r", "e")]
    backend = tokenizers.Tokenizer(
        models.BPE(
            {name: i for i, name in enumerate(names)}, merges, unk_token="<unk>", byte_fallback=True
        )
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    backend.add_special_tokens([AddedToken(name, special=True) for name in specials])
    old = tmp_path / "old"
    old.mkdir()
    backend.save(str(old / "tokenizer.json"))
    named = dict(zip(("unk", "bos", "eos", "pad", "mask"), specials, strict=True))
    (old / "tokenizer_config.json").write_text(
        json.dumps({f"{role}_token": {"content": name} for role, name in named.items()})
    )
    table = torch.eye(len(names))
    swap, new = plan_swap(old, folders[1]), vocabulary(folders[1])

    def taken(token: str) -> dict[str, float]:
        row = swap.rows(table)[new[token]]
        return {names[int(i)]: round(float(row[i]), 6) for i in row.nonzero()[:, 0]}

    found = {role: taken(role) for role in SPECIAL_TOKENS}
    assert found == {role: {name: 1.0} for role, name in zip(SPECIAL_TOKENS, specials, strict=True)}
    assert taken("Ġthe") == {"▁the": 1.0}
    assert taken("Ġreturn") == dict.fromkeys(("▁re", "t", "u", "r", "n"), 0.2)
    assert taken("Ã") == {"<0xC3>": 1.0}  # the first byte of é
    assert taken("Ã©") == {"<0xC3>": 0.5, "<0xA9>": 0.5}
    assert taken("Ċ") == {"<0x0A>": 1.0}


def test_a_token_without_pieces_takes_the_mean(folders: tuple[Path, Path], tmp_path: Path) -> None:
    document = json.loads((folders[1] / "tokenizer.json").read_text())
    document["model"]["vocab"]["<x>"] = 320
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    table = torch.randn(290, 3, generator=torch.Generator().manual_seed(3))
    rows = plan_swap(folders[0], tmp_path).rows(table)
    assert rows.shape == (321, 3)  # ids 311 to 319 are holes
    torch.testing.assert_close(rows[315], table.mean(dim=0))
    pieces = slow_pieces(folders[0], "<x>")
    torch.testing.assert_close(rows[320], table[pieces].mean(dim=0))


def test_a_special_token_in_a_text_is_text(folders: tuple[Path, Path]) -> None:
    assert Vocabulary(folders[0]).pieces(b"[MASK]") == slow_pieces(folders[0], "[MASK]")


def test_refusals_name_the_file(folders: tuple[Path, Path], tmp_path: Path) -> None:
    word_piece = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    word_piece.decoder = decoders.WordPiece()
    word_piece.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer\.json: decoder: WordPiece: only byte-level"):
        plan_swap(tmp_path, folders[1])
    with pytest.raises(FileNotFoundError, match=r"it has no tokenizer\.json"):
        plan_swap(tmp_path / "nowhere", folders[1])
    start = write_random_model(tmp_path / "hf", "encoder", folders[0])
    (start / "tokenizer.json").write_bytes((folders[1] / "tokenizer.json").read_bytes())
    with pytest.raises(SystemExit, match="ids up to 310, but the embedding has 290 rows"):
        main(f"from-hf --input {start} --tokenizer {folders[1]} --output {tmp_path / 'c'}".split())
    assert not (tmp_path / "c").exists()


def test_a_sample_needs_a_tokenizer(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["from-hf", "--input", "x", "--output", "y", "--tokenizer-sample", "z"])
    assert "--tokenizer-sample: goes with --tokenizer" in capsys.readouterr().err
