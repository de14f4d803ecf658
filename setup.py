"""Build the C++ extension; everything else about the package is in pyproject.toml."""

from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

# As many compilers as there are cores.
ParallelCompile(default=0).install()

setup(
    ext_modules=[
        Pybind11Extension(
            "megatron_ettin._native",
            sorted(glob("csrc/*.cc")),
            depends=sorted(glob("csrc/*.h")),
            cxx_std=17,
            # No fused multiply-add: initial weights are the same bits on every architecture.
            extra_compile_args=["-O3", "-Wall", "-Wextra", "-ffp-contract=off"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
