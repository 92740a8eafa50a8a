"""What the pages on networks from scratch show: what pairs spend, and settings as they are."""

import pandas as pd
import pytest

from dpmix.companion import networks, paper
from dpmix.runs import spec


def test_pairs_spend_less_than_is_accounted_and_more_where_the_noise_is_for_one():
    """The figures of the demo and of CIFAR-10 at the paper's setting; `core/test_microbatch` has where they come from."""
    p = networks.network_preset("demo")
    (cell,) = networks.network_cells(p, "x", p.views_of("dp-sgd"), eps=8, seeds=0, microbatch=2)
    m = spec.mechanism(cell.spec, 1437)
    run = dict(
        dataset="digits", microbatch=2, epsilon=8.0, delta=1e-5, sigma=m.noise_multiplier, q=m.sample_rate, T=m.steps
    )
    found = networks.privacy_of_pairs(
        pd.DataFrame([run, {**run, "microbatch": 1, "sigma": 9.9}, {**run, "sigma": 0.0}])
    )
    assert list(found["accounted"]) == pytest.approx([6.91, 7.42], rel=0.02)
    assert list(found["true"]) == pytest.approx([3.15, 7.04], rel=0.02)
    assert list(found["noise for C"]) == pytest.approx([8.38, 16.6], rel=0.02)
    assert found["enough"].iloc[0] == pytest.approx(1.13, rel=0.02) and 1.9 < found["enough"].iloc[1] < 2.0


def test_settings_stand_beside_those_of_the_paper():
    table = networks.settings(networks.network_preset("demo"))
    assert (
        table.loc["batch size", "paper scale"] == "4,096"
        and table.loc["views of DP-MixSelf", "paper scale"] == "16 + 18"
    )
    assert table.loc["views of DP-MixSelf", "these runs"] == "4 + 4" and table.loc["epochs", "paper scale"] == "200"


def test_the_rows_of_table_1_have_the_published_numbers():
    published = networks.published_table1()
    assert list(dict.fromkeys(published["method"])) == list(networks.TABLE1)
    by_name = published.groupby("method")["mean"].first()
    assert by_name["DP-SGD"] > by_name["DP-SGD in pairs"] and len(paper.table(1)) < len(published)


def test_networks_of_table_1_and_5():
    p = networks.network_preset("demo")
    cells = networks.microbatch_grid(p, seeds=0)
    assert [c.labels["method"] for c in cells] == list(networks.TABLE1)
    pairs = [c.spec.microbatch for c in cells]
    assert pairs == [1, 2, 2, 2, 1, 2] and all(c.spec.from_scratch and c.spec.validation == 0 for c in cells)
    paper_p = networks.network_preset("paper")
    assert (paper_p.model, paper_p.batch_size, paper_p.epochs) == ("wrn-16-4", 4096, 200)
    assert paper_p.views_of("self-aug").k_base == 16 and p.views_of("self-aug").k_base == 4
    five = networks.augmentations_grid("paper", paper_p, network_seeds=0, seeds=0, learning_rates=1.0)
    assert [f"{c.labels['method'].rsplit(' ', 1)[1]}" for c in five] == [f"{c.spec.recipe.views}" for c in five]
    assert len({c.spec for c in five}) == len(five) == 5 * 3
    changed = networks.changed(p, epochs=5, batch_size=None)
    assert changed.epochs == 5 and changed.batch_size == p.batch_size


def test_an_empty_list_is_refused_for_networks_too():
    with pytest.raises(ValueError, match=r"seeds=\[\]: is empty; give a value"):
        networks.microbatch_grid(networks.network_preset("demo"), seeds=[])


def test_a_page_says_whether_its_networks_have_learned():
    rows = [dict(model="wrn-10-1", method="a", epsilon=8.0, accuracy=a) for a in (12.0, 60.0)]
    text = networks.level(pd.DataFrame([*rows, rows[0] | {"method": "b"}]), classes=10).data
    assert "36.0 %" in text and "12.0 %" in text and "hardly learned" in text
    assert "well above guessing, 10 %" in networks.level(pd.DataFrame([rows[1], rows[1] | {"method": "b"}]), 10).data
