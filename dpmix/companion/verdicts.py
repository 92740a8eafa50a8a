"""One rule of decision for the whole book.

A comparison is one difference, and one test. The difference between two methods is averaged over the cells of a table
(encoders, budgets) within a seed, on the same draws; Student's t over the seeds gives its interval. All comparisons of a
page are one family: Holm's correction keeps the chance of a false *holds* or *contradicted* at 5 % a page, and that of a
false *no effect* likewise. What counts as an effect is stated before the runs: half of what the paper found, but at least
a quarter of a point of accuracy (5 % of a ratio) and at most one point (10 %).

Seeds share their test images, so the spread over seeds does not hold the error of those images. Where it is known which
images each run got right (column `right`), the interval holds it: the variance of the image's mean difference over the
number of images is added, with Satterthwaite's degrees of freedom. Where it is not known, `show` says so."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from dpmix.companion.report import Sources, Tables, beside, entry, label
from dpmix.core.checks import counted

LEVEL = 0.05
POINTS = (0.25, 1.0)  # the least and the largest bound in percentage points
RATIO = (float(np.log(1.05)), float(np.log(1.1)))  # the same of the logarithm of a ratio
PLACES = ("dataset", "model", "epsilon", "reference")  # what tells the published numbers of a method apart

HOLDS, CONTRADICTED, UNDECIDED = "holds", "contradicted", "undecided"


class Comparison(NamedTuple):
    """`first` less `second`. `claim`: "published" (the sign of the published difference), "above" (a positive one), or
    "no gain" (at most `bound`). `bound` is the least difference that counts; None takes that of `bound_of`. `only` names
    the data sets that it is made on, if not all."""

    first: str
    second: str
    claim: str = "published"
    bound: float | None = None
    only: tuple[str, ...] = ()


class Effect(NamedTuple):
    """A comparison as it was measured: a difference a seed, and the standard error that the test images add. `expected` is
    the sign that is claimed: +1, -1, or 0 for a comparison that nobody has made before; with `no_gain` the claim is that the
    difference is at most `bound`."""

    values: Sequence[float]
    bound: float
    expected: float = 1.0
    no_gain: bool = False
    images: float = 0.0
    ratio: bool = False


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's adjusted p-values (1979): reject those at most the level, and the family-wise error is at most the level."""
    order = np.argsort(p)
    steps = np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order])
    return np.minimum(steps, 1)[np.argsort(order)]


def decide(effects: Sequence[Effect], level: float = LEVEL) -> pd.DataFrame:
    """A verdict for each comparison of one family: `difference`, `low`, `high`, `n`, `p`, `p_none`, `verdict`.

    `low` and `high` bound one difference with confidence 1 - `level`, without correction; `p` (of no difference, or of
    one of exactly `bound` where no gain is claimed) and `p_none` (of a difference of `bound` or more; two one-sided
    tests) are Holm's. An effect whose interval lies inside the bound is *no effect larger than* it, also where it differs
    from zero. One seed decides nothing, nor do seeds without any spread in favour of a difference."""
    rows, raw = [], np.ones((len(effects), 2))
    for i, e in enumerate(effects):
        values = np.asarray(e.values, dtype=float)
        n, mean = len(values), float(np.mean(values)) if len(values) else np.nan
        half = np.nan
        if n > 1:
            seeds, images = values.var(ddof=1) / n, e.images**2
            error = half = float(np.sqrt(seeds + images))
            if error > 0:
                # the images are many: their part has no small number of degrees of freedom of its own
                free = (seeds + images) ** 2 / (seeds**2 / (n - 1)) if seeds > 0 else np.inf
                half = float(stats.t.ppf(1 - level / 2, free)) * error
                off = mean - (e.bound if e.no_gain else 0.0)
                raw[i] = stats.t.sf([abs(off) / error, (e.bound - abs(mean)) / error], free) * (2, 1)
            else:
                raw[i, 1] = float(abs(mean) >= e.bound)
        rows.append((mean, mean - half, mean + half, n))
    found = pd.DataFrame(rows, columns=["difference", "low", "high", "n"])
    found["p"], found["p_none"] = holm(raw[:, 0]), holm(raw[:, 1])
    each = zip(effects, *(found[c] for c in ("difference", "p", "p_none")), strict=True)
    found["verdict"] = [_word(e, mean, p <= level, none <= level) for e, mean, p, none in each]
    return found


