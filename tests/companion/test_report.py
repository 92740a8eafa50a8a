"""What pages show: every number is the right one, and the verdicts follow from the numbers."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from dpmix.companion import paper, plots, report


def runs_of(values: dict[str, list[float]], epsilon=1.0, model="tiny-vit") -> pd.DataFrame:
    """One row a method and seed."""
    rows = [
        {"method": m, "model": model, "epsilon": epsilon, "seed": seed, "accuracy": a, "learning_rate": 2.0, "clip_norm": 1.0}
        for m, accuracies in values.items() for seed, a in enumerate(accuracies)
    ]  # fmt: skip
    return pd.DataFrame(rows)


RUNS = runs_of({"self-aug": [80.0, 82.0, 81.0], "mix-self": [83.0, 84.5, 84.0]})


def test_labels_and_spreads():
    assert report.label("mix-self") == "DP-MixSelf" and report.label("unheard of") == "unheard of"
    assert report.label("self-aug+jitter") == "Self-Aug + colour jitter"
    assert report.spread(97.25, 0.349) == "97.2 (0.3)" and report.spread(97.0) == "97.0"
    assert report.spread(97.0, float("nan")) == "97.0" and report.spread(float("nan"), 1.0) == "–"


def test_summary_is_mean_deviation_and_count():
    table = report.summary(RUNS, ["method"]).set_index("method")
    assert table.loc["self-aug"].tolist() == [81.0, 1.0, 3]
    assert table.loc["mix-self", "std"] == pytest.approx(np.std([83.0, 84.5, 84.0], ddof=1))
    assert list(table.index) == ["self-aug", "mix-self"], "in the order in which they come"
    assert np.isnan(report.summary(RUNS[RUNS["seed"] == 0], ["method"])["std"]).all(), "one seed has no deviation"
    without = report.summary(RUNS.assign(epsilon=None), ["method", "epsilon"])
    assert len(without) == 2, "runs without noise are not dropped"


def test_blocks_are_laid_out_as_the_paper_prints_them():
    measured = report.summary(
        pd.concat([RUNS, runs_of({"self-aug": [90.0]}, epsilon=2.0)]), ["model", "method", "epsilon"]
    )
    block = report.block(measured)
    assert list(block.index) == ["Self-Aug", "DP-MixSelf"] and list(block.columns) == [
        ("tiny ViT", "ε = 1"),
        ("tiny ViT", "ε = 2"),
    ]
    assert block.to_numpy().tolist() == [["81.0 (1.0)", "90.0"], ["83.8 (0.8)", "–"]]


def test_published_stands_beside_measured():
    table = paper.table(3)
    published = table[(table["dataset"] == "cifar10") & (table["epsilon"] == 1) & (table["model"] == "vit-b-16")]
    measured = report.summary(RUNS, ["model", "method", "epsilon"])
    both = report.side_by_side(published, measured)
    cell = published[published["method"] == "mix-self"].iloc[0]
    assert "DP-MixSelf" in str(both.index.tolist())
    text = both.to_string()
    assert report.spread(cell["mean"], cell["std"]) in text and "83.8 (0.8)" in text and "measured here" in text
    same = report.side_by_side(measured, measured)
    assert same.loc["published"].equals(same.loc["measured here"]), "one above the other where the columns agree"


def test_paired_differences_are_those_of_the_same_seed():
    found = report.paired(RUNS.sample(frac=1, random_state=0), [("mix-self", "self-aug")]).iloc[0]
    gaps = np.array([3.0, 2.5, 3.0])
    interval = stats.ttest_1samp(gaps, 0).confidence_interval(0.95)
    assert found["difference"] == pytest.approx(gaps.mean()) and found["n"] == 3
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high))
    unpaired = stats.ttest_ind([83.0, 84.5, 84.0], [80.0, 82.0, 81.0]).confidence_interval(0.95)
    assert found["high"] - found["low"] < 0.9 * (unpaired.high - unpaired.low), "pairing must tell"
    level = report.paired(RUNS, [("mix-self", "self-aug")], level=0.5).iloc[0]
    assert level["high"] - level["low"] < found["high"] - found["low"]


def test_pairs_that_are_incomplete():
    lone = RUNS[~((RUNS["method"] == "self-aug") & (RUNS["seed"] == 2))]
    assert report.paired(lone, [("mix-self", "self-aug")]).iloc[0]["n"] == 2, "a seed without its twin is left out"
    one = report.paired(RUNS[RUNS["seed"] == 0], [("mix-self", "self-aug")]).iloc[0]
    assert one["difference"] == 3.0 and np.isnan(one["low"]), "one seed has no interval"
    assert len(report.paired(RUNS, [("mix-self", "mix-diff")])) == 0
    nothing = report.paired(RUNS, [])
    assert report.show_paired(nothing).empty
    assert report.agreement(nothing, gaps()).data == "There are no two methods here to compare."


def test_differences_are_shown_with_their_intervals():
    found = report.paired(
        pd.concat([RUNS, RUNS.assign(epsilon=2.0)]), [("mix-self", "self-aug"), ("self-aug", "mix-self")]
    )
    table = report.show_paired(found)
    low, high = found.iloc[0][["low", "high"]]
    assert table.loc[("tiny ViT", "DP-MixSelf − Self-Aug"), "ε = 1"] == f"+2.8 [{low:+.1f}, {high:+.1f}]"
    assert list(table.loc["tiny ViT"].index) == ["DP-MixSelf − Self-Aug", "Self-Aug − DP-MixSelf"] and table.shape == (
        2,
        2,
    )


def test_networks_that_differ_are_rows_and_an_epsilon_that_was_not_run_is_a_dash():
    table = paper.table(3)
    published = table[table["dataset"] == "cifar10"]
    both = report.side_by_side(published, report.summary(RUNS, ["model", "method", "epsilon"]))
    assert list(both.columns) == ["ε = 1", "ε = 2", "ε = 4", "ε = 8"]
    assert both.loc[("measured here", "tiny ViT", "DP-MixSelf"), "ε = 1"] == "83.8 (0.8)"
    assert set(both.loc["measured here"].loc["tiny ViT"]["ε = 8"]) == {"–"} and ("published", "ConvNeXt") in both.index


def gaps(*values: float) -> pd.DataFrame:
    return pd.DataFrame({"better": "mix-self", "worse": "self-aug", "difference": values})


def differences(*intervals: tuple[float, float]) -> pd.DataFrame:
    low, high = np.array(intervals).T
    return pd.DataFrame(
        {"better": "mix-self", "worse": "self-aug", "difference": (low + high) / 2, "low": low, "high": high}
    )


@pytest.mark.parametrize(("measured", "published", "verdict"), [
    ([(1, 2), (-1, 3)], [1.0, 2.0], r"Where the runs decide \(1 of 2\), they \*\*agree\*\*"),
    ([(-2, -1), (-3, 1)], [1.0, 2.0], r"\*\*not agree\*\*"),
    ([(-2, -1), (-3, 1)], [-1.0, -2.0], r"they \*\*agree\*\*"),
    ([(-1, 1), (-3, 1)], [1.0], r"\*\*do not decide\*\*"),
    ([(1, 2), (-3, -1)], [1.0], r"The cells \*\*disagree\*\* with each other"),
    ([(1, 2)], [], "The paper has no such comparison"),
    ([(np.nan, np.nan)], [1.0], r"\*\*do not decide\*\*"),
])  # fmt: skip
def test_verdicts_follow_from_the_intervals(measured, published, verdict):
    import re

    text = report.agreement(differences(*measured), gaps(*published)).data
    assert re.search(verdict, text) and text.startswith("- **DP-MixSelf against Self-Aug.**")
    kinds = ["**agree**", "not agree", "do not decide", "**disagree**", "no such comparison"]
    assert sum(kind in text for kind in kinds) == 1
    if published:
        above = sum(p > 0 for p in published)
        assert f"ahead in {above} of {len(published)} cells, by {np.mean(published):+.1f} points" in text
    cells = "1 cell" if len(measured) == 1 else f"{len(measured)} cells"
    assert f"over {cells}; the interval lies above zero in {sum(low > 0 for low, _ in measured)}" in text


def test_published_gaps_are_differences_of_published_means():
    table = paper.table(3)
    one = table[(table["dataset"] == "cifar10") & (table["model"] == "vit-b-16")]
    found = report.published_gaps(one, [("mix-self", "self-aug"), ("mix-self", "unheard of")])
    wide = one.pivot(index="epsilon", columns="method", values="mean")
    assert sorted(found["difference"]) == pytest.approx(sorted(wide["mix-self"] - wide["self-aug"])) and len(found) == 4


def test_chosen_rates_are_in_units_of_one_over_c_and_ends_are_starred():
    chosen = pd.concat([RUNS, RUNS.assign(epsilon=2.0, learning_rate=160.0, clip_norm=0.05)])
    table = report.chosen_rates(chosen, [2.0, 4.0, 8.0])
    assert table.loc["Self-Aug"].tolist() == ["2 *", "8 *"]
    assert report.chosen_rates(chosen, [1.0, 2.0, 4.0, 8.0, 16.0]).loc["Self-Aug"].tolist() == ["2", "8"]


def full(runs: pd.DataFrame) -> pd.DataFrame:
    return runs.assign(delta=1e-5, accountant="rdp", sigma=1.23456, q=0.1, T=70, N=1150, batch_size=115, epsilon_rdp=0.9999,
                       epsilon_prv=0.9, epsilon_pld=0.89, seconds=12.34, views_per_second=23456.7, dataset="digits",
                       device="CPU, 2 threads", date="2030-01-02T03:04:05+00:00", versions="dpmix 1, torch 2")  # fmt: skip


def test_privacy_and_cost_tables():
    table = report.privacy_table(full(RUNS))
    assert len(table) == 1, "one row a budget"
    assert table.iloc[0].tolist() == ["1", "1e-05", "rdp", "1.235", "0.1000", 70, 1150, 115, "1.000", "0.900", "0.890"]
    without = report.privacy_table(full(RUNS).assign(epsilon=np.nan, sigma=0.0, epsilon_rdp=np.nan))
    assert without.iloc[0]["ε asked"] == "–" and without.iloc[0]["ε (RDP)"] == "–"
    cost = report.cost_table(full(RUNS))
    assert cost["runs of this table"].tolist() == [2, 2, 2] and set(cost["views/s"]) == {"23,457"}


def test_a_page_says_where_its_numbers_come_from():
    text = report.provenance_note(full(RUNS)).data
    for part in ("6 runs on digits", "seeds 0, 1, 2", "2030-01-02T03:04", "CPU, 2 threads", "dpmix 1, torch 2"):
        assert part in text


def test_the_plot_shows_the_means(monkeypatch):
    runs = pd.concat([RUNS, RUNS.assign(epsilon=8.0, accuracy=RUNS["accuracy"] + 5)])
    published = paper.table(3).query("dataset == 'cifar10'")
    before = plt.get_fignums()
    figure = plots.accuracy_plot(runs, published)
    assert plt.get_fignums() == before, "closed: a notebook shows it once, as a value"
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["ViT-B-16, published", "tiny ViT, measured here"]
    drawn = {tuple(line.get_ydata()) for line in figure.axes[1].get_lines() if len(line.get_ydata()) == 2}
    assert (81.0, 86.0) in drawn
    assert len(plots.accuracy_plot(runs).axes) == 1


def test_runs_without_noise_are_paired_too():
    runs = pd.DataFrame({"method": ["a", "b"] * 4, "seed": [0, 0, 1, 1] * 2, "model": "m", "accuracy": range(8),
                         "epsilon": [1.0] * 4 + [None] * 4})  # fmt: skip
    assert len(report.paired(runs, [("b", "a")])) == 2
