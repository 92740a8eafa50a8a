"""Make every notebooks/NAME.ipynb from its NAME.py (py:percent), without outputs. `make notebooks` runs this."""

from pathlib import Path

import jupytext
import nbformat

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"


def made_from(source: Path) -> nbformat.NotebookNode:
    """The notebook that a source stands for: same cells in order, no outputs, ids counted."""
    notebook = jupytext.read(source)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        if cell.cell_type == "code":
            cell.update(outputs=[], execution_count=None)
    notebook.metadata = {
        "jupytext": {"formats": "ipynb,py:percent", "main_language": "python"},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


if __name__ == "__main__":
    for source in sorted(FOLDER.glob("*.py")):
        nbformat.write(made_from(source), source.with_suffix(".ipynb"))