def _word(e: Effect, mean: float, differs: bool, none: bool) -> str:
    if e.no_gain:
        return (HOLDS if mean < e.bound else CONTRADICTED) if differs else UNDECIDED
    if none:
        return f"no effect larger than {f'{np.expm1(e.bound):.0%}' if e.ratio else f'{e.bound:.2g}'}"
    if not differs:
        return UNDECIDED
    if e.expected == 0:
        return "higher" if mean > 0 else "lower"
    return HOLDS if mean * e.expected > 0 else CONTRADICTED


def bound_of(c: Comparison, published: float, ratio: bool = False) -> float:
    """What counts as an effect, before any run: half of the published one, within `POINTS` or `RATIO`; half a point or 5 %
    where none is published or no gain is claimed."""
    least, most = RATIO if ratio else POINTS
    if c.bound is not None:
        return c.bound
    if c.claim == "no gain" or np.isnan(published):
        return least if ratio else 2 * least
    return float(np.clip(abs(published) / 2, least, most))


def shared(runs: pd.DataFrame, c: Comparison, cells: Sequence[str]) -> pd.DataFrame:
    """The rows of the two methods, of cells that have both."""
    here = runs[runs["method"].isin(c[:2])]
    known = [k for k in cells if k in here]
    if here.empty or not known:
        return here
    return here[here.groupby(known, dropna=False)["method"].transform("nunique") == 2]


def per_seed(here: pd.DataFrame, c: Comparison, cells: Sequence[str], value: str, ratio: bool) -> pd.Series:
    """The difference of each seed, averaged over the cells that any seed has (a seed without all of them is left out), of
    rows of the two methods."""
    cells = [k for k in cells if k in here]
    here = here.drop_duplicates([*cells, "seed", "method"])
    cell = here.groupby(cells, dropna=False).ngroup() if cells else 0
    wide = here.assign(cell=cell).pivot(index="seed", columns=["method", "cell"], values=value)
    wide = np.log(wide) if ratio else wide
    return (wide[c.first] - wide[c.second]).dropna(axis=1, how="all").dropna().mean(axis=1)


def _of_images(here: pd.DataFrame, c: Comparison) -> float:
    """The standard error, in points, of a mean difference over test images, each taken over all runs of both methods; nan
    where the runs do not say which they got right."""
    if "right" not in here or here["right"].isna().any():
        return np.nan
    variance = 0.0
    for _, part in here.groupby("dataset", sort=False):  # test sets of their own
        first, second = (100 * np.mean(list(part.loc[part["method"] == m, "right"]), axis=0) for m in c[:2])
        variance += (len(part) / len(here)) ** 2 * (first - second).var(ddof=1) / len(first)
    return float(np.sqrt(variance))


def measure(
    runs: pd.DataFrame,
    c: Comparison,
    published: pd.DataFrame | None,
    *,
    cells: Sequence[str],
    per: Sequence[str] = (),
    value: str = "accuracy",
    ratio: bool = False,
) -> tuple[dict[str, Any], Effect | None]:
    """One comparison: what was published beside these runs and what bound that sets, and the effect; None where no cell has
    both methods."""
    here = shared(runs, c, cells)
    theirs = runs[:0] if published is None else beside(published, here, per) if len(here) else published
    theirs = shared(theirs, c, PLACES)
    said = np.nan
    if theirs["method"].nunique() == 2:
        said = float(per_seed(theirs.assign(seed=0), c, PLACES, "mean", ratio).mean())
    bound = bound_of(c, said, ratio)
    row = {"first": c.first, "second": c.second, "claim": c.claim, "published": said, "bound": bound, "ratio": ratio}
    values = per_seed(here, c, cells, value, ratio) if here["method"].nunique() == 2 else pd.Series(dtype=float)
    if values.empty:
        return row | {"images": np.nan}, None
    images = np.nan if ratio else _of_images(here[here["seed"].isin(values.index)], c)
    expected = {"above": 1.0, "no gain": 1.0}.get(c.claim, 0.0 if np.isnan(said) else float(np.sign(said)))
    effect = Effect(values.tolist(), bound, expected, c.claim == "no gain")
    return row | {"images": images}, effect._replace(images=0.0 if np.isnan(images) else images, ratio=ratio)


