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
# # Table 6: pretrain on the synthetic images, or mix them in?
#
# DP-MixDiff has synthetic images that other methods do not have. Is it the images that help, or the way they are used? Table 6 of the paper sets
# DP-MixDiff against the plain alternative: train on the synthetic images first, with ordinary SGD and no noise (they are public), then fine-tune on the private images
# with DP-SGD. On Caltech-256 the paper finds that this is about ten points worse.
#
# The paper does not say which views the private part takes after pretraining. Here are two answers, **Self-Aug** {cite:p}`De-2022` and **DP-MixSelf**
# {cite:p}`Bao-2023`. Beside them stand the same two methods without pretraining, which shows what pretraining itself does, and the pretrained head as it is, **without a
# single private image**: where that line is close to the others, the private training has done little.

# %% tags=["hide-input"]
import pandas as pd

from dpmix.companion import evidence, grids, ledger, paper, plots, report, verdicts
from dpmix.companion.verdicts import Comparison
from dpmix.core.checks import counted

ledger.status("table6")

# %% tags=["parameters"]
eps = 2
dataset = (
    None  # None: "digits" at demo scale, "cifar10" at laptop scale (the only one with D), "caltech256" at paper scale
)
models = None  # None: "tiny-convnext" in the demo, to stay within a minute or two; else the encoders of the scale
pretrain_epochs = 10  # of plain SGD on the synthetic images
seeds = None  # None: the scale's
epochs = None  # of the private training; None: the scale's
batch_size = None  # the expected batch size B; None: the scale's
learning_rates = None  # of the private training, in units of 1/C; None: the scale's grid
scale = "demo"  # "demo" | "laptop": real data, hours on two cores | "paper": the paper's settings, a GPU
download = False  # let torchvision fetch what is missing at laptop or paper scale

# %% tags=["hide-input"]
dataset = dataset or ("caltech256" if scale == "paper" else None)
grids.check_scale(scale, dataset, download)
cells, heads = grids.pretraining_grid(
    scale,
    pretrain_epochs=pretrain_epochs,
    dataset=dataset,
    eps=eps,
    models=models or ("tiny-convnext" if scale == "demo" else None),
    seeds=seeds,
    epochs=epochs,
    batch_size=batch_size,
    learning_rates=learning_rates,
)
f"{counted(len(cells), 'private run')}, {len(heads)} on the synthetic images alone"

# %%
runs = grids.run_cells(cells)
public = grids.run_cells(heads)
report.provenance_note(pd.concat([runs, public]), scale)

# %% [markdown]
# The pretrained head is the very one that the private runs start from; it has cost nothing.
#
# ## Published, real data, demo
#
# Test accuracy of the last step in percent, mean (standard deviation) over the n seeds; the learning rate of the private training is chosen on a validation split.
# The paper's block is Caltech-256, 257 classes and few images of each, where synthetic images matter most. Levels do not compare.

# %% tags=["hide-input"]
by = ["dataset", "model", "method", "epsilon"]
order = [grids.ALONE, "self-aug", grids.PRETRAINED["self-aug"], "mix-self", grids.PRETRAINED["mix-self"], "mix-diff"]


def arranged(runs):
    """All rows in one order; the pretrained head stands under the budget of the others."""
    rows = runs.assign(epsilon=runs["epsilon"].fillna(runs["epsilon"].max()))
    return rows.sort_values("method", key=lambda s: s.map(order.index), kind="stable").reset_index(drop=True)


chosen = evidence.outcomes(arranged(evidence.choose(pd.concat([runs, public], ignore_index=True), by)))
real = arranged(evidence.chosen("table6", by))
found = report.Sources(paper.table(6), real, chosen, scale)
report.tables(found)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Test accuracy with and without pretraining on synthetic images and of DP-MixDiff, a panel a source and encoder"}}
plots.point_plot(found)

# %% [markdown]
# *A panel a source and encoder, each with a scale of its own; bars of one standard deviation over the seeds.*
#
# ## What holds, and what does not
#
# Differences in points on the same draws; all rows of a table are one family ({doc}`The rule of decision, and what is ours </deviations>` states the rule). The paper's one comparison is the first two rows'; the others are *higher* or *lower*.

# %% tags=["hide-input"]
after = grids.PRETRAINED
twice = pd.concat(
    found.published.replace({"method": {"synthetic-pretraining": name}}) for name in after.values()
).drop_duplicates()
pairs = [
    *[Comparison("mix-diff", name) for name in after.values()],
    *[Comparison(name, method) for method, name in after.items()],
    Comparison(after["self-aug"], grids.ALONE),
    Comparison("mix-diff", "mix-self"),
]
verdicts.page(found._replace(published=twice), pairs)

# %% [markdown]
# Two things make the comparison milder in the demo than in the paper. A head on digits has ten classes with over a hundred private examples each, so the private
# images alone teach nearly all there is to learn. And the start costs nothing in privacy: a few noisy steps from a decent head can be better than the same steps from
# zero, as long as the two domains are not too far apart ({doc}`Table 8: how far are the synthetic images from the data? <table8>` measures how far).
#
# ## Learning rates and privacy
#
# In units of 1/C, as chosen on the validation split; a star marks an end of the grid. The choice looks at private validation data without noise and is not part of
# the guarantee ({doc}`Limits </limits>`). Pretraining has a fixed rate of 1 and neither noise nor clipping, since it sees no private image.

# %% tags=["hide-input"]
private = chosen[chosen["method"] != grids.ALONE]
report.chosen_rates(found._replace(made=private))

# %% tags=["hide-input"]
report.privacy_table(private)

# %% [markdown]
# ## Run it again
#
# ```console
# $ papermill notebooks/table6.ipynb out.ipynb -p pretrain_epochs 40
# $ papermill notebooks/table6.ipynb out.ipynb -y "{eps: 1, seeds: [0, 1, 2, 3, 4]}"
# $ papermill notebooks/table6.ipynb out.ipynb -p scale laptop
# $ papermill notebooks/table6.ipynb out.ipynb -p scale paper -p dataset caltech256
# ```
#
# The last one needs the data set, the encoders' weights and synthetic images on disk, and a GPU: see {doc}`Running at paper scale </paper_scale>`. Without them it stops at once and says
# what to put where.
