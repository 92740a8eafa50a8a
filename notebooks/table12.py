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
# # Table 12: Pure-DP-MixDiff, and what it means
#
# Pure-DP-MixDiff is DP-MixDiff {cite:p}`bao2023dpmix` with $K_\text{base} = 0$. The pool that its mixtures are drawn from then holds public images only. The paper runs it on CIFAR-100 to show
# what the base views are good for, and finds it *above* Self-Aug {cite:p}`de2022unlocking` and below DP-MixSelf and DP-MixDiff.
#
# Stop for a moment at what that is. **No private pixel and no private label enters any view.** Of the private
# data only the number of examples matters: it says how many positions there are that may join a step, and each position has random draws of its own. A model trained in this way knows
# nothing of the private images. Clipping and noise then protect nothing, and only cost accuracy. So the
# fair line beside it is to train **on the public images alone, without noise**, for as long as one likes: it has no privacy cost at all. The paper does not show that line. This page does.

# %% tags=["parameters"]
eps = 1
dataset = None  # None: "digits" at demo scale, "cifar100" at paper scale
model = None  # None: "tiny-convnext", or "vit-b-16" at paper scale
seeds = None  # None: three seeds
epochs = None  # None: the scale's
batch_size = None
learning_rates = None  # in units of 1/C; None: the scale's grid
longer = 10  # how many times as long the last line trains on the public images, with one view of each
scale = "demo"  # "demo": two CPU cores; "paper": the paper's settings, a GPU

# %% [markdown]
# ## The claim, in code
#
# One clipped sum of gradients, over 64 private examples, by a head with random weights. Then the same with *all* private pixels replaced by noise and all labels changed. The
# positions of the examples, and so the random draws, stay.

# %% tags=["hide-input"]
from dataclasses import replace

import pandas as pd
import torch
from myst_nb import glue

from dpmix import models
from dpmix.companion import grids, paper, plots, report
from dpmix.core import clipping, rng, views
from dpmix.images import data
from dpmix.runs import experiments

demo = scale == "demo"
dataset = dataset or ("digits" if demo else "cifar100")
model = model or ("tiny-convnext" if demo else "vit-b-16")
grids.check_scale(scale, dataset)
encoder = models.encoder(paper.ENCODERS.get(model, model))
train = data.load(dataset).train
public = data.public_images(dataset, like=train)
ids = torch.arange(64)
draw = rng.generator(0, "table12")
weights = torch.from_numpy(draw.standard_normal((1, train.num_classes, encoder.dim))).float()
other_images = torch.from_numpy(draw.integers(0, 256, train.images[ids].shape, dtype="uint8"))
other_labels = (train.labels[ids] + 1) % train.num_classes


def clipped_sum(recipe, images, labels):
    made = views.make_views(images, labels, ids, recipe, num_classes=train.num_classes, seed=0, step=0, public=public)
    features = encoder.features(made.images.flatten(0, 1)).unflatten(0, made.images.shape[:2])
    one = torch.ones(1)
    return clipping.clipped_head_sums(
        features,
        made.targets,
        weights,
        torch.zeros(1, train.num_classes),
        one,
        one.expand(1, recipe.views) / recipe.views,
    )


rows = {}
for method in ("self-aug", "mix-self", "mix-diff", "pure-mix-diff"):
    recipe = grids.recipe(method, dataset).for_data(train.flip)
    before = clipped_sum(recipe, train.images[ids], train.labels[ids])
    after = clipped_sum(recipe, other_images, other_labels)
    moved = (after.weights - before.weights).norm().item()
    rows[report.label(method)] = {
        "length of the clipped sum": f"{before.weights.norm().item():.2f}",
        "moves by": "0, not a bit" if torch.equal(after.weights, before.weights) else f"{moved:.2f}",
    }
    assert (moved == 0) == (method == "pure-mix-diff"), "the argument of this page does not hold"
pd.DataFrame(rows).T

# %% [markdown]
# ## The runs
#
# To the four rows of the paper come three that train on the public images alone, with neither clipping nor noise: with the same views as Pure-DP-MixDiff, with 16 augmentations, and
# with one augmentation, but longer. Their learning rate is chosen on held-out *public* images, so that
# not even this choice looks at private data.

# %% tags=["hide-input"]
METHODS = ["self-aug", "mix-self", "mix-diff", "pure-mix-diff"]
ALONE = {
    "pure-mix-diff": "public only, same views",
    "self-aug": "public only, augmented",
}
common = dict(
    dataset=dataset,
    models=model,
    seeds=seeds,
    epochs=epochs,
    batch_size=batch_size,
    learning_rates=learning_rates,
)
private = grids.methods_grid(scale, methods=METHODS, eps=eps, **common)
# epsilon=None: no noise. A clip norm that no gradient reaches: no clipping.
plain = dict(train_on="synthetic", epsilon=None, clip_norm=1e9)
alone = [
    grids.Cell({**cell.labels, "method": ALONE[cell.labels["method"]]}, replace(cell.spec, **plain))
    for cell in private
    if cell.labels["method"] in ALONE
]
if longer:
    ALONE["longer"] = f"public only, {longer:g} times as long"
    alone += [
        grids.Cell(
            {**cell.labels, "method": ALONE["longer"]},
            replace(cell.spec, epochs=longer * cell.spec.epochs, recipe=views.Recipe(k_base=1), **plain),
        )
        for cell in private
        if cell.labels["method"] == "self-aug"
    ]
