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
# # Table 13: running time
#
# More views cost more time. The paper gives the hours for fine-tuning ViT-B-16 on Caltech-256 for ten epochs on one A100: DP-MixSelf takes a good three
# times as long as Self-Aug. This page measures where the time goes, how far training is from the *floor* (encoding the views and nothing else), and what
# the shared pass of {doc}`/one_pass` saves.
#
# The timings are taken afresh each time this page is made, never from the store: they are those of the machine at hand, and they change with what else it
# does. Each is repeated, in alternation, after one step that warms up.

# %% tags=["parameters"]
dataset = None  # None: "digits" at demo scale, "caltech256" at paper scale
model = None  # None: "tiny-vit" at demo scale, "vit-b-16" at paper scale
methods = ["self-aug", "mix-self", "mix-diff"]
eps = [1, 2, 4, 8]  # of the bank; a single run takes the first
steps = 4  # that are timed, of each repeat
repeats = 3
batch_size = None  # None: the scale's
scale = "demo"

# %% tags=["hide-input"]
from myst_nb import glue

from dpmix.companion import diagnostics, grids, paper
from dpmix.companion import report_diagnostics as inside

dataset = dataset or ("digits" if scale == "demo" else "caltech256")
model = model or ("tiny-vit" if scale == "demo" else "vit-b-16")
grids.check_scale(scale, dataset)
preset = grids.preset(scale, dataset)
cells = grids.methods_grid(
    scale, dataset=dataset, models=model, methods=methods, eps=eps, seeds=0, batch_size=batch_size
)
runs = {m: [next(c.spec for c in cells if c.labels["method"] == m)] for m in methods}
runs["bank"] = [c.spec for c in cells]
timed = diagnostics.timings(runs, steps=steps, repeats=repeats)
inside.timing_note(timed, scale, dataset, model, steps)

# %% [markdown]
# ## Published beside measured
#
# Hours of the paper and seconds here are not comparable; their ratios to Self-Aug are, next to the ratio of views. `published` is the paper's time on an A100. `measured here` is a
# whole run at the measured rate, median over the repeats (smallest to largest).

# %% tags=["hide-input"]
published = paper.table(13)
inside.running_times(published, timed)

# %% [markdown]
# If time were proportional to the number of views, the last two columns would be equal. The published ratio lies above that of the views, so the paper's mixtures cost more than
# their forward passes. Views that take long to make on the processor would explain it; the paper says no more than that augmentation takes additional steps.
# What the A100 achieved follows from the table, if we read the number of views off Section 6.5:

# %% tags=["hide-input"]
inside.published_rates(published, dataset="caltech256")

# %% [markdown]
# The row of DP-MixDiff takes the number of synthetic images that the paper's third footnote gives for Caltech-256. Then it would have passed more views a second than
# DP-MixSelf did, by far. Either this table was measured with fewer, or features of the synthetic images, which need no new crop each time, were kept. The paper does not say.

# %% [markdown]
# ## Where the time goes
#
# Shares of one run by itself. *Floor* is the encoder alone, fed with ready-made images of the same number; *of the floor* is the rate of training over the
# floor's.

# %% tags=["hide-input"]
inside.time_shares(timed[timed["name"] != "bank"])

# %% tags=["hide-input"] mystnb={"image": {"alt": "Bars of microseconds a view, split into encoder, views, clipping and noise, one a method and one for the bank; a dash marks the encoder alone"}}
inside.time_plot(timed)

# %% [markdown]
# *Time of a view in microseconds, by what it is spent on, for each method by itself and for the bank. The dashes mark the floor, the encoder alone. Medians over the repeats.*
#
# In the demo the encoder is tiny, so what surrounds it weighs more than it would beside a ViT-B-16: drawing a crop takes as long for a small encoder as for a large one.
#
# ## What one pass replaces
#
# All runs of the methods above, at every ε and every learning rate of the grid, for one seed. One by one they would take the sum of their own times. The bank computes
# the union of the views once.

# %% tags=["hide-input"]
bank = inside.bank_against_singles(timed, {m: sum(c.labels["method"] == m for c in cells) for m in methods})
glue("table13_heads", int(timed.loc[timed["name"] == "bank", "heads"].iloc[0]), display=False)
glue("table13_factor", f"{bank.attrs['factor']:.0f}", display=False)
bank

# %% [markdown]
# One pass trains {glue:text}`table13_heads` heads and takes the time of a {glue:text}`table13_factor`th of what they take one by one.
#
# ## The gradient by itself
#
# Two benchmarks leave everything else out. Their figures came with the repository; `python benchmarks/heads.py` and `python benchmarks/network.py` take them anew.
#
# The clipped gradient of a linear head on 64 examples of 34 views, 512 features and 257 classes, against the plain gradient of the same batch, per-example gradients by `einsum`,
# and Opacus on all views; and a whole pass with 64 heads against one with a single head:

# %% tags=["hide-input"]
inside.head_ratios(inside.benchmark("heads"))

# %% [markdown]
# A whole network, where the views of an example share one backward pass. The limit is plain SGD on the same images:

# %% tags=["hide-input"]
networks = inside.benchmark("network")
about = networks["about"]
glue(
    "table13_network",
    f"{about['model']}, {about['side']} pixels, {about['device']} with {about['threads']} threads, torch {about['torch']}",
    display=False,
)
inside.network_ratios(networks)

# %% [markdown]
# *{glue:text}`table13_network`. Medians over rounds in which all rows take turns.*
#
# ## Run it again
#
# ```console
# $ papermill notebooks/table13.ipynb out.ipynb -p model tiny-convnext -p steps 16
# $ papermill notebooks/table13.ipynb out.ipynb -p scale paper
# ```
