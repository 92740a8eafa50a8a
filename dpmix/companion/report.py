"""What notebooks show: small tables under captions (published, real data, made now), privacy and cost, where numbers come from.

Every number here comes from results or from `data/paper`; the sentences are put together from them. No table has more
columns than a telephone is wide."""

import html
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pandas as pd
from IPython.display import Markdown

from dpmix.companion.grids import LABELS, STANDS_FOR, parts
from dpmix.core.checks import counted
from dpmix.images import data
from dpmix.runs import passes
from dpmix.runs.result import told
from dpmix.runs.spec import ComputeFlags

Columns = Sequence[str]


def label(name: Any) -> str:
    """How a key is printed; "self-aug+jitter" and "self-aug@0.05" are put together."""
    base, extra, c = parts(str(name))
    return LABELS.get(base, base) + (f" + {LABELS.get(extra, extra)}" if extra else "") + (f", C = {c}" if c else "")


def entry(column: str, value: Any) -> str:
    """How the value of a column is printed."""
    return f"ε = {value:g}" if column == "epsilon" else label(value)


def spread(mean: float, std: float | None = None, digits: int = 1) -> str:
    """ "97.2 (0.3)": mean and standard deviation."""
    if pd.isna(mean):
        return "–"
    return f"{mean:.{digits}f}" if std is None or pd.isna(std) else f"{mean:.{digits}f} ({std:.{digits}f})"


def summary(runs: pd.DataFrame, by: Columns, value: str = "accuracy") -> pd.DataFrame:
    """Mean, standard deviation (n - 1) and n over the seeds of each condition."""
    grouped = runs.groupby(list(by), sort=False, dropna=False)[value]
    return grouped.agg(mean="mean", std="std", n="count").reset_index()


def pivot(table: pd.DataFrame, rows: Columns, columns: Columns) -> pd.DataFrame:
    """The column `cell` (text) laid out by one column each way, both under their labels and in the order in which they come."""
    (row,), (column,) = rows, columns
    named = {name: [entry(name, v) for v in table[name]] for name in (row, column)}
    wide = table.assign(**named).pivot(index=row, columns=column, values="cell").fillna("–")
    order = (list(dict.fromkeys(named[name])) for name in (row, column))
    return wide.loc[*order].rename_axis(index=None, columns=None)


def block(table: pd.DataFrame, rows: Columns, columns: Columns, digits: int = 1) -> pd.DataFrame:
    """A table as the paper prints it: "mean (std)" in the cells."""
    cells = [spread(m, s, digits) for m, s in zip(table["mean"], table["std"], strict=True)]
    return pivot(table.assign(cell=cells), rows, columns)


class Tables(list[tuple[str, pd.DataFrame]]):
    """Small tables, each under its caption: HTML where a page is drawn, text elsewhere."""

    def _repr_html_(self) -> str:
        parts = [f"<p><strong>{html.escape(c)}</strong></p>{t.to_html(border=0)}" for c, t in self]
        return f"<div>{''.join(parts)}</div>"

    def __repr__(self) -> str:
        return "\n\n".join(f"{c}\n{t.to_string()}" for c, t in self)


class Sources(NamedTuple):
    """What a page shows, in this order: `published` (with `mean` and `std`), `real` (runs that came with the repository) and
    `made` (now, at `scale`): a row a run, maybe none."""

    published: pd.DataFrame
    real: pd.DataFrame
    made: pd.DataFrame
    scale: str = "demo"

    def runs(self) -> dict[str, pd.DataFrame]:
        """The two frames of runs that are there, under the words for them."""
        words = {"real data": self.real, f"made now, {self.scale} scale": self.made}
        return {name: frame for name, frame in words.items() if len(frame)}

    def twins(self) -> "Sources":
        """With the published rows alone of the data sets, or their stand-ins, and of the budgets that the runs have."""
        table, frames = self.published, [f for f in (self.real, self.made) if len(f)]
        sets = {STANDS_FOR.get(d, d) for f in frames for d in f["dataset"]}
        if "dataset" in table and sets & set(table["dataset"]):
            table = table[table["dataset"].isin(sets)]
        if "epsilon" in table:
            table = table[table["epsilon"].isin({e for f in frames for e in f["epsilon"]})]
        return self._replace(published=table)

    def parts(self, split: Columns, by: Columns, value: str) -> Iterator[tuple[str, dict[str, Any], pd.DataFrame]]:
        """Of each source: its name, the data set and what else of `split` it has, and the means of `value` by `by` there."""
        s = self.twins()
        for source, table in ({"published": s.published} | s.runs()).items():
            here = [c for c in split if c in table]
            means = table if source == "published" else summary(table, list(dict.fromkeys([*here, *by])), value)
            for names, part in means.groupby(here, sort=False) if here else [((), means)]:
                yield source, dict(zip(here, names, strict=True)), part


def beside(published: pd.DataFrame, runs: pd.DataFrame, per: Columns = ()) -> pd.DataFrame:
    """The published rows that runs are compared with: of their data sets and models (or what these stand for, or the same kind
    of model, a frozen encoder or a network from scratch) and budgets, where the paper has those; and of what they have in
    `per`."""

    def same(column: str, word: Callable[[Any], Any]) -> pd.Series:
        return published[column].map(word).isin(set(runs[column].map(word)))

    wanted = ("dataset", "model", "epsilon")
    for column in (c for c in dict.fromkeys((*wanted, *per)) if c in published and c in runs):
        there = same(column, lambda v: STANDS_FOR.get(v, v))
        if column == "model" and not there.any():
            there = same(column, lambda v: str(v).startswith("wrn"))
        if there.any() or column not in wanted:
            published = published[there]
    return published


