"""The house stays one that a person can overlook: limits of lines, and an API page that shows the face and every room."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

import dpmix

HOUSE = Path(dpmix.__file__).parent
BOOK = HOUSE.parent / "book"
LIMITS = {
    "core": 2_000, "images": 1_200, "models": 900, "runs": 1_200, "audit": 550, "own": 500, "companion": 2_000, "demo": 700,
    "peers": 400,
}  # fmt: skip
WHOLE, FILE, FUNCTION, LOOP = 8_000, 320, 60, 90
LOOPS = {("core/heads.py", "train"), ("core/network.py", "train")}  # the two training loops
SOURCES = sorted(HOUSE.rglob("*.py"))
HAS_BODY = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def lines_of_code(text: str) -> int:
    """Lines that hold code: not those that are blank, nor what only comments and docstrings fill."""
    nothing = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    found = set[int]()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in nothing:
            found |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, HAS_BODY) and ast.get_docstring(node) is not None:
            found -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(found)


def test_lines_are_counted_as_said():
    text = '"""About\n\nit."""\n\n# A comment.\nx = """a\nb"""  # three words\n\n\ndef f():\n    """Says."""\n    return 1\n'
    assert lines_of_code(text) == 4


def test_every_room_keeps_its_limit():
    rooms = {p.parent.name for p in SOURCES if p.parent != HOUSE}
    assert rooms == set(LIMITS)
    size = {room: sum(lines_of_code(p.read_text()) for p in (HOUSE / room).glob("*.py")) for room in rooms}
    assert {room: n for room, n in size.items() if n > LIMITS[room]} == {}
    assert sum(lines_of_code(p.read_text()) for p in SOURCES) < WHOLE


def test_no_file_and_no_function_is_long():
    assert {str(p): n for p in SOURCES if (n := len(p.read_text().splitlines())) > FILE} == {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                most = LOOP if (path.relative_to(HOUSE).as_posix(), node.name) in LOOPS else FUNCTION
                assert node.end_lineno - node.lineno + 1 <= most, f"{path.name}: {node.name}"


def test_only_tables_are_kept_from_the_formatter():
    for path in SOURCES:
        kept = [line for line in path.read_text().splitlines() if "fmt: skip" in line or "fmt: off" in line]
        assert all(re.fullmatch(r"\s*[}\])]+\s*# fmt: skip", line) for line in kept), path.name


@pytest.mark.parametrize("room", LIMITS)
def test_the_api_page_shows_every_module_of_a_room(room):
    shown = set(re.findall(rf"automodule:: dpmix\.{room}\.(\w+)", (BOOK / "api.md").read_text()))
    assert shown == {p.stem for p in (HOUSE / room).glob("*.py")} - {"__init__"}


def test_the_api_page_shows_the_face():
    shown = re.findall(r"`dpmix\.(\w+) <dpmix\.([\w.]+)\.\w+>`", (BOOK / "api.md").read_text())
    assert {name: home for name, home in shown} == dpmix._HOME and set(dpmix._HOME) == set(dpmix.__all__)


@pytest.mark.parametrize("room", LIMITS)
def test_the_page_on_the_layout_names_the_room(room):
    assert f"`dpmix/{room}/`" in (BOOK / "code_layout.md").read_text()
