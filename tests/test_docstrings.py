"""What docstrings promise, where the linter cannot see it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted([*(ROOT / "lightning_mi").glob("**/*.py"), *(ROOT / "callbacks").glob("*.py")])
Function = ast.FunctionDef | ast.AsyncFunctionDef


def public_functions(tree: ast.AST) -> Iterator[Function]:
    """Yield module functions and methods of public classes whose names are public."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node)
        elif isinstance(node, Function) and not node.name.startswith("_"):
            yield node


def raised(function: Function) -> set[str]:
    """Return the names of the errors that the body itself raises, whatever builds them."""
    names = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Raise) and node.exc is not None:
            error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            while isinstance(error, ast.Attribute) and error.attr.islower():
                error = error.value  # ArgumentError.of(...)
            name = error.attr if isinstance(error, ast.Attribute) else getattr(error, "id", "")
            names |= {name} if name[:1].isupper() else set()
    return names


def undocumented(source: str) -> list[str]:
    missing = []
    for function in public_functions(ast.parse(source)):
        _, _, raises = (ast.get_docstring(function) or "").partition("Raises:\n")
        absent = {name for name in raised(function) if f"    {name}:" not in raises}
        missing += [f"{function.name} (line {function.lineno}): {name}" for name in sorted(absent)]
    return missing


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_error_that_a_public_function_raises_is_documented(file: Path) -> None:
    assert undocumented(file.read_text()) == []


def test_the_check_can_fail() -> None:
    body = "    if x:\n        raise ArgumentError.of('x')\n    raise mi.RunError('y') from None\n"
    assert undocumented(f'def f(x):\n    """Do."""\n{body}') == [
        "f (line 1): ArgumentError",
        "f (line 1): RunError",
    ]
    told = '"""Do.\n\n    Raises:\n        ArgumentError: If so.\n        RunError: Else.\n    """'
    assert undocumented(f"def f(x):\n    {told}\n{body}") == []
    assert undocumented(f"def _f(x):\n{body}") == []
