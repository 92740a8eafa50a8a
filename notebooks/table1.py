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
# # Table 1: microbatches cost more than mixup can win back
#
# Mixup needs two examples {cite:p}`zhang2018mixup`. The obvious place for it in DP-SGD is a microbatch of two, clipped as one. {doc}`/microbatches` shows
# the price: one example can turn the clipped average of its pair round, so the sum moves by $2C$ and the noise must be doubled. Table 1 of the paper
# {cite:p}`bao2023dpmix` trains a WRN-16-4 on CIFAR-10 from scratch, with microbatches of one and of two, and finds that mixup in pairs loses far more than
# it gains. This page repeats that on your machine, every row with noise for its own sensitivity:
#
# - **DP-SGD** and **Self-Aug** {cite:p}`de2022unlocking`: every example clipped alone;
# - **DP-SGD in pairs** and **Self-Aug in pairs**: the average gradient of a fixed pair is clipped;
# - **pairs with their mixture**: the mixup of the two joins them; **mixtures of pairs alone**: it takes their place.

# %% tags=["hide-input"]
from dpmix.companion import evidence, grids, networks, plots, report, verdicts
from dpmix.companion.verdicts import Comparison
from dpmix.images import data

evidence.status("table1")

# %% tags=["parameters"]
eps = None  # None: 8, as in the paper; or a number, or a list
dataset = None  # None: "digits" at demo scale, "cifar10" else
seeds = None  # None: three seeds
epochs = None  # None: the scale's; 200 in the paper
batch_size = None  # the expected number of examples B; None: the scale's; 4096 in the paper
views_cut = None  # divides the paper's 16 views of Self-Aug; None: the scale's; 1 restores them
learning_rate = None  # of per-example clipping; None: the scale's
microbatch_learning_rate = None  # of pairs; None: the scale's
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
    microbatch_learning_rate=microbatch_learning_rate,
    model=model,
)
cells = networks.microbatch_grid(preset, eps=eps or 8, seeds=seeds)
networks.settings(preset)

# %% [markdown]
# The right column is what `scale="paper"` runs. The paper names B, the epochs, C and the 16 views; for the rest it points to De et al., so the learning rate, the moving average of
# the weights and the absence of momentum are those of their published configuration. The learning rate of microbatches at paper scale is ours. A demo cuts the network, the epochs and the
# views, and gives the parameters above to restore them.
#
# No learning rate is chosen on this page, and none by test accuracy. The demo's two, one for each way of clipping, come from a trial with another seed, a fifth of the training set held out and a
# coarse grid: pairs have noise four times as large beside their signal, and did best with shorter steps. A finer search may move each row by some points.

# %% tags=["remove-stderr"]
runs = grids.run_cells(cells, compute=networks.network_compute(preset.dataset))
report.provenance_note(runs, scale)

# %% [markdown]
# ## The sum turns round
#
# Before any training: the worked example of {doc}`/microbatches`, computed by the code that trains. A linear model of two weights, one example with gradient $-2Ce$, another with $+4Ce$; the
# second leaves the data set, and the sum of clipped gradients along $e$ moves.

# %% tags=["hide-input"]
networks.sign_flip()

# %% [markdown]
# Clipped alone, an example takes away what it gave, at most $C$. In a pair, whatever is mixed, the sum goes from $+Ce$ to $-Ce$.
#
# ## Published, real data, demo
#
# Test accuracy in percent after the last step, mean (standard deviation) over the n seeds. The paper prints one number for mixup in pairs and does not say which of the two variants it is; it stands in
# both rows. The data, the network and the length of training differ between the tables, so the levels cannot be compared. The order of the rows can.

# %% tags=["hide-input"]
by = ["dataset", "model", "method", "epsilon"]
found = report.Sources(networks.published_table1(), evidence.chosen("table1", by), runs, scale)
report.tables(found)

# %% tags=["hide-input"]
networks.level(runs, data.load(preset.dataset).train.num_classes)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Test accuracy for six ways to clip, clipped alone and in pairs, a panel a source"}}
plots.point_plot(found)

# %% [markdown]
# *Test accuracy with every example clipped alone and with microbatches of two: means over the seeds, with bars of one standard deviation, a panel a source, each with a scale of its own.*
#
# ## What holds, and what does not
#
# Differences in points. Runs with the same seed start from the same weights; those with the same microbatches see the same batches too. All rows of a table are one family ({doc}`/deviations` states the rule).

# %% tags=["hide-input"]
pairs = [
    Comparison("DP-SGD", "DP-SGD in pairs"),
    Comparison("Self-Aug", "Self-Aug in pairs"),
    Comparison("pairs with their mixture", "DP-SGD in pairs"),
    Comparison("mixtures of pairs alone", "DP-SGD in pairs"),
    Comparison("DP-SGD", "pairs with their mixture"),
    Comparison("DP-SGD", "mixtures of pairs alone"),
    Comparison("Self-Aug in pairs", "DP-SGD in pairs"),
    Comparison("Self-Aug", "DP-SGD"),
]
verdicts.page(found, pairs)

# %% [markdown]
# In a demo of a few steps, a method that learns slowly at first looks bad, whatever it would reach in the end. Augmentation is likely to be one: on images of eight pixels, a crop by one pixel moves a stroke by an eighth of the
# image. What this page says about Self-Aug, it says about such short runs. The price of microbatches does not depend on that: it is in every step.
#
# ## What ε the pairs would really have
#
# Had the noise been calibrated to $C$, as if a pair were one example, its noise multiplier would be half of what the accountant was told. The claim and the truth:

# %% tags=["hide-input"]
networks.underestimated(runs)

# %% [markdown]
# ## Privacy
#
# The noise has standard deviation σ times the sensitivity: $\sigma C$ for examples clipped alone, $2 \sigma C$ for pairs. With that, all rows have the same ε. The sampling rate q is the same too: in pairs, it is whole pairs that
# join a step.

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
# $ papermill notebooks/table1.ipynb out.ipynb -p epochs 10 -p views_cut 1
# $ papermill notebooks/table1.ipynb out.ipynb -y "{eps: [2, 8], seeds: [0, 1, 2, 3, 4]}"
# $ papermill notebooks/table1.ipynb out.ipynb -p scale paper -p dataset cifar10
# ```
#
# The first takes about ten times as long. The last needs the data set on disk and a GPU ({doc}`/paper_scale`); without the data it stops at once and says what to put where.
