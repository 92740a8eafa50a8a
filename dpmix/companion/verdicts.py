"""One rule of decision for the whole book.

A comparison is one difference, and one test. The difference between two methods is averaged over the cells of a table
(encoders, budgets) within a seed, on the same draws; Student's t over the seeds gives its interval. All comparisons of a
page are one family: Holm's correction keeps the chance of a false *holds* or *contradicted* at 5 % a page, and that of a
false *no effect* likewise. What counts as an effect is stated before the runs: half of what the paper found, and at least
`SMALLEST`.

Seeds share their test images, so the spread over seeds does not hold the error of those images. Where it is known which
images each run got right (column `right`), the interval holds it: the variance of the image's mean difference over the
number of images is added, with Satterthwaite's degrees of freedom. Where it is not known, `show` says so.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from dpmix.companion.report import label

LEVEL = 0.05
SMALLEST = 0.25  # percentage points below which no difference in accuracy is called an effect
SMALLEST_RATIO = 0.05  # and what a ratio must differ from 1

HOLDS, CONTRADICTED, UNDECIDED = "holds", "contradicted", "undecided"


class Comparison(NamedTuple):
    """`first` less `second`. `claim`: "published" (the sign of the published difference), "above" (a positive one), or
    "no gain" (at most `bound`). `bound` is the least difference that counts; None takes that of `bound_of`."""

    first: str
    second: str
    claim: str = "published"
    bound: float | None = None


class Effect(NamedTuple):
    """A comparison as it was measured: a difference a seed, and the standard error that the test images add.

    `expected` is the sign that is claimed: +1, -1, or 0 for a comparison that nobody has made before; with `no_gain` the
    claim is that the difference is at most `bound`.
    """

    values: Sequence[float]
    bound: float
    expected: float = 1.0
    no_gain: bool = False
    images: float = 0.0


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's adjusted p-values (1979): reject those at most the level, and the family-wise error is at most the level."""
    order = np.argsort(p)
    steps = np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order])
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(steps, 1)
    return adjusted


def decide(effects: Sequence[Effect], level: float = LEVEL) -> pd.DataFrame:
    """A verdict for each comparison of one family: `difference`, `low`, `high`, `n`, `p`, `p_none`, `verdict`.

    `low` and `high` bound one difference with confidence 1 - `level`, without correction; `p` (of no difference, or of
    one of exactly `bound` where no gain is claimed) and `p_none` (of a difference of `bound` or more; two one-sided
    tests) are Holm's. An effect whose interval lies inside the bound is *no effect larger than* it, also where it differs
    from zero. One seed decides nothing, nor do seeds without any spread in favour of a difference.
    """
    rows, raw = [], np.ones((len(effects), 2))
    for i, e in enumerate(effects):
        values = np.asarray(e.values, dtype=float)
        n, mean = len(values), float(np.mean(values)) if len(values) else np.nan
        low = high = np.nan
        if n > 1:
            parts = np.array([values.var(ddof=1) / n, e.images**2])
            error = float(np.sqrt(parts.sum()))
            if error > 0:
                # the images are many: their part has no small number of degrees of freedom of its own
                free = parts.sum() ** 2 / (parts[0] ** 2 / (n - 1)) if parts[0] > 0 else np.inf
                half = float(stats.t.ppf(1 - level / 2, free)) * error
                low, high = mean - half, mean + half
                off = mean - (e.bound if e.no_gain else 0.0)
                raw[i] = stats.t.sf([abs(off) / error, (e.bound - abs(mean)) / error], free) * (2, 1)
            else:
                low = high = mean
                raw[i, 1] = float(abs(mean) >= e.bound)
        rows.append({"difference": mean, "low": low, "high": high, "n": n})
    found = pd.DataFrame(rows, columns=["difference", "low", "high", "n"])
    found["p"], found["p_none"] = holm(raw[:, 0]), holm(raw[:, 1])
    each = zip(effects, *(found[c] for c in ("difference", "p", "p_none")), strict=True)
    found["verdict"] = [_word(e, mean, p <= level, none <= level) for e, mean, p, none in each]
    return found


def _word(e: Effect, mean: float, differs: bool, none: bool) -> str:
    if e.no_gain:
        return (HOLDS if mean < e.bound else CONTRADICTED) if differs else UNDECIDED
    if none:
        return f"no effect larger than {e.bound:.2g}"
    if not differs:
        return UNDECIDED
    if e.expected == 0:
        return "higher" if mean > 0 else "lower"
    return HOLDS if mean * e.expected > 0 else CONTRADICTED


def bound_of(published: float, smallest: float) -> float:
    """What counts as an effect: half of the published one, and at least `smallest`; twice that where none is published."""
    return 2 * smallest if np.isnan(published) else max(smallest, abs(published) / 2)


