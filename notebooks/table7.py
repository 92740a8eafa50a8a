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
# {cite:p}`heusel2017gans`: fit a Gaussian to the features of each set, and take the distance of the two Gaussians,
#
# $$\lVert \mu_1 - \mu_2 \rVert^2 + \operatorname{Tr}\bigl(\Sigma_1 + \Sigma_2 - 2\,(\Sigma_1 \Sigma_2)^{1/2}\bigr) .$$
#
# The paper draws on it to explain accuracies: colour jitter, which costs accuracy, moves the views far away, while mixtures stay near; on EuroSAT, where
# DP-MixDiff loses, its views are the farthest of all.

# %% tags=["parameters"]
dataset = None  # None: "digits" at demo scale, "cifar10" at paper scale
encoders = None  # None: both tiny encoders at demo scale, "inceptionv3" at paper scale
methods = ["self-aug", "self-aug+jitter", "mix-self", "mix-diff"]
seeds = None  # None: three seeds
examples = None  # training examples that give views; None: all
scale = "demo"  # "demo": two CPU cores; "paper": the paper's settings, a GPU
beside = None  # which rows of the published table to show; None: the data set's own, CIFAR-10 for digits

# %% tags=["hide-input"]
from IPython.display import Markdown
from myst_nb import glue

from dpmix.companion import fid, grids, grids_fid, paper, plots, report

grids.check_scale(scale, dataset)
preset = grids.preset(scale, dataset)
encoders = grids.many(encoders, preset.models if scale == "demo" else (fid.INCEPTION,), "encoders")
asked = {"dataset": preset.dataset, "seeds": grids.many(seeds, preset.seeds, "seeds"), "examples": examples}
found = grids_fid.fid_of_methods(methods, encoders=encoders, **asked)
report.provenance_note(found, scale, "distances")

# %% [markdown]
# Each training example gives its views once, as in one epoch, and all views of a method make one set. It is compared with the training images and with the test
# images, both as they are. The seed keys the views, so the spread over seeds is that of the crops, pairs and λ. A reference set is the same for every method, hence
# so is the bias that its limited size brings ({doc}`table8`).
#
# ## Published beside measured
#
# :::{warning}
# The paper's distances are those of Inception-v3 on colour photographs, which has 2,048 features. The demo's are those of the two tiny encoders, with 64 features of
# unit norm, and are multiplied by 1,000 to be readable. **Levels do not compare**, neither between the blocks nor between two encoders. The order of the methods
# within a column can.
# :::

# %% tags=["hide-input"]
factor = 1 if encoders == [fid.INCEPTION] else 1000
beside = beside or (preset.dataset if preset.dataset in paper.DATASETS else "cifar10")
table = paper.table(7)
table["method"] = [
    m if t == "crop-flip" else f"{m}+{t}" for m, t in zip(table["method"], table["transform"], strict=True)
]
published = table[table["method"].isin(methods)].assign(set=lambda t: [report.label(d) for d in t["dataset"]])
measured = report.summary(found.assign(fid=factor * found["fid"]), ["encoder", "method", "reference"], "fid")
measured = measured.sort_values("reference", key=lambda s: s.map(["train", "test"].index), kind="stable")
own = f"{report.label(preset.dataset)} here"
measured["set"] = [
    f"{own}, {report.label(e)}" + (f" (× {factor:,})" if factor > 1 else "") for e in measured["encoder"]
]
layout = {"rows": ("set",), "columns": ("reference", "method")}
n = int(measured["n"].min())
report.side_by_side(published, measured, **layout)

# %% tags=["hide-input"]
counts = found.drop_duplicates("method").set_index("method")["n"]
told = ", ".join(f"{counts[m]:,} ({report.label(m)})" for m in methods)
Markdown(
    f"Measured: mean (standard deviation) over {n} seeds, of {told} views. Columns: the set that is compared with, and the method. "
    "The paper states one number a cell and no spread."
)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Frechet distance of the views of each method to the training and the test images, published above and measured below"}}
shown = {f"published, {report.label(beside)}": published[published["dataset"] == beside]}
for encoder, part in measured.groupby("encoder", sort=False):
    shown[f"here, {report.label(encoder)}" + (f", × {factor:,}" if factor > 1 else "")] = part
