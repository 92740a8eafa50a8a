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
# # Table 10: how good could public images be?
#
# DP-MixDiff mixes private images with synthetic ones. The best synthetic images imaginable would look as if drawn from the private
# distribution itself. Table 10 of the paper measures how far that would carry. The training set is split at random into two halves S1 and S2:
#
# - **A**: DP-MixSelf on S1, with no public images.
# - **B**: DP-MixDiff on S1, with synthetic images D in the mixtures.
# - **C**: DP-MixDiff on S1, with S2 in place of D. S2 is *assumed* to be public, so it costs no privacy; it is an experiment, not a method.
#
# C bounds what better synthetic images could bring to B. The paper finds C ahead of A where classes are many, and no gain on CIFAR-10 and EuroSAT; B follows, and falls behind A on
# EuroSAT, whose synthetic images are far from the real ones.

# %% tags=["parameters"]
eps = 2  # one number or a list
dataset = None  # None: "digits" at demo scale, "cifar10" at paper scale
models = None  # None: both encoders of the scale
seeds = None  # None: three seeds; each has halves of its own
epochs = None  # None: the scale's
batch_size = None  # the expected batch size B; None: the scale's
learning_rates = None  # in units of 1/C; None: the scale's grid
scale = "demo"  # "demo": two CPU cores; "paper": the paper's settings, a GPU

# %% tags=["hide-input"]
from IPython.display import Markdown
from myst_nb import glue

from dpmix.companion import grids, paper, plots, report
from dpmix.images import data
from dpmix.runs import experiments, passes

grids.check_scale(scale, dataset)
preset = grids.preset(scale, dataset)
wanted = {
    "eps": eps,
    "models": models,
    "seeds": seeds,
    "epochs": epochs,
    "batch_size": batch_size,
    "learning_rates": learning_rates,
}
# Method A needs no public images: it names the same ones as B, so that one pass trains both.
variants = {"A": ("mix-self", "synthetic-half"), "B": ("mix-diff", "synthetic-half"), "C": ("mix-diff", "half-2")}
cells = [
    grids.Cell({**cell.labels, "method": name}, cell.spec)
    for name, (method, public) in variants.items()
    for cell in grids.methods_grid(
        scale, dataset=preset.dataset, methods=[method], train_on="half-1", public=public, **wanted
    )
]
f"{len(cells)} runs: every variant × encoder × ε × learning rate × seed"

# %%
runs = grids.run_cells(cells)
report.provenance_note(runs, scale)