def per_seed(runs: pd.DataFrame, first: str, second: str, cells: Sequence[str], value: str) -> tuple[np.ndarray, float]:
    """The difference of each seed, averaged over the cells that any seed has (a seed without all of them is left out), and
    the standard error from the test images (nan where the runs do not say which they got right)."""
    here = runs[runs["method"].isin([first, second])].drop_duplicates([*cells, "seed", "method"])
    wide = here.assign(cell=here.groupby(list(cells), dropna=False).ngroup()).pivot(
        index="seed", columns=["method", "cell"], values=value
    )
    if not {first, second} <= set(wide.columns.get_level_values(0)):
        return np.empty(0), np.nan
    gaps = (wide[first] - wide[second]).dropna(axis=1, how="all").dropna()
    return gaps.mean(axis=1).to_numpy(), _of_images(here, first, second)


def _of_images(here: pd.DataFrame, first: str, second: str) -> float:
    """The standard error, in points, of a mean difference over test images, each taken over all runs of both methods."""
    if "right" not in here or here["right"].isna().any():
        return np.nan
    variance, runs = 0.0, len(here)
    for _, part in here.groupby("dataset", sort=False):  # test sets of their own
        means = [100 * np.mean(list(part.loc[part["method"] == m, "right"]), axis=0) for m in (first, second)]
        gap = means[0] - means[1]
        variance += (len(part) / runs) ** 2 * gap.var(ddof=1) / len(gap)
    return float(np.sqrt(variance))


def published_gap(published: pd.DataFrame | None, first: str, second: str, ratio: bool = False) -> float:
    """The mean published difference over the cells that have both methods; nan where there are none."""
    if published is None or not {first, second} <= set(published["method"]):
        return np.nan
    known = [c for c in ("dataset", "model", "epsilon", "reference", "set") if c in published]
    wide = published.pivot_table(index=known or None, columns="method", values="mean", dropna=False)
    wide = np.log(wide) if ratio else wide
    return float((wide[first] - wide[second]).mean())


def compare(
    runs: pd.DataFrame,
    comparisons: Sequence[Comparison],
    published: pd.DataFrame | None = None,
    *,
    cells: Sequence[str] = ("model", "epsilon"),
    value: str = "accuracy",
    ratio: bool = False,
    level: float = LEVEL,
) -> pd.DataFrame:
    """The comparisons of a page, as one family: a row each with `published`, what `decide` finds, and the verdict.

    `runs` has a row a run with `method`, `seed`, `cells` and `value`; a comparison is averaged over all cells. With `ratio`
    differences are those of logarithms, so that `np.exp` of them is a ratio.
    """
    measured = runs.assign(**{value: np.log(runs[value])}) if ratio else runs
    smallest = np.log1p(SMALLEST_RATIO) if ratio else SMALLEST
    rows, effects = [], []
    for c in comparisons:
        values, images = per_seed(measured, c.first, c.second, cells, value)
        if not len(values):
            continue
        said = published_gap(published, c.first, c.second, ratio)
        bound = (2 * smallest if c.claim == "no gain" else bound_of(said, smallest)) if c.bound is None else c.bound
        expected = {"above": 1.0, "no gain": 1.0}.get(c.claim, 0.0 if np.isnan(said) else float(np.sign(said)))
        effects.append(
            Effect(values.tolist(), bound, expected, c.claim == "no gain", 0.0 if np.isnan(images) else images)
        )
        rows.append({"first": c.first, "second": c.second, "claim": c.claim, "published": said, "bound": bound,
                     "images": images, "ratio": ratio})  # fmt: skip
    columns = ["first", "second", "claim", "published", "bound", "images", "ratio"]
    return pd.concat([pd.DataFrame(rows, columns=columns), decide(effects, level)], axis=1)


def _number(x: float, ratio: bool) -> str:
    return "–" if np.isnan(x) else f"{np.exp(x):.2f}" if ratio else f"{x:+.1f}"


def show(found: pd.DataFrame) -> pd.DataFrame:
    """`compare` for reading, a row a comparison: published, measured with its interval, verdict."""
    rows = {}
    for r in found.itertuples():
        name = f"{label(r.first)} {'÷' if r.ratio else '−'} {label(r.second)}"
        low, high = _number(r.low, r.ratio), _number(r.high, r.ratio)
        rows[name] = {
            "published": _number(r.published, r.ratio),
            "measured": f"{_number(r.difference, r.ratio)} [{low}, {high}]",
            "verdict": r.verdict + (f" (at most {r.bound:.2g} claimed)" if r.claim == "no gain" else ""),
        }
    return pd.DataFrame.from_dict(rows, orient="index", columns=["published", "measured", "verdict"])