titles = {"train": "to the training images", "test": "to the test images"}
shown = {k: t.assign(reference=[titles[r] for r in t["reference"]]) for k, t in shown.items()}
plots.point_plot(shown, panel="reference", unit="Fréchet distance")

# %% [markdown]
# *Distance of a method's views to the training images (left) and to the test images (right): a row a source, each panel with a scale of its own, bars of one standard
# deviation over the seeds. Smaller is nearer.*
#
# ## What agrees, and what does not

# %% tags=["hide-input"]
pairs = [
    ("self-aug+jitter", "self-aug", "is farther away than"),
    ("self-aug+jitter", "mix-self", "is farther away than"),
    ("mix-self", "self-aug", "is farther away than"),
    ("mix-diff", "mix-self", "is farther away than"),
]


def farther(rows, index, a, b):
    """In how many rows a method's views are farther away than another's."""
    wide = rows.pivot(index=index, columns="method", values="mean" if "mean" in rows else "fid")
    return int((wide[a] > wide[b]).sum()), len(wide)


lines = []
for a, b, words in pairs:
    if not {a, b} <= set(methods):
        continue
    said, of = farther(published, ["dataset", "reference"], a, b)
    got, cells = farther(found, ["encoder", "seed", "reference"], a, b)
    for_it = 2 * said > of
    verdict = (
        "**agrees**"
        if (got == cells) == for_it and got in (0, cells)
        else "is **divided**"
        if 0 < got < cells
        else "does **not agree**"
    )
    lines.append(
        f"- **{report.label(a)} {words} {report.label(b)}**: published in {said} of {of} cells, measured in {got} of {cells} "
        f"(encoders × seeds × references). The measurement {verdict}."
    )
wide = found.pivot(index=["encoder", "seed", "method"], columns="reference", values="fid")
nearer = int((wide["train"] < wide["test"]).sum())
theirs = published.pivot(index=["dataset", "method"], columns="reference", values="mean")
lines.append(
    f"- **Views are nearer to the training images than to the test images**: published in {int((theirs['train'] < theirs['test']).sum())} of {len(theirs)} cells, "
    f"measured in {nearer} of {len(wide)}. They are made of the training images, and the test set is smaller, which alone adds to a distance."
)
Markdown("\n".join(lines))

# %% tags=["hide-input"]
base = measured[measured["method"] == "self-aug"].set_index(["encoder", "reference"])["mean"]
ratio = {
    m: (measured[measured["method"] == m].set_index(["encoder", "reference"])["mean"] / base).mean()
    for m in methods
    if m != "self-aug"
}
theirs = {
    m: (
        published[published["method"] == m].set_index(["dataset", "reference"])["mean"]
        / published[published["method"] == "self-aug"].set_index(["dataset", "reference"])["mean"]
    ).mean()
    for m in ratio
}
for name in ratio:
    glue(f"table7_{name}", f"{ratio[name]:.2f}", display=False)
Markdown(
    "In multiples of Self-Aug's distance, averaged over the cells: "
    + "; ".join(f"{report.label(m)} {ratio[m]:.2f} here, {theirs[m]:.2f} published" for m in ratio)
    + "."
)

# %% [markdown]
# What such a distance can and cannot say: it sees the mean and the covariance of features, over all classes together, and no label. A method whose views lie near the
# data may still train worse, and two methods at the same distance may differ in accuracy. Digits have one channel, so the jitter here changes
# brightness and contrast and no colour.
#
# A distance to the private images is a statistic of them without noise. It is a diagnostic, and is not covered by any guarantee ({doc}`/limits`).
#
# ## Run it again
#
# ```console
# $ papermill notebooks/table7.ipynb -p examples 200
# $ papermill notebooks/table7.ipynb out.ipynb -y "{methods: [self-aug, self-aug+noise, self-aug+blur]}"
# $ papermill notebooks/table7.ipynb out.ipynb -p scale paper -p dataset eurosat
# ```
#
# The last one needs the data set, synthetic images and the weights of Inception-v3 on disk, and a GPU. Without them it stops at once and says what to put where.
