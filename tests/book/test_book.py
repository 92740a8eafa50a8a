"""The book says nothing that the code does not bear out: targets, citations and names exist, accuracies are not typed in,
and the module is built in floors as DESIGN draws it."""

import ast
import importlib.util
import itertools
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
import yaml
from jupyter_cache import get_cache

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"
CHAPTERS = sorted(BOOK.glob("*.md"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
PAGES = [*CHAPTERS, *NOTEBOOKS]


def names(pages):
    return [p.name for p in pages]


def contents() -> list[str]:
    toc = yaml.safe_load((BOOK / "_toc.yml").read_text())
    return [toc["root"], *(c["file"] for part in toc["parts"] for c in part["chapters"])]


def exists(target: str) -> bool:
    """Whether `target`, seen from book/, is a page: a chapter, or a notebook through the link book/notebooks."""
    return any((BOOK / f"{target}{suffix}").is_file() for suffix in (".md", ".ipynb"))


def test_the_contents_list_every_page_once_and_nothing_else():
    listed = contents()
    assert [t for t in listed if not exists(t)] == []
    pages = [p.stem for p in CHAPTERS] + [f"notebooks/{p.stem}" for p in NOTEBOOKS]
    assert sorted(listed) == sorted(pages)
    assert not exists("nowhere") and not exists("notebooks/nowhere")


def missing_targets(text: str, folder: str) -> list[str]:
    """{doc} roles that lead nowhere. "/x" is seen from book/, "x" from the page's own folder."""
    found = re.findall(r"\{doc\}`(?:[^`<]*<)?([^`>]+)>?`", text)
    return [t for t in found if not exists(t[1:] if t.startswith("/") else f"{folder}{t}")]


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_every_reference_leads_to_a_page(page):
    assert missing_targets(page.read_text(), "notebooks/" if page in NOTEBOOKS else "") == []


def test_a_reference_that_leads_nowhere_is_seen():
    assert missing_targets("{doc}`views` {doc}`/views` {doc}`x <notebooks/table3>`", "") == []
    assert missing_targets("{doc}`vews` {doc}`x <notebooks/table33>`", "") == ["vews", "notebooks/table33"]
    assert missing_targets("{doc}`views`", "notebooks/") == ["views"]


def title_of(target: str) -> str:
    """The heading of the page that a notebook names: "/x" is a chapter, "x" a notebook."""
    path = BOOK / f"{target[1:]}.md" if target.startswith("/") else BOOK / "notebooks" / f"{target}.py"
    found = re.search(r"^(?:# )?# (.+)$", path.read_text().partition("# %% [markdown]\n")[2] or path.read_text(), re.M)
    assert found is not None
    return found[1].strip()


@pytest.mark.parametrize("page", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_references_of_a_notebook_bring_the_title_along(page):
    """JupyterLab knows no other page: without a title of its own it would show the path."""
    text = page.with_suffix(".py").read_text()
    assert re.findall(r"\{doc\}`[^`<]+`", text) == []
    for said, target in re.findall(r"\{doc\}`([^`<]+) <([^`>]+)>`", text):
        assert said == title_of(target)


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_every_citation_is_in_the_bibliography(page):
    known = set(re.findall(r"^@\w+\{([^,]+),", (BOOK / "references.bib").read_text(), re.M))
    assert len(known) > 10
    cited = re.findall(r"\{cite:\w+\}`([^`]+)`", page.read_text())
    assert {key.strip() for keys in cited for key in keys.split(",")} - known == set()


def test_a_citation_reads_as_author_and_year():
    """JupyterLab has no bibliography and shows the key itself."""
    for key, entry in re.findall(r"^@\w+\{([^,]+),(.*?)^\}", (BOOK / "references.bib").read_text(), re.M | re.S):
        assert re.fullmatch(r"[A-Z][A-Za-z]+-\d{4}", key) and key[-4:] == re.search(r"year\s*= \{(\d+)\}", entry)[1]


def test_citations_are_found():
    assert any("{cite:" in p.read_text() for p in CHAPTERS)


# Accuracies come from results.

CODE = re.compile(r"```.*?```|~~~.*?~~~|\$\$.*?\$\$|\$[^$\n]*\$|`[^`\n]*`", re.S)
NUMBER = re.compile(r"(?<![\w.])(\d{1,3}(?:\.\d+)?\s?%|\d{2}\.\d{1,2}(?![\w.]))(?!\s*(?:confidence|interval|level))")


def typed_numbers(text: str) -> list[str]:
    """Percentages and numbers such as 87.5 in prose: what an accuracy looks like. Code and formulas may hold them."""
    return NUMBER.findall(CODE.sub(" ", text))


@pytest.mark.parametrize("page", CHAPTERS, ids=names(CHAPTERS))
def test_no_accuracy_is_typed_into_a_chapter(page):
    assert typed_numbers(page.read_text()) == []


@pytest.mark.parametrize(
    "text", ["reaches 97.2 on digits", "an accuracy of 81%", "81.3 % (0.2)", "91.25 against 92.75", "(88.1)"]
)
def test_a_typed_accuracy_is_seen(text):
    assert typed_numbers(text)


@pytest.mark.parametrize("text", ["$0.5\\%$", "`--share 20%`", "epsilon 2.5", "PyTorch 2.11.0", "1,797 digits", "K = 16, 18",
                                  "a 95 % confidence interval", "Table 12.", "```\n97.2\n```", "16.5MB"])  # fmt: skip
def test_other_numbers_are_not_taken_for_accuracies(text):
    assert typed_numbers(text) == []


@pytest.mark.parametrize("page", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_no_number_in_prose_is_glued(page):
    """Neither JupyterLab nor papermill knows what the book has glued: such a number would be missing there."""
    assert "glue" not in page.with_suffix(".py").read_text()


# Names.


def unknown_names(text: str) -> list[str]:
    """`dpmix.a.b` in the text that Python does not find."""
    wrong = []
    for dotted in sorted(set(re.findall(r"\bdpmix(?:\.[A-Za-z_]\w*)+", text))):
        room = dotted.split(".")[1]
        if room in ("css", "git", "github", "svg"):
            continue
        try:
            pkgutil.resolve_name(dotted)
        except (ImportError, AttributeError):
            wrong.append(dotted)
    return wrong


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=names([*PAGES, ROOT / "README.md"]))
def test_every_name_of_the_module_exists(page):
    assert unknown_names(page.read_text()) == []


def test_a_name_that_does_not_exist_is_seen():
    assert unknown_names("`dpmix.core.views.make_views` and `dpmix.view` and `dpmix.core.views.make_vews`") == [
        "dpmix.core.views.make_vews",
        "dpmix.view",
    ]


@pytest.mark.parametrize("page", [*CHAPTERS, ROOT / "README.md"], ids=names([*CHAPTERS, ROOT / "README.md"]))
def test_python_in_the_text_is_python(page):
    for block in re.findall(r"```\{?(?:python|code-cell)\}?[^\n]*\n(.*?)```", page.read_text(), re.S):
        assert names_unknown_to_rooms(textwrap.dedent(block)) == []


def names_unknown_to_rooms(source: str) -> list[str]:
    """`room.name` in a notebook, imported from dpmix, where the room has no such name."""
    tree, rooms, unknown = ast.parse(source), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            rooms |= {a.name: importlib.import_module(a.name) for a in node.names if a.name == "dpmix"}
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dpmix":
            for alias in node.names:
                try:
                    found = pkgutil.resolve_name(f"{node.module}.{alias.name}")
                except (ImportError, AttributeError):
                    unknown.append(f"{node.module}.{alias.name}")
                else:
                    if isinstance(found, ModuleType):
                        rooms[alias.asname or alias.name] = found
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in rooms:
            room = rooms[node.value.id]
            unknown += [] if hasattr(room, node.attr) else [f"{room.__name__}.{node.attr}"]
    return unknown


@pytest.mark.parametrize("page", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_notebooks_use_names_that_exist(page):
    """A page that runs for minutes before it finds out is too late."""
    assert names_unknown_to_rooms(page.read_text()) == []


def test_a_name_that_moved_away_is_seen():
    assert names_unknown_to_rooms("from dpmix.companion import report\nreport.PALETTE") == [
        "dpmix.companion.report.PALETTE"
    ]
    assert names_unknown_to_rooms("from dpmix.companion import plots as p\np.PALETTE, p.nothing") == [
        "dpmix.companion.plots.nothing"
    ]
    assert names_unknown_to_rooms("import dpmix\ndpmix.run, dpmix.rum") == ["dpmix.rum"]
    assert names_unknown_to_rooms("from dpmix import experiments") == ["dpmix.experiments"]
    assert names_unknown_to_rooms("from dpmix.runs.spec import ComputeFlags, Nobody") == ["dpmix.runs.spec.Nobody"]


def linted(folder: Path) -> subprocess.CompletedProcess[str]:
    """import-linter on a copy of the package below `folder`."""
    return subprocess.run([Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=folder, capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(folder)})  # fmt: skip


@pytest.mark.parametrize(
    "room, line, said",
    [
        ("core/views", "import dpmix.models.encoders", "dpmix.core.views -> dpmix.models.encoders"),
        ("core/rng", "def f():\n    from dpmix.images import data", "dpmix.core.rng -> dpmix.images.data"),
        ("runs/spec", "from dpmix.audit import attacks", "dpmix.runs.spec -> dpmix.audit.attacks"),
        ("core/rng", "from dpmix.core import views", "dpmix.core"),
    ],
)
def test_an_import_upwards_or_in_a_circle_is_seen(room, line, said, tmp_path):
    shutil.copytree(ROOT / "dpmix", tmp_path / "dpmix")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / "dpmix" / f"{room}.py"
    path.write_text(f"{path.read_text()}\n{line}\n")
    done = linted(tmp_path)
    assert done.returncode == 1 and said in done.stdout.replace("\n", " "), done.stdout + done.stderr


def test_nothing_in_the_module_uses_global_randomness_or_unpickles_or_prints():
    """Keyed randomness is what makes neighbours comparable; unpickling runs code."""
    forbidden = {
        # inside fork_rng for a third party's initialisation; and generators of their own, as diffusers wants them
        r"\bmanual_seed\(": {"encoders", "synthesis"},
        r"\bnp\.random\.(?!Generator|Philox|default_rng\b)\w+\(": set(), r"\brandom\.seed\(": set(),
        r"torch\.(rand|randn|randperm|randint)\(": set(), r"\bpickle\.loads?\(": set(), r"weights_only=False": set(),
        r"allow_pickle=True": set(), r"simplefilter\(.ignore": set(), r"except:\s": set(), r"^\s*print\(": {"__main__"},
    }  # fmt: skip
    wrong = [
        (path.stem, pattern)
        for path in (ROOT / "dpmix").rglob("*.py") for pattern, allowed in forbidden.items()
        if path.stem not in allowed and re.search(pattern, path.read_text(), re.M)
    ]  # fmt: skip
    assert wrong == []
    assert re.search(next(iter(forbidden)), (ROOT / "dpmix" / "models" / "encoders.py").read_text()), (
        "the patterns must find"
    )


def test_pages_are_executed_into_the_cache_that_the_book_reads(tmp_path, monkeypatch, capsys):
    """What ran is not run again; what failed is left to the book, which says why."""
    spec = importlib.util.spec_from_file_location("execute", BOOK / "execute.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    (tmp_path / "_toc.yml").write_text("parts:\n- {chapters: [{file: good}, {file: bad}, {file: prose}]}\n")
    for name, line in (("good", "print(6 * 7)"), ("bad", "1 / 0")):
        page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(line)])
        page.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(page, tmp_path / f"{name}.ipynb")
    monkeypatch.setattr(program, "BOOK", tmp_path)
    monkeypatch.setattr(sys, "argv", ["execute.py", "--at-a-time", "1"])
    program.main()
    said = capsys.readouterr().out
    assert re.search(r"good: done in \d+ s, \d left", said) and re.search(r"bad: failed \(\w+\) in", said)
    cache = get_cache(tmp_path / "_build" / ".jupyter_cache")
    assert [path.stem for path in program.missing(program.pages(), cache)] == ["bad"]
    _, merged = cache.merge_match_into_notebook(nbformat.read(tmp_path / "good.ipynb", as_version=4))
    assert merged.cells[0].outputs[0].text == "42\n"


def project_with(tmp_path, program: str) -> dict:
    """A project with our Makefile, whose `jupyter-book` is the shell script `program`: the environment to run make in."""
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for folder in ("book/_build", "dpmix", ".venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    for name, text in (("jupyter-book", program), ("python", "exit 0")):
        path = tmp_path / ".venv/bin" / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    (tmp_path / ".venv/.ready").touch()
    # without the variables of a make that runs the tests
    return {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}


def test_a_book_of_other_code_is_made_anew(tmp_path):
    """Pages that have not changed are executed again if the module behind them has, and not otherwise."""
    outer = project_with(
        tmp_path, "ls -A book/_build >> seen\nmkdir -p book/_build/.doctrees book/_build/.jupyter_cache"
    )
    for text, kept in (("a = 1", False), ("a = 1", True), ("a = 2", False), ("a = 2", True)):
        (tmp_path / "dpmix/rng.py").write_text(text)
        (tmp_path / "seen").unlink(missing_ok=True)
        subprocess.run(["make", "book"], cwd=tmp_path, env=outer, check=True, capture_output=True)
        wanted = {".doctrees", ".jupyter_cache"} if kept else set()
        assert set((tmp_path / "seen").read_text().split()) - {"warnings"} == {"code", *wanted}


def test_a_book_with_a_failed_page_is_no_success_and_names_the_page_last(tmp_path):
    """Nor is it one the second time: Sphinx would take a page that it has read for done, failed or not."""
    page = """
test -e book/_build/.doctrees && exit 0
mkdir -p book/_build/.doctrees book/_build/.jupyter_cache book/_build/html/reports
echo 'book/table3.ipynb: WARNING: Executing notebook failed' >&2
echo 'ValueError: epsilon=-1: must be positive' > book/_build/html/reports/table3.err.log
seq 200
exit 1"""
    outer = project_with(tmp_path, page)
    for _ in range(2):
        made = subprocess.run(
            ["make", "book"], cwd=tmp_path, env=outer, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        last = made.stdout.splitlines()[-8:]
        assert made.returncode != 0 and "index.html" not in made.stdout
        assert any("table3.ipynb: WARNING" in line for line in last) and any("epsilon=-1" in line for line in last)
    assert (tmp_path / "book/_build/.jupyter_cache").is_dir(), "pages that ran are not executed again"


NOUNS = [
    "images",
    "runs",
    "heads",
    "views",
    "seeds",
    "steps",
    "classes",
    "examples",
    "rows",
    "cells",
    "comparisons",
    "claims",
    "files",
    "epochs",
    "chunks",
    "passes",
    "pairs",
    "mixtures",
    "patients",
    "threads",
    "tensors",
    "gradients",
    "repeats",
    "samples",
    "augmentations",
    "features",
    "points",
    "paths",
    "others",
    "models",
    "values",
]
KINDS = [
    "training",
    "test",
    "synthetic",
    "private",
    "public",
    "other",
    "exact",
    "more",
    "different",
    "whole",
    "feature",
    "simulated",
    "base",
]
COUNTED = re.compile(rf" (?:(?:{'|'.join(KINDS)}) )*(?:{'|'.join(NOUNS)})\b(?!/)| (?:are|were|have) ")


def fixed_plurals(source: str) -> list[str]:
    """Where an f-string says "{n} images" whatever n is. Measured numbers (with decimals) and constants may."""
    found = []
    for node in ast.walk(ast.parse(source)):
        parts = node.values if isinstance(node, ast.JoinedStr) else []
        for value, text in itertools.pairwise(parts):
            if isinstance(value, ast.FormattedValue) and isinstance(text, ast.Constant) and COUNTED.match(text.value):
                measured = re.search(r"[1-9]f|g|%", ast.unparse(value.format_spec) if value.format_spec else "")
                if not measured and not ast.unparse(value.value).isupper():
                    found.append(f"line {node.lineno}: {{{ast.unparse(value.value)}}}{text.value[:30]}")
    return found


def test_nothing_says_1_images():
    """A count and its noun come from `checks.counted`."""
    from dpmix.core.checks import counted

    assert [counted(n, "image") for n in (0, 1, 2, 2000)] == ["0 images", "1 image", "2 images", "2,000 images"]
    assert [counted(n, "public class") for n in (1, 3)] == ["1 public class", "3 public classes"]
    caught = ['f"{n} images"', 'f"of {len(a):,} test images, {b}"', 'f"{n} are undecided"', 'f"{x:.0f} runs"']
    assert all(map(fixed_plurals, caught)), "negative control"
    fine = [
        'f"{x:.1f} points"',
        'f"{CHUNK} examples"',
        'f"{counted(n, 1)} in all"',
        'f"{name} takes images"',
        'f"{n} of the images"',
    ]
    assert not any(map(fixed_plurals, fine))
    code = [path for part in ("dpmix", "notebooks", "benchmarks") for path in (ROOT / part).rglob("*.py")]
    told = [f"{path.relative_to(ROOT)}, {said}" for path in code for said in fixed_plurals(path.read_text())]
    assert not told, "\n".join(told)