def real_alone(runs: pd.DataFrame) -> Sources:
    """Runs that came with the repository, of a page that has nothing published and makes nothing."""
    return Sources(runs.iloc[:0].assign(mean=[], std=[]), runs, runs.iloc[:0])


def tables(
    s: Sources,
    *,
    rows: Columns = ("method",),
    columns: Columns = ("epsilon",),
    split: Columns = ("dataset", "model"),
    value: str = "accuracy",
    digits: int = 1,
) -> Tables:
    """Published | real data | made now: a table for each data set and model, those of one data set together."""
    # The paper's first data set comes first, where it has it.
    found, order = [], {"cifar10": 0} if "cifar10" in set(s.twins().published.get("dataset", ())) else {}
    for place, (source, known, part) in enumerate(s.parts(split, [*rows, *columns], value)):
        name = known.get("dataset", "")
        group = (source.startswith("made"), order.setdefault(STANDS_FOR.get(name, name), len(order)), place)
        words = [source, *(entry(c, v) for c, v in known.items())]
        words += [f"n = {int(part['n'].min())}"] if "n" in part else []
        found.append((group, ", ".join(words), block(part, rows, columns, digits)))
    return Tables((f"{c[:1].upper()}{c[1:]}", t) for _, c, t in sorted(found, key=lambda f: f[0]))


def chosen_rates(s: Sources) -> Tables:
    """The learning rates that validation chose (in units of 1/C, or as they are where nothing is clipped), a table a source,
    data set and model; starred where the rate is an end of those that were tried."""
    found = Tables()
    for source, runs in s.runs().items():
        table = runs.drop_duplicates(["method", "dataset", "model", "epsilon"])
        rates = table["learning_rate"] * table["clip_norm"].where(table["clip_norm"] < 1e8, 1.0)
        table = table.assign(cell=[f"{r:.3g}{' *' if e else ''}" for r, e in zip(rates, table["edge"], strict=True)])
        for (dataset, model), part in table.groupby(["dataset", "model"], sort=False):
            caption = f"{source[:1].upper()}{source[1:]}: {label(dataset)}, {label(model)}"
            found.append((caption, pivot(part, ["method"], ["epsilon"])))
    return found


def privacy_table(runs: pd.DataFrame) -> pd.DataFrame:
    """σ, q, T and ε by all three accountants, a column a budget; of microbatches also that of the true pair."""
    shown = {
        "epsilon": ("ε asked", "{:g}"), "delta": ("δ", "{:.0e}"), "accountant": ("calibrated by", "{}"),
        "sigma": ("σ", "{:.3f}"), "q": ("q", "{:.4f}"), "T": ("T", "{}"), "N": ("N", "{}"), "batch_size": ("B", "{}"),
        "epsilon_rdp": ("ε (RDP)", "{:.3f}"), "epsilon_prv": ("ε (PRV)", "{:.3f}"), "epsilon_pld": ("ε (PLD)", "{:.3f}"),
    }  # fmt: skip
    if "epsilon_pair" in runs:
        shown["epsilon_pair"] = "ε (the true pair, PLD)", "{:.3f}"
    table = runs[list(shown)].drop_duplicates().sort_values(["epsilon", "sigma"])
    rows = [["–" if pd.isna(v) else form.format(v) for v in table[column]] for column, (_, form) in shown.items()]
    return pd.DataFrame(rows, [name for name, _ in shown.values()], [""] * len(table))


def cost_table(runs: pd.DataFrame) -> pd.DataFrame:
    """What the passes cost where they were computed: heads trained, seconds, views a second, medians over the seeds."""
    each = runs.groupby(["model", "seed", "seconds"], sort=False)
    each = each.agg(runs=("method", "count"), speed=("views_per_second", "first")).reset_index()
    total = {"passes": ("runs", "count"), "runs": ("runs", "sum")}
    table = each.groupby("model", sort=False).agg(**total, seconds=("seconds", "median"), speed=("speed", "median"))
    table["seconds"], table["speed"] = table["seconds"].map("{:.1f}".format), table["speed"].map("{:,.0f}".format)
    table.index = pd.Index([label(m) for m in table.index])
    return table.rename(columns={"seconds": "seconds of a pass", "speed": "views/s"})


def made_note(what: str) -> Markdown:
    """`what` was made, and device, date and version: for a page whose numbers do not come from the store."""
    about = told(passes.provenance(ComputeFlags().where(), ""))
    return Markdown(f"*{what}, made on {about['date'][:16]} UTC on {about['device']}, with {about['versions']}.*")


def provenance_note(runs: pd.DataFrame, scale: str = "", noun: str = "run") -> Markdown:
    """Scale, data set, seeds, date, device and version behind a page, from the results."""
    sets, seeds, devices = (", ".join(map(str, sorted(set(runs[c])))) for c in ("dataset", "seed", "device"))
    versions = "; ".join(sorted(set(runs["versions"])))
    what = f"{counted(len(runs), noun)}{f' at {scale} scale' if scale else ''}"
    first, last = runs["date"].min()[:16], runs["date"].max()[:16]
    when = f"at {first}" if first == last else f"between {first} and {last}"
    seeded = f"{'seeds' if ',' in seeds else 'seed'} {seeds}"
    return Markdown(f"*{what} on {sets}, {seeded}, computed {when} UTC on {devices}, with {versions}.*")


def benchmark(name: str) -> dict[str, Any]:
    """What `python benchmarks/NAME.py` wrote when it was last run for the repository, on a machine of the authors."""
    return json.loads((data.PROJECT / "benchmarks" / "results" / f"{name}.json").read_text())
