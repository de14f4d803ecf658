"""Commands, options, files and links in the documents exist; `--help` answers.

In README.md, CONTRIBUTING.md, AGENTS.md, tests/gpu/README.md and docs/, a ```bash block is a
promise, checked command by command; text that is not to be checked goes into another kind of block.
UPPER_CASE words and `$variables` are places to fill in. A block that starts with a folder
(`megatron_ettin/`) is a tree: one entry a line, two spaces or more before its description.
"""

import functools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.shell_blocks import blocks, commands

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCUMENTS = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "AGENTS.md",
    ROOT / "tests/gpu/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
TOOLS = sorted((ROOT / "tools").glob("*.py"))
PRETRAIN = ("-m", "megatron_ettin.pretrain")

LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)]*)?\)")
TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
TARGET = re.compile(r"^([a-z][\w-]*):", re.MULTILINE)
OPTION = re.compile(r"--[A-Za-z][\w.-]*")
PLACEHOLDER = re.compile(r"\$|\b[A-Z][A-Z0-9_]+\b")
BOX = str.maketrans(dict.fromkeys("│├└─", " "))

# Made by a run, so absent from a fresh clone.
GENERATED = ("quickstart/", "gpu-kit/", "own/", "runs/", "study/", ".venv/")
OTHERS_PROGRAMS = {
    "cat",
    "cp",
    "echo",
    "git",
    "head",
    "ls",
    "mkdir",
    "pip",
    "python",
    "python3",
    "sbatch",
    "sed",
    "srun",
    "touch",
}
OTHERS_MODULES = {"http", "pip", "pytest", "venv"}
HEAVY = {"megatron", "torch", "transformers"}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def run_help(program: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Run `python PROGRAM --help`, with the times of imports on stderr."""
    command = [sys.executable, "-X", "importtime", *program, "--help"]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def known_options(program: tuple[str, ...], arguments: list[str]) -> set[str]:
    """Return the options that the help of a program, or of its subcommand, names."""
    text = run_help(program).stdout
    choices = {
        choice for group in re.findall(r"\{([\w,-]+)\}", text) for choice in group.split(",")
    }
    if choices & set(arguments[:1]):
        text += run_help((*program, arguments[0])).stdout
    return set(OPTION.findall(text))


def unknown_options(program: tuple[str, ...], arguments: list[str]) -> list[str]:
    """Return the options that the help does not name; it names `--objective`, not its fields."""
    known = known_options(program, arguments)
    used = [match[0] for word in arguments if (match := OPTION.match(word))]
    return [
        option
        for option in used
        if not any(option == name or option.startswith(name + ".") for name in known)
    ]


def module_exists(module: str) -> bool:
    path = ROOT / Path(*module.split("."))
    return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


def python_faults(words: list[str]) -> list[str]:
    """Check what python or torchrun is told to run: a script or a module, and its options."""
    start = next((i for i, word in enumerate(words) if word == "-m" or word.endswith(".py")), None)
    if start is None:
        return []
    if words[start] == "-m":
        program, arguments = ("-m", words[start + 1]), words[start + 2 :]
        if program[1].split(".")[0] in OTHERS_MODULES:
            return []
        exists = module_exists(program[1])
    else:
        program, arguments = (words[start],), words[start + 1 :]
        exists = (ROOT / program[0]).is_file()
    if program == ("setup.py",) and exists:
        return []  # the options are setuptools'
    if not exists:
        return [f"{program[-1]} does not exist"]
    return [f"{program[-1]} has no option {o}" for o in unknown_options(program, arguments)]


def make_faults(words: list[str]) -> list[str]:
    makefile = (ROOT / "Makefile").read_text()
    targets = [word for word in words if "=" not in word and not word.startswith("-")]
    variables = [word.split("=")[0] for word in words if "=" in word]
    return [
        *(f"make has no target {t}" for t in targets if t not in TARGET.findall(makefile)),
        *(f"make has no variable {v}" for v in variables if f"$({v})" not in makefile),
    ]


def path_faults(words: list[str]) -> list[str]:
    """Check the words that name something in a folder of the repository."""
    folders = tuple(f"{path.name}/" for path in ROOT.iterdir() if path.is_dir())
    paths = [word.rsplit("=", 1)[-1] for word in words]
    return [
        f"{path} does not exist"
        for path in paths
        if path.startswith(folders) and not path.startswith(GENERATED)
        if not PLACEHOLDER.search(path) and not any(ROOT.glob(path.rstrip("/")))
    ]


def faults(words: list[str]) -> list[str]:
    """Return what is wrong with a command of a document."""
    program, arguments = words[0], words[1:]
    name = program.removeprefix(".venv/bin/")
    found = path_faults(words)
    if name == "make":
        return found + make_faults(arguments)
    if name in {"python", "python3", "torchrun"}:
        return found + python_faults(arguments)
    script = arguments[0] if name in {"bash", "sh"} else name
    if script != name or "/" in script:
        return found if (ROOT / script).is_file() else [*found, f"{script} does not exist"]
    installed = (Path(sys.executable).parent / name).is_file()
    return found if installed or name in OTHERS_PROGRAMS else [*found, f"{name}: unknown program"]


def expand(name: str) -> list[str]:
    """Expand {a,b} as the shell does."""
    match = re.search(r"\{([^{}]*)\}", name)
    if match is None:
        return [name]
    ends = name[: match.start()], name[match.end() :]
    return [x for word in match[1].split(",") for x in expand(ends[0] + word + ends[1])]


def tree_paths(block: str) -> Iterator[str]:
    """Yield the paths of a tree; the repository's own name, if it is the top, is left out."""
    folders: list[tuple[int, str]] = []
    for raw in block.splitlines():
        line = raw.translate(BOX).replace("\N{NO-BREAK SPACE}", " ")
        indent = len(line) - len(line.lstrip())
        entry = re.split(r"\s{2,}|\s#", line.strip())[0]
        folders = [folder for folder in folders if folder[0] < indent]
        above = folders[-1][1] if folders else ""
        for name in (x for word in re.split(r",?\s+", entry) for x in expand(word)):
            if name in {"", "...", "…"}:
                continue
            path = "" if name in {"./", "megatron-ettin/"} else above + name
            if name.endswith("/"):
                folders.append((indent, path))
            if path:
                yield path


def trees(markdown: str) -> list[str]:
    """Return the blocks that start with a folder which is part of the repository."""
    return [
        block
        for _, block in blocks(markdown)
        if (top := block.split(maxsplit=1)) and top[0].endswith("/")
        if not top[0].startswith(GENERATED)
    ]


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_commands_exist(document: Path) -> None:
    scripts = [block for language, block in blocks(document.read_text()) if language == "bash"]
    found = {shlex.join(words): faults(words) for script in scripts for words in commands(script)}
    assert {command: wrong for command, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_links_lead_somewhere(document: Path) -> None:
    links = [link for link in LINK.findall(document.read_text()) if "://" not in link]
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_tests_that_are_named_exist(document: Path) -> None:
    named = [each for each in TEST.findall(document.read_text()) if each[0].islower()]
    if document.name == "reliability.md":
        assert len(named) > 10
    assert [path for path, _ in named if not (ROOT / path).is_file()] == []
    assert [
        f"{path}::{test}"
        for path, test in named
        if test and f"def {test}(" not in (ROOT / path).read_text()
    ] == []


def test_files_of_readme_tree_exist() -> None:
    paths = [path for block in trees(README.read_text()) for path in tree_paths(block)]
    assert "megatron_ettin/" in paths, "README.md shows no tree of the repository"
    assert [path for path in paths if not any(ROOT.glob(path.rstrip("/")))] == []


def test_readme_shows_the_two_commands() -> None:
    scripts = [block for language, block in blocks(README.read_text()) if language == "bash"]
    shown = [words for script in scripts for words in commands(script)]
    assert ["make", "quickstart"] in shown
    assert ["make", "test"] in shown


@pytest.mark.parametrize(
    "program", [PRETRAIN, *((relative(tool),) for tool in TOOLS)], ids=" ".join
)
def test_help_answers_without_heavy_imports(program: tuple[str, ...]) -> None:
    answer = run_help(program)
    lines = answer.stderr.splitlines()
    messages = [line for line in lines if not line.startswith("import time:")]
    assert answer.returncode == 0, "\n".join(messages)
    first = answer.stdout.splitlines()[0]
    assert re.match("[A-Z].* ", first)
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in lines}
    assert imported & HEAVY == set(), "import it after the command line is parsed"


def test_commands_are_split() -> None:
    script = "A=1 make test && cd x  # why\nfor o in mlm clm; do \\\n  tool --o $o | head; done\n"
    assert list(commands(script)) == [["make", "test"], ["tool", "--o", "$o"], ["head"]]
    assert list(commands("run -c 'a; b\n  c' > out\nls\n")) == [
        ["run", "-c", "a; b\n  c", ">", "out"],
        ["ls"],
    ]


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("make tset", "make has no target tset"),
        ("make test COLOUR=1", "make has no variable COLOUR"),
        ("python tools/nothing.py", "tools/nothing.py does not exist"),
        ("python -m megatron_ettin.nothing", "megatron_ettin.nothing does not exist"),
        ("bash examples/nothing.sh", "examples/nothing.sh does not exist"),
        ("nothing --at-all", "nothing: unknown program"),
        (
            "torchrun --nproc-per-node 2 -m megatron_ettin.pretrain --config FILE --modle.x 1",
            "megatron_ettin.pretrain has no option --modle.x",
        ),
        (
            "python -m megatron_ettin.pretrain --config docs/nothing.yaml",
            "docs/nothing.yaml does not exist",
        ),
    ],
)
def test_fault_of_a_command_is_found(command: str, fault: str) -> None:
    (words,) = commands(command)
    assert fault in faults(words)


def test_right_command_has_no_fault() -> None:
    for script in (
        "make quickstart QUICKSTART_SHORT=1",
        "python3 -m venv .venv",
        ".venv/bin/python -m pytest tests/unit -k house",
        "python -m megatron_ettin.pretrain --config examples/PLACE.yaml --model.num_layers 4",
    ):
        assert [faults(words) for words in commands(script)] == [[]], script


def test_tree_is_read() -> None:
    block = """\
megatron-ettin/
├── megatron_ettin/      the package
│   ├── config.py        every knob: one place
│   └── data/            batches
│       └── readers.py   # by format
└── examples/model/{17m,nano}.yaml, Makefile
"""
    assert list(tree_paths(block)) == [
        "megatron_ettin/",
        "megatron_ettin/config.py",
        "megatron_ettin/data/",
        "megatron_ettin/data/readers.py",
        "examples/model/17m.yaml",
        "examples/model/nano.yaml",
        "Makefile",
    ]
