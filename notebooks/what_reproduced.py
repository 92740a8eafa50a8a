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
# # What reproduced
#
# The paper {cite:p}`Bao-2023` makes some forty claims that an experiment can decide. Here is each of them, in our own words, with the effect that the paper printed, the effect
# that was measured on real data with this code, and a verdict. Nothing on this page is typed in: it is computed from the runs that came with the repository
# (`data/results/laptop/`, each with its commit, machine, seeds and digest of the data) and from `data/paper/`.

# %% tags=["hide-input"]
from IPython.display import Markdown

from dpmix.companion import evidence, ledger, plots
from dpmix.core.checks import counted

runs = ledger.committed()
found = ledger.decide(runs)
Markdown(f"**{counted(len(found), 'claim')}: {ledger.counts(found)}.**")

# %% [markdown]
# The data are the paper's own, or others where those were not at hand: Caltech-101 for Caltech-256, and CIFAR-10 or EuroSAT for Caltech-256 and CIFAR-100 in Tables 6, 12 and 13; the list says where. The encoder is another one: an EfficientNet-Lite0 trained on ImageNet, which fits two cores, in place of
# a ViT-B-16 and a ConvNeXt trained on two billion images. So a verdict is about the claim on *this* encoder, and a claim that is contradicted here may hold there.
# Views are cropped out of a padded image, as the paper has them, and on CIFAR-10 Self-Aug loses nearly a point by that: {doc}`On what does the gain depend? <conditions>` has the same comparison with mirrors alone, at other sizes, and with views drawn anew.
#
# The rule is one for the whole book ({doc}`The rule of decision, and what is ours </deviations>`): the difference is averaged over the cells of the claim within a seed and tested over the seeds, with Holm's correction over all claims of this page. *Holds* and *contradicted*
# are about the sign. *No effect larger than x* means that the interval excludes half of what the paper found (at least a quarter of a point, at most one). *Undecided* is what it says.

# %% tags=["parameters"]
scale = None  # "demo", "laptop" or "paper": decide the claims once more from this machine's store, at that scale; runs nothing

# %% tags=["hide-input"] mystnb={"image": {"alt": "Each claim's published effect as a ring and the measured one as a dot with its interval, coloured by verdict"}}
plots.effects_plot(found)

# %% [markdown]
# *Published effects (rings) and measured ones (dots, 95 % intervals), a row a claim, in the order of the paper; the words at the left are those before each claim in the list below. The axis is not linear beyond five points.*
#
# ## The ledger

# %% tags=["hide-input"]
ledger.table(found)

# %% [markdown]
# ## From the store of this machine
#
# With `-p scale demo` (or `laptop`, `paper`) the claims are decided once more, from whatever runs of that scale this machine has made.

# %% tags=["hide-input"]
again = ledger.decide(ledger.stored(scale)) if scale else None
ledger.table(again[again["verdict"] != ledger.NOT_RUN]) if scale else Markdown("*Not asked for.*")

# %% [markdown]
# ## What the real data were

# %% tags=["hide-input"]
parts = [f"{t}\n\n{evidence.status(t).data}" for t, part in runs.items() if len(part)]
Markdown("\n\n".join(parts) or "None yet: `python benchmarks/evidence.py --list` says what makes them.")
