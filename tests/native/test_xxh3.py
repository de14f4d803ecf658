"""XXH3 against the package of xxHash's own authors' C code."""

import numpy as np
import pytest
import xxhash

from megatron_ettin import native

CONTENT = np.random.default_rng(3).integers(0, 256, 1 << 20, dtype=np.uint8).tobytes()


def test_every_short_length() -> None:
    for length in range(2001):
        data = CONTENT[length : 2 * length]
        assert native.xxh3_64(data) == xxhash.xxh3_64_intdigest(data), length
        assert native.xxh3_128(data) == xxhash.xxh3_128_intdigest(data), length


@pytest.mark.parametrize(
    "length", [2047, 2048, 2049, 4096, 65_535, 65_536, 65_537, 100_000, (1 << 20) - 1, 1 << 20]
)
def test_long_inputs(length: int) -> None:
    for start in {0, min(1, len(CONTENT) - length)}:  # the second is not aligned
        data = memoryview(CONTENT)[start : start + length]
        assert native.xxh3_64(data) == xxhash.xxh3_64_intdigest(data)
        assert native.xxh3_128(data) == xxhash.xxh3_128_intdigest(data)


def test_bytes_that_are_all_equal() -> None:
    for byte in (0, 255):
        for length in (1, 3, 4, 8, 9, 16, 17, 128, 129, 240, 241, 1024, 1025):
            data = bytes([byte]) * length
            assert native.xxh3_128(data) == xxhash.xxh3_128_intdigest(data)


def test_other_buffers_are_read_as_they_lie() -> None:
    values = np.arange(300).reshape(20, 15)
    expected = xxhash.xxh3_128_intdigest(values.tobytes())
    assert native.xxh3_128(values) == expected
    assert native.xxh3_128(bytearray(values.tobytes())) == expected
    assert native.xxh3_64(np.zeros(0)) == xxhash.xxh3_64_intdigest(b"")


@pytest.mark.parametrize("part", [np.s_[::2], np.s_[:, 1:], np.s_[:, ::-1]])
def test_a_buffer_with_gaps_is_refused(part: slice) -> None:
    with pytest.raises(ValueError, match="data must lie in one piece"):
        native.xxh3_64(np.arange(300).reshape(20, 15)[part])


def test_text_is_refused() -> None:
    with pytest.raises(TypeError):
        native.xxh3_64("text")  # type: ignore[arg-type]
