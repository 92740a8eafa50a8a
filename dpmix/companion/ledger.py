"""What reproduced: every empirical claim of the paper (`data/paper/claims.csv`), decided from results by the one rule.

A claim names a table, two of its methods, where it is made, and what is claimed: the sign of the published difference, or
that there is no gain of `bound` or more. The whole ledger is one family."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
from IPython.display import Markdown

from dpmix.companion import evidence, grids, grids_fid, networks, paper, verdicts
from dpmix.companion.report import label
from dpmix.companion.verdicts import Comparison
from dpmix.runs.result import frame
from dpmix.runs.run import look_up

NOT_RUN = "not run"
# The tables whose differences are ratios: the column of their runs, and what a comparison is averaged over.
RATIOS: dict[str, Any] = {"table7": ("distance", ("model", "reference")), "table8": ("distance", ("model",))}
RATIOS |= {"table13": ("seconds", ("model",)), "figure2": ("deviation", ("model",))}
# What a learning rate was chosen for; within a method, only Table 9 varies the numbers of views.
RATE_FOR = ("dataset", "model", "method", "epsilon", "k_base", "k_self", "k_diff")


def published(table: str) -> pd.DataFrame:
    """A table of the paper with the methods named as in the runs."""
    if table == "figure2":
        return paper.figure2().rename(columns={"std": "mean"})
    if table == "table1":
        return networks.published_table1()
    found = paper.table(int(table.removeprefix("table")))
    if table in ("table4", "table7"):
        plain = found["transform"] == "crop-flip"
        found["method"] = found["method"].where(plain, found["method"] + "+" + found["transform"])
    elif table == "table5":
        found["method"] = [f"{label(m)} {n}" for m, n in zip(found["method"], found["n_augmentations"], strict=True)]
    elif table == "table6":
        found = found.replace({"method": {"synthetic-pretraining": grids.PRETRAINED["self-aug"]}})
    elif table == "table8":
        found = found.assign(method=found["compared"].map(grids_fid.WORDS), model=found["fid_model"])
    elif table == "table9":
        found = grids.k_groups(found, "mean")
    elif table == "table10":
        found["method"] = found["variant"]
    return found


def committed() -> dict[str, pd.DataFrame]:
    """The runs that came with the repository, of every table that a claim names, at the chosen learning rates."""
    tables = dict.fromkeys(paper.claims()["table"])
    return {t: _ready(t, evidence.read(t) if t in RATIOS else evidence.chosen(t, RATE_FOR)) for t in tables}


def stored(scale: str) -> dict[str, pd.DataFrame]:
    """The same from this machine's store at another scale: what is there of Tables 3, 4, 6, 10 and 12. Runs nothing."""
    one = {"demo": "tiny-convnext", "paper": "vit-b-16"}.get(scale)
    others = [f"self-aug+{t}" for t in grids.TABLE4]
    cells = {
        "table3": grids.methods_grid(scale, methods=grids.TABLE3),
        "table4": grids.methods_grid(scale, methods=["self-aug", *others, "mix-self"], models=one, eps=1),
        "table6": grids.pretraining_grid(scale, eps=2)[0],
        "table10": grids.halves_grid(scale, eps=2),
        "table12": grids.pure_grid(scale, eps=1, models=one),
    }
    found = {}
    for table, wanted in cells.items():
        there = [(c, r) for c, r in zip(wanted, look_up([c.spec for c in wanted]), strict=True) if r is not None]
        if there:
            runs = grids.labelled([c for c, _ in there], frame(r for _, r in there))
            found[table] = _ready(table, evidence.choose(runs, RATE_FOR))
    return found


def _ready(table: str, runs: pd.DataFrame) -> pd.DataFrame:
    if table == "table9" and len(runs):
        return grids.k_groups(runs)
    return runs.query("stage == 'whole'") if "stage" in runs else runs


def within(table: pd.DataFrame, where: Any) -> pd.DataFrame:
    """The rows where a claim is made: "dataset=cifar10,eurosat epsilon=1", or no text for all of them. What stands for the
    paper's data sets counts as they do."""
    for column, _, values in (part.partition("=") for part in ("" if pd.isna(where) else where).split()):
        if column in table:
            known = [f"{v:g}" if column == "epsilon" else grids.STANDS_FOR.get(v, v) for v in table[column]]
            table = table[pd.Index(known).isin(values.split(","))]
    return table


