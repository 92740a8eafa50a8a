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
# DP-MixSelf averages over more views than Self-Aug {cite:p}`De-2022`. Is it the number of views that helps? Table 5 of the paper {cite:p}`Bao-2023` gives Self-Aug 16, 24, 32 and 36 views and DP-MixSelf 16 views and 16 mixtures, for a network
# trained from scratch and for a linear layer on a frozen encoder, at ε = 8.
#
# What the paper claims: more self-augmentations bring nothing, mixtures do.

# %% tags=["hide-input"]
from IPython.display import Markdown

from dpmix.companion import evidence, grids, ledger, networks, paper, plots, report, verdicts
from dpmix.companion.verdicts import Comparison
from dpmix.images import data

ledger.status("table5")

# %% tags=["parameters"]
eps = None  # None: 8, as in the paper; or a number
dataset = None  # None: "digits" at demo scale, "cifar10" else
counts = None  # numbers of self-augmentations; None: 16, 24, 32 and 36
encoder = None  # None: "tiny-convnext" at demo scale, "vit-b-16" at paper scale
seeds = None  # of the linear layer; None: the scale's
network_seeds = None  # None: the scale's
epochs = None  # of the network; None: the scale's; 200 in the paper
batch_size = None  # of the network; None: the scale's; 4096 in the paper
views_cut = None  # divides the network's numbers of views; None: the scale's; 1 restores the paper's
learning_rate = None  # of the network; None: the scale's
model = None  # "wrn-DEPTH-WIDTH"; None: the scale's
head_epochs = None  # of the linear layer; None: the scale's
learning_rates = None  # of the linear layer, a grid; None: the scale's
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
cells = networks.augmentations_grid(
    scale,
    preset,
    counts=counts,
    eps=eps or 8,
    network_seeds=network_seeds,
    dataset=dataset,
    models=encoder or {"demo": "tiny-convnext", "paper": "vit-b-16"}.get(scale),
    seeds=seeds,
    epochs=head_epochs,
    learning_rates=learning_rates,
)
networks.settings(preset)

# %% tags=["hide-input"]
most = max(cell.spec.recipe.k_base for cell in cells if cell.spec.from_scratch)
Markdown(
    f"The table says how the network is trained. Its numbers of views are the paper's divided by {preset.views_cut}, so that the largest is {most}; `views_cut=1` restores them. "
    "The linear layer has all views of the paper at any scale: its heads share one pass. Rows are named after the paper's numbers."
)

# %% [markdown]
# The network has one learning rate for all rows, from a trial with another seed ({doc}`Table 2: training from scratch <table2>`). That of the linear layer is chosen for each row on a validation split, as in {doc}`Table 3: fine-tuning with differential privacy <table3>`.

# %% tags=["remove-stderr"]
runs = grids.run_cells(cells, compute=networks.network_compute(preset.dataset))
report.provenance_note(runs, scale)

# %% [markdown]
# ## Published, real data, demo
#
# Test accuracy in percent after the last step, mean (standard deviation) over the n seeds. The number beside a method is how many views an example has in the paper.

# %% tags=["hide-input"]
by = ["dataset", "model", "method", "epsilon"]
chosen = evidence.outcomes(evidence.choose(runs, by))
published = paper.table(5)
published["method"] = [
    f"{report.label(m)} {n}" for m, n in zip(published["method"], published["n_augmentations"], strict=True)
]
found = report.Sources(published, evidence.chosen("table5", by), chosen, scale)
report.tables(found, columns=("epsilon",))

# %% tags=["hide-input"]
network = chosen["model"] == preset.model
networks.level(chosen[network], data.load(preset.dataset).train.num_classes)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Test accuracy for Self-Aug with 16 to 36 views and DP-MixSelf, a panel a source and model"}}
plots.point_plot(found)

# %% [markdown]
# *Test accuracy by number of views, from scratch and on a frozen encoder: means with bars of one standard deviation, a panel a source and model, each with a scale of its own.*
#
# ## What holds, and what does not
#
# That more self-augmentations bring nothing is a claim that can fail: it *holds* where the interval of what they bring lies below half a point, is *contradicted* where it lies above, and is
# *undecided* where it holds half a point. Rows of a seed see the same batches, and a smaller number of views is the first part of a larger one. All rows of a table are one family
# ({doc}`The rule of decision, and what is ours </deviations>` states the rule).

# %% tags=["hide-input"]
first, *more = [f"{report.label('self-aug')} {n}" for n in grids.many(counts, networks.AUGMENTATIONS)]
mixed = f"{report.label('mix-self')} 32"
pairs = [Comparison(name, first, "no gain") for name in more] + [Comparison(mixed, name) for name in (first, *more)]
verdicts.page(found, pairs, per=("dataset", "model"))

# %% [markdown]
# In the demo the network takes few steps, and in few steps a method that learns slowly at first looks bad, whatever it would reach in the end. The encoder, for its part, leaves little to gain on digits.
#
# ## Learning rates of the linear layer
#
# In units of 1/C, chosen on the validation split. A star marks an end of the grid.

# %% tags=["hide-input"]
report.chosen_rates(found._replace(made=chosen[~network]))

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
report.cost_table(runs)

# %% [markdown]
# ## Run it again
#
# ```console
# $ papermill notebooks/table5.ipynb out.ipynb -p epochs 10 -p views_cut 1
# $ papermill notebooks/table5.ipynb out.ipynb -y "{counts: [16, 64], seeds: [0, 1, 2, 3, 4]}"
# $ papermill notebooks/table5.ipynb out.ipynb -p scale paper -p dataset cifar10
# ```
#
# The first takes some twenty times as long. The last needs the data set and the encoder's weights on disk and a GPU ({doc}`Running at paper scale </paper_scale>`); without the data it stops at once and says what to put where.
