"""What the pages on networks from scratch show: the sign flip by the code that trains, and settings as they are."""

import pandas as pd
import pytest

from dpmix.companion import grids, paper, report_network
from dpmix.core import views
from dpmix.runs import experiments, spec


def test_the_sum_of_a_pair_turns_round_and_that_of_single_examples_does_not():
    table = report_network.sign_flip(clip_norm=0.7)
    moved = {name: float(cell.split()[0]) for name, cell in table["moved by"].items()}
    assert moved["pair"] == 2.0 and moved["one example, clipped alone"] == 1.0
    assert table.loc["pair", "both present"] == "+1.00 C" and table.loc["pair", "without the second"] == "-1.00 C"
    promised = {name: float(cell.split()[0]) for name, cell in table["noise is scaled for"].items()}
    assert all(moved[name] <= promised[name] for name in moved)


def test_pairs_spend_less_than_is_accounted_and_more_where_the_noise_is_for_one():
    """The figures of the demo and of CIFAR-10 at the paper's setting; `core/test_microbatch` has where they come from."""
    p = grids.network_preset("demo")
    (cell,) = grids.network_cells(p, "x", p.views_of("dp-sgd"), eps=8, seeds=0, microbatch=2)
    m = spec.mechanism(cell.spec, 1437)
    run = dict(
        dataset="digits", microbatch=2, epsilon=8.0, delta=1e-5, sigma=m.noise_multiplier, q=m.sample_rate, T=m.steps
    )
    found = report_network.privacy_of_pairs(
        pd.DataFrame([run, {**run, "microbatch": 1, "sigma": 9.9}, {**run, "sigma": 0.0}])
    )
    assert list(found["accounted"]) == pytest.approx([6.91, 7.42], rel=0.02)
    assert list(found["true"]) == pytest.approx([3.15, 7.04], rel=0.02)
    assert list(found["noise for C"]) == pytest.approx([8.38, 16.6], rel=0.02)
    assert found["enough"].iloc[0] == pytest.approx(1.13, rel=0.02) and 1.9 < found["enough"].iloc[1] < 2.0


def test_settings_stand_beside_those_of_the_paper():
    table = report_network.settings(grids.network_preset("demo"))
    assert (
        table.loc["expected batch B", "paper scale"] == "4,096"
        and table.loc["views of DP-MixSelf", "paper scale"] == "16 + 18"
    )
    assert table.loc["views of DP-MixSelf", "these runs"] == "4 + 4" and table.loc["epochs", "paper scale"] == "200"


def test_the_rows_of_table_1_have_the_published_numbers():
    published = report_network.published_table1()
    assert list(dict.fromkeys(published["method"])) == list(grids.TABLE1)
    by_name = published.groupby("method")["mean"].first()
    assert by_name["DP-SGD"] > by_name["DP-SGD in pairs"] and len(paper.table(1)) < len(published)


@pytest.fixture
def reference(tmp_path, monkeypatch):
    store = experiments.Store(tmp_path / "table2")
    tiny = dict(
        epsilon=8.0, learning_rate=1.0, epochs=0.05, batch_size=64, model="wrn-10-1", validation=0.0, delta=1e-5
    )
    recipes = [views.Recipe(k_base=2, transform="crop"), views.Recipe(k_base=2, k_self=2, transform="crop")]
    specs = [experiments.RunSpec(recipe=r, seed=s, **tiny) for r in recipes for s in (0, 1)]
    results = experiments.run_all(specs, compute=experiments.ComputeFlags(progress=False, workers=1), store=store)
    monkeypatch.setattr(grids.data, "RESULTS", tmp_path)
    return results


def test_results_that_came_with_the_repository_are_read_whatever_the_code(reference):
    runs = grids.reference("table2")
    assert sorted(runs["accuracy"]) == sorted(100 * r.test_accuracy for r in reference)
    table = report_network.as_run(runs)
    assert (
        list(table.index) == ["Self-Aug", "DP-MixSelf"]
        and list(table["views"]) == ["2", "2 + 2"]
        and set(table["n"]) == {2}
    )
    assert len(grids.reference("nothing")) == 0
