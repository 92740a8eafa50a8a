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
# # Table 8: how far are the synthetic images from the data?
#
# DP-MixDiff mixes private images with synthetic ones. Table 8 of the paper measures the gap between the two domains, by the Fréchet distance
# {cite:p}`heusel2017gans` of the training images to the images of the text-to-image model, and sets it beside that to the test images, which come from
# the same source as the training images. It does so under two networks, Inception-v3 and ViT-B-16, so that the finding does not hang on one.

# %% tags=["parameters"]
dataset = None  # None: "digits" at demo scale, "cifar10" at paper scale
encoders = None  # None: both tiny encoders at demo scale, Inception-v3 and ViT-B-16 at paper scale
seeds = None  # None: five samples
scale = "demo"  # "demo": two CPU cores; "paper": the paper's settings, a GPU
beside = None  # which rows of the published table the figure shows; None: the data set's own, CIFAR-10 for digits

# %% tags=["hide-input"]
from IPython.display import Markdown
from myst_nb import glue

from dpmix.companion import fid, grids, grids_fid, paper, plots, report

grids.check_scale(scale, dataset)
preset = grids.preset(scale, dataset)
encoders = grids.many(encoders, preset.models if scale == "demo" else (fid.INCEPTION, "vit-b-16"), "encoders")
names = [paper.ENCODERS.get(e, e) for e in encoders]
found = grids_fid.fid_of_sets(dataset=preset.dataset, encoders=names, seeds=grids.many(seeds, range(5), "seeds"))
found["encoder"] = found["encoder"].replace(dict(zip(names, encoders, strict=True)))
factor = 1 if fid.INCEPTION in encoders else 1000
size, n = int(found["n"].iloc[0]), found["seed"].nunique()
glue("table8_size", f"{size:,}", display=False)
glue("table8_n", n, display=False)
report.provenance_note(found, scale, "distances")

# %% [markdown]
# The distance is biased: two small samples of *one* distribution are farther apart than two large ones. So the three comparisons here are
# between samples of {glue:text}`table8_size` images each, drawn {glue:text}`table8_n` times, and the third one, between two disjoint samples of the training images, is what a
# distance of nothing looks like at that size.
#
# ## Published beside measured
#
# :::{warning}
# **Levels do not compare** between networks, nor between the paper and the demo, whose tiny encoders have 64 features of unit norm and whose distances are multiplied by
# 1,000 to be readable. What compares is the ratio of two distances under one network.
# :::

# %% tags=["hide-input"]
beside = beside or (preset.dataset if preset.dataset in paper.DATASETS else "cifar10")
words = {"test": "train and test", "diffusion": "train and synthetic", "train": "train and train"}
table = paper.table(8)
published = table.assign(
    pair=table["compared"].map(words), encoder=table["fid_model"], set=[report.label(d) for d in table["dataset"]]
)
scaled = found.assign(fid=factor * found["fid"], fid_all=factor * found["fid_all"], pair=found["compared"].map(words))
samples = report.summary(scaled, ["encoder", "pair"], "fid").assign(set=f"samples of {size:,}")
whole = report.summary(
    scaled[scaled["compared"] != "train"].drop_duplicates(["encoder", "pair"]), ["encoder", "pair"], "fid_all"
)
whole = whole.assign(set="all images")
report.block(published, rows=("set",), columns=("encoder", "pair"))

# %% [markdown]
# *Published.*

# %% tags=["hide-input"]
import pandas as pd

measured = pd.concat([samples, whole])
report.block(measured, rows=("set",), columns=("encoder", "pair"))

# %% tags=["hide-input"]
Markdown(
    f"*Measured on {report.label(preset.dataset)}{f', multiplied by {factor:,}' if factor > 1 else ''}: mean (standard deviation) over {n} samples; below, the sets as they "
    "are, with all their images, as in the paper. These have no spread and differ in size.*"
)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Frechet distance of the training images to test, synthetic and other training images under two encoders, published above and measured below"}}
shown = {
    f"published, {report.label(beside)}": published[published["dataset"] == beside],
    f"measured, {report.label(preset.dataset)}{f', × {factor:,}' if factor > 1 else ''}": samples,
}
plots.point_plot(shown, panel="encoder", line="pair", unit="Fréchet distance")

# %% [markdown]
# *A column a network, a row a source, each panel with a scale of its own; bars of one standard deviation over the samples.*
#
# ## What agrees, and what does not

# %% tags=["hide-input"]
theirs = published.pivot(index=["dataset", "encoder"], columns="compared", values="mean")
ours = found.pivot(index=["encoder", "seed"], columns="compared", values="fid")
above, said = int((ours["diffusion"] > ours["test"]).sum()), int((theirs["diffusion"] > theirs["test"]).sum())
ratios = (theirs["diffusion"] / theirs["test"]).sort_values()
lines = [
    f"- **The synthetic images are farther from the training images than the test images are**: published in {said} of {len(theirs)} cells (by factors of "
    f"{ratios.iloc[0]:.1f} to {ratios.iloc[-1]:.0f}), measured in {above} of {len(ours)} (encoders × samples). "
    + ("This **agrees**." if above == len(ours) and said == len(theirs) else "This does **not agree** everywhere.")
]
for encoder in encoders:
    part = ours.loc[encoder]
    full = found[found["encoder"] == encoder].drop_duplicates("compared").set_index("compared")["fid_all"]
    mean, std = part.mean(), part.std()
    apart = mean["test"] - mean["train"]
    near = abs(apart) <= max(std["test"], std["train"]) if n > 1 else None
    told = (
        "no farther from it than another part of it is"
        if near
        else "not at the same distance as another part of it"
        if near is not None
        else "drawn once"
    )
    lines.append(
        f"- **{report.label(encoder)}**: synthetic against test, a factor of {mean['diffusion'] / mean['test']:.1f} on samples of {size:,} and of "
        f"{full['diffusion'] / full['test']:.1f} on all images, where the bias is less. The test set is {told} "
        f"({factor * mean['test']:.1f} against {factor * mean['train']:.1f})."
    )
Markdown("\n".join(lines))

# %% [markdown]
# In the demo the synthetic digits come from a small diffusion model that has seen printed digits only ({doc}`/data_and_models`), so a gap to handwriting
# is built in, as one between a text-to-image model and satellite images is in the paper's EuroSAT. Whether mixing helps across such a gap is the subject of
# {doc}`table3` and {doc}`table10`.
#
# These distances are statistics of the private images without noise: diagnostics, not covered by any guarantee ({doc}`/limits`).
#
# ## Run it again
#
# ```console
# $ papermill notebooks/table8.ipynb out.ipynb -y "{encoders: [tiny-vit], seeds: [0, 1]}"
# $ papermill notebooks/table8.ipynb out.ipynb -p scale paper -p dataset caltech256
# ```
#
# The last one needs the data set, synthetic images and the weights of Inception-v3 and ViT-B-16 on disk, and a GPU. Without them it stops at once and says what to put where.
