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
# # Table 11: the comparison in JAX
#
# A result that holds in one program only may be a property of the program. The paper therefore repeats Self-Aug {cite:p}`De-2022` against
# DP-MixSelf {cite:p}`Bao-2023` in the JAX code of Self-Aug's authors, training WRN-16-4 on CIFAR-10 five times, and reports medians: DP-MixSelf stays ahead.
#
# This page repeats the comparison with what that code has become, the released package `jax-privacy`. Clipping, noise and the noise multiplier are the
# package's; nothing of them is ours. In the demo the network is a linear head on a frozen encoder instead of a WRN-16-4, so what is checked is the
# mechanism and the order of the methods, not the accuracies.

# %% tags=["hide-input"]
import pandas as pd
import torch

from dpmix.companion import evidence, grids, ledger, paper, plots, report, verdicts
from dpmix.companion.verdicts import Comparison
from dpmix.core import clipping, rng
from dpmix.core.checks import counted
from dpmix.peers import jax as jax_peer

ledger.status("table11")

# %% tags=["parameters"]
eps = [1, 8]
dataset = None  # None: "digits" at demo scale, "cifar10" at paper scale
models = None  # None: "tiny-convnext" at demo scale, both encoders at paper scale
methods = ["self-aug", "mix-self"]
seeds = None  # None: three seeds
epochs = None  # None: the scale's
batch_size = None
learning_rates = None  # in units of 1/C; None: the scale's grid
scale = "demo"

# %% tags=["hide-input"]
grids.check_scale(scale, dataset)
cells = grids.changed_cells(
    grids.methods_grid(
        scale,
        dataset=dataset,
        models=models or (["tiny-convnext"] if scale == "demo" else None),
        methods=methods,
        eps=eps,
        seeds=range(3) if scale == "demo" and seeds is None else seeds,
        epochs=epochs,
        batch_size=batch_size,
        learning_rates=learning_rates,
    ),
    None,
    redraw=True,  # views at every step, as in Algorithm 1: what the twin in JAX trains on
)
f"{counted(len(cells), 'run')} in each framework: every encoder × method × ε × learning rate × seed"

# %% [markdown]
# ## How jax-privacy sees a view
#
# `jax_privacy.clipped_grad` clips the gradient of a loss for each entry of the batch axis. With `keep_batch_dim=False` an entry may have an axis of its
# own. Here that axis holds the $K$ views of one example, and the loss is their mean:
#
# ```python
# def loss(params, views):           # of one example: features [K, D], targets [K, classes]
#     features, targets = views
#     return softmax_cross_entropy(features @ params["weights"].T + params["biases"], targets).mean()
#
# clipped_grad(loss, l2_clip_norm=C, batch_argnums=1, keep_batch_dim=False)
# ```
#
# The gradient of a mean is the mean of the gradients, so the average stands before the clip ({doc}`Why the sensitivity stays C </sensitivity>`), and mixtures enter as nothing but
# further rows of `features` and `targets`. Batches, views and features are made by `dpmix` for both frameworks; draws are keyed, so they are equal. The
# weights start at zero. What remains different is the noise, of course, and rounding. A test trains both without noise and finds the same head.

# %%
in_jax = jax_peer.run_cells(cells)
in_torch = grids.run_cells(cells)
report.provenance_note(in_jax, scale)

# %% [markdown]
# ## Published, demo
#
# Test accuracy in percent, mean (standard deviation) over the n seeds; the paper has medians. The learning rate was chosen on a validation split, for each framework by
# itself.

# %% tags=["hide-input"]
runs = pd.concat([in_jax.assign(framework="JAX"), in_torch.assign(framework="PyTorch")], ignore_index=True)
by = ["framework", "dataset", "model", "method", "epsilon"]
chosen = evidence.choose(runs, by)
published = paper.table(11).assign(framework="JAX")
found = report.Sources(published, evidence.chosen("table11", by), chosen, scale)
report.tables(found, split=("framework", "dataset", "model"))

# %% tags=["hide-input"] mystnb={"image": {"alt": "Test accuracy of Self-Aug and DP-MixSelf, published in JAX, measured in JAX and in PyTorch, a panel each"}}
plots.accuracy_plot(found, split=("framework", "dataset", "model"))

# %% [markdown]
# *Means (published: medians) with bars of one standard deviation over the seeds; a panel a source and framework, each with a scale of its own. JAX and
# PyTorch share the batches and the views of a seed; the rest of their difference is noise.*
#
# ## What holds, and what does not
#
# DP-MixSelf less Self-Aug in points, averaged over ε within a seed ({doc}`The rule of decision, and what is ours </deviations>` states the rule).

# %% tags=["hide-input"]
verdicts.page(found, [Comparison("mix-self", "self-aug")], per=("framework",))

# %% [markdown]
# ## The same clipped sum
#
# For equal weights and views both frameworks must agree on the clipped sum, the only thing that the noise is laid over. This cell draws random features
# of four views, lets the clip bite, and shows the largest relative difference of an entry between the two.

# %% tags=["hide-input"]
draw, (b, K, dim, classes) = rng.generator(0, "compare"), (32, 4, 64, 10)
features, logits, weights, biases = (
    torch.from_numpy(draw.standard_normal(shape)).float()
    for shape in ((b, K, dim), (b, K, classes), (1, classes, dim), (1, classes))
)
targets, head = logits.softmax(-1), (weights, biases, torch.tensor([0.5]))
mean = torch.full((1, K), 1 / K)
wanted = clipping.clipped_head_sums(features, targets, *head, mean)
one_by_one = jax_peer.clipped_head_sums(
    features.flatten(0, 1)[:, None], targets.flatten(0, 1)[:, None], *head, torch.ones(1, 1)
)
found = {
    "views averaged, then clipped": jax_peer.clipped_head_sums(features, targets, *head, mean),
    "views one by one": [total / K for total in one_by_one],
}
off = {
    name: [float((t - w).abs().max() / w.abs().max()) for t, w in zip(sums, wanted, strict=False)]
    for name, sums in found.items()
}
pd.DataFrame.from_dict(off, orient="index", columns=["weights", "biases"]).style.format("{:.0e}")

# %% [markdown]
# `views one by one` is the negative control: clipping every view by itself and averaging afterwards gives another sum, and a sensitivity that no longer
# rests on one clip.
#
# ## The same noise multiplier
#
# Each framework asked an accountant of its own: PyTorch Opacus' RDP accountant, JAX that of `dp_accounting`, as `jax-privacy` sets it up. They use different orders of
# the Rényi divergence, so the last digits differ.

# %% tags=["hide-input"]
report.Tables((name, report.privacy_table(part)) for name, part in chosen.groupby("framework", sort=False))

# %% [markdown]
# ## Run it again
#
# ```console
# $ pip install 'dpmix[jax]'
# $ papermill notebooks/table11.ipynb out.ipynb -p eps 2
# ```
#
# Without the extra the page stops with a line that says so. At `scale="paper"` it trains heads on the paper's frozen encoders; a WRN-16-4 in JAX is not
# part of this project.
