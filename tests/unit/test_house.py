"""The house rules that no linter knows: sizes, names, twin branches, paths of a machine."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ettin import objectives

ROOT = Path(__file__).parents[2]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_TOOL_LINES = 60

# Where knowing the twin is the point; everywhere else it is data: the objective and its attention.
TWIN_FOLDERS = ("objectives", "export", "evaluation")
TWIN_IDENTIFIERS = re.compile(r"(?:^|_)encoder(?:$|_)|^is_decoder$|^decoder_only$")
TWIN_CLASSES = {
    name
    for name, found in vars(objectives).items()
    if isinstance(found, type) and issubclass(found, objectives.Objective)
} - {"Objective"}
TWIN_STRINGS = {"causal_lm", "clm", "decoder", "encoder", "masked_lm", "mlm", "mntp"}

BANNED_WORDS = {"common", "handler", "handlers", "helper", "helpers", "manager", "misc", "utils"}
BANNED_PREFIXES = ("do_", "my_", "new_")
VERSIONED = re.compile(r"_v\d+$")

HEADLESS = re.compile(r"(?:Of|What|That|Whether|How|Which|Where|When|Why|As)\b")
MACHINE_PATH = re.compile(r"(?<![\w.}~])/(?:home|root|Users|mnt|opt|tmp|work)/[\w.]+")
#: A test that imports from another module of tests, which pytest would collect twice.
TEST_IMPORT = re.compile(r"^\s*(?:from|import) tests(?:\.\w+)*\.test_\w+", re.MULTILINE)
TEXT_SUFFIXES = {
    "", ".cc", ".cfg", ".h", ".json", ".md", ".py", ".pyi", ".sh", ".toml", ".txt", ".yaml", ".yml",
}  # fmt: skip
TEXT_FOLDERS = (".ci", "benchmarks", "csrc", "docs", "examples", "megatron_ettin", "tests", "tools")

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def text_files() -> list[Path]:
    """List the project's own text files: the root's and those of TEXT_FOLDERS."""
    inside = [path for folder in TEXT_FOLDERS for path in (ROOT / folder).rglob("*")]
    return [
        path
        for path in sorted([*ROOT.iterdir(), *inside])
        if path.is_file() and path.suffix in TEXT_SUFFIXES
        # In a worktree .git is a file; files without a suffix can be binary, as .metadata is.
        if path.name != ".git" and b"\0" not in path.read_bytes()
    ]


SOURCES = [ROOT / "setup.py", *python_files("benchmarks", "megatron_ettin", "tools", "examples")]
SOURCE_SIZES = [*SOURCES, *sorted((ROOT / "csrc").glob("*.[ch]*"))]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(tree: ast.AST) -> Iterator[FunctionNode]:
    return (node for node in ast.walk(tree) if isinstance(node, FunctionNode))


def long_functions(source: str) -> list[str]:
    return [
        f"line {node.lineno}: {node.name} has {length} lines"
        for node in functions(ast.parse(source))
        if (length := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]


def conditions(tree: ast.AST) -> Iterator[ast.expr]:
    """Yield what a program branches on: tests of if, while, if-expressions, filters, match."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.IfExp | ast.While):
            yield node.test
        elif isinstance(node, ast.comprehension):
            yield from node.ifs
        elif isinstance(node, ast.Match):
            yield node.subject
            yield from (case.guard for case in node.cases if case.guard)
            yield from (
                pattern.value
                for case in node.cases
                for pattern in ast.walk(case.pattern)
                if isinstance(pattern, ast.MatchValue)
            )


def names_a_twin(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str) and node.value.lower() in TWIN_STRINGS
    name = node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")
    return name in TWIN_CLASSES or bool(TWIN_IDENTIFIERS.search(name))


def twin_branches(source: str) -> list[str]:
    return [
        f"line {condition.lineno}: {ast.unparse(condition)}"
        for condition in conditions(ast.parse(source))
        if any(names_a_twin(node) for node in ast.walk(condition))
    ]


def twin_blind_files() -> list[Path]:
    """List the modules that must not know which of the twins a model is."""
    return [
        path
        for path in python_files("megatron_ettin")
        if path.relative_to(ROOT).parts[1] not in TWIN_FOLDERS
    ]


def bad_module_name(path: str) -> bool:
    """Say whether a part of the path is a word that could hold anything."""
    parts = Path(path).with_suffix("").parts
    return any(BANNED_WORDS & set(part.split("_")) or VERSIONED.search(part) for part in parts)


def bad_definitions(source: str) -> list[str]:
    return [
        f"line {node.lineno}: {node.name}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, FunctionNode | ast.ClassDef)
        and (node.name.startswith(BANNED_PREFIXES) or VERSIONED.search(node.name))
    ]


def headless_docstrings(source: str) -> list[str]:
    """List docstrings, of attributes too, that begin with a word of HEADLESS."""
    strings = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | FunctionNode):
            # The statement before a string: none for a module, class or function.
            for before, statement in zip([None, *node.body], node.body, strict=False):
                match statement:
                    case ast.Expr(value=ast.Constant(value=str(text))):
                        if before is None or isinstance(before, ast.Assign | ast.AnnAssign):
                            strings.append((statement.lineno, text))
    return [
        f"line {line}: {text.splitlines()[0]}" for line, text in strings if HEADLESS.match(text)
    ]


