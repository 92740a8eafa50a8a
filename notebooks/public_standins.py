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
# # The public stand-ins
#
# DP-Mix rests on two things that were trained on public data alone: an encoder, whose features make private training cheap, and a text-to-image model,
# whose pictures DP-MixDiff mixes into the private ones (Section 4 of the paper {cite:p}`Bao-2023`). The privacy guarantee covers neither, and need not: what has
# never seen a private image cannot tell of one.
#
# At demo scale the private images are handwritten digits, and the public world is made of **characters printed in the fonts that matplotlib carries**. From these
# come two small encoders, a small diffusion model and its samples. This page shows them; with `rebuild=True` it makes them anew.

# %% tags=["parameters"]
rebuild = False  # True: make everything from nothing, some twenty minutes on two cores
folder = None  # where the files lie or go; None: data/public
seed = 0
encoder_steps = 3000
generator_steps = 1500
characters = 36_000  # how many rendered characters the encoders see; the generator sees as many digits
per_digit = 150  # synthetic images of each class

# %% tags=["hide-input"]
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import Markdown, display

from dpmix import models
from dpmix.core.checks import counted
from dpmix.demo import glyphs, standins
from dpmix.images import data

sns.set_theme(style="whitegrid", palette="colorblind", font_scale=0.9)
folder = data.PUBLIC if folder is None else Path(folder)
digits = data.load("digits")
if rebuild:
    sizes = dict(encoder_steps=encoder_steps, generator_steps=generator_steps, characters=characters)
    standins.rebuild(folder, seed=seed, per_digit=per_digit, probe_on=digits, **sizes)
records = {name: standins.record(name, folder) for name in standins.NAMES}
spent = {name: record.get("cpu_seconds", record["seconds"]) for name, record in records.items()}
table = pd.DataFrame(
    {
        "made by": {name: record["function"].removeprefix("dpmix.") for name, record in records.items()},
        "steps": {name: record["steps"] for name, record in records.items()},
        "seconds": {name: round(record["seconds"]) for name, record in records.items()},
        "processor seconds": {
            name: f"{record.get('cpu_seconds', float('nan')):.0f}" for name, record in records.items()
        },
        "kB": {name: round(record["bytes"] / 1000) for name, record in records.items()},
        "sha256": {name: record["sha256"][:12] for name, record in records.items()},
    }
)
display(table.rename_axis("file"))
display(Markdown(f"Making these files took {sum(spent.values()) / 60:.0f} minutes in all."))

# %% [markdown]
# That is processor time where it was kept (`nan`: it was not), else that of the clock on a machine that also did other work. Each has a JSON beside it with the function, the seed, the corpus,
# the versions, the losses and the checksum, which is compared whenever the file is read.
#
# ## The public corpus
#
# A character is drawn large, then turned, sheared, stretched, bent by a smooth random field, and made thinner or bolder. After that it goes the way that
# scikit-learn's digits went: it fills a bitmap of 32 × 32, whose blocks of 4 × 4 are counted. Every image is keyed by the seed and its number, as all
# randomness here.


# %% tags=["hide-input"] mystnb={"image": {"alt": "Rows of rendered characters, 0 to 9 and A to Z, in many fonts and slants"}}
def mosaic(axis, images, columns, title):
    """Images [n, 1, h, w] side by side in rows, with a thin line between them."""
    padded = np.pad(images[:, 0].numpy(), ((0, 0), (1, 0), (1, 0)), constant_values=90)
    rows = padded.reshape(-1, columns, *padded.shape[1:]).transpose(0, 2, 1, 3)
    axis.imshow(rows.reshape(rows.shape[0] * rows.shape[1], -1), cmap="gray")
    axis.set_title(title, loc="left")
    axis.axis("off")


corpus = glyphs.corpus(180, seed)
figure, axis = plt.subplots(figsize=(9, 3))
mosaic(axis, corpus.images, 30, "Rendered characters (public)")
plt.show()

