"""Write megatron_ettin/_native.pyi from the built extension, or check that it is up to date.

Signatures and docstrings are stated in csrc/bindings_*.cc. pybind11-stubgen reads them out of the
module; this program narrows what it finds and formats it (docs/decisions/0011-generated-stub.md).
"""

import argparse
import difflib
import enum
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_ettin import _native

STUB = Path(__file__).parent.parent / "megatron_ettin" / "_native.pyi"
#: pybind11 writes what a call accepts, which is more than our docstrings promise: lists for arrays,
#: anything with __int__ for integers. The stub asks for the promised types, so that mypy sees a
#: wrong dtype, which at run time is a copy or a TypeError.
NARROWED = {
    r"typing\.Annotated\[numpy\.typing\.ArrayLike, (numpy\.\w+)\]": r"numpy.typing.NDArray[\1]",
    r"typing\.SupportsInt \| typing\.SupportsIndex": "int",
    r"typing\.SupportsFloat \| typing\.SupportsIndex": "float",
    r"os\.PathLike \| str \| bytes": "os.PathLike[str] | str",
    r"(typing_extensions|collections\.abc)\.Buffer": (
        "bytes | bytearray | memoryview | numpy.typing.NDArray[typing.Any]"
    ),
}
ENUM = re.compile(
    r'^class (\w+)\(enum\.IntEnum\):\n(    """\n.*?\n    """\n).*?(?=^\S)', re.MULTILINE | re.DOTALL
)


def main() -> int:
    """Write the stub, or report how it differs; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the file would change")
    if not parser.parse_args().check:
        STUB.write_text(generate())
        return 0
    expected = generate().splitlines(keepends=True)
    changes = difflib.unified_diff(
        STUB.read_text().splitlines(keepends=True), expected, str(STUB), "what the extension says"
    )
    difference = "".join(changes)
    if difference:
        print(f"{difference}{STUB}: is out of date; run `make stub`", file=sys.stderr)
    return 1 if difference else 0


def generate() -> str:
    """Return the stub of the extension that is built now."""
    with tempfile.TemporaryDirectory() as folder:
        run("pybind11_stubgen", _native.__name__, "--output-dir", folder, "--exit-code")
        stub = Path(folder) / "megatron_ettin" / STUB.name
        text = ENUM.sub(list_members, stub.read_text())
        for accepted, promised in NARROWED.items():
            text = re.sub(accepted, promised, text)
        stub.write_text(text)
        config = str(STUB.parent.parent / "pyproject.toml")
        run("ruff", "check", "--quiet", "--config", config, "--select=F401,I", "--fix", str(stub))
        run("ruff", "format", "--quiet", "--config", config, str(stub))
        return stub.read_text()


def list_members(found: re.Match[str]) -> str:
    """Replace the body of an enum, of which the generator shows methods that depend on Python."""
    name, docstring = found.groups()
    members: type[enum.IntEnum] = getattr(_native, name)
    lines = [f"    {member.name} = {member.value}\n" for member in members]
    return f"class {name}(enum.IntEnum):\n{docstring}" + "".join(lines)


def run(module: str, *arguments: str) -> None:
    """Run a program of this environment; its words are shown only if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{module}: {done.stdout}{done.stderr}")


if __name__ == "__main__":
    sys.exit(main())
