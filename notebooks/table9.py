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
# # Table 9: how many of each
#
# A method is three numbers ({doc}`Views: Algorithm 1 </views>`): $K_\text{base}$ augmentations of the example, $K_\text{self}$ mixtures and $K_\text{diff}$ public images. Table 9 of the
# paper {cite:p}`Bao-2023` varies all three on Caltech-256. Its 27 runs are one pass here ({doc}`Many heads, one pass </one_pass>`): smaller numbers take the first views of
# larger ones.
#
# What the paper claims: two or four public images, and no more mixtures than augmentations, are good choices overall. It settles on (16, 18, 2), and on 24 public
# images for Caltech-256 and Oxford-IIIT Pet.

# %% tags=["hide-input"]
import pandas as pd
from IPython.display import Markdown

from dpmix.companion import evidence, grids, ledger, paper, report, verdicts
from dpmix.companion.verdicts import Comparison
from dpmix.core import views
from dpmix.core.checks import counted

ledger.status("table9")

# %% tags=["parameters"]
k_base = [8, 16, 24]
k_self = [8, 16, 24]
k_diff = [0, 2, 4]
eps = 1
dataset = (
    None  # None: "digits" at demo scale, "cifar10" at laptop scale (the only one with D), "caltech256" at paper scale
)
model = None  # None: "tiny-convnext" at demo scale, "vit-b-16" at paper scale
seeds = None  # None: five in the demo, else the scale's
epochs = None  # None: 2 in the demo, to stay within three minutes; else the paper's
batch_size = None
learning_rates = None  # in units of 1/C; None: 2, 4 and 8 in the demo, else the scale's grid
scale = "demo"  # "demo" | "laptop": real data, hours on two cores | "paper": the paper's settings, a GPU
download = False  # let torchvision fetch what is missing at laptop or paper scale

# %% tags=["hide-input"]
demo = scale == "demo"
dataset = dataset or {"demo": "digits", "laptop": "cifar10", "paper": "caltech256"}[scale]
grids.check_scale(scale, dataset, download)
ks = ["k_base", "k_self", "k_diff"]
values = [grids.many(v, [], k) for v, k in zip((k_base, k_self, k_diff), ks, strict=True)]
cells = grids.k_grid(
    scale,
    *values,
    dataset=dataset,
    models=model or {"demo": "tiny-convnext", "paper": "vit-b-16"}.get(scale),
    eps=eps,
    seeds=range(5) if demo and seeds is None else seeds,
    epochs=2 if demo and epochs is None else epochs,
    batch_size=batch_size,
    learning_rates=(2.0, 4.0, 8.0) if demo and learning_rates is None else learning_rates,
)
grid = {tuple(c.labels[k] for k in ks): c.spec.recipe for c in cells}
union = views.make_union(list(grid.values()))
Markdown(
    f"{counted(len(cells), 'run')}: every combination × learning rate × seed. Alone, the combinations would make {counted(sum(map(sum, grid)), 'view')} of an example; together they need {union.views}, "
    "because they share the augmentations, the public images and, where the pool is the same, the mixtures. That is still several times as many as a usual table, "
    f"so that these runs train for few epochs ({cells[0].spec.epochs:g})."
)

# %%
runs = grids.run_cells(cells)
report.provenance_note(runs, scale)

# %% [markdown]
# ## Published, real data, demo

# %% tags=["hide-input"]
by = ["dataset", "model", *ks, "epsilon"]
chosen = evidence.outcomes(evidence.choose(runs, by))
named = pd.DataFrame([{**dict(zip(ks, k, strict=True)), "pool": f"K_diff = {k[2]}"} for k in grid])
named = named.assign(row=[f"{b} + {s}" for b, s in zip(named["k_base"], named["k_self"], strict=True)])
parts = [t.merge(named, on=ks) if len(t) else t for t in (paper.table(9), evidence.chosen("table9", by), chosen)]
found = report.Sources(*parts, scale)
shape = {"rows": ("row",), "columns": ("pool",), "split": ("dataset", "model")}
report.tables(found, **shape)

# %% [markdown]
# *Test accuracy in percent: published (one number a cell, no deviation given), and mean (standard deviation) over the n seeds. A row is $K_\text{base} + K_\text{self}$.*
#
# The average over all cells with one number in common is less noisy:

# %% tags=["hide-input"]
sources = {"published": found.published} | {name: report.summary(f, [*by, "row"]) for name, f in found.runs().items()}
pd.DataFrame(
    {
        name: {f"K_{k[2:]} = {v}": f"{part.mean():.1f}" for k in ks for v, part in t.groupby(k)["mean"]}
        for name, t in sources.items()
    }
)

# %% [markdown]
# ## What holds, and what does not
#
# Each claim as a difference between averages over groups of cells, paired by seed; all rows of a table are one family ({doc}`The rule of decision, and what is ours </deviations>` states the rule).

# %% tags=["hide-input"]
names = list(grids.K_GROUPS)
pairs = [Comparison(*pair) for pair in zip(names[::2], names[1::2], strict=True)]
real = grids.k_groups(found.real) if len(found.real) else found.real
published = grids.k_groups(found.published, "mean")
verdicts.page(report.Sources(published, real, grids.k_groups(chosen), scale), pairs)

# %% [markdown]
# The paper's own numbers say more than its text. Without public images the three best cells are those with $K_\text{self} = K_\text{base}$, ahead of all the others by more
# than the other cells differ among themselves; the paper gives no deviations. With public images, fewer views of the private example are never worse. On Caltech-256 it is the synthetic images that carry the gain, which fits the paper's Table 12, where views without any private pixel
# come close to the full method (on CIFAR-10 we do not find that: {doc}`Table 12: Pure-DP-MixDiff, and what it means <table12>`).
#
# The best cell is the best of many on the test set, so its accuracy is a little too good. Nothing in other tables uses it.
#
# ## Privacy and cost

# %% tags=["hide-input"]
report.privacy_table(chosen)

# %% tags=["hide-input"]
report.cost_table(runs)

# %% [markdown]
# ## Run it again
#
# ```console
# $ papermill notebooks/table9.ipynb out.ipynb -p epochs 10
# $ papermill notebooks/table9.ipynb out.ipynb -y "{k_base: [4, 16], k_self: [0, 18], k_diff: [0, 2, 24]}"
# $ papermill notebooks/table9.ipynb out.ipynb -p scale laptop
# $ papermill notebooks/table9.ipynb out.ipynb -p scale paper
# ```
