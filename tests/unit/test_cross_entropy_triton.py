"""The kernels of the loss for GPUs: in Triton's interpreter, and they compile where no GPU is.

On a GPU, test_linear_cross_entropy.py runs them.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton comes with the CUDA builds of torch")

ROOT = Path(__file__).parents[2]


def test_the_interpreted_kernels_equal_the_exact_softmax() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.interpreted_cross_entropy"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "wrong: []\n", done.stdout + done.stderr


@pytest.mark.parametrize("kernel", ["row_statistics", "row_gradient"])
def test_the_kernels_compile_for_hopper(
    kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_ettin.model import cross_entropy_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(cross_entropy_triton, kernel)
    types = {"logits_ptr": "*bf16", "labels_ptr": "*i64", "BLOCK": "constexpr"}
    types |= dict.fromkeys(("found_ptr", "peak_ptr", "share_ptr"), "*fp32")
    names = function.arg_names
    # As Triton specialises the padded vocabulary's columns and the tensors that torch allocates.
    by_16 = {(names.index(name),): [["tt.divisibility", 16]] for name in ("logits_ptr", "columns")}
    compiled = triton.compile(
        ASTSource(
            function,
            {name: types.get(name, "i32") for name in names},
            {"BLOCK": cross_entropy_triton.BLOCK_COLUMNS},
            by_16,
        ),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": cross_entropy_triton.WARPS},
    )
    ptx = compiled.asm["ptx"]
    # Logits go by 16 bytes of a thread, through no local memory, and nothing is summed atomically.
    assert re.search(r"ld\.global\.v4\.b32", ptx)
    assert "ld.local" not in ptx
    assert not re.search(r"\b(atom|red)\.", ptx)
    # The interpreter cuts to bfloat16, so that a GPU rounds to nearest is seen here.
    assert (kernel == "row_gradient") == bool(re.search(r"\bcvt\.rn\.bf16", ptx))
    assert "cubin" in compiled.asm
