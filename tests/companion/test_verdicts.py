"""The rule of decision: made-up results of known truth get the verdicts that they deserve, and no others."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from dpmix.companion import verdicts
from dpmix.companion.verdicts import Comparison, Effect, compare, decide

DRAW = np.random.default_rng(11)


def frame(gap: float, *, seeds: int = 3, shared: float = 0.0, spread: float = 1.0, draw=DRAW) -> pd.DataFrame:
    """Accuracies of two methods in eight cells: `gap` between them, seeds with an effect of their own in every cell."""
    rows = []
    for model in ("vit", "conv"):
        for seed in range(seeds):
            own = {m: draw.normal() * shared for m in ("self-aug", "mix-self")}
            for epsilon in (1, 2, 4, 8):
                for m in own:
                    noise = own[m] + draw.normal() * (1 - shared**2) ** 0.5
                    level = 90 + (gap if m == "mix-self" else 0) + spread * noise
                    rows.append(dict(model=model, epsilon=epsilon, seed=seed, method=m, accuracy=level))
    return pd.DataFrame(rows)


def by_cells(runs: pd.DataFrame) -> bool:
    """The rule that this one replaces: an interval a cell, a verdict if any excludes zero. The negative control."""
    wide = runs.pivot(index=["model", "epsilon", "seed"], columns="method", values="accuracy")
    gaps = (wide["mix-self"] - wide["self-aug"]).groupby(level=[0, 1])
    half = stats.t.ppf(0.975, gaps.count() - 1) * gaps.std() / gaps.count() ** 0.5
    return bool((gaps.mean().abs() > half).any())


PAIR = [Comparison("mix-self", "self-aug", "above")]


@pytest.mark.parametrize("shared", [0.0, 0.9])
def test_nothing_gives_no_verdict_where_the_rule_by_cells_gives_one(shared):
    """300 pages without any difference: at most 5 % say that there is one (binomial: more than 27 once in 1,000)."""
    pages = [frame(0.0, shared=shared) for _ in range(300)]
    wrong = sum(compare(p, PAIR)["verdict"].iloc[0] in ("holds", "contradicted") for p in pages)
    assert wrong <= 27
    assert sum(map(by_cells, pages[:200])) > 40, "the control must fail: three in ten"


def many(truth, n: int, spread: float = 1.0, pages: int = 1000):
    """Verdicts of pages with a comparison for each true difference, n seeds."""
    for _ in range(pages):
        yield decide([Effect(DRAW.normal(t, spread, n), bound=1.0) for t in truth])["verdict"].tolist()


def test_a_page_of_six_without_a_difference_has_a_verdict_in_one_of_twenty():
    found = list(many([0.0] * 6, 5, spread=3.0))  # an interval far wider than the bound
    assert 20 <= sum(any(v in ("holds", "contradicted") for v in page) for page in found) <= 72  # 50 +- 3.1 deviations
    assert sum(any(v.startswith("no effect") for v in page) for page in found) <= 20
    without = sum(any(stats.ttest_1samp(DRAW.normal(0, 3, 5), 0).pvalue <= 0.05 for _ in range(6)) for _ in range(1000))
    assert without > 200, "without Holm: one page in four"


def test_an_effect_at_the_bound_is_not_called_none():
    """The edge of the null hypothesis of `no effect larger than x`, six comparisons, narrow intervals."""
    found = list(many([1.0] * 6, 10, spread=0.5))
    assert sum(any(v.startswith("no effect") for v in page) for page in found) <= 72
    naive = [abs(DRAW.normal(1.0, 0.5, (6, 10)).mean(axis=1)).min() < 1.0 for _ in range(200)]
    assert np.mean(naive) > 0.9, "the mean alone lies inside the bound in nearly every page"


@pytest.mark.parametrize(("truth", "word"), [(3.0, "holds"), (-3.0, "contradicted"), (0.0, "no effect larger than 1")])
def test_what_is_there_is_found(truth, word):
    """Power at ten seeds: at least 95 of 100 pages with six comparisons find all six."""
    found = list(many([truth] * 6, 10, spread=0.6, pages=200))
    assert np.mean([page == [word] * 6 for page in found]) >= 0.95


def test_the_pooled_difference_is_that_of_seeds():
    runs = frame(0.5, seeds=4)
    found = compare(runs, PAIR).iloc[0]
    wide = runs.pivot(index=["seed", "model", "epsilon"], columns="method", values="accuracy")
    gaps = (wide["mix-self"] - wide["self-aug"]).groupby("seed").mean()
    exact = stats.ttest_1samp(gaps, 0)
    assert found["difference"] == pytest.approx(gaps.mean()) and found["n"] == 4
    assert (found["low"], found["high"]) == pytest.approx(tuple(exact.confidence_interval(0.95)))
    assert found["p"] == pytest.approx(exact.pvalue)


def test_a_seed_without_all_cells_is_left_out():
    """Cells differ in level: a seed that has half of them would drag the mean along."""
    runs = frame(0.5, seeds=4)
    runs.loc[runs["epsilon"] == 8, "accuracy"] += np.where(runs["method"] == "mix-self", 50, 0)[runs["epsilon"] == 8]
    lacking = runs[~((runs["seed"] == 3) & (runs["epsilon"] == 8))]
    found, whole = compare(lacking, PAIR).iloc[0], compare(runs[runs["seed"] < 3], PAIR).iloc[0]
    assert found["n"] == 3 and found["difference"] == pytest.approx(whole["difference"])
    assert len(compare(runs, [Comparison("mix-self", "mix-diff")])) == 0
    assert compare(runs[runs["seed"] == 0], PAIR).iloc[0]["verdict"] == verdicts.UNDECIDED


def test_holm_is_holm():
    assert verdicts.holm(np.array([0.04, 0.01, 0.03])) == pytest.approx([0.06, 0.03, 0.06])
    assert verdicts.holm(np.array([])).tolist() == [] and verdicts.holm(np.array([0.9, 0.8])).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ([0.1, 0.2, 0.15], "holds"),
        ([-3.0, -3.1, -3.2], "holds"),
        ([2.0, 2.1, 2.2], "contradicted"),
        ([0, 1, 2], "undecided"),
    ],
)
def test_a_claim_of_no_gain_can_fail(values, word):
    assert decide([Effect(values, bound=1.0, no_gain=True)])["verdict"].tolist() == [word]


def test_what_was_published_sets_sign_and_bound():
    published = pd.DataFrame({"method": ["self-aug", "mix-self"], "model": "m", "epsilon": 1, "mean": [80.0, 78.0]})
    runs = frame(-3.0, seeds=10, spread=0.2)
    found = compare(runs, [Comparison("mix-self", "self-aug")], published).iloc[0]
    assert (found["published"], found["bound"], found["verdict"]) == (-2.0, 1.0, "holds")
    turned = compare(runs, [Comparison("mix-self", "self-aug")], published.assign(mean=[78.0, 80.0])).iloc[0]
    assert turned["verdict"] == "contradicted"
    new = compare(runs, [Comparison("mix-self", "self-aug")]).iloc[0]
    assert new["verdict"] == "lower" and new["bound"] == 0.5
    small = compare(frame(-0.3, seeds=10, spread=0.1), [Comparison("mix-self", "self-aug")], published).iloc[0]
    assert small["verdict"] == "no effect larger than 1", "differs from zero, and is far from what was published"


def test_ratios_are_those_of_logarithms():
    rows = [
        dict(method=m, seed=s, set="a", fid=v * (1 + 0.01 * s)) for m, v in (("a", 2.0), ("b", 1.0)) for s in range(3)
    ]
    rows[0]["fid"] *= 1.01
    found = compare(pd.DataFrame(rows), [Comparison("a", "b", "above")], cells=("set",), value="fid", ratio=True)
    assert np.exp(found["difference"].iloc[0]) == pytest.approx(2 * 1.01 ** (1 / 3))
    assert verdicts.show(found).loc["a ÷ b", "measured"].startswith("2.01 [") and found["verdict"].iloc[0] == "holds"


def test_the_error_of_the_test_images_is_in_the_interval():
    """Two heads that differ on few images, the same for all seeds: the seeds agree, other images would not."""
    rows, draw = [], np.random.default_rng(5)
    base = draw.random(400) < 0.8
    better = base | (draw.random(400) < 0.05)
    for seed in range(5):
        for method, right in (("self-aug", base), ("mix-self", better)):
            flipped = right ^ (draw.random(400) < 0.002)
            rows.append(
                dict(
                    dataset="d",
                    method=method,
                    seed=seed,
                    model="m",
                    epsilon=1,
                    accuracy=100 * flipped.mean(),
                    right=flipped,
                )
            )
    runs = pd.DataFrame(rows)
    found, blind = compare(runs, PAIR).iloc[0], compare(runs.drop(columns="right"), PAIR).iloc[0]
    gap = better.astype(float) - base
    assert found["images"] == pytest.approx(100 * gap.std(ddof=1) / 20, rel=0.2)
    assert found["high"] - found["low"] > 2 * (blind["high"] - blind["low"]) and np.isnan(blind["images"])
    assert found["difference"] == blind["difference"]


def test_a_table_for_reading():
    table = verdicts.show(compare(frame(3.0, seeds=5), PAIR))
    assert table.index.tolist() == ["DP-MixSelf − Self-Aug"] and table["verdict"].tolist() == ["holds"]
    assert verdicts.show(compare(frame(3.0), [])).empty


def test_only_cells_that_have_both_methods_count():
    """Their test images and their published rows, too; two methods that never meet are not compared."""
    right = [np.array([True] * 40 + [False] * 60), np.array([True] * 50 + [False] * 50)]
    rows = [
        ("a", m, e, seed, 40.0 + 10 * i, right[i])
        for i, m in enumerate(("x", "y"))
        for e in (1, 8)
        for seed in range(3)
    ]
    rows += [("b", "x", 1, seed, 90.0, right[0]) for seed in range(3)]
    runs = pd.DataFrame(rows, columns=["dataset", "method", "epsilon", "seed", "accuracy", "right"])
    said = pd.DataFrame({"dataset": list("aabb"), "method": ["x", "y"] * 2, "mean": [1.0, 3.0, 0.0, 100.0]})
    c, cells = verdicts.Comparison("y", "x"), ("dataset", "epsilon")
    row, effect = verdicts.measure(runs, c, said[:2], cells=cells)
    assert len(effect.values) == 3 and effect.values[0] == 10 and effect.images > 0 and row["published"] == 2
    (found,) = verdicts.compare(runs, [c], said, cells=("epsilon",)).to_dict("records")
    assert found["place"] == ("a",) and found["published"] == 2
    apart = runs[(runs["method"] == "x") == (runs["epsilon"] == 1)]
    assert verdicts.measure(apart, c, said, cells=cells)[1] is None
