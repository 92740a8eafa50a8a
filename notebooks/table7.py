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
# # Table 7: how far are the views from the data?
#
# A method trains on its views, not on the images. Table 7 of the paper asks how far the two are apart, by the Fréchet Inception Distance
# {cite:p}`Heusel-2017`: fit a Gaussian to the features of each set, and take the distance of the two Gaussians,
#
# $$\lVert \mu_1 - \mu_2 \rVert^2 + \operatorname{Tr}\bigl(\Sigma_1 + \Sigma_2 - 2\,(\Sigma_1 \Sigma_2)^{1/2}\bigr) .$$
#
# The paper draws on it to explain accuracies: colour jitter, which costs accuracy, moves the views far away, while mixtures stay near; on EuroSAT, where
# DP-MixDiff loses, its views are the farthest of all.

# %% tags=["hide-input"]
import pandas as pd
from IPython.display import Markdown

from dpmix.companion import evidence, fid, grids, grids_fid, ledger, paper, plots, report, verdicts
from dpmix.companion.verdicts import Comparison
from dpmix.core.checks import counted

ledger.status("table7")

# %% tags=["parameters"]
dataset = None  # None: "digits" at demo scale, "cifar10" else
encoders = None  # None: those of the scale, "inceptionv3" at paper scale
methods = ["self-aug", "self-aug+jitter", "mix-self", "mix-diff"]
seeds = None  # None: five
examples = None  # training examples that give views; None: all
scale = "demo"  # "demo" | "laptop": real data | "paper": the paper's settings, a GPU
download = False  # let torchvision fetch what is missing at laptop or paper scale

# %% tags=["hide-input"]
grids.check_scale(scale, dataset, download)
preset = grids.preset(scale, dataset)
encoders = grids.many(encoders, (fid.INCEPTION,) if scale == "paper" else preset.models, "encoders")
made = grids_fid.fid_of_methods(
    grids.with_public(methods, preset.dataset),
    encoders=encoders,
    dataset=preset.dataset,
    seeds=grids.many(seeds, range(5), "seeds"),
    examples=examples,
    image_size=preset.image_size,
)
report.provenance_note(made, scale, "distance")

# %% [markdown]
# Each training example gives its views once, as in one epoch, and all views of a method make one set. It is compared with the training images and with the test
# images, both as they are. The seed keys the views, so the spread over seeds is that of the crops, pairs and λ. A reference set is the same for every method, hence
# so is the bias that its limited size brings ({doc}`Table 8: how far are the synthetic images from the data? <table8>`).
#
# ## Published, real data, demo
#
# :::{warning}
# The paper's distances are those of Inception-v3 on colour photographs, which has 2,048 features. Those here are of the encoder that is named, multiplied by 1,000 where its features have
# unit norm. **Levels do not compare**, neither between the tables nor between two encoders. The order of the methods within a column does.
# :::

# %% tags=["hide-input"]
published = paper.table(7)
published["method"] = [
    m if t == "crop-flip" else f"{m}+{t}" for m, t in zip(published["method"], published["transform"], strict=True)
]
real = evidence.read("table7")
found = report.Sources(published[published["method"].isin(methods)], real, made, scale)
shape = {"columns": ("reference",), "split": ("dataset", "model"), "value": "distance"}
report.tables(found, **shape)

# %% tags=["hide-input"]
counts = made.drop_duplicates("method").set_index("method")["n"]
Markdown(
    f"Columns: the set that is compared with. Made now: mean (standard deviation) over {counted(made['seed'].nunique(), 'seed')}, of "
    + ", ".join(f"{n:,} ({report.label(m)})" for m, n in counts.items())
    + " views. The paper states one number a cell and no spread."
)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Frechet distance of the views of each method to the training and the test images, a panel a source and reference"}}
plots.point_plot(found, unit="Fréchet distance", split=("dataset", "model", "reference"), value="distance")

# %% [markdown]
# *Distance of a method's views to the training and to the test images: a panel a source and reference, each with a scale of its own, bars of one standard
# deviation over the seeds. Smaller is nearer.*
#
# ## What holds, and what does not
#
# Ratios of two distances, averaged over encoders and references within a seed; all rows of a table are one family ({doc}`The rule of decision, and what is ours </deviations>` states the rule, here for
# logarithms). The last row compares the two reference sets, over all methods.

# %% tags=["hide-input"]
titles = {"train": "to the training images", "test": "to the test images"}


def both_ways(table):
    """The distances by method within a reference, and by reference within a method."""
    parts = (
        table.assign(cell=table["reference"]),
        table.assign(cell=table["method"], method=table["reference"].map(titles)),
    )
    return pd.concat(parts, ignore_index=True)


pairs = [
    Comparison("self-aug+jitter", "self-aug"),
    Comparison("self-aug+jitter", "mix-self"),
    Comparison("mix-self", "self-aug"),
    Comparison("mix-diff", "mix-self"),
    Comparison(titles["test"], titles["train"]),
]
turned = report.Sources(both_ways(found.published), both_ways(real) if len(real) else real, both_ways(made), scale)
verdicts.page(turned, pairs, cells=("model", "cell"), value="distance", ratio=True)

# %% [markdown]
# What such a distance can and cannot say: it sees the mean and the covariance of features, over all classes together, and no label. A method whose views lie near the
# data may still train worse, and two methods at the same distance may differ in accuracy. Digits have one channel, so the jitter there changes
# brightness and contrast and no colour. Views are made of the training images, and the test set is smaller, which alone adds to a distance.
#
# A distance to the private images is a statistic of them without noise. It is a diagnostic, and is not covered by any guarantee ({doc}`Limits </limits>`).
#
# ## Run it again
#
# ```console
# $ papermill notebooks/table7.ipynb out.ipynb -p examples 200
# $ papermill notebooks/table7.ipynb out.ipynb -y "{methods: [self-aug, self-aug+noise, self-aug+blur]}"
# $ papermill notebooks/table7.ipynb out.ipynb -p scale paper -p dataset eurosat
# ```
#
# The last one needs the data set, synthetic images and the weights of Inception-v3 on disk, and a GPU. Without them it stops at once and says what to put where.
