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
# Pure-DP-MixDiff is DP-MixDiff {cite:p}`Bao-2023` with $K_\text{base} = 0$. The pool that its mixtures are drawn from then holds public images only. The paper runs it on CIFAR-100 to show
# what the base views are good for, and finds it *above* Self-Aug {cite:p}`De-2022` and below DP-MixSelf and DP-MixDiff.
#
# Stop for a moment at what that is. **No private pixel and no private label enters any view.** Of the private
# data only the number of examples matters: it says how many positions there are that may join a step, and each position has random draws of its own. A model trained in this way knows
# nothing of the private images. Clipping and noise then protect nothing, and only cost accuracy. So the
# fair line beside it is to train **on the public images alone, without noise**, for as long as one likes: it has no privacy cost at all. The paper does not show that line. This page does.

# %% tags=["hide-input"]
import pandas as pd
import torch
from IPython.display import Markdown

from dpmix import models
from dpmix.companion import evidence, grids, ledger, paper, plots, report, verdicts
from dpmix.companion.verdicts import Comparison
from dpmix.core import clipping, rng, views
from dpmix.core.checks import counted
from dpmix.images import data

ledger.status("table12")

# %% tags=["parameters"]
eps = 1
dataset = (
    None  # None: "digits" at demo scale, "cifar10" at laptop scale (the only one with D), "cifar100" at paper scale
)
model = None  # None: "tiny-convnext" at demo scale, "vit-b-16" at paper scale
seeds = None  # None: the scale's
epochs = None  # None: the scale's
batch_size = None
learning_rates = None  # in units of 1/C; None: the scale's grid
longer = 10  # how many times as long the last line trains on the public images, with one view of each
scale = "demo"  # "demo" | "laptop": real data, hours on two cores | "paper": the paper's settings, a GPU
download = False  # let torchvision fetch what is missing at laptop or paper scale

# %% [markdown]
# ## The claim, in code
#
# One clipped sum of gradients, over 64 private examples, by a head with random weights. Then the same with *all* private pixels replaced by noise and all labels changed. The
# positions of the examples, and so the random draws, stay.

# %% tags=["hide-input"]
dataset = dataset or {"demo": "digits", "laptop": "cifar10", "paper": "cifar100"}[scale]
model = model or {"demo": "tiny-convnext", "paper": "vit-b-16"}.get(scale, grids.preset(scale, dataset).models[0])
grids.check_scale(scale, dataset, download)
encoder = models.encoder(paper.ENCODERS.get(model, model), image_size=grids.preset(scale, dataset).image_size)
train = data.load(dataset).train
public = data.public_images(dataset, like=train)
ids, one, zero = torch.arange(64), torch.ones(1), torch.zeros(1, train.num_classes)
draw = rng.generator(0, "table12")
weights = torch.from_numpy(draw.standard_normal((1, train.num_classes, encoder.dim))).float()
noise = torch.from_numpy(draw.integers(0, 256, train.images[ids].shape, dtype="uint8"))
rows = {}
for method in grids.PURE:
    recipe, sums = grids.recipe(method, dataset).for_data(train.flip), []
    for images, shift in ((train.images[ids], 0), (noise, 1)):
        example = images, (train.labels[ids] + shift) % train.num_classes, ids, recipe
        made = views.make_views(*example, num_classes=train.num_classes, seed=0, step=0, public=public)
        features = encoder.features(made.images.flatten(0, 1)).unflatten(0, made.images.shape[:2])
        even = one.expand(1, recipe.views) / recipe.views
        sums.append(clipping.clipped_head_sums(features, made.targets, weights, zero, one, even).weights)
    moved = (sums[1] - sums[0]).norm().item()
    if (moved == 0) != (method == "pure-mix-diff"):
        raise RuntimeError(f"{method}: the clipped sum moves by {moved:.2g}; the argument of this page does not hold")
    rows[report.label(method)] = {
        "length of the clipped sum": f"{sums[0].norm().item():.2f}",
        "moves by": f"{moved:.2f}" if moved else "0, not a bit",
    }
pd.DataFrame(rows).T

