"""Files and functions that fit on a screen or a few."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("udiff", "pipelines", "jobs", "serve", "benchmarks")
FILES = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 400, 60, 10


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_sizes(file):
    text = file.read_text()
    assert text.count("\n") <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"
            parameters = len(node.args.args) + len(node.args.kwonlyargs)
            assert parameters <= MAX_PARAMETERS, f"{node.name} has {parameters} parameters"


def test_names_say_what_is_inside():
    vague = {"utils", "util", "common", "base", "helpers", "misc"}
    assert not [file for file in FILES if file.stem in vague]
