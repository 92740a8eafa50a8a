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
# Every weight of a network is trained on private images, from a random start. Table 2 of the paper {cite:p}`Bao-2023` compares **Self-Aug** {cite:p}`De-2022`, which averages the gradient of an example over
# 16 augmented views before it is clipped, with **DP-MixSelf**, which adds mixtures of those views. Synthetic images are left out: the other methods do not have them.
#
# What the paper claims: DP-MixSelf is ahead on all three data sets and for every ε. The margins are between a few tenths of a point and almost two points.

# %% tags=["hide-input"]
from dpmix.companion import evidence, grids, ledger, networks, paper, plots, report, verdicts
from dpmix.companion.verdicts import Comparison
from dpmix.images import data

ledger.status("table2")

# %% tags=["parameters"]
eps = None  # None: 1, 2, 4 and 8 at paper scale, 2 and 8 in the demo; or one number; or a list
dataset = None  # None: "digits" at demo scale, "cifar10" else; the paper has "cifar100" and "eurosat" too
methods = ["self-aug", "mix-self"]
seeds = None  # None: three seeds
epochs = None  # None: the scale's; 200 in the paper
batch_size = None  # the expected batch size B; None: the scale's; 4096 in the paper
views_cut = None  # divides the paper's numbers of views; None: the scale's; 1 restores them
learning_rate = None  # None: the scale's
model = None  # "wrn-DEPTH-WIDTH"; None: the scale's
scale = "demo"  # "demo" | "laptop": real data, hours on two cores | "paper": the paper's settings, a GPU
download = False  # let torchvision fetch what is missing at laptop or paper scale

# %% tags=["hide-input"]
grids.check_scale(scale, dataset, download)
preset = networks.changed(
    networks.network_preset(scale, dataset),
    epochs=epochs,
    batch_size=batch_size,
    views_cut=views_cut,
    learning_rate=learning_rate,
    model=model,
)
cells = [
    cell
    for method in grids.many(methods, (), "methods")
    for cell in networks.network_cells(preset, method, preset.views_of(method), eps=eps, seeds=seeds)
]
networks.settings(preset)

# %% [markdown]
# The right column is what `scale="paper"` runs. The paper names B, the epochs, C and the views; for the rest it points to De et al., so the learning rate, the moving average of the weights and the absence
# of momentum are those of their published configuration for this network. A demo cuts the network, the epochs, the views and the list of ε to what two cores do in minutes; the parameters above restore each.
#
# Both methods have the same learning rate. The demo's comes from a trial of Self-Aug and of plain DP-SGD with another seed, a fifth of the training set held out and a coarse grid; it was not tuned for DP-MixSelf, nor for each ε.
# Nothing is chosen by the runs on this page, so they train on the whole training set.

# %% tags=["remove-stderr"]
runs = grids.run_cells(cells, compute=networks.network_compute(preset.dataset))
report.provenance_note(runs, scale)

# %% [markdown]
# ## Published, real data, demo
#
# Test accuracy in percent after the last step, mean (standard deviation) over the n seeds. The data, the network and the length of training differ between the tables, so the levels cannot be compared. The order of
# the methods can. The run on real data is of a JPEG copy of CIFAR-10's images, with a small network, few steps and one budget; of one seed nothing can be decided.

# %% tags=["hide-input"]
by = ["dataset", "model", "method", "epsilon"]
found = report.Sources(paper.table(2), evidence.chosen("table2", by), runs, scale)
report.tables(found)

# %% tags=["hide-input"]
networks.level(runs, data.load(preset.dataset).train.num_classes)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Test accuracy against epsilon for Self-Aug and DP-MixSelf from scratch, a panel a source"}}
plots.accuracy_plot(found)

# %% [markdown]
# *Test accuracy against ε: the mean over the seeds, with bars of one standard deviation; a panel a source, each with a scale of its own.*
#
# ## What holds, and what does not
#
# Both methods of a seed start from the same weights and see the same batches and the same crops. The difference in points is averaged over ε within a seed ({doc}`The rule of decision, and what is ours </deviations>` states the rule).

# %% tags=["hide-input"]
verdicts.page(found, [Comparison("mix-self", "self-aug")])

# %% [markdown]
# The margins of the paper are near the standard deviation of a demo of this size over its seeds. And in so few steps, a method that learns slowly at first looks bad, whatever it would reach in the end. The comparison at the paper's length needs
# a GPU.
#
# ## Privacy
#
# The number of views changes nothing here: an example's views are averaged before the clip, so its influence stays at most C.

# %% tags=["hide-input"]
report.privacy_table(runs)

# %% [markdown]
# ## Cost

# %% tags=["hide-input"]
report.cost_table(runs.assign(model=runs["method"]))

# %% [markdown]
# ## Run it again
#
# ```console
# $ papermill notebooks/table2.ipynb out.ipynb -y "{eps: [1, 2, 4, 8]}"
# $ papermill notebooks/table2.ipynb out.ipynb -p epochs 10 -p views_cut 1
# $ papermill notebooks/table2.ipynb out.ipynb -p scale paper -p dataset cifar10
# ```
#
# The second takes some twenty times as long. The last needs the data set on disk and a GPU ({doc}`Running at paper scale </paper_scale>`); without the data it stops at once and says what to put where.
