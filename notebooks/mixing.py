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
# # What does the mixing do?
#
# DP-MixSelf adds 18 mixtures to 16 views, and DP-MixDiff {cite:p}`Bao-2023` two synthetic images besides. A gain could come from the mere number of views, from mixing pixels, from how far
# the mixtures lie from their members (λ is drawn from a Beta distribution that favours the ends), or from the public images as such. The paper takes only the number of views apart (its Table 5). This page takes them all apart, on the same
# draws: in each row one thing has changed.
#
# **In short:** on CIFAR-10, so far as three seeds tell: the more is mixed, the lower the accuracy, and what DP-MixDiff gains over DP-MixSelf, two synthetic images bring as mere views, with nothing mixed.

# %% tags=["hide-input"]
from dpmix.companion import evidence, plots, report, verdicts
from dpmix.companion.verdicts import Comparison

evidence.status("mixing", demo=False)

# %% tags=["parameters"]
value = "accuracy"  # what is compared

# %% [markdown]
# - **34 views**: as many as DP-MixSelf has, all of them augmentations.
# - **α = 1** and **λ = ½**: mixtures of any share, or of equal halves, in place of the paper's faint ones.
# - **CutMix** {cite:p}`Yun-2019`: a rectangle of one member is pasted into the other.
# - **D as views, unmixed**: 16 views and the two synthetic images, each with its own label, and no mixture.
# - **of features**: what the encoder made of two members is mixed, in place of their pixels. It needs no encoding of its own.
# - **images only** and **labels only**: mixed pixels with the label of the member that has the larger share, or that member with the mixed label.
# - **mixtures weigh ¼** and **¾**: their weight in the average over an example's views, which is about a half in the paper (18 of 34, or of 36). Clipping comes after the average, so the guarantee is the same.
#
# ## Accuracy
#
# In percent, mean (standard deviation) over the n seeds, at ε = 1.

# %% tags=["hide-input"]
by = ["dataset", "model", "method", "epsilon"]
runs = evidence.chosen("mixing", by)
found = report.real_alone(runs)
report.tables(found) if len(runs) else "no runs"

# %% tags=["hide-input"] mystnb={"image": {"alt": "Test accuracy of each way to mix, a panel a data set"}}
plots.point_plot(found) if len(runs) else "no runs"

# %% [markdown]
# ## One thing at a time
#
# Differences in points on the same draws; all rows are one family ({doc}`The rule of decision, and what is ours </deviations>` states the rule). The bound of *no effect* is half a point.

# %% tags=["hide-input"]
pairs = [
    Comparison("34 views", "16 views"),
    Comparison("DP-MixSelf", "34 views"),
    Comparison("DP-MixSelf, α = 1", "DP-MixSelf"),
    Comparison("DP-MixSelf, λ = ½", "DP-MixSelf"),
    Comparison("CutMix of itself", "DP-MixSelf"),
    Comparison("DP-MixSelf of features", "DP-MixSelf"),
    Comparison("DP-MixSelf, mixtures weigh ¼", "DP-MixSelf"),
    Comparison("DP-MixSelf, mixtures weigh ¾", "DP-MixSelf"),
    Comparison("DP-MixDiff", "DP-MixSelf"),
    Comparison("D as views, unmixed", "16 views"),
    Comparison("DP-MixDiff", "D as views, unmixed"),
    Comparison("DP-MixDiff, α = 1", "DP-MixDiff"),
    Comparison("DP-MixDiff, λ = ½", "DP-MixDiff"),
    Comparison("CutMix with D", "DP-MixDiff"),
    Comparison("DP-MixDiff of features", "DP-MixDiff"),
    Comparison("DP-MixDiff, images only", "DP-MixDiff"),
    Comparison("DP-MixDiff, labels only", "DP-MixDiff"),
    Comparison("DP-MixDiff, mixtures weigh ¼", "DP-MixDiff"),
    Comparison("DP-MixDiff, mixtures weigh ¾", "DP-MixDiff"),
]
shown = verdicts.page(found, pairs, value=value) if len(runs) else []
report.Tables((caption, table.drop(columns="published")) for caption, table in shown) or "no runs"

# %% [markdown]
# ## Run it again
#
# ```console
# $ python benchmarks/evidence.py mixing/cifar10 --examples 10000
# $ python benchmarks/mixing.py cifar10 --examples 10000      # features, images or labels alone, weights
# $ python benchmarks/evidence.py mixing/caltech101 && python benchmarks/mixing.py caltech101
# ```
