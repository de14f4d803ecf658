"""Modules with code for GPUs say that no GPU has run it, until one has; README says so first.

A module that a GPU has run loses its sentence together with its entry in `HAVE_RUN`, which names
the card and the date.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("megatron_ettin", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
)
SENTENCE = re.compile(r"No GPU has run (this|its code for GPUs) yet\.")
#: Questions that a machine without a GPU answers too.
QUESTIONS = {"torch.cuda.is_available", "torch.cuda.device_count"}
#: Modules that a GPU has run: which one, and when.
HAVE_RUN: dict[str, str] = {}


def uses_a_gpu(tree: ast.AST) -> bool:
    """Tell whether code calls CUDA through torch, Triton or Transformer Engine."""
    return any(_is_for_a_gpu(node) for node in ast.walk(tree))


def _is_for_a_gpu(node: ast.AST) -> bool:
    match node:
        case ast.Import(names=names):
            return any(_is_of_a_gpu_package(each.name) for each in names)
        case ast.ImportFrom(module=str(module)):
            return _is_of_a_gpu_package(module)
        case ast.Attribute(attr="is_cuda"):
            return True
        case ast.Attribute(value=ast.Attribute(attr="cuda")):
            return ast.unparse(node) not in QUESTIONS
    return False


def _is_of_a_gpu_package(module: str) -> bool:
    package, *_ = module.split(".")
    return package in {"triton", "transformer_engine"} or module.endswith("_triton")


def test_what_uses_a_gpu_is_known() -> None:
    for code, expected in (
        ("import triton.language as tl", True),
        ("from transformer_engine.pytorch import Linear", True),
        ("from megatron_ettin.model.gated_gelu_triton import gated_gelu", True),
        ("x = torch.cuda.Stream()", True),
        ("torch.cuda.synchronize()", True),
        ("y = x.is_cuda", True),
        ("y = torch.cuda.is_available()", False),
        ("from megatron_ettin.model import attention", False),
    ):
        assert uses_a_gpu(ast.parse(code)) == expected, code


def test_code_that_no_gpu_has_run_says_so() -> None:
    trees = {module: ast.parse((ROOT / module).read_text()) for module in MODULES}
    says_so = {
        module for module, tree in trees.items() if SENTENCE.search(ast.get_docstring(tree) or "")
    }
    for_a_gpu = {module for module, tree in trees.items() if uses_a_gpu(tree)}
    assert len(for_a_gpu) > 15
    assert for_a_gpu - says_so == set(HAVE_RUN)
    assert says_so <= for_a_gpu


def test_readme_begins_with_what_has_not_run() -> None:
    title, *_ = (ROOT / "README.md").read_text().split("\n\n", 2)[1:]
    expected = "**Status: runs on CPUs; no GPU has run it yet.**" if not HAVE_RUN else "**Status:"
    assert title.startswith(expected)
