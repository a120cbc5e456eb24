"""No sentence that the code writes for people has more than 25 words: messages, warnings, reports and help."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import cropi

PACKAGE = Path(cropi.__file__).parent
MAX_WORDS = 25
FILES = sorted(PACKAGE.rglob("*.py"))


def written(tree: ast.AST) -> Iterator[str]:
    """Texts of a module, but for docstrings; a value in braces counts as a word."""
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    inside -= {id(node) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "VALUE" for part in node.values)
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.value


def is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def without_docstrings(tree: ast.AST) -> ast.AST:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [part for part in node.body if not is_docstring(part)]
    return tree


def words(sentence: str) -> int:
    return sum(any(letter.isalpha() for letter in word) for word in sentence.split())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_sentences_are_short(path: Path) -> None:
    tree = without_docstrings(ast.parse(path.read_text(encoding="utf-8")))
    sentences = [one for text in written(tree) for one in re.split(r"(?<=[.!?])\s+|\n", text)]
    assert [one for one in sentences if words(one) > MAX_WORDS] == []
