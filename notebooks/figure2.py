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
# # Figure 2: gradients before clipping and noise
#
# Why does mixup help? The paper looks at the gradient that each parameter of the head receives, averaged over examples, before it is clipped and before noise is
# added. Its histogram is narrower for DP-MixSelf and DP-MixDiff {cite:p}`Bao-2023` than for Self-Aug {cite:p}`De-2022`, at the stages of training that it shows.
# The paper reads that as more stable training and faster convergence.
#
# ```{warning}
# This page is a **non-private diagnostic**. It computes averages over private examples without noise. The digits here are public; a page like this
# about data that are not must not leave the room ({doc}`Your own images </own_images>`). Nothing on it is written to the store.
# ```

# %% tags=["hide-input"]
from dpmix.companion import diagnostics, evidence, grids, ledger, paper, plots, report, verdicts
from dpmix.companion.verdicts import Comparison

ledger.status("figure2")

# %% tags=["parameters"]
eps = 1
dataset = None  # None: "digits" at demo scale, "cifar10" else
model = None  # None: the first encoder of the scale
methods = ["self-aug", "mix-self", "mix-diff"]
seeds = None  # None: five
epochs = None  # None: the scale's
batch_size = None
learning_rates = None  # in units of 1/C; None: the scale's grid
stages = 5  # 20 %, 40 %, ... of training
scale = "demo"  # "demo" | "laptop": real data | "paper": the paper's settings, a GPU
download = False  # let torchvision fetch what is missing at laptop or paper scale

# %% tags=["hide-input"]
grids.check_scale(scale, dataset, download)
preset = grids.preset(scale, dataset)
cells = grids.methods_grid(
    scale,
    dataset=dataset,
    models=model or preset.models[0],
    methods=grids.with_public(methods, preset.dataset),
    eps=eps,
    seeds=range(5) if seeds is None else seeds,
    epochs=epochs,
    batch_size=batch_size,
    learning_rates=learning_rates,
)
runs = grids.run_cells(cells)
report.provenance_note(runs, scale)

# %% [markdown]
# Each method trains with the learning rate that validation chose for it, privately, as always. An observer then sees the features of each batch and the weights at
# that step, and sums the gradients that were *not* clipped.

# %%
chosen = evidence.choose(runs, ["method"])
by_key = {key: cell.spec for key, cell in zip(runs["key"], cells, strict=True)}
looked = chosen.assign(gradients=diagnostics.gradients([by_key[k] for k in chosen["key"]], stages=stages))

# %% tags=["hide-input"] mystnb={"image": {"alt": "Histograms of the per-parameter gradient before clipping and noise, one panel a method, one line a stage of training"}}
plots.gradient_plot(looked)

# %% [markdown]
# *Histograms of the gradient of each parameter of the head, averaged over views and examples, before clipping and noise, first seed. Grey: over all of training. Lines: over the
# stage of training that ends at the given share. The vertical axis is logarithmic.*
#
# ## Published, real data, demo
#
# Standard deviation over the parameters, times 1,000, mean (standard deviation) over the seeds, of the gradient averaged over all of training and over each stage. The scale of a gradient depends on
# the length of the features and the number of classes; the ratio to Self-Aug does not.

# %% tags=["hide-input"]
deviations = diagnostics.gradient_deviations(looked)
published = paper.figure2().assign(stage="whole").rename(columns={"std": "mean"})
published = published.assign(mean=1000 * published["mean"], std=float("nan"))
found = report.Sources(published, evidence.read("figure2"), deviations, scale)
report.tables(found, columns=("stage",), value="deviation", digits=2)

# %% [markdown]
# ## What holds, and what does not
#
# Ratios of the deviations over all of training, by seed; all rows of a table are one family ({doc}`The rule of decision, and what is ours </deviations>` states the rule, here for logarithms).

# %% tags=["hide-input"]
whole = [f[f["stage"] == "whole"] if len(f) else f for f in (found.published, found.real, found.made)]
pairs = [Comparison("mix-self", "self-aug"), Comparison("mix-diff", "self-aug")]
verdicts.page(report.Sources(*whole, scale), pairs, cells=("model",), value="deviation", ratio=True)

# %% [markdown]
# Two readings are ours. The paper speaks of *magnitude* and shows a histogram around zero; we take the signed average. And it does not say whether its deviation is that
# of one epoch or of all; we give both.
#
# Mixed targets are less far from the prediction, and averaging more views cancels more of what differs between them: a mixture may narrow the gradient for reasons of
# its own, whatever it does for accuracy. A narrower gradient would be consistent with the paper's explanation and would not single it out. On real
# data the verdicts above do not find it: there is no gain of this kind to explain.
#
# ## Run it again
#
# ```console
# $ papermill notebooks/figure2.ipynb out.ipynb -p eps 8 -p model tiny-convnext
# $ papermill notebooks/figure2.ipynb out.ipynb -p scale paper -p dataset caltech256
# ```
