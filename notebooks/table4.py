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
# # Table 4: other transformations
#
# DP-MixSelf mixes views of *one* example and keeps its label. So it could be seen as one more transformation of a single image, and the paper asks: would another
# one do as well? Table 4 adds six well-known ones (those of SimCLR {cite:p}`Chen-2020`, among them cutout {cite:p}`DeVries-2017`) to the crop and flip of Self-Aug
# {cite:p}`De-2022`, and all of them together, one drawn at random for each view. There are 16 views of each example in every row but the last: DP-MixSelf
# {cite:p}`Bao-2023` has 18 mixtures on top.
#
# What the paper claims: none of them reaches DP-MixSelf. A few help a little, others hurt, and the Sobel filter, which replaces an image by its edges, ruins the
# training.

# %% tags=["hide-input"]
from dataclasses import replace

import torch

from dpmix.companion import evidence, grids, ledger, paper, plots, report, verdicts
from dpmix.companion.verdicts import Comparison
from dpmix.core import views
from dpmix.core.checks import counted
from dpmix.images import data

ledger.status("table4")

# %% tags=["parameters"]
eps = 1
dataset = None  # None: "digits" at demo scale, "cifar10" else; "cifar100" is in the paper too
model = None  # None: "tiny-convnext" at demo scale, "vit-b-16" at paper scale
transforms = ["jitter", "affine", "cutout", "noise", "blur", "sobel", "all"]
seeds = None  # None: the scale's
epochs = None  # None: the scale's
batch_size = None
learning_rates = None  # in units of 1/C; None: the scale's grid
scale = "demo"  # "demo" | "laptop": real data, hours on two cores | "paper": the paper's settings, a GPU
download = False  # let torchvision fetch what is missing at laptop or paper scale

# %% tags=["hide-input"]
grids.check_scale(scale, dataset, download)
preset = grids.preset(scale, dataset)
transforms = grids.many(transforms, [], "transforms")
others = [f"self-aug+{t}" for t in transforms]
cells = grids.methods_grid(
    scale,
    dataset=dataset,
    models=model or {"demo": "tiny-convnext", "paper": "vit-b-16"}.get(scale),
    methods=["self-aug", *others, "mix-self"],
    eps=eps,
    seeds=seeds,
    epochs=epochs,
    batch_size=batch_size,
    learning_rates=learning_rates,
)
f"{counted(len(cells), 'run')}: every transformation × learning rate × seed"

# %% [markdown]
# All rows of a seed train in one pass, on the same random batches and the same crops; what is added to a crop is drawn apart.

# %%
runs = grids.run_cells(cells)
report.provenance_note(runs, scale)

# %% [markdown]
# ## Published, real data, demo
#
# Test accuracy of the last step in percent, mean (standard deviation) over the n seeds. The learning rate of each row is the one with the best mean accuracy on a
# validation split.

# %% tags=["hide-input"]
by = ["dataset", "model", "method", "epsilon"]
chosen = evidence.outcomes(evidence.choose(runs, by))
published = paper.table(4)
plain = published["transform"] == "crop-flip"
published["method"] = published["method"].where(plain, published["method"] + "+" + published["transform"])
found = report.Sources(published, evidence.chosen("table4", by), chosen, scale)
report.tables(found)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Test accuracy of Self-Aug with each transformation and of DP-MixSelf, a panel a source and data set"}}
plots.point_plot(found)

# %% [markdown]
# *Test accuracy of Self-Aug with each transformation and of DP-MixSelf: means over the seeds, with bars of one standard deviation, a panel a source, each with a scale of its own.*
#
# ## What holds, and what does not
#
# Differences in points on the same draws; all rows of a table are one family ({doc}`The rule of decision, and what is ours </deviations>` states the rule).

# %% tags=["hide-input"]
pairs = [Comparison("mix-self", m) for m in ("self-aug", *others)] + [Comparison(m, "self-aug") for m in others]
verdicts.page(found, pairs)

# %% [markdown]
# A word on fairness: DP-MixSelf averages 34 views and the other rows 16. The paper's Table 5 answers that more views of the same kind do not help Self-Aug
# ({cite:t}`De-2022` say so too).
#
# ## Strengths
#
# The paper does not state how strong its transformations are, and results depend on it. These are ours, in `dpmix.core.augmentations`; where the source has a value for
# images of CIFAR's size, it is that one.
#
# | Transformation | Strength here |
# |---|---|
# | colour jitter | brightness, contrast, saturation times 0.6 to 1.4, hue by up to a tenth of the circle; on grey images brightness and contrast only |
# | affine | rotation by up to 15°, translation by up to a tenth of the side |
# | cutout | one square of a quarter of the side, in the mean colour of the image |
# | Gaussian noise | standard deviation 0.1 for pixels in 0 to 1 |
# | Gaussian blur | a window of a tenth of the side, at least 3 pixels; σ from 0.1 to 2 pixels, on sides below 32 up to a sixteenth of the side |
# | Sobel | magnitude of the gradient in place of the image |
# | all | one of these six, drawn for each view |
#
# Here is what they do to one example, six views each:

# %% tags=["hide-input"] mystnb={"image": {"alt": "Six views of one training example under each transformation, a row a transformation"}}
train, ids = data.load(preset.dataset).train, torch.tensor([0])
recipe = views.Recipe(k_base=6).for_data(train.flip)
sheet = []
for name in [recipe.transform, *(f"{recipe.transform}+{t}" for t in transforms)]:
    one = train.images[ids], train.labels[ids], ids, replace(recipe, transform=name)
    made = views.make_views(*one, num_classes=train.num_classes, seed=0, step=0)
    sheet.append((name.replace("-", " and ").replace("+", ", then "), made.images[0], [""] * 6))
plots.picture_rows(sheet)

# %% [markdown]
# *Six views of one training example under each transformation.*
#
# ## Learning rates, privacy, cost
#
# Learning rates in units of 1/C, as validation chose them; a star marks an end of the grid, where a wider grid might do better.

# %% tags=["hide-input"]
report.chosen_rates(found)

# %% tags=["hide-input"]
report.privacy_table(chosen)

# %% tags=["hide-input"]
report.cost_table(runs)

# %% [markdown]
# ## Run it again
#
# ```console
# $ papermill notebooks/table4.ipynb out.ipynb -p epochs 10
# $ papermill notebooks/table4.ipynb out.ipynb -y "{transforms: [blur, cutout], seeds: [0, 1, 2, 3, 4]}"
# $ papermill notebooks/table4.ipynb out.ipynb -p scale laptop -p dataset cifar10
# $ papermill notebooks/table4.ipynb out.ipynb -p scale paper -p dataset cifar100
# ```
