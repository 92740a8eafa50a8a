# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # On what does the gain depend?
#
# On real data ({doc}`Table 3: fine-tuning with differential privacy <table3>`) one plain view of an image does about as well as sixteen augmentations, and mixtures of those do worse, against what the paper found. Before that is said of the methods, it has to be
# asked of the setting: the encoder sees images at 96 pixels, they are cropped out of a padding that no test image has, and views are drawn once. Here one of these changes at a time.
#
# **In short:** on CIFAR-10 it is the crop. Views that are cropped cost accuracy against one plain view; views that are only mirrored cost nothing that counts, and bring nothing. Mixtures brought nothing beyond views in any condition that was run.

# %% tags=["hide-input"]
import pandas as pd

from dpmix.companion import evidence, plots, report, verdicts
from dpmix.companion.verdicts import Comparison

evidence.status("conditions", demo=False)

# %% tags=["parameters"]
value = "accuracy"  # what is compared

# %% [markdown]
# - **96 px**, as in Table 3: 96 pixels, a crop out of an image that is padded by an eighth of its side, and a mirror; views drawn once and stored;
# - **64 px**, **128 px**, **224 px** (not run yet): what the encoder sees. Its weights were trained at 224;
# - **mirrors**, no crops: views keep the framing of the test images;
# - **64 px, anew**: views drawn at every step, as Algorithm 1 has them; of Self-Aug alone, since that takes ten times as long.
#
# All with C = 1. What C does is on the page of {doc}`Table 3: fine-tuning with differential privacy <table3>`.
#
# ## Accuracy
#
# In percent, mean (standard deviation) over the n seeds; learning rates chosen on a validation split, for each condition by itself.

# %% tags=["hide-input"]
by = ["dataset", "model", "method", "epsilon", "condition"]
short = {
    "as in Table 3": "96 px",
    "64 pixels": "64 px",
    "128 pixels": "128 px",
    "mirrors, no crops": "mirrors",
    "64 pixels, views drawn anew": "64 px, anew",
    "224 pixels": "224 px",
}
runs = evidence.chosen("conditions", by).replace({"condition": short})
found = report.real_alone(runs)
how = {"rows": ("condition",), "columns": ("method",), "split": ("dataset", "epsilon"), "value": value}
report.tables(found, **how) if len(runs) else "no runs"

# %% [markdown]
# ## What views bring, and what mixtures bring beyond them
#
# Differences in points within a condition, averaged over the budgets, on the same draws; all rows are one family ({doc}`The rule of decision, and what is ours </deviations>` states the rule). The bound of *no effect* is half a point.

# %% tags=["hide-input"]
pairs = [Comparison("self-aug", "dp-sgd"), Comparison("mix-self", "self-aug")]
shown = verdicts.page(found, pairs, value=value, per=("condition",)) if len(runs) else []
report.Tables((caption, table.drop(columns="published")) for caption, table in shown) or "no runs"


# %% [markdown]
# ## Does that change with the condition?
#
# The same differences, less those of Table 3's setting, seed by seed: a gain that depends on the condition would stand out here. The interval does not hold the error of the test images.


# %% tags=["hide-input"]
def gains(first: str, second: str) -> pd.DataFrame:
    """What `first` has over `second`, a row a seed, budget and condition, which is called the method."""
    keys = ["dataset", "model", "epsilon", "condition", "seed"]
    wide = runs.pivot_table(index=keys, columns="method", values=value, sort=False)
    return (wide[first] - wide[second]).dropna().rename(value).reset_index().assign(method=lambda t: t["condition"])


if len(runs):
    places = [c for c in dict.fromkeys(runs["condition"]) if c != "96 px"]
    # Beside what differs in one thing.
    beside = {c: "64 px" if c == "64 px, anew" else "96 px" for c in places}
    asked = [Comparison(c, other) for c, other in beside.items()]
    parts = [gains(p.first, p.second).assign(gain=f"{report.label(p.first)} − {report.label(p.second)}") for p in pairs]
    compared = report.real_alone(pd.concat(parts, ignore_index=True))
    shown = verdicts.page(compared, asked, value=value, per=("gain",))
report.Tables((caption, table.drop(columns="published")) for caption, table in shown) or "no runs"

# %% tags=["hide-input"] mystnb={"image": {"alt": "Test accuracy of each method under each condition, a panel a budget"}}
if len(runs):
    rows = [f"{report.label(m)}, {c}" for m, c in zip(runs["method"], runs["condition"], strict=True)]
    together = found._replace(real=runs.assign(row=rows, budget=[f"ε = {e:g}" for e in runs["epsilon"]]))
plots.point_plot(together, line="row", split=("dataset", "budget"), value=value) if len(runs) else "no runs"

# %% [markdown]
# ## Run it again
#
# ```console
# $ python benchmarks/evidence.py conditions/cifar10 --examples 10000
# $ python benchmarks/evidence.py conditions/cifar10/224 --examples 10000     # 27 minutes a seed on two cores
# ```
