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
# {cite:p}`Heusel-2017` of the training images to the images of the text-to-image model, and sets it beside that to the test images, which come from
# the same source as the training images. It does so under two networks, Inception-v3 and ViT-B-16, so that the finding does not hang on one.

# %% tags=["hide-input"]
from IPython.display import Markdown

from dpmix.companion import evidence, fid, grids, grids_fid, ledger, paper, plots, report, verdicts
from dpmix.companion.verdicts import Comparison
from dpmix.core.checks import counted

ledger.status("table8")

# %% tags=["parameters"]
dataset = None  # None: "digits" at demo scale, "cifar10" else
encoders = None  # None: those of the scale, Inception-v3 and ViT-B-16 at paper scale
seeds = None  # None: five samples
scale = "demo"  # "demo" | "laptop": real data | "paper": the paper's settings, a GPU
download = False  # let torchvision fetch what is missing at laptop or paper scale

# %% tags=["hide-input"]
grids.check_scale(scale, dataset, download)
preset = grids.preset(scale, dataset)
encoders = grids.many(encoders, (fid.INCEPTION, "vit-b-16") if scale == "paper" else preset.models, "encoders")
made = grids_fid.fid_of_sets(
    dataset=preset.dataset,
    encoders=encoders,
    seeds=grids.many(seeds, range(5), "seeds"),
    image_size=preset.image_size,
)
report.provenance_note(made, scale, "distance")

# %% tags=["hide-input"]
size, n = int(made["n"].iloc[0]), made["seed"].nunique()
Markdown(
    "The distance is biased: two small samples of *one* distribution are farther apart than two large ones. So the three comparisons made now are "
    f"between samples of {counted(size, 'image')} each, drawn for {counted(n, 'seed')}, and the third one, between two disjoint samples of the training images, is what a "
    "distance of nothing looks like at that size."
)

# %% [markdown]
# ## Published, real data, demo
#
# :::{warning}
# **Levels do not compare** between networks; where features have unit norm, distances are multiplied by 1,000. What compares is the ratio of two distances under one network.
# :::

# %% tags=["hide-input"]
published = paper.table(8)
published = published.assign(method=published["compared"].map(grids_fid.WORDS), model=published["fid_model"])
real = evidence.read("table8")
found = report.Sources(published, real, made, scale)
report.tables(found, columns=("model",), split=("dataset",), value="distance")

# %% tags=["hide-input"]
whole = made.dropna(subset=["whole"]).drop_duplicates(["model", "method"])
found_whole = ", ".join(f"{report.label(r.model)}, {r.method}: {r.whole:.1f}" for r in whole.itertuples())
Markdown(
    f"*Distance of the training images to other sets: made now, mean (standard deviation) over {counted(n, 'sample')} of {size:,}. Between the sets as they are, with all their images, as in the paper: {found_whole}. "
    "These have no spread and differ in size.*"
)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Frechet distance of the training images to test, synthetic and other training images, a panel a source and encoder"}}
plots.point_plot(found, unit="Fréchet distance", value="distance")

# %% [markdown]
# *A panel a source and network, each with a scale of its own; bars of one standard deviation over the samples.*
#
# ## What holds, and what does not
#
# Ratios under one network; all rows of a table are one family ({doc}`The rule of decision, and what is ours </deviations>` states the rule, here for logarithms). That the test images are no farther than other training images is
# a claim of *no gain*: at most a twentieth farther.

# %% tags=["hide-input"]
words = grids_fid.WORDS
pairs = [Comparison(words["diffusion"], words["test"]), Comparison(words["test"], words["train"], "no gain")]
verdicts.page(found, pairs, cells=("model",), per=("dataset", "model"), value="distance", ratio=True)

# %% [markdown]
# In the demo the synthetic digits come from a small diffusion model that has seen printed digits only ({doc}`Data and models </data_and_models>`), so a gap to handwriting
# is built in, as one between a text-to-image model and satellite images is in the paper's EuroSAT. Whether mixing helps across such a gap is the subject of
# {doc}`Table 3: fine-tuning with differential privacy <table3>` and {doc}`Table 10: how good could public images be? <table10>`.
#
# These distances are statistics of the private images without noise: diagnostics, not covered by any guarantee ({doc}`Limits </limits>`).
#
# ## Run it again
#
# ```console
# $ papermill notebooks/table8.ipynb out.ipynb -y "{encoders: [tiny-vit], seeds: [0, 1, 2]}"
# $ papermill notebooks/table8.ipynb out.ipynb -p scale paper -p dataset caltech256
# ```
#
# The last one needs the data set, synthetic images and the weights of Inception-v3 and ViT-B-16 on disk, and a GPU. Without them it stops at once and says what to put where.