def compare(
    runs: pd.DataFrame,
    comparisons: Sequence[Comparison],
    published: pd.DataFrame | None = None,
    *,
    cells: Sequence[str] = ("model", "epsilon"),
    per: Sequence[str] = ("dataset",),
    value: str = "accuracy",
    ratio: bool = False,
) -> pd.DataFrame:
    """The comparisons of a page, for each value of `per`, as one family: a row each with `published`, what `decide` finds,
    and the verdict. `runs` has a row a run with `method`, `seed`, `cells` and `value`, and `per` where there are several; a
    comparison is averaged over all cells. With `ratio` differences are those of logarithms: `np.exp` of them is a ratio."""
    rows, effects = [], []
    per = [c for c in per if c in runs]
    for names, part in runs.groupby(per, sort=False) if per else [((), runs)]:
        place = dict(zip(per, names, strict=True))
        for c in comparisons:
            row, effect = measure(part, c, published, cells=cells, per=per, value=value, ratio=ratio)
            if effect is not None and (not c.only or place.get("dataset") in c.only):
                rows.append({"place": tuple(place.values()), **row})
                effects.append(effect)
    columns = ["place", "first", "second", "claim", "published", "bound", "ratio", "images"]
    found = pd.concat([pd.DataFrame(rows, columns=columns), decide(effects)], axis=1)
    found.attrs["per"] = per
    return found


def number(x: float, ratio: bool) -> str:
    """A difference in points, or the ratio of which it is the logarithm."""
    return "–" if pd.isna(x) else f"{np.exp(x):.2f}" if ratio else f"{x:+.1f}"


def show(found: pd.DataFrame) -> pd.DataFrame:
    """`compare` for reading, a row a comparison: published, measured with its interval, verdict."""
    rows, varied = {}, [i for i, v in enumerate(zip(*found["place"], strict=True)) if len(set(v)) > 1]
    for r in found.itertuples():
        said, got, low, high, bound = (number(x, r.ratio) for x in (r.published, r.difference, r.low, r.high, r.bound))
        claimed = f" (claimed: at most {bound})" if r.claim == "no gain" else ""
        place = "".join(f"{entry(found.attrs['per'][i], r.place[i])}: " for i in varied)
        name = f"{place}{label(r.first)} {'÷' if r.ratio else '−'} {label(r.second)}"
        rows[name] = said, f"{got} [{low}, {high}]", r.verdict + claimed
    return pd.DataFrame.from_dict(rows, orient="index", columns=["published", "measured", "verdict"])


def page(s: Sources, comparisons: Sequence[Comparison], **how: Any) -> Tables:
    """The verdicts of a page: of the real data, and of what was made now. `how` goes to `compare`."""
    found = Tables()
    published = s.twins().published
    for source, runs in s.runs().items():
        table = compare(runs, comparisons, published, **how)
        if len(table):
            low, high = int(table["n"].min()), int(table["n"].max())
            seeds = f"{low} to " * (low < high) + counted(high, "seed")
            no, share = ("not ", ", which seeds share") if table["images"].isna().any() else ("", "")
            what = f"{source}, {seeds}, family of {len(table)}; 95 % intervals hold the error of seeds, and {no}"
            what += f"of the test images{share}"
            if table["ratio"].all():
                what = f"{source}, {counted(high, 'repeat')}, family of {len(table)}; 95 % intervals hold the error of repeats"
            shown = show(table)
            if source != "real data" and s.scale == "demo":  # digits say nothing of a claim
                shown["verdict"] = shown["verdict"].replace({HOLDS: "same sign", CONTRADICTED: "other sign"})
            found.append((f"{what[:1].upper()}{what[1:]}", shown))
    return found
