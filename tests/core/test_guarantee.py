"""Every function and every test that GUARANTEE.md names exists, and each of its lines names both."""

import ast
import importlib
import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
PAGE = (PROJECT / "dpmix" / "core" / "GUARANTEE.md").read_text(encoding="utf-8")
LINES = re.findall(r"^\| \d+ \|.*\|$", PAGE, flags=re.M)


def missing(text: str) -> list[str]:
    """The names in backticks that are neither a test nor something of `core`."""
    found = []
    for name in re.findall(r"`([\w./]+(?:\.|::)\w+)`", text):
        if "::" in name:
            path, test = name.split("::")
            file = PROJECT / path
            tests = ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if file.is_file() else ()
            there = any(isinstance(node, ast.FunctionDef) and node.name == test for node in tests)
        else:
            module, *rest = name.split(".")
            try:
                value = importlib.import_module(f"dpmix.core.{module}")
                for part in rest:
                    value = getattr(value, part)
                there = callable(value)
            except (ImportError, AttributeError):
                there = False
        if not there:
            found.append(name)
    return found


def test_what_the_guarantee_names_exists():
    assert missing(PAGE) == []


def test_each_of_ten_lines_names_a_function_and_a_test():
    assert len(LINES) == 10
    for line in LINES:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert len(cells) == 5 and all(cells), line
        assert re.fullmatch(r"`\w+(\.\w+)+`", cells[1]) and "::test_" in cells[4], line


@pytest.mark.parametrize(
    "name",
    ["views.make_vews", "vews.make_views", "tests/core/test_views.py::test_not", "tests/core/test_no.py::test_x"],
)
def test_a_name_that_does_not_exist_is_seen(name):
    assert missing(f"as `{name}` says, unlike `views.make_views`") == [name]