# %% [markdown]
# *The first 180 characters of the corpus on which the encoders were trained: the ten digits, then the alphabet, again and again, in fonts drawn at random.
# Zero and O, one and I differ little; an encoder that cannot tell them apart loses nothing here.*
#
# ## Two encoders
#
# `tiny-vit` is a vision transformer and `tiny-convnext` a convolutional network, as in the paper, but with some fifty and seventy thousand
# weights. Both learn to name the 36 characters, from images that are shifted, blurred, noised and mixed on the way. Then the classifier is thrown
# away; what is left gives 64 features of norm one.
#
# ## A generator
#
# The diffusion model {cite:p}`Ho-2020` learns to remove noise from rendered digits, told which digit it is. It stands in for the text-to-image model of the paper: the class label
# is its prompt. Samples are drawn with DDIM {cite:p}`Song-2021`.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Three falling loss curves, of tiny-vit, tiny-convnext and the generator"}}
curves = {name.removesuffix(".safetensors"): record["loss"] for name, record in records.items() if record["loss"]}
figure, axes = plt.subplots(1, 2, figsize=(9, 3), width_ratios=[2, 1], layout="constrained")
for name, colour in zip(curves, sns.color_palette("colorblind"), strict=False):
    axis = axes[int(name == "generator")]
    steps, losses = zip(*curves[name], strict=True)
    sns.lineplot(x=steps, y=losses, ax=axis, color=colour, label=name)
axes[0].set(title="Encoders: cross-entropy", xlabel="step", ylabel="loss")
axes[1].set(title="Generator: squared error", xlabel="step", yscale="log")
plt.show()

# %% [markdown]
# *Training losses, averaged over stretches of steps. The encoders' cannot reach zero: half of their images are mixtures of two characters and their targets are
# smoothed.*

# %% tags=["hide-input"] mystnb={"image": {"alt": "Three blocks of digits: rendered, synthetic and handwritten"}}
synthetic, _ = standins.load_digits(folder)
some = min(90, len(synthetic))
printed = glyphs.corpus(some, seed + 1, glyphs.DIGITS).images
by_class = np.concatenate([np.flatnonzero(digits.train.labels.numpy() == c)[: some // 10] for c in range(10)])
written = digits.train.images[by_class.reshape(10, -1).T.ravel()]
figure, axes = plt.subplots(3, 1, figsize=(9, 6), layout="constrained")
columns = 30 if some % 30 == 0 else 10
for axis, title, images in zip(
    axes,
    ("Rendered digits: what the generator was trained on", "Synthetic digits: what it draws", "Private digits"),
    (printed, synthetic[:some], written),
    strict=True,
):
    mosaic(axis, images, columns, title)
plt.show()

# %% [markdown]
# *Public above, private below. The synthetic digits are new shapes, no copies of a font; and they are printed rather than written. That gap is wanted: in the paper, too,
# the synthetic images look little like the private ones (its Table 8 measures how little).*
#
# ## What the encoders know about handwriting
#
# A linear classifier on frozen features, trained **without privacy** on the private digits: the ceiling for what heads on these encoders can reach under differential
# privacy. `nearest mean` assigns the class whose mean feature is closest, a rule so simple that it survives noise well.

# %% tags=["hide-input"]
probes = {name: standins.probe(models.encoder(name, folder / f"{name}.safetensors"), digits) for name in standins.TINY}
display(
    pd.DataFrame(probes)
    .T.mul(100)
    .round(1)
    .rename_axis("encoder")
    .rename(columns=lambda c: c.replace("_", " ") + " (%)")
)
display(Markdown(f"{counted(digits.train.num_classes, 'class')}, {counted(len(digits.test), 'test image')}."))

# %% [markdown]
# Accuracy on the test images (`test`, `nearest mean`) and in five folds of the training set
# (`cross validated`), computed just now. No handwritten digit took part in making the encoders or the generator; this probe only describes them, and no experiment of
# this book uses it.
#
# ## Try it
#
# ```bash
# $ papermill notebooks/public_standins.ipynb out.ipynb -p rebuild True
# $ papermill notebooks/public_standins.ipynb out.ipynb -p rebuild True -p folder elsewhere -p seed 7
# ```
#
# The first makes the files in `data/public` anew, after which all results of the demo change a little and are computed again. The same seed gives the same
# files on the same machine with the same number of threads; elsewhere sums may be rounded otherwise, so trust the checksums of the shipped files and not those of a rebuild.
