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
# # Table 5: more augmentations instead of mixtures?
#
# DP-MixSelf averages over more views than Self-Aug {cite:p}`de2022unlocking`. Is it the number of views that helps? Table 5 of the paper {cite:p}`bao2023dpmix` gives Self-Aug 16, 24, 32 and 36 views and DP-MixSelf 16 views and 16 mixtures, for a network
# trained from scratch and for a linear layer on a frozen encoder, at ε = 8.
#
# What the paper claims: more self-augmentations bring nothing, mixtures do.

# %% tags=["parameters"]
eps = None  # None: 8, as in the paper; or a number
dataset = None  # None: "digits" at demo scale, "cifar10" at paper scale
counts = None  # numbers of self-augmentations; None: 16, 24, 32 and 36
encoder = None  # None: "tiny-convnext" at demo scale, "vit-b-16" at paper scale
seeds = None  # None: three seeds
epochs = None  # of the network; None: the scale's; 200 in the paper
batch_size = None  # of the network; None: the scale's; 4096 in the paper
views_cut = None  # divides the network's numbers of views; None: the scale's; 1 restores the paper's
learning_rate = None  # of the network; None: the scale's
model = None  # "wrn-DEPTH-WIDTH"; None: the scale's
head_epochs = None  # of the linear layer; None: the scale's
learning_rates = None  # of the linear layer, a grid; None: the scale's
scale = "demo"  # "demo": two CPU cores; "paper": the paper's settings, a GPU

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
encoder = encoder or {"demo": "tiny-convnext", "paper": "vit-b-16"}[scale]
head = grids.changed(grids.preset(scale, dataset), models=(encoder,), epochs=head_epochs)
cells = grids.augmentations_grid(preset, head, eps=eps or 8, counts=counts, seeds=seeds, learning_rates=learning_rates)
glue("table5_cut", preset.views_cut, display=False)
glue("table5_most", max(cell.spec.recipe.k_base for cell in cells if cell.spec.from_scratch), display=False)
report_network.settings(preset)

# %% [markdown]
# The table says how the network is trained. The demo divides its numbers of views by {glue:text}`table5_cut`, so that the largest is {glue:text}`table5_most`; `views_cut=1` restores the paper's. The linear layer has all views of the paper at
# either scale: its heads share one pass ({doc}`/one_pass`). Rows below are named after the paper's numbers.
#
# The network has one learning rate for all rows, from a trial with another seed ({doc}`table2`). That of the linear layer is chosen for each row on a validation split, as in {doc}`table3`.

# %% tags=["remove-stderr"]
runs = grids.run_cells(cells, compute=grids.network_compute(preset.dataset))
report.provenance_note(runs, scale)

# %% [markdown]
# ## Published beside measured
#
# Test accuracy in percent after the last step, mean (standard deviation) over the seeds. In the demo the data set and the models differ between the two blocks, so the levels cannot be compared.

# %% tags=["hide-input"]
chosen = report_network.chosen(runs, ["model", "method", "n_augmentations", "epsilon"])
measured = report.summary(chosen, ["model", "method", "n_augmentations", "epsilon"])
published = paper.table(5)
glue("table5_n", int(measured["n"].min()), display=False)
glue("table5_dataset", report.label(preset.dataset), display=False)
report.side_by_side(published, measured, rows=("method", "n_augmentations"), columns=("model",))

# %% [markdown]
# Left CIFAR-10 from the paper, right {glue:text}`table5_dataset` here, over {glue:text}`table5_n` seeds. The number beside a method is how many views an example has in the paper.

# %% tags=["hide-input"]
network = chosen["model"] == preset.model
report_network.level(report_network.numbered(chosen[network]), data.load(preset.dataset).train.num_classes)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Test accuracy for Self-Aug with 16 to 36 views and DP-MixSelf, published above and measured below, a network from scratch and a frozen encoder"}}
parts = {"published": report_network.numbered(published), "measured here": report_network.numbered(measured)}
plots.point_plot(parts, unit="test accuracy (%)")

# %% [markdown]
# *Test accuracy by number of views, from scratch and on a frozen encoder, published above and measured below: means with bars of one standard deviation. Every panel has a scale of its own.*
#
# ## Differences on the same draws
#
# Rows of a seed see the same Poisson batches, and a smaller number of views is the first part of a larger one. In percentage points, with a 95 % interval by Student's t over the seeds.

# %% tags=["hide-input"]
least, *more = [f"{report.label('self-aug')} {n}" for n in grids.many(counts, grids.AUGMENTATIONS)]
mixed = f"{report.label('mix-self')} 32"
pairs = [(name, least) for name in more] + [(mixed, name) for name in (least, *more)]
differences = report.paired(report_network.numbered(chosen), pairs)
report.show_paired(differences)

# %% [markdown]
# ## What agrees, and what does not
#
# Cells are the models. The paper's differences among Self-Aug's rows are at most a few tenths of a point, for the network about as much as their standard deviation: its claim is that there is nothing to gain, so an undecided comparison is what it predicts.

# %% tags=["hide-input"]
report.agreement(differences, report.published_gaps(report_network.numbered(published), pairs))

# %% [markdown]
# In the demo the network takes few steps, and in few steps a method that learns slowly at first looks bad, whatever it would reach in the end. The encoder, for its part, leaves little to gain on digits.
#
# ## Learning rates of the linear layer
#
# In units of 1/C, chosen on the validation split. A star marks an end of the grid.

# %% tags=["hide-input"]
rates = grids.many(learning_rates, head.learning_rates)
report.chosen_rates(report_network.numbered(chosen[~network]), rates)

# %% [markdown]
# ## Privacy
#
# The number of views changes nothing here: they are averaged before the clip.

# %% tags=["hide-input"]
report.privacy_table(chosen)

# %% [markdown]
# ## Cost
#
# The network is trained once for every row and seed. The heads of the linear layer share one pass a seed.

# %% tags=["hide-input"]
report_network.cost(runs, ["method", "k_base", "k_self"])

# %% tags=["hide-input"]
report.cost_table(runs[runs["model"] != preset.model])

# %% [markdown]
# ## Run it again
#
# ```console
# $ papermill notebooks/table5.ipynb out.ipynb -p epochs 10 -p views_cut 1
# $ papermill notebooks/table5.ipynb out.ipynb -y "{counts: [16, 64], seeds: [0, 1, 2, 3, 4]}"
# $ papermill notebooks/table5.ipynb out.ipynb -p scale paper -p dataset cifar10
# ```
#
# The first takes some twenty times as long. The last needs the data set and the encoder's weights on disk and a GPU ({doc}`/paper_scale`); without the data it stops at once and says what to put where.
