"""Notebooks: source and ipynb agree, hold no outputs, take parameters; Table 3 runs through papermill."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from notebooks import FOLDER, made_from

SOURCES = sorted(FOLDER.glob("*.py"))


def cells(notebook):
    return [(c.cell_type, c.source, c.metadata) for c in notebook.cells]


@pytest.mark.parametrize("source", SOURCES, ids=[s.stem for s in SOURCES])
def test_source_and_notebook_agree(source):
    found = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    assert cells(found) == cells(made_from(source)), "run `make notebooks`"
    assert all(not c.get("outputs") and c.get("execution_count") is None for c in found.cells)
    assert sum("parameters" in c.metadata.get("tags", []) for c in found.cells) == 1


def test_another_source_is_told_apart():
    a, b = SOURCES[:2]
    assert cells(made_from(a)) != cells(made_from(b))


def papermill(tmp_path: Path, *parameters: str, notebook: str = "table3") -> subprocess.CompletedProcess:
    environment = {**os.environ, "DPMIX_STORE": str(tmp_path / "store"), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(FOLDER / f"{notebook}.ipynb"),
        str(tmp_path / "out.ipynb"),
        *parameters,
    ]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


def test_table3_runs_through_papermill_with_tiny_parameters(tmp_path):
    tiny = "{eps: 1, models: tiny-convnext, seeds: [0, 1], epochs: 0.3, learning_rates: [4, 8]}"
    done = papermill(tmp_path, "-y", tiny)
    assert done.returncode == 0, done.stderr[-2000:]
    out = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    shown = str([o.get("data", {}) for c in out.cells for o in c.get("outputs", [])])
    assert "Made now" in shown and "DP-MixDiff" in shown and "image/png" in shown
    assert len(list((tmp_path / "store").glob("*.json"))) == 7 * 2 * 2


def test_the_page_of_the_standins_reads_their_records(tmp_path):
    done = papermill(tmp_path, notebook="public_standins")
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_explorer_stands_still_where_no_kernel_answers(tmp_path):
    """Each picture is there as HTML, of which the book takes its page, beside the widget that JupyterLab shows."""
    done = papermill(tmp_path, "-p", "index", "12", notebook="explore")
    assert done.returncode == 0, done.stderr[-2000:]
    out = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    names, *shown = [o["data"] for c in out.cells for o in c.get("outputs", []) if "data" in o]
    assert "aria-label" in names["text/html"], "the script that names the handles of the sliders"
    assert [("application/vnd.jupyter.widget-view+json" in d, "text/html" in d) for d in shown] == [(True, True)] * 4
    words = ("The example", "q = B/N = ", "Lengths before clipping", "that came with the repository")
    assert [w in d["text/html"] for w, d in zip(words, shown, strict=True)] == [True] * 4
    assert not any('role="alert"' in d["text/html"] for d in shown)
    assert [d["text/html"].count("<hr>") for d in shown] == [2, 3, 2, 0]  # other settings


def test_paper_scale_without_the_files_stops_at_once_and_says_what_to_put_where(tmp_path):
    done = papermill(tmp_path, "-p", "scale", "paper", "-p", "dataset", "sun397")
    assert done.returncode != 0 and "is not on disk" in done.stderr and "works now" in done.stderr
    assert not list((tmp_path / "store").glob("*.json"))
