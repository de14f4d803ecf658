"""The kernels of the loss for GPUs: in Triton's interpreter, and they compile where no GPU is.

On a GPU, test_linear_cross_entropy.py runs them.
"""

import re
from pathlib import Path

import pytest

from tests.kernels import NOTHING_WRONG, compiled_for_hopper, interpreted

pytest.importorskip("triton", reason="triton comes with the CUDA builds of torch")


def test_the_interpreted_kernels_equal_the_exact_softmax() -> None:
    assert interpreted("tests.unit.interpreted_cross_entropy") == NOTHING_WRONG


@pytest.mark.parametrize("kernel", ["row_statistics", "row_gradient"])
def test_the_kernels_compile_for_hopper(
    kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_ettin.model import cross_entropy_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(cross_entropy_triton, kernel)
    types = {"logits_ptr": "*bf16", "labels_ptr": "*i64"}
    types |= dict.fromkeys(("by_row_ptr", "peak_ptr", "share_ptr"), "*fp32")
    compiled = compiled_for_hopper(
        function,
        {name: types.get(name, "i32") for name in function.arg_names if name != "BLOCK"},
        {"BLOCK": cross_entropy_triton.BLOCK_COLUMNS},
        # As for the padded vocabulary's columns, and the tensors that torch allocates.
        by_16=["logits_ptr", "columns"],
        options={"num_warps": cross_entropy_triton.WARPS},
    )
    ptx = compiled["ptx"]
    # Logits go by 16 bytes of a thread, through no local memory, and nothing is summed atomically.
    assert re.search(r"ld\.global\.v4\.b32", ptx)
    assert "ld.local" not in ptx
    assert not re.search(r"\b(atom|red)\.", ptx)
    # The interpreter cuts to bfloat16, so that a GPU rounds to nearest is seen here.
    assert (kernel == "row_gradient") == bool(re.search(r"\bcvt\.rn\.bf16", ptx))
    assert "cubin" in compiled
