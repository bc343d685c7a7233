"""The plan of the house: few files at the top, programs in flux_jax/cli alone, no flag in what the library says."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "flux_jax"
STUBS = ("generate", "plan", "doctor", "prompts", "__main__", "distill/compare", "nano/train", "nano/oracle_error")
LIBRARY = [
    path
    for path in sorted(PACKAGE.rglob("*.py"))
    if "cli" not in path.parts and path.name != "__main__.py" and path not in {PACKAGE / f"{stub}.py" for stub in STUBS}
]


def names(paths) -> list[str]:
    return [str(path.relative_to(PACKAGE)) for path in paths]


def test_at_most_twelve_files_are_at_the_top():
    assert len(list(PACKAGE.glob("*.py"))) <= 12


@pytest.mark.parametrize("path", LIBRARY, ids=names(LIBRARY))
def test_the_library_speaks_of_arguments_not_of_flags(path):
    """`flux_jax.cli.main.in_flags` turns offload="layers" into --offload layers where a program says it."""
    tree = ast.parse(path.read_text())
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    said = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
    ]
    assert [text for text in said if re.search(r"(?<![\w-])--[a-z]", text)] == []
