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
# added. Its histogram is narrower for DP-MixSelf and DP-MixDiff {cite:p}`bao2023dpmix` than for Self-Aug {cite:p}`de2022unlocking`, at every stage of training.
# The paper reads that as more stable training and faster convergence.
#
# ```{warning}
# This page is a **non-private diagnostic**. It computes averages over private examples without noise. The digits here are public; a page like this
# about data that are not must not leave the room ({doc}`/own_images`). Nothing on it is written to the store.
# ```

# %% tags=["parameters"]
eps = 1
dataset = None  # None: "digits" at demo scale, "cifar10" at paper scale
model = None  # None: "tiny-vit" at demo scale, "vit-b-16" at paper scale
methods = ["self-aug", "mix-self", "mix-diff"]
seeds = None  # None: three seeds
epochs = None  # None: the scale's
batch_size = None
learning_rates = None  # in units of 1/C; None: the scale's grid
stages = 5  # 20 %, 40 %, ... of training
scale = "demo"

# %% tags=["hide-input"]
from myst_nb import glue

from dpmix.companion import diagnostics, grids, paper, report
from dpmix.companion import report_diagnostics as inside
from dpmix.runs import experiments

grids.check_scale(scale, dataset)
preset = grids.preset(scale, dataset)
model = model or preset.models[0]
cells = grids.methods_grid(
    scale,
    dataset=dataset,
    models=model,
    methods=methods,
    eps=eps,
    seeds=seeds,
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
chosen = experiments.choose_learning_rate(runs, ["method"])
specs = {experiments.key(c.spec): c.spec for c in cells}
looked = chosen.assign(gradients=diagnostics.gradients([specs[k] for k in chosen["key"]], stages=stages))

# %% tags=["hide-input"] mystnb={"image": {"alt": "Histograms of the per-parameter gradient before clipping and noise, one panel a method, one line a stage of training"}}
inside.gradient_plot(looked)

# %% [markdown]
# *Histograms of the gradient of each parameter of the head, averaged over views and examples, before clipping and noise, first seed. Grey: over all of training. Lines: over the
# stage of training that ends at the given share. The vertical axis is logarithmic.*
#
# ## Published beside measured
#
# Standard deviation over the parameters, times 1,000. The paper's is for ViT-B-16 on two data sets; here it is the mean (standard deviation) over the seeds of the
# gradient averaged over all of training. The scale of a gradient depends on the length of the features and the number of classes; the ratio to Self-Aug does not.

# %% tags=["hide-input"]
deviations = inside.gradient_deviations(looked)
glue("figure2_n", looked["seed"].nunique(), display=False)
inside.show_deviations(paper.figure2(), deviations)

# %% [markdown]
# By stage, over {glue:text}`figure2_n` seeds:

# %% tags=["hide-input"]
inside.deviations_by_stage(deviations)

# %% [markdown]
# ## What agrees, and what does not

# %% tags=["hide-input"]
inside.deviation_verdict(paper.figure2(), deviations)

# %% [markdown]
# Two readings are ours. The paper speaks of *magnitude* and shows a histogram around zero; we take the signed average. And it does not say whether its deviation is that
# of one epoch or of all; we give both.
#
# A narrower gradient is what a mixture is bound to give, whatever it does for accuracy: mixed targets are less far from the prediction, and averaging more views cancels more.
# The figure is consistent with the paper's explanation. It does not single it out.
#
# ## Run it again
#
# ```console
# $ papermill notebooks/figure2.ipynb out.ipynb -p eps 8 -p model tiny-convnext
# $ papermill notebooks/figure2.ipynb out.ipynb -p scale paper -p dataset caltech256
# ```