glue("table12_eps", f"{eps:g}", display=False)
f"{len(private)} private runs and {len(alone)} on the public images alone"

# %%
runs = grids.run_cells(private + alone)
report.provenance_note(runs, scale)

# %% [markdown]
# ## Published beside measured
#
# Test accuracy on private test images, of the last step, in percent: mean (standard deviation) over the seeds.

# %% tags=["hide-input"]
by = ["dataset", "method"]
chosen = experiments.choose_learning_rate(runs, by)
measured = report.summary(chosen, by)
order = [*METHODS, *ALONE.values()]
measured = measured.sort_values("method", key=lambda names: names.map(order.index)).reset_index(drop=True)
published = paper.table(12)
means = published.set_index("method")["mean"]
glue("table12_gain", f"{means['mix-diff'] - means['self-aug']:.1f}", display=False)
glue("table12_free", f"{means['pure-mix-diff'] - means['self-aug']:.1f}", display=False)
glue("table12_n", int(measured["n"].min()), display=False)
parts = {"published": published, "measured here": measured}
table = pd.concat({source: report.block(part, columns=("dataset",)) for source, part in parts.items()}, axis=1)
table.reindex([report.label(m) for m in order]).fillna("–")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Bars of test accuracy for the private methods, published and measured, and for training on the public images alone"}}
plots.bar_plot({"CIFAR-100, published": published, f"{report.label(dataset)}, measured here": measured})

# %% [markdown]
# *Test accuracy, published for the four private methods and measured for these and for training on the public images alone: mean over {glue:text}`table12_n` seeds, with bars of one standard
# deviation.*
#
# ## What the private images add

# %% tags=["hide-input"]
rivals = list(ALONE.values())
pairs = [
    ("pure-mix-diff", "self-aug"),
    ("mix-self", "pure-mix-diff"),
    ("mix-diff", "pure-mix-diff"),
    (rivals[0], "pure-mix-diff"),
    *[(method, rivals[-1]) for method in ("self-aug", "mix-self", "mix-diff")],
]
differences = report.paired(chosen, pairs, by=("dataset",))
report.show_gaps(differences, published, pairs)

# %% [markdown]
# *Differences in points: published, and measured by pairs of the same seed with a 95 % interval by Student's t over the seeds. The fourth row is the price of clipping and noise where they
# protect nothing; the last rows are what private training brings beyond the public images.*
#
# ## What agrees, and what does not

# %% tags=["hide-input"]
report.agreement(differences, report.published_gaps(published, pairs, by=("dataset",)))

# %% [markdown]
# Two things follow from the published rows and this page, whatever the demo finds:
#
# - On CIFAR-100 at this budget, views without any private pixel beat Self-Aug. An accuracy that *no* private image contributed to is higher than that of a private method that uses all of
#   them. The public images are that good, or the budget is that tight.
# - Of the {glue:text}`table12_gain` points that DP-MixDiff gains over Self-Aug, {glue:text}`table12_free` can be had without looking at a private image, and for no budget at all. DP-MixSelf
#   uses no public image; what it gains, it gains from the private ones.
#
# Which way it goes on other data depends on how near the public images are to the private ones ({doc}`table8`), on how many private images there are, and on ε.
#
# The demo's public images are digits that a small diffusion model drew from printed fonts ({doc}`/data_and_models`); the private ones are handwritten.
#
# ## Learning rates, privacy, cost

# %% tags=["hide-input"]
rates = chosen.assign(epsilon=eps, clip_norm=chosen["clip_norm"].clip(upper=1.0))
report.chosen_rates(rates, sorted(set((rates["learning_rate"] * rates["clip_norm"]).round(10))))

# %% [markdown]
# *In units of 1/C, or as they are where nothing is clipped. A star marks an end of the grid. The runs on public images alone are listed under ε = {glue:text}`table12_eps` too, but have no noise: with
# respect to the private data they have ε = 0.*

# %% tags=["hide-input"]
report.privacy_table(chosen[chosen["train_on"] == "all"])

# %% tags=["hide-input"]
report.cost_table(runs)

# %% [markdown]
# ## Run it again
#
# ```console
# $ papermill notebooks/table12.ipynb out.ipynb -p eps 8
# $ papermill notebooks/table12.ipynb out.ipynb -y "{longer: 50, seeds: [0, 1, 2, 3, 4]}"
# $ papermill notebooks/table12.ipynb out.ipynb -p scale paper
# ```
