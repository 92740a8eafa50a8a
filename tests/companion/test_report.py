"""What pages show: every number is the right one, and the verdicts follow from the numbers."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from dpmix.companion import evidence, paper, plots, report


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
    both = pd.concat([RUNS, runs_of({"self-aug": [90.0]}, epsilon=2.0)])
    block = report.block(report.summary(both, ["method", "epsilon"]), ["method"], ["epsilon"])
    assert list(block.index) == ["Self-Aug", "DP-MixSelf"] and list(block.columns) == ["ε = 1", "ε = 2"]
    assert block.to_numpy().tolist() == [["81.0 (1.0)", "90.0"], ["83.8 (0.8)", "–"]]


def test_published_then_real_data_then_what_was_made_now():
    real = RUNS.assign(dataset="caltech101", model="efficientnet-lite0")
    s = report.Sources(paper.table(3), real, RUNS.assign(dataset="digits"))
    shown = report.tables(s)
    captions = [c for c, _ in shown]
    assert captions == [
        "Published, CIFAR-10, ViT-B-16",
        "Published, CIFAR-10, ConvNeXt",
        "Published, Caltech-256, ViT-B-16",
        "Published, Caltech-256, ConvNeXt",
        "Real data, Caltech-101, EfficientNet-Lite0, n = 3",
        "Made now, demo scale, digits, tiny ViT, n = 3",
    ]
    assert list(shown[0][1].columns) == ["ε = 1"], "the budgets that were run, and no others"
    cell = paper.table(3).query(
        "dataset == 'cifar10' and model == 'vit-b-16' and method == 'mix-self' and epsilon == 1"
    )
    assert shown[0][1].loc["DP-MixSelf", "ε = 1"] == report.spread(cell["mean"].iloc[0], cell["std"].iloc[0])
    assert shown[-1][1].loc["DP-MixSelf", "ε = 1"] == "83.8 (0.8)"
    page = shown._repr_html_()
    assert (
        page.count("<table") == 6 and page.index("Caltech-101") < page.index("Made now") and "DP-MixSelf" in repr(shown)
    )
    alone = report.tables(s._replace(real=RUNS.iloc[:0]))
    assert [c.split(",")[0] for c, _ in alone] == ["Published", "Published", "Made now"]
    other = paper.table(3).query("dataset == 'caltech256'")
    elsewhere = report.tables(report.Sources(other, RUNS.assign(dataset="cifar10"), RUNS.assign(dataset="digits")))
    assert [c.split(",")[0] for c, _ in elsewhere] == ["Published", "Published", "Real data", "Made now"]


def test_chosen_rates_are_in_units_of_one_over_c_and_ends_are_starred():
    chosen = pd.concat([RUNS, RUNS.assign(epsilon=2.0, learning_rate=160.0, clip_norm=0.05)]).assign(dataset="digits")
    chosen["edge"] = chosen["epsilon"] == 2
    free = chosen.assign(clip_norm=1e9, learning_rate=3.0, edge=False, dataset="cifar10")  # nothing is clipped
    (_, real), (caption, table) = report.chosen_rates(report.Sources(chosen, free, chosen))
    assert caption == "Made now, demo scale: digits, tiny ViT" and table.loc["Self-Aug"].tolist() == ["2", "8 *"]
    assert set(real.loc["Self-Aug"]) == {"3"}


def test_an_end_of_the_rates_that_were_tried_is_marked():
    rows = [(m, r, sign * r) for m, sign in (("low", -1), ("high", 1)) for r in (1.0, 2.0, 4.0)]
    rows += [("middle", r, v) for r, v in ((1.0, 1), (2.0, 3), (4.0, 2))] + [("two", 1.0, 1), ("two", 2.0, 2)]
    runs = pd.DataFrame(rows, columns=["method", "learning_rate", "validation_accuracy"]).assign(validation=0.1, seed=0)
    found = evidence.choose(runs, ["method"]).set_index("method")
    assert found["learning_rate"].to_dict() == {"low": 1.0, "high": 4.0, "middle": 2.0, "two": 2.0}
    assert found["edge"].to_dict() == {"low": True, "high": True, "middle": False, "two": False}


def test_published_rows_stand_beside_runs_of_their_kind():
    table3, table5 = paper.table(3), paper.table(5)
    runs = pd.DataFrame({"dataset": ["caltech101"], "model": ["efficientnet-lite0"], "epsilon": [2.0]})
    found = report.beside(table3, runs)
    assert set(found["dataset"]) == {"caltech256"} and set(found["epsilon"]) == {2} and found["model"].nunique() == 2
    assert set(report.beside(table3, runs.assign(model="tiny-vit"))["model"]) == {"vit-b-16"}
    for model, kind in (("efficientnet-lite0", False), ("wrn-10-2", True)):
        assert set(report.beside(table5, runs.assign(model=model))["model"].str.startswith("wrn")) == {kind}
    assert len(report.beside(table3, runs.assign(dataset="malaria", epsilon=3.0))) == len(table3), (
        "the paper has neither"
    )
    assert report.beside(table3.assign(framework="JAX"), runs.assign(framework="PyTorch"), ["framework"]).empty


def full(runs: pd.DataFrame) -> pd.DataFrame:
    return runs.assign(delta=1e-5, accountant="rdp", sigma=1.23456, q=0.1, T=70, N=1150, batch_size=115, epsilon_rdp=0.9999,
                       epsilon_prv=0.9, epsilon_pld=0.89, seconds=12.34, views_per_second=23456.7, dataset="digits",
                       device="CPU, 2 threads", date="2030-01-02T03:04:05+00:00", versions="dpmix 1, torch 2")  # fmt: skip


def test_privacy_and_cost_tables():
    table = report.privacy_table(full(RUNS))
    assert table.shape[1] == 1, "one column a budget"
    assert table.iloc[:, 0].tolist() == [
        "1",
        "1e-05",
        "rdp",
        "1.235",
        "0.1000",
        "70",
        "1150",
        "115",
        "1.000",
        "0.900",
        "0.890",
    ]
    without = report.privacy_table(full(RUNS).assign(epsilon=np.nan, sigma=0.0, epsilon_rdp=np.nan))
    assert without.loc["ε asked"].tolist() == ["–"] and without.loc["ε (RDP)"].tolist() == ["–"]
    cost = report.cost_table(full(RUNS)).loc["tiny ViT"]
    assert cost.tolist() == [3, 6, "12.3", "23,457"]


def test_a_page_says_where_its_numbers_come_from():
    text = report.provenance_note(full(RUNS)).data
    for part in ("6 runs on digits", "seeds 0, 1, 2", "2030-01-02T03:04", "CPU, 2 threads", "dpmix 1, torch 2"):
        assert part in text
    once = full(RUNS).assign(date="2030-01-02T03:04:05")
    assert "computed at 2030-01-02T03:04 UTC" in report.provenance_note(once).data
    later = once.assign(date=["2030-01-02T03:05:05", *once["date"][1:]])
    assert "between 2030-01-02T03:04 and 2030-01-02T03:05 UTC" in report.provenance_note(later).data
    assert "1 distance on digits, seed 0, " in report.provenance_note(once[:1], noun="distance").data


def test_captions_do_not_meet():
    """Of pictures side by side and of those below; nothing of a caption is lost."""
    words = ["Parasitized (100 %)\ntrue: Parasitized", "gerenuk in the savanna (97 %)\ntrue: Gliriscactus-of-1923"] * 4
    figure = plots.picture_rows([("Names", torch.zeros(8, 3, 4, 4), words)], columns=4)
    figure.canvas.draw()
    captions = [ax.texts[0] for ax in figure.axes]
    assert ["".join(c.get_text().split()) for c in captions] == ["".join(w.split()) for w in words]
    boxes = [c.get_window_extent() for c in captions] + [ax.get_window_extent() for ax in figure.axes]
    assert not [
        (a, b) for a, b in itertools.combinations(boxes, 2) if a.shrunk(0.98, 0.95).overlaps(b.shrunk(0.98, 0.95))
    ]


def test_the_plots_show_the_means():
    runs = pd.concat([RUNS, RUNS.assign(epsilon=8.0, accuracy=RUNS["accuracy"] + 5)]).assign(dataset="digits")
    before = plt.get_fignums()
    s = report.Sources(paper.table(3), runs.iloc[:0], runs)
    figure = plots.accuracy_plot(s)
    assert plt.get_fignums() == before, "closed: a notebook shows it once, as a value"
    titles = [ax.get_title() for ax in figure.axes[:3]]
    assert titles == [
        "CIFAR-10, ViT-B-16\npublished",
        "CIFAR-10, ConvNeXt\npublished",
        "digits, tiny ViT\nmade now, demo scale",
    ]
    drawn = {tuple(line.get_ydata()) for line in figure.axes[2].get_lines() if len(line.get_ydata()) == 2}
    assert (81.0, 86.0) in drawn
    points = plots.point_plot(s._replace(made=runs[runs["epsilon"] == 1.0]))
    assert {tuple(line.get_xdata()) for line in points.axes[2].get_lines()} >= {(81.0,)}


def test_a_key_with_a_clip_norm_is_put_together():
    assert report.label("self-aug@0.05") == "Self-Aug, C = 0.05"