# %% [markdown]
# ## The runs
#
# To the four rows of the paper come three that train on the public images alone, with neither clipping nor noise: with the same views as Pure-DP-MixDiff, with 16 augmentations, and
# with one augmentation, but longer. Their learning rate is chosen on held-out *public* images, so that
# not even this choice looks at private data.

# %% tags=["hide-input"]
cells = grids.pure_grid(
    scale,
    longer=longer,
    dataset=dataset,
    models=model,
    eps=eps,
    seeds=seeds,
    epochs=epochs,
    batch_size=batch_size,
    learning_rates=learning_rates,
)
order = list(dict.fromkeys(c.labels["method"] for c in cells))
private = sum(c.spec.train_on == "all" for c in cells)
f"{counted(private, 'private run')} and {len(cells) - private} on the public images alone"

# %%
runs = grids.run_cells(cells)
report.provenance_note(runs, scale)

# %% [markdown]
# ## Published, real data, demo
#
# Test accuracy on private test images, of the last step, in percent: mean (standard deviation) over the n seeds.

# %% tags=["hide-input"]
by = ["dataset", "model", "method"]


def budget(runs):
    """What has no noise stands under the budget of the others."""
    return runs.assign(epsilon=runs["epsilon"].fillna(runs["epsilon"].max()))


chosen = evidence.outcomes(budget(evidence.choose(runs, by)))
found = report.Sources(paper.table(12), budget(evidence.chosen("table12", by)), chosen, scale)
report.tables(found)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Test accuracy of the private methods and of training on the public images alone, a panel a source"}}
plots.point_plot(found)

# %% [markdown]
# *Test accuracy of the four private methods, and of training on the public images alone: means over the seeds, with bars of one standard
# deviation, a panel a source, each with a scale of its own.*
#
# ## What holds, and what does not
#
# Differences in points on the same draws; all rows of a table are one family ({doc}`The rule of decision, and what is ours </deviations>` states the rule). The fourth row is the price of clipping and noise where they
# protect nothing; the last rows are what private training brings beyond the public images, which the paper does not ask.

# %% tags=["hide-input"]
pairs = [
    Comparison("pure-mix-diff", "self-aug"),
    Comparison("mix-self", "pure-mix-diff"),
    Comparison("mix-diff", "pure-mix-diff"),
    Comparison(grids.PUBLIC_ONLY["pure-mix-diff"], "pure-mix-diff"),
    *[Comparison(method, order[-1]) for method in ("self-aug", "mix-self", "mix-diff")],
]
verdicts.page(found, pairs)

# %% tags=["hide-input"]
means = paper.table(12).set_index("method")["mean"]
Markdown(
    f"""Two things follow from the published rows and the argument above:

- In the paper's table, on CIFAR-100 at this budget, views without any private pixel beat Self-Aug. There an accuracy that *no* private image contributed to is higher than that of a private method that uses all of
  them. The public images are that good, or the budget is that tight.
- Of the {means["mix-diff"] - means["self-aug"]:.1f} points that DP-MixDiff gains there over Self-Aug, {means["pure-mix-diff"] - means["self-aug"]:.1f} can be had without looking at a private image, and for no budget at all. DP-MixSelf
  uses no public image; what it gains, it gains from the private ones.

On real data, CIFAR-10 with images of Stable Diffusion, it is the other way round: see the rows above."""
)

# %% [markdown]
# Which way it goes on other data depends on how near the public images are to the private ones ({doc}`Table 8: how far are the synthetic images from the data? <table8>`), on how many private images there are, and on ε.
#
# The demo's public images are digits that a small diffusion model drew from printed fonts ({doc}`Data and models </data_and_models>`); the private ones are handwritten.
#
# ## Learning rates, privacy, cost
#
# In units of 1/C, or as they are where nothing is clipped. A star marks an end of the grid. The runs on public images alone have no noise: with
# respect to the private data they have ε = 0.

# %% tags=["hide-input"]
report.chosen_rates(found)

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
# $ papermill notebooks/table12.ipynb out.ipynb -p scale laptop
# $ papermill notebooks/table12.ipynb out.ipynb -p scale paper
# ```