# %% tags=["hide-input"]
size = 224 if preset.dataset in passes.SCALED else None  # decoded for a pass already
train = data.load(preset.dataset, image_size=size).train
half = -(-len(train) // 2)
synthetic = min(half, len(data.public_images(preset.dataset, like=train)))
Markdown(
    f"S1 has {half:,} images, of which a validation share of {preset.validation:.0%} only serves to choose the learning rate; S2 has {len(train) - half:,}, and D {synthetic:,}. "
    + (
        "D is as large as S1, as in the paper: a random part of the synthetic images, another for every seed."
        if synthetic == half
        else "In the paper D is as large as S1. Here there are fewer synthetic images than that, which is a handicap for B."
    )
)

# %% [markdown]
# ## Published beside measured
#
# Test accuracy of the last step in percent, mean (standard deviation) over the seeds; the learning rate of every row is chosen on the validation split. Training is on
# half of the data, so the levels lie below those of {doc}`table3`.

# %% tags=["hide-input"]
chosen = experiments.choose_learning_rate(runs, ["model", "method", "epsilon"])
measured = report.summary(chosen, ["model", "method", "epsilon"])
published = paper.table(10)
published["method"] = published["variant"]
here = f"{report.label(preset.dataset)} here"
rows = {"rows": ("dataset",), "columns": ("model", "method")}
glue("table10_n", int(measured["n"].min()), display=False)
report.block(published, **rows)

# %% [markdown]
# *Published, at ε = 2.*

# %% tags=["hide-input"]
report.block(measured.assign(dataset=preset.dataset), rows=("dataset", "epsilon"), columns=("model", "method"))

# %% [markdown]
# *Measured here, over {glue:text}`table10_n` seeds, each with halves of its own.*

# %% tags=["hide-input"] mystnb={"image": {"alt": "Test accuracy of methods A, B and C, published for six data sets and measured below, one column an encoder"}}
names = {"A": "A: no public images", "B": "B: synthetic images", "C": "C: S2, assumed public"}
beside = preset.dataset if preset.dataset in paper.DATASETS else "cifar10"
shown = {
    f"published, {report.label(d)}": published[published["dataset"] == d]
    for d in dict.fromkeys(["cifar10" if beside == "cifar10" else beside, "caltech256"])
}
shown |= {f"measured, {report.label(preset.dataset)}, ε = {e:g}": part for e, part in measured.groupby("epsilon")}
plots.point_plot({k: t.assign(method=t["method"].map(names)) for k, t in shown.items()}, unit="test accuracy (%)")

# %% [markdown]
# *A column an encoder (the demo's tiny encoders stand for the paper's), a row a source, each panel with a scale of its own, bars of one standard deviation over the seeds. Of the
# published data sets, one with few classes and one with many.*
#
# ## Differences on the same draws
#
# A, B and C of a seed share S1, the Poisson batches and the crops. Differences in percentage points, with a 95 % interval by Student's t over the seeds.

# %% tags=["hide-input"]
pairs = [("C", "A"), ("B", "A"), ("C", "B")]
differences = report.paired(chosen, pairs)
report.show_paired(differences)

# %% [markdown]
# ## What agrees, and what does not

# %% tags=["hide-input"]
report.agreement(differences, report.published_gaps(published, pairs, by=["model", "dataset"]))

# %% tags=["hide-input"]
wide = published.pivot(index=["dataset", "model"], columns="method", values="mean")
bounded = int((wide["C"] >= wide["B"]).sum())
ours = measured.pivot(index=["model", "epsilon"], columns="method", values="mean")
held = int((ours["C"] >= ours["B"]).sum())
few = [d for d in ("cifar10", "eurosat") if d in published["dataset"].to_list()]
small = (wide["C"] - wide["A"]).loc[few].max()
room = (ours["C"] - ours["A"]).mean()
Markdown(
    f"Does C bound B? In {bounded} of {len(wide)} published cells, and in {held} of {len(ours)} here. "
    f"On {' and '.join(report.label(d) for d in few)}, the paper's data sets with ten classes, C is ahead of A by at most {small:.1f} points; here, also with "
    f"{train.num_classes} classes, by {room:+.1f} on average: "
    + (
        "about as little, so that not even real images leave the mixtures much to gain."
        if abs(room) <= max(small, 0.5)
        else "more than that."
        if room > 0
        else "real images in the mixtures cost accuracy in this demo, which the paper does not see."
    )
)

# %% [markdown]
# Half of the digits are few: an expected batch is a larger share of them than in {doc}`table3`, so the sampling rate, and with it the noise for the same ε, is
# higher. The ε below holds for S1. If S2 were not public, C would have no guarantee for it at all.
#
# ## Learning rates and privacy
#
# In units of 1/C, as chosen on the validation split; a star marks an end of the grid. The choice is not part of the guarantee ({doc}`/limits`).

# %% tags=["hide-input"]
report.chosen_rates(chosen, grids.many(learning_rates, preset.learning_rates))

# %% tags=["hide-input"]
report.privacy_table(chosen)

# %% [markdown]
# ## Run it again
#
# ```console
# $ papermill notebooks/table10.ipynb -p eps 1
# $ papermill notebooks/table10.ipynb out.ipynb -y "{models: [tiny-convnext], seeds: [0, 1, 2, 3, 4]}"
# $ papermill notebooks/table10.ipynb out.ipynb -p scale paper -p dataset pets
# ```
#
# The last one needs the data set, the encoders' weights and synthetic images on disk, and a GPU: see {doc}`/paper_scale`. Without them it stops at once and says
# what to put where.
