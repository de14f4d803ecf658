"""Blocks of code in Markdown, and shell scripts as lists of simple commands."""

import re
import shlex
from collections.abc import Iterator

FENCE = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
SHELL_WORDS = {"do", "else", "then"}
SHELL_STATEMENTS = {"cd", "done", "export", "fi", "for", "if", "source"}


def blocks(markdown: str) -> Iterator[tuple[str, str]]:
    return ((match[1], match[2]) for match in FENCE.finditer(markdown))


def lex(script: str) -> Iterator[list[str]]:
    """Split a shell script into lines of words and operators; a quoted word may span lines."""
    pending = ""
    for line in script.replace("\\\n", " ").splitlines(keepends=True):
        pending += line
        lexer = shlex.shlex(pending, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        try:
            yield list(lexer)
        except ValueError:  # a quotation is still open
            continue
        pending = ""
    assert not pending, f"a quotation is never closed: {pending}"


def commands(script: str) -> Iterator[list[str]]:
    """Split a shell script into simple commands, each a list of words without its assignments."""
    for line in lex(script):
        words: list[str] = []
        for word in [*line, ";"]:
            if not word or not set(word) <= set(";&|()"):
                words.append(word)
                continue
            while words and (words[0] in SHELL_WORDS or re.match(r"\w+=", words[0])):
                words = words[1:]
            if words and words[0] not in SHELL_STATEMENTS:
                yield words
            words = []
