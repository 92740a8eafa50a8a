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
# # Table 2: training from scratch
#
# Every weight of a network is trained on private images, from a random start. Table 2 of the paper {cite:p}`bao2023dpmix` compares **Self-Aug** {cite:p}`de2022unlocking`, which averages the gradient of an example over
# 16 augmented views before it is clipped, with **DP-MixSelf**, which adds mixtures of those views. There are no synthetic images here: the other methods would have seen less data.
#
# What the paper claims: DP-MixSelf is ahead on all three data sets and for every ε. The margins are between a few tenths of a point and almost two points.

# %% tags=["parameters"]
eps = None  # None: 1, 2, 4 and 8 at paper scale, 2 and 8 in the demo; or one number; or a list
dataset = None  # None: "digits" at demo scale, "cifar10" at paper scale; the paper has "cifar100" and "eurosat" too
methods = ["self-aug", "mix-self"]
seeds = None  # None: three seeds
epochs = None  # None: the scale's; 200 in the paper
batch_size = None  # the expected batch size B; None: the scale's; 4096 in the paper
views_cut = None  # divides the paper's numbers of views; None: the scale's; 1 restores them
learning_rate = None  # None: the scale's
model = None  # "wrn-DEPTH-WIDTH"; None: the scale's
scale = "demo"  # "demo": two CPU cores; "paper": the paper's settings, a GPU
beside = None  # which block of the published table to show; None: the data set's own, CIFAR-10 for digits

# %% tags=["hide-input"]
from myst_nb import glue

from dpmix.companion import grids, paper, plots, report, report_network
from dpmix.images import data

grids.check_scale(scale, dataset)
preset = grids.changed(
    grids.network_preset(scale, dataset),
    epochs=epochs,
    batch_size=batch_size,
    views_cut=views_cut,
    learning_rate=learning_rate,
    model=model,
)
cells = [
    cell
    for method in grids.many(methods, (), "methods")
    for cell in grids.network_cells(preset, method, preset.views_of(method), eps=eps, seeds=seeds)
]
report_network.settings(preset)

# %% [markdown]
# The right column is what `scale="paper"` runs. The paper names B, the epochs, C and the views; for the rest it points to De et al., so the learning rate, the moving average of the weights and the absence
# of momentum are those of their published configuration for this network. A demo cuts the network, the epochs, the views and the list of ε to what two cores do in minutes; the parameters above restore each.
#
# Both methods have the same learning rate. The demo's comes from a trial of Self-Aug and of plain DP-SGD with another seed, a fifth of the training set held out and a coarse grid; it was not tuned for DP-MixSelf, nor for each ε.
# Nothing is chosen by the runs on this page, so they train on the whole training set.

# %% tags=["remove-stderr"]
runs = grids.run_cells(cells, compute=grids.network_compute(preset.dataset))
report.provenance_note(runs, scale)

# %% [markdown]
# ## Published beside measured
#
# Test accuracy in percent after the last step, mean (standard deviation) over the seeds. In the demo, the data set, the network and the length of training differ between the two blocks, so the levels cannot be compared. The order of
# the methods can.

# %% tags=["hide-input"]
measured = report.summary(runs, ["model", "method", "epsilon"])
table = paper.table(2)
beside = beside or (preset.dataset if preset.dataset in set(table["dataset"]) else "cifar10")
published = table[table["dataset"] == beside]
glue("table2_n", int(measured["n"].min()), display=False)
glue("table2_beside", report.label(beside), display=False)
glue("table2_dataset", report.label(preset.dataset), display=False)
report.side_by_side(published, measured)

# %% [markdown]
# The upper block is {glue:text}`table2_beside` from the paper, the lower one {glue:text}`table2_dataset` here, over {glue:text}`table2_n` seeds.

# %% tags=["hide-input"]
report_network.level(runs, data.load(preset.dataset).train.num_classes)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Test accuracy against epsilon for Self-Aug and DP-MixSelf from scratch, published above and measured below"}}
plots.accuracy_plot(runs, published)

# %% [markdown]
# *Test accuracy against ε, published above and measured below: the mean over the seeds, with bars of one standard deviation.*
#
# ## Differences on the same draws
#
# Both methods of a seed start from the same weights and see the same Poisson batches and the same crops. Each cell is the mean difference in percentage points, with a 95 % interval by Student's t over the seeds. With
# three seeds an interval is wide.

# %% tags=["hide-input"]
pairs = [("mix-self", "self-aug")]
differences = report.paired(runs, pairs)
report.show_paired(differences)

# %% [markdown]
# ## What agrees, and what does not

# %% tags=["hide-input"]
report.agreement(differences, report.published_gaps(published, pairs))

# %% [markdown]
# The margins of the paper are near the standard deviation of a demo of this size over its seeds. And in so few steps, a method that learns slowly at first looks bad, whatever it would reach in the end. The comparison at the paper's length needs
# a GPU.
#
# ## CIFAR-10 itself, cut down
#
# Runs that are not repeated when the book is built: the same code on the paper's own data, with a small network and few steps, on two CPU cores. Their results came with the repository
# (`data/results/table2_cifar10`). The images are a JPEG copy, so accuracies may differ a little from those on the lossless original.

# %% tags=["hide-input"]
small = grids.reference("table2_cifar10")
report.provenance_note(small.assign(dataset="CIFAR-10 (JPEG)"))

# %% tags=["hide-input"]
report_network.as_run(small)

# %% [markdown]
# *Training views of an example, expected batch, steps, noise and the test accuracy of the last step in percent, mean (standard deviation) over n seeds. In so few steps such a network learns little; guessing gives 10 %.*
#
# ## Privacy
#
# The number of views changes nothing here: an example's views are averaged before the clip, so its influence stays at most C.

# %% tags=["hide-input"]
report.privacy_table(runs)

# %% [markdown]
# ## Cost

# %% tags=["hide-input"]
report_network.cost(runs, ["method", "k_base", "k_self"])

# %% [markdown]
# ## Run it again
#
# ```console
# $ papermill notebooks/table2.ipynb out.ipynb -y "{eps: [1, 2, 4, 8]}"
# $ papermill notebooks/table2.ipynb out.ipynb -p epochs 10 -p views_cut 1
# $ papermill notebooks/table2.ipynb out.ipynb -p scale paper -p dataset cifar10
# ```
#
# The second takes some twenty times as long. The last needs the data set on disk and a GPU ({doc}`/paper_scale`); without the data it stops at once and says what to put where.