def decide(runs: Mapping[str, pd.DataFrame], level: float = verdicts.LEVEL) -> pd.DataFrame:
    """Every claim with `published`, `difference`, `low`, `high`, `n`, `bound`, `ratio`, `sets` and `verdict`, in the order of
    the paper. `runs` holds the runs of each table, from `committed` or `stored`; without any a claim is "not run"."""
    claims, none = paper.claims(), pd.DataFrame(columns=["dataset", "method"])
    rows, effects = [], []
    for c in claims.itertuples():
        value, cells = RATIOS.get(c.table, ("accuracy", ("model", "epsilon")))
        mine = within(runs.get(c.table, none), c.where)
        said = within(published(c.table), c.where)
        asked = Comparison(c.first, c.second, c.kind, None if pd.isna(c.bound) else float(c.bound))
        how: dict[str, Any] = dict(cells=("dataset", *cells), value=value, ratio=c.table in RATIOS)
        row, effect = verdicts.measure(mine, asked, said, **how)
        sets = verdicts.shared(mine, asked, how["cells"])["dataset"].unique() if effect else []
        known = {grids.STANDS_FOR.get(d, d) for d in sets}
        elsewhere = [d for d in said.get("dataset", pd.Series()).unique() if not known & set(said["dataset"])]
        rows.append(row | {"sets": ", ".join(map(label, sets)), "elsewhere": ", ".join(map(label, elsewhere))})
        effects.append(effect)
    there = {i: e for i, e in enumerate(effects) if e is not None}
    decided = verdicts.decide(list(there.values()), level).set_index(pd.Index(there))
    about = claims.rename(columns={"claim": "key"})[["key", "section", "table", "text"]]
    found = pd.concat([about, pd.DataFrame(rows), decided], axis=1)
    found["verdict"] = found["verdict"].astype(object).where(found["verdict"].notna(), NOT_RUN)
    return found


def table(found: pd.DataFrame) -> Markdown:
    """The ledger for reading, a line a claim with a link to its page."""
    lines = []
    for section, part in found.groupby("section", sort=False):
        lines.append(f"\n**{section}**\n")
        for r in part.itertuples():
            link = f"[{r.table.replace('table', 'Table ').replace('figure', 'Figure ')}]({r.table}.ipynb)"
            lines.append(f"- `{r.key}` {r.text} {link}. {_effects(r)}; **{r.verdict}**.")
    return Markdown("\n".join(lines))


def _effects(r: Any) -> str:
    """What was published, and what was measured where."""
    said, low, got, high = (verdicts.number(x, r.ratio) for x in (r.published, r.low, r.difference, r.high))
    published = "not printed" if pd.isna(r.published) else said + (" times" if r.ratio else " points")
    other = f" (the paper: {r.elsewhere})" if r.elsewhere else ""
    measured = "" if r.verdict == NOT_RUN else f"; measured {got} [{low}, {high}] on {r.sets}{other}, n = {r.n:.0f}"
    return f"Published {published}{measured}"


def status(name: str) -> Markdown:
    """The first lines of a table's page: the verdicts on its claims, and which real data they rest on."""
    found = decide(committed())
    asked = list(found[found["table"] == name].itertuples())
    lines = [f"- **{r.verdict}**: {r.text} {_effects(r)}." for r in asked if r.verdict != NOT_RUN]
    left = [f"- not run: {' '.join(r.text for r in asked if r.verdict == NOT_RUN)}"]
    shown = "\n".join(lines + (left if len(lines) < len(asked) else []))
    about = "**The paper's claims, by the real data of this page** ([all claims](what_reproduced.ipynb)):"
    return Markdown(f"{about}\n\n{shown}\n\n{evidence.status(name).data}")


def counts(found: pd.DataFrame) -> str:
    """ "holds 12, contradicted 3, ...": how often each verdict was given."""
    kind = found["verdict"].mask(found["verdict"].str.startswith("no effect"), "no effect of that size").value_counts()
    words = ("holds", "contradicted", "no effect of that size", "undecided", NOT_RUN)
    return ", ".join(f"{word} {kind[word]}" for word in words if word in kind)
