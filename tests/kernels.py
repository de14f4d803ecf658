"""Triton's kernels where no GPU is: interpreted in a process of its own, or compiled for Hopper."""

import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
#: What a program of `interpreted` prints if every kernel is right.
NOTHING_WRONG = "wrong: []\n"
#: What a cubin's section .nv.info says about a kernel: an attribute's number, and its meaning.
FRAME_BYTES, REGISTERS = 0x11, 0x2F
#: Format of entries with a value behind them; the others hold it in their four bytes.
SIZED_VALUE = 0x04


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
    # Said here, because Triton 3.9 warns of its default, which is this.
    chosen = {"enable_fp_fusion": True, **(options or {})}
    return triton.compile(source, target=target, options=chosen).asm


def argument_types(function: Any, constants: Mapping[str, int], **others: str) -> dict[str, str]:
    """Return the types of a kernel's arguments: bf16 pointers, int32, or those in `others`."""
    return {
        name: others.get(name, "*bf16" if name.endswith("_ptr") else "i32")
        for name in function.arg_names
        if name not in constants
    }


def assert_whole_vectors(
    compiled: Mapping[str, Any], *, loads: int, stores: int, rounds: bool = True
) -> None:
    """Check that a thread moves 16 bytes at a time in as many places, and spills no register.

    A kernel that writes bfloat16 `rounds`.
    """
    ptx = compiled["ptx"]
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) >= loads
    assert len(re.findall(r"st\.global\.v4\.b32", ptx)) >= stores
    # The interpreter cuts to bfloat16, so that a GPU rounds to nearest is seen here.
    assert bool(re.search(r"\bcvt\.rn\.bf16", ptx)) == rounds
    assert_no_spills(compiled)


def assert_no_spills(compiled: Mapping[str, Any]) -> None:
    """Check that a kernel keeps all it computes in registers, as its cubin says."""
    assert not re.search(r"\b(ld|st)\.local", compiled["ptx"])
    said = list(said_by_assembler(compiled["cubin"]))
    # Registers that do not fit are spilled to a frame in local memory, which PTX does not show.
    assert {value for attribute, value in said if attribute == FRAME_BYTES} == {0}
    assert [attribute for attribute, _ in said].count(REGISTERS) == 1


def said_by_assembler(cubin: bytes) -> Iterator[tuple[int, int]]:
    """Yield attributes and their values, of a kernel each, from an ELF file's section .nv.info."""
    (headers,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, headers + i * size) for i in range(count)]
    for name, _, _, _, begin, length in sections:
        if not cubin[sections[names][4] + name :].startswith(b".nv.info\0"):
            continue
        at = begin
        while at < begin + length:
            form, attribute, value_bytes = struct.unpack_from("<BBH", cubin, at)
            if form == SIZED_VALUE and value_bytes == 8:
                yield attribute, struct.unpack_from("<II", cubin, at + 4)[1]
            at += 4 + (value_bytes if form == SIZED_VALUE else 0)
