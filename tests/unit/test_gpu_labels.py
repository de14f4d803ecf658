"""Modules with code for GPUs say that no GPU has run it, until one has; README says so first.

A module that a GPU has run loses its sentence together with its entry in `HAVE_RUN`, which names
the card and the date.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("megatron_ettin", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
)
SENTENCE = re.compile(r"No GPU has run (this|its code for GPUs) yet\.")
#: Modules that name a GPU's code but run where there is none.
WITHOUT_A_GPU = {"megatron_ettin/cpu.py", "benchmarks/attention_dispatch.py"}
#: Modules that a GPU has run: which one, and when.
HAVE_RUN: dict[str, str] = {}


def uses_a_gpu(tree: ast.AST) -> bool:
    """Tell whether code calls CUDA, Triton or Transformer Engine, or depends on the device."""
    return any(_is_for_a_gpu(node) for node in ast.walk(tree))


def _is_for_a_gpu(node: ast.AST) -> bool:
    match node:
        case ast.Import(names=names):
            return any(_is_of_a_gpu_package(each.name) for each in names)
        case ast.ImportFrom(module=str(module)):
            return _is_of_a_gpu_package(module)
        # torch.cuda and whatever it is asked for, Tensor.cuda, Tensor.is_cuda.
        case ast.Attribute(attr="cuda" | "is_cuda", value=value):
            return ast.unparse(value) != "torch.version"
        case ast.Attribute(attr="type", value=value):
            return re.search(r"\bdevice(\(\))?$", ast.unparse(value)) is not None
    return False


def _is_of_a_gpu_package(module: str) -> bool:
    package, *_ = module.split(".")
    is_ours = package == "megatron_ettin" and module.endswith(("_triton", "_gpu"))
    return is_ours or package in {"triton", "transformer_engine"}


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import triton.language as tl", True),
        ("from transformer_engine.pytorch import Linear", True),
        ("from megatron_ettin.model.gated_gelu_triton import gated_gelu", True),
        ("from megatron_ettin.model.attention_gpu import VarlenCoreAttention", True),
        ("x = torch.cuda.Stream()", True),
        ("torch.cuda.synchronize()", True),
        ("y = x.is_cuda", True),
        ("y = x.cuda()", True),
        ("name = 'cuda' if torch.cuda.is_available() else 'cpu'", True),
        ("if distributed.device().type == 'cuda': pass", True),
        ("on_gpu = classifier.module.device.type != 'cpu'", True),
        ("size = BLOCK_ELEMENTS[shard.device.type]", True),
        ("with torch.autocast(self.device.type): pass", True),
        ("from megatron_ettin.model import attention", False),
        ("from benchmarks.fake_gpu import fake_gpu", False),
        ("same = array.type == kind", False),
        ("built_for = torch.version.cuda", False),
        ("x = torch.empty(3, device=x.device)", False),
    ],
)
def test_what_uses_a_gpu_is_known(code: str, expected: bool) -> None:
    assert uses_a_gpu(ast.parse(code)) == expected


def test_code_that_no_gpu_has_run_says_so_once() -> None:
    trees = {module: ast.parse((ROOT / module).read_text()) for module in MODULES}
    times = {
        module: len(SENTENCE.findall(ast.get_docstring(tree) or ""))
        for module, tree in trees.items()
    }
    says_so = {module for module, number in times.items() if number}
    for_a_gpu = {module for module, tree in trees.items() if uses_a_gpu(tree)} - WITHOUT_A_GPU
    assert len(for_a_gpu) > 30
    assert for_a_gpu - says_so == set(HAVE_RUN)
    assert says_so <= for_a_gpu
    assert [module for module, number in times.items() if number > 1] == []


def test_readme_begins_with_what_has_not_run() -> None:
    title, *_ = (ROOT / "README.md").read_text().split("\n\n", 2)[1:]
    expected = "**Status: runs on CPUs; no GPU has run it yet.**" if not HAVE_RUN else "**Status:"
    assert title.startswith(expected)
