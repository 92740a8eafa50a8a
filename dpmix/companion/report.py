"""What notebooks show. Published beside measured, paired differences, privacy and cost tables, plots, prose.

Every number here comes from the results or from `data/paper`; the sentences are put together from them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import Markdown
from scipy import stats

from dpmix.companion.grids import LABELS
from dpmix.runs import passes
from dpmix.runs.spec import ComputeFlags


def label(name: Any) -> str:
    """How a key is printed; "self-aug+jitter" is put together."""
    base, _, extra = str(name).partition("+")
    return f"{LABELS.get(base, base)} + {LABELS.get(extra, extra)}" if extra else LABELS.get(base, base)


def spread(mean: float, std: float | None = None, digits: int = 1) -> str:
    """ "97.2 (0.3)": mean and standard deviation."""
    if pd.isna(mean):
        return "–"
    return f"{mean:.{digits}f}" if std is None or pd.isna(std) else f"{mean:.{digits}f} ({std:.{digits}f})"


def summary(runs: pd.DataFrame, by: Sequence[str], value: str = "accuracy") -> pd.DataFrame:
    """Mean, standard deviation (n - 1) and n over the seeds of each condition."""
    grouped = runs.groupby(list(by), sort=False, dropna=False)[value]
    return grouped.agg(mean="mean", std="std", n="count").reset_index()


def block(
    table: pd.DataFrame, rows: Sequence[str] = ("method",), columns: Sequence[str] = ("model", "epsilon")
) -> pd.DataFrame:
    """A table as the paper prints it: "mean (std)" in cells, rows and columns in the order in which they come."""
    table = table.assign(cell=[spread(m, s) for m, s in zip(table["mean"], table["std"], strict=True)])
    for name in (*rows, *columns):
        values = [f"ε = {v:g}" if name == "epsilon" else label(v) for v in table[name]]
        table[name] = pd.Categorical(values, categories=list(dict.fromkeys(values)), ordered=True)
    wide = table.pivot(index=list(rows), columns=list(columns), values="cell")
    wide.columns.names = [None] * wide.columns.nlevels
    wide.index.names = [None] * wide.index.nlevels
    return wide.fillna("–")


def side_by_side(
    published: pd.DataFrame, measured: pd.DataFrame, *, rows: Sequence[str] = ("method",),
    columns: Sequence[str] = ("model", "epsilon"),
) -> pd.DataFrame:  # fmt: skip
    """The published block and the measured one, one above the other in the rows' first level, so that a narrow page shows
    both. Networks that differ become rows; blocks that differ in their only level of columns stand next to each other."""
    if len(columns) > 1 and set(published[columns[0]]) != set(measured[columns[0]]):
        rows, columns = (columns[0], *rows), columns[1:]
    parts = {"published": published, "measured here": measured}
    blocks = {name: block(part, rows, columns) for name, part in parts.items()}
    if len(columns) > 1 or columns[0] == "epsilon":
        for table in blocks.values():
            table.columns = pd.Index(table.columns.tolist())
        return pd.concat(blocks).fillna("–")
    return pd.concat(blocks, axis=1).fillna("–")


def paired(runs: pd.DataFrame, pairs: Sequence[tuple[str, str]], by: Sequence[str] = ("model", "epsilon"),
           level: float = 0.95) -> pd.DataFrame:  # fmt: skip
    """Differences in accuracy (percentage points) between two methods on the same seed, hence on the same draws.

    `low` and `high` bound the mean difference with confidence `level` by Student's t over the seeds: with three seeds
    the interval is wide, and honest. No correction for the number of comparisons.
    """
    rows = []
    for better, worse in pairs:
        wide = runs[runs["method"].isin([better, worse])].pivot(
            index=[*by, "seed"], columns="method", values="accuracy"
        )
        if better not in wide or worse not in wide:
            continue
        for condition, gap in (wide[better] - wide[worse]).dropna().groupby(level=list(by), sort=False, dropna=False):
            n, mean, std = len(gap), gap.mean(), gap.std()
            half = stats.t.ppf((1 + level) / 2, n - 1) * std / n**0.5 if n > 1 else np.nan
            names = condition if isinstance(condition, tuple) else (condition,)
            rows.append({**dict(zip(by, names, strict=True)), "better": better, "worse": worse, "difference": mean,
                         "low": mean - half, "high": mean + half, "n": n})  # fmt: skip
    return pd.DataFrame(rows, columns=[*by, "better", "worse", "difference", "low", "high", "n"])


def show_paired(differences: pd.DataFrame) -> pd.DataFrame:
    """`paired` for reading: a row a model and comparison, a column an epsilon, "difference [low, high]" in the cells."""
    cells = [f"{d:+.1f} [{lo:+.1f}, {hi:+.1f}]" for d, lo, hi in differences[["difference", "low", "high"]].to_numpy()]
    names = [f"{label(a)} − {label(b)}" for a, b in zip(differences["better"], differences["worse"], strict=True)]
    table = differences.assign(mean=cells, comparison=names)
    table["model"] = [label(m) for m in table["model"]]
    table["epsilon"] = [f"ε = {e:g}" for e in table["epsilon"]]
    wide = table.pivot(index=["model", "comparison"], columns="epsilon", values="mean")
    order = [row for m in dict.fromkeys(table["model"]) for n in dict.fromkeys(names) if (row := (m, n)) in wide.index]
    wide = wide.reindex(
        index=pd.MultiIndex.from_tuples(order, names=[None, None]), columns=list(dict.fromkeys(table["epsilon"]))
    )
    wide.columns.name = None
    return wide.fillna("–")


def published_gaps(
    published: pd.DataFrame, pairs: Sequence[tuple[str, str]], by: Sequence[str] = ("model", "epsilon")
) -> pd.DataFrame:
    """The same differences between published means; the paper gives no interval for them."""
    wide = published.pivot(index=list(by), columns="method", values="mean")
    rows = [
        {"better": a, "worse": b, "difference": gap}
        for a, b in pairs if a in wide and b in wide for gap in (wide[a] - wide[b]).dropna()
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["better", "worse", "difference"])


def agreement(differences: pd.DataFrame, gaps: pd.DataFrame) -> Markdown:
    """What agrees with the published ordering and what does not, a sentence for each comparison, from the numbers."""
    lines = []
    for (better, worse), found in differences.groupby(["better", "worse"], sort=False):
        said = gaps[(gaps["better"] == better) & (gaps["worse"] == worse)]["difference"]
        up, down = int((found["low"] > 0).sum()), int((found["high"] < 0).sum())
        n = len(found)
        mean = found["difference"].mean()
        cells = "cell" if n == 1 else "cells"
        text = f"- **{label(better)} against {label(worse)}.** "
        expected = 0.0
        if len(said):
            expected = said.mean()
            above = int((said > 0).sum())
            text += f"Published: ahead in {above} of {len(said)} cells, by {expected:+.1f} points on average. "
        text += (f"Measured here: {mean:+.1f} points on average over {n} {cells}; the interval lies above zero in {up}, "
                 f"below zero in {down} and holds zero in {n - up - down}. ")  # fmt: skip
        if not len(said):
            verdict = "The paper has no such comparison."
        elif up == down == 0:
            verdict = "These runs **do not decide** it."
        elif (up > 0 and down > 0) or (up - down) * expected < 0:
            verdict = (
                "This does **not agree** with the published ordering."
                if not (up and down)
                else "The cells **disagree** with each other."
            )
        else:
            verdict = f"Where the runs decide ({up + down} of {n}), they **agree** with the published ordering."
        lines.append(text + verdict)
    return Markdown("\n".join(lines) or "There are no two methods here to compare.")


def chosen_rates(chosen: pd.DataFrame, grid: Sequence[float], by: Sequence[str] = ("method",)) -> pd.DataFrame:
    """The learning rate that validation chose (in units of 1/C), for each condition; marked where it ends the grid."""
    unit = (chosen["learning_rate"] * chosen["clip_norm"]).round(10)
    ends = {min(grid), max(grid)} if len(grid) > 2 else set()
    table = chosen.assign(mean=unit, std=None).drop_duplicates([*by, "model", "epsilon"])
    cells = [f"{m:g}{' *' if m in ends else ''}" for m in table["mean"]]
    out = block(table, rows=by)
    text = table.assign(cell=cells)
    for name in (*by, "model", "epsilon"):
        text[name] = [f"ε = {v:g}" if name == "epsilon" else label(v) for v in text[name]]
    wide = text.pivot(index=list(by), columns=["model", "epsilon"], values="cell")
    wide.index.names, wide.columns.names = [None] * wide.index.nlevels, [None] * wide.columns.nlevels
    return wide.reindex(index=list(out.index), columns=pd.MultiIndex.from_tuples(list(out.columns)))


def privacy_table(runs: pd.DataFrame) -> pd.DataFrame:
    """σ, q, T and ε by all three accountants of every budget."""
    columns = [
        "epsilon",
        "delta",
        "accountant",
        "sigma",
        "q",
        "T",
        "N",
        "batch_size",
        "epsilon_rdp",
        "epsilon_prv",
        "epsilon_pld",
    ]
    table = runs[columns].drop_duplicates().sort_values(["epsilon", "sigma"]).reset_index(drop=True)
    names = {"epsilon": "ε asked", "delta": "δ", "accountant": "calibrated by", "sigma": "σ", "batch_size": "B",
             "epsilon_rdp": "ε (RDP)", "epsilon_prv": "ε (PRV)", "epsilon_pld": "ε (PLD)"}  # fmt: skip
    formats = {"epsilon": "{:g}", "delta": "{:.0e}", "sigma": "{:.3f}", "q": "{:.4f}",
               **dict.fromkeys(["epsilon_rdp", "epsilon_prv", "epsilon_pld"], "{:.3f}")}  # fmt: skip
    for name, form in formats.items():
        table[name] = ["–" if pd.isna(v) else form.format(v) for v in table[name]]
    return table.rename(columns=names)


def cost_table(runs: pd.DataFrame) -> pd.DataFrame:
    """What the passes cost where they were computed: heads trained, minutes, views a second."""
    rows = []
    for (model, seed, seconds), part in runs.groupby(["model", "seed", "seconds"], sort=False):
        speed = f"{part['views_per_second'].iloc[0]:,.0f}"
        rows.append({"encoder": label(model), "seed": seed, "runs of this table": len(part),
                     "seconds of the pass": round(seconds, 1), "views/s": speed})  # fmt: skip
    return pd.DataFrame(rows)


def made_note(what: str) -> Markdown:
    """`what` was made, and device, date and version: for a page whose numbers do not come from the store."""
    about = passes.provenance(ComputeFlags().where(), "")
    commit = f" at {about['commit'][:9]}{' with changes' if about['dirty'] else ''}" if about["commit"] else ""
    made, v = f"made on {about['date'][:16]} UTC on {about['device']}", about["versions"]
    return Markdown(f"*{what}, {made}, with dpmix {v['dpmix']}{commit}, torch {v['torch']}.*")


def provenance_note(runs: pd.DataFrame, scale: str = "", noun: str = "runs") -> Markdown:
    """Scale, data set, seeds, date, device and version behind a page, from the results."""
    sets, seeds, devices = (", ".join(map(str, sorted(set(runs[c])))) for c in ("dataset", "seed", "device"))
    versions = "; ".join(sorted(set(runs["versions"])))
    what = f"{len(runs)} {noun}{f' at {scale} scale' if scale else ''}"
    return Markdown(
        f"*{what} on {sets}, seeds {seeds}, computed between {runs['date'].min()[:16]} and "
        f"{runs['date'].max()[:16]} UTC on {devices}, with {versions}.*"
    )


def show_gaps(
    differences: pd.DataFrame, published: pd.DataFrame, pairs: Sequence[tuple[str, str]], by: str = "dataset"
) -> pd.DataFrame:
    """Differences in points, one row a pair: between published means, and beside them `paired(..., by=(by,))`."""
    names = [f"{label(a)} against {label(b)}" for a, b in pairs]
    means = published.pivot(index="method", columns=by, values="mean")
    table: dict[tuple[str, str], list[str]] = {}
    for condition in means:
        gaps = [means[condition].get(a, np.nan) - means[condition].get(b, np.nan) for a, b in pairs]
        table["published", label(condition)] = ["–" if pd.isna(gap) else f"{gap:+.1f}" for gap in gaps]
    for condition, found in differences.groupby(by, sort=False):
        rows = found.set_index(["better", "worse"])[["difference", "low", "high"]]
        said = [f"{d:+.1f} [{low:+.1f}, {high:+.1f}]" for d, low, high in rows.to_numpy()]
        cells = dict(zip(rows.index, said, strict=True))
        table["measured here", label(condition)] = [cells.get(pair, "–") for pair in pairs]
    return pd.DataFrame(table, index=names)
