"""The kernels of the loss for GPUs: in Triton's interpreter, and they compile where no GPU is.

On a GPU, test_linear_cross_entropy.py runs them.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.kernels import (
    NOTHING_WRONG,
    assert_no_spills,
    assert_whole_vectors,
    compiled_for_hopper,
    interpreted,
)

pytest.importorskip("triton", reason="triton comes with the CUDA builds of torch")


def test_the_interpreted_kernels_equal_the_exact_softmax() -> None:
    assert interpreted("tests.unit.interpreted_cross_entropy") == NOTHING_WRONG


@pytest.mark.parametrize("kernel", ["row_statistics", "row_gradient"])
def test_the_kernels_compile_for_hopper(
    kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = compiled_kernel(kernel)
    # A thread has 16 logits, twice 16 bytes; statistics are not written as vectors.
    gradient = kernel == "row_gradient"
    assert_whole_vectors(compiled, loads=2, stores=2 if gradient else 0, rounds=gradient)
    # Nothing is summed atomically, so results repeat.
    assert not re.search(r"\b(atom|red)\.", compiled["ptx"])


def test_a_spill_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = compiled_kernel("row_statistics", maxnreg=24)
    # The assembler spills, so only what it says shows it.
    assert not re.search(r"\b(ld|st)\.local", compiled["ptx"])
    with pytest.raises(AssertionError):
        assert_no_spills(compiled)


def compiled_kernel(kernel: str, **options: int) -> Mapping[str, Any]:
    """Return a kernel compiled for Hopper as for the padded vocabulary and torch's tensors."""
    from megatron_ettin.model import cross_entropy_triton

    function = getattr(cross_entropy_triton, kernel)
    types = {"logits_ptr": "*bf16", "labels_ptr": "*i64"}
    types |= dict.fromkeys(("by_row_ptr", "peak_ptr", "share_ptr"), "*fp32")
    return compiled_for_hopper(
        function,
        {name: types.get(name, "i32") for name in function.arg_names if name != "BLOCK"},
        {"BLOCK": cross_entropy_triton.BLOCK_COLUMNS},
        by_16=["logits_ptr", "columns"],
        options={"num_warps": cross_entropy_triton.WARPS, **options},
    )
