"""What came with the repository can be made again, where the images are on disk."""

import pytest

from dpmix import ComputeFlags, run
from dpmix.companion import evidence, grids
from dpmix.images import data
from dpmix.runs.store import Store


def test_one_cell_of_table_3_comes_out_again(tmp_path):
    """DP-SGD, which takes one view an image, at the largest budget. Another version of the code draws other noise, and
    another processor rounds otherwise: two points."""
    mine = "dataset == 'caltech101' and method == 'dp-sgd' and epsilon == 8 and validation > 0"
    runs = evidence.read("table3").query(mine)
    assert len(runs), "they come with the repository"
    try:
        data.find("caltech101")
    except FileNotFoundError:
        pytest.skip(
            "trains on the photographs of Caltech-101, which do not come with the repository and are not on disk"
        )
    row = evidence.choose(runs, ["method", "epsilon"]).sort_values("seed").iloc[0]
    cells = grids.methods_grid("laptop", dataset="caltech101", methods=["dp-sgd"], eps=8, seeds=[int(row["seed"])])
    (spec,) = (c.spec for c in cells if c.spec.learning_rate == pytest.approx(row["learning_rate"]))
    again = run(spec, compute=ComputeFlags(cache=str(tmp_path / "cache"), workers=1), store=Store(tmp_path / "store"))
    assert 100 * again.test_accuracy == pytest.approx(row["accuracy"], abs=2)
    assert 100 * again.diagnostics.validation_accuracy == pytest.approx(row["validation_accuracy"], abs=4)
