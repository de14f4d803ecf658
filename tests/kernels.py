"""Triton's kernels where no GPU is: interpreted in a process of its own, or compiled for Hopper."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
#: What a program of `interpreted` prints if every kernel is right.
NOTHING_WRONG = "wrong: []\n"


def interpreted(program: str) -> str:
    """Return what the module `program` prints in Triton's interpreter; its errors if nothing."""
    done = subprocess.run(
        [sys.executable, "-m", program],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout or done.stderr


def compiled_for_hopper(
    function: Any,
    types: Mapping[str, str],
    constants: Mapping[str, int],
    *,
    by_16: Sequence[str] = (),
    options: Mapping[str, int] | None = None,
) -> Mapping[str, Any]:
    """Return the stages of a kernel compiled for sm_90, "ptx" and "cubin" among them.

    `types` are those of its arguments but the constants; arguments `by_16` are multiples of 16, as
    Triton specialises sizes and pointers that are.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names
    source = ASTSource(
        function,
        {**types, **dict.fromkeys(constants, "constexpr")},
        dict(constants),
        {(names.index(name),): [["tt.divisibility", 16]] for name in by_16},
    )
    target = GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options=dict(options or {})).asm