def machine_paths(text: str) -> list[str]:
    return MACHINE_PATH.findall(text)


@pytest.mark.parametrize("path", SOURCE_SIZES, ids=relative)
def test_file_is_short(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_FILE_LINES, f"{lines} lines, {MAX_FILE_LINES} allowed: split by subject"


@pytest.mark.parametrize("path", python_files("tools"), ids=relative)
def test_tool_parses_calls_and_prints(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_TOOL_LINES, f"{lines} lines, {MAX_TOOL_LINES} allowed: work goes elsewhere"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_functions_are_short(path: Path) -> None:
    assert long_functions(path.read_text()) == []


@pytest.mark.parametrize("path", twin_blind_files(), ids=relative)
def test_twins_differ_only_where_they_may(path: Path) -> None:
    branches = twin_branches(path.read_text())
    assert branches == [], "ask the objective (its attention, its batch) instead"


@pytest.mark.parametrize("path", SOURCE_SIZES, ids=relative)
def test_names_say_something(path: Path) -> None:
    assert not bad_module_name(relative(path))
    if path.suffix == ".py":
        assert bad_definitions(path.read_text()) == []


@pytest.mark.parametrize("path", python_files("tests"), ids=relative)
def test_what_tests_share_is_in_a_module_of_its_own(path: Path) -> None:
    assert TEST_IMPORT.findall(path.read_text()) == []


def test_class_names_are_unique() -> None:
    places: dict[str, list[str]] = {}
    for path in python_files("benchmarks", "megatron_ettin", "tools"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(relative(path))
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_docstrings_begin_with_a_noun_or_a_verb(path: Path) -> None:
    assert headless_docstrings(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        '"""Of the masks."""',
        'class A:\n    """What a step learns from."""',
        'def f():\n    """Whether it fits."""',
        'LIMIT = 3\n"""How many."""',
        'class A:\n    x: int\n    """As saved."""',
    ],
)
def test_headless_docstring_is_found(source: str) -> None:
    assert len(headless_docstrings(source)) == 1


def test_plain_docstring_is_not_found() -> None:
    assert headless_docstrings('"""Seed of the masks."""\nprint("What")\n"Of no assignment"') == []


def test_no_path_of_a_machine() -> None:
    found = {
        relative(path): machine_paths(path.read_text(errors="replace")) for path in text_files()
    }
    assert {path: paths for path, paths in found.items() if paths} == {}


def test_rules_see_the_whole_project() -> None:
    assert {"model", "order", "training"} <= {
        p.relative_to(ROOT).parts[1] for p in twin_blind_files()
    }
    seen = {relative(path).split("/")[0] for path in text_files()}
    assert {"Makefile", "README.md", "megatron_ettin", "csrc", "tools", "examples", "docs"} <= seen
    assert {"benchmarks", "megatron_ettin", "tools", "setup.py"} <= {
        relative(p).split("/")[0] for p in SOURCES
    }


def test_long_function_is_found() -> None:
    body = "    x = 1\n"
    assert long_functions("def f():\n" + body * (MAX_FUNCTION_LINES - 1)) == []
    assert long_functions("def f():\n" + body * MAX_FUNCTION_LINES) == ["line 1: f has 61 lines"]


@pytest.mark.parametrize(
    "source",
    [
        "if is_encoder: pass",
        "x = 1 if config.encoder_only else 2",
        "if objective.name == 'mlm': pass",
        "if isinstance(objective, MaskedLM): pass",
        "y = [a for a in b if a.encoder]",
        "match kind:\n    case 'encoder': pass",
        "while not self.is_decoder: pass",
    ],
)
def test_twin_branch_is_found(source: str) -> None:
    assert twin_branches(source)


@pytest.mark.parametrize(
    "source",
    [
        "if attention == 'causal': pass",  # the kind of attention is data, and all that may differ
        "if name.startswith('decoder.layers.'): pass",  # Megatron-Core's name of any block
        "encoder = load('encoder')",
    ],
)
def test_plain_code_is_no_twin_branch(source: str) -> None:
    assert twin_branches(source) == []


@pytest.mark.parametrize("path", ["a/utils.py", "a/data_utils.py", "common/x.py", "a/loader_v2.py"])
def test_bad_module_name_is_found(path: str) -> None:
    assert bad_module_name(path)


def test_bad_definition_is_found() -> None:
    assert bad_definitions("def do_it(): pass\nclass Good: pass\ndef pack_v2(): pass") == [
        "line 1: do_it",
        "line 3: pack_v2",
    ]


def test_machine_path_is_found() -> None:
    somebody = "/".join(["", "home", "somebody", "runs"])
    assert machine_paths(f"--output {somebody}") == ["/".join(["", "home", "somebody"])]
    assert machine_paths("#!/usr/bin/env bash, runs/mlm, https://x.org/work/y, {root}/tmp/x") == []
