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
# # Figure 1: the method in pictures
#
# Figure 1 of the paper {cite:p}`Bao-2023` draws the method as a diagram. This page shows the same with real pixels: one private example, and every view
# that stands for it in one step of training. Each view gives a gradient; the gradients are averaged, the average is clipped, noise is added to the sum over the
# batch ({doc}`Views: Algorithm 1 </views>`, {doc}`Why the sensitivity stays C </sensitivity>`). What you see is exactly what a run with this seed trains on.

# %% tags=["parameters"]
dataset = "digits"  # or any that is on disk: "cifar10", ..., "folder:PATH"
index = 25  # which training example
seed = 0
step = 0  # the views are drawn anew at each step of training
columns = 6

# %% tags=["hide-input"] mystnb={"image": {"alt": "Rows of pictures: one example, its augmentations, mixtures of them, public images, and mixtures with those, each with its label"}}
import warnings

import torch
from IPython.display import Markdown, display

from dpmix.companion import plots, report
from dpmix.core import views
from dpmix.core.checks import counted
from dpmix.core.transforms import as_float
from dpmix.images import data

train = data.load(dataset).train
if not 0 <= index < len(train):
    raise ValueError(f"index={index}: must lie in 0..{len(train) - 1}, the training examples of {dataset}")
try:
    public = data.public_images(dataset, like=train)
except FileNotFoundError as missing:  # DP-MixSelf needs none: show that half
    public = None
    warnings.warn(f"only the first half of this page: {missing}", stacklevel=1)
ids = torch.tensor([index])
images, labels = train.images[ids], train.labels[ids]
mix_self = views.METHODS["mix-self"].for_data(train.flip)
mix_diff = views.METHODS["mix-diff"].for_data(train.flip)


def views_of(recipe):
    """The views, and for each mixture its two members of the pool and λ; checked against the pixels and the labels."""
    made = views.make_views(
        images, labels, ids, recipe, num_classes=train.num_classes, seed=seed, step=step, public=public
    )
    first, second, share = (t[0] for t in views.mixing_draws(recipe, ids, seed=seed, step=step))
    pool = recipe.k_base + recipe.k_diff
    for view, a, b, s in zip(range(pool, recipe.views), first, second, share, strict=True):
        for tensor in (made.images[0].double(), made.targets[0].double()):
            torch.testing.assert_close(tensor[view], s * tensor[a] + (1 - s) * tensor[b], rtol=0, atol=1e-5)
    return made.images[0], made.targets[0], list(zip(first.tolist(), second.tolist(), share.tolist(), strict=True))


def name_of(target):
    """A label as text: "5", or "0.93 · 5 + 0.07 · 8"."""
    parts = [(w, train.class_names[c]) for c, w in enumerate(target.tolist()) if w > 0.005]
    parts = sorted(parts, reverse=True)
    return parts[0][1] if len(parts) == 1 else "\n+ ".join(f"{w:.2f} · {name}" for w, name in parts)


self_images, self_targets, self_mixes = views_of(mix_self)
own = name_of(self_targets[0])
base = mix_self.k_base
faint = sum(max(share, 1 - share) > 0.9 for *_, share in self_mixes)


def clearest(mixes, among):
    """The places of the mixtures nearest to half and half."""
    return sorted(among, key=lambda m: abs(mixes[m][2] - 0.5))[:columns]


shown = clearest(self_mixes, range(len(self_mixes)))
rows = [
    (f"One private example: {report.label(dataset)}, number {index}", as_float(images), [f"label {own}"]),
    (f"Self-Aug: {columns} of {counted(base, 'augmentation')}", self_images[:columns], [own] * columns),
    (
        f"DP-MixSelf: the {len(shown)} least faint of {counted(len(self_mixes), 'mixture')}",
        self_images[[base + m for m in shown]],
        [f"λ = {self_mixes[m][2]:.2f}\n{name_of(self_targets[base + m])}" for m in shown],
    ),
]
if public is not None:
    diff_images, diff_targets, diff_mixes = views_of(mix_diff)
    k_diff = mix_diff.k_diff
    pool = base + k_diff
    crossed = [m for m, (a, b, _) in enumerate(diff_mixes) if (a < base) != (b < base)]
    shown = clearest(diff_mixes, crossed)
    captions = [name_of(t) for t in diff_targets[base:pool]]
    rows.append((f"DP-MixDiff: {counted(k_diff, 'public image')} without a change", diff_images[base:pool], captions))
    rows.append(
        (
            f"DP-MixDiff: private with public, {len(crossed)} of {counted(len(diff_mixes), 'mixture')}",
            diff_images[[pool + m for m in shown]],
            [f"λ = {diff_mixes[m][2]:.2f}\n{name_of(diff_targets[pool + m])}" for m in shown],
        )
    )
display(plots.picture_rows(rows, columns))
display(
    Markdown(
        f"*From top to bottom: a private example (label {own}), augmentations of it, mixtures of two of those (the clearest ones), public synthetic images, and mixtures "
        "that join a private view with a public one. Under each picture its label, and for a mixture λ, the share of the first of its two members.*\n\n"
        f"λ comes from a Beta distribution with both parameters {mix_self.alpha:g}, which favours the two ends: here {faint} of {counted(len(self_mixes), 'mixture')} give one "
        "member more than nine tenths."
    )
)

# %% [markdown]
# Three things to see:
#
# - **A mixture of DP-MixSelf keeps its label.** Both members are the same example, so λ does not show in the label, only in the picture.
# - **A mixture with a public image has a soft label**, λ of one class and 1 − λ of the other. Public images come with a class of their own, whatever the
#   private example is.
# - **Many mixtures are faint**, since the distribution of λ favours the two ends. (The example above was picked because many of its mixtures are clear.)
#
# ## All views of DP-MixSelf

# %% tags=["hide-input"] mystnb={"image": {"alt": "All augmentations of the example, numbered, and all mixtures of DP-MixSelf, each with its two members and lambda"}}
plots.picture_rows(
    [
        (f"{counted(base, 'augmentation')}, numbered", self_images[:base], [str(v + 1) for v in range(base)]),
        (
            f"{counted(len(self_mixes), 'mixture')}: λ of one, 1 − λ of the other",
            self_images[base:],
            [f"{a + 1} with {b + 1}\nλ = {share:.2f}" for a, b, share in self_mixes],
        ),
    ],
    columns,
)

# %% [markdown]
# *The sixteen augmentations of the example and the eighteen mixtures of them. All carry the example's label. Small images leave few different crops: on the digits'
# 8 × 8 pixels there are nine, so some augmentations are equal, and so is a mixture of two equal ones to both.*
#
# ## All views of DP-MixDiff

# %% tags=["hide-input"] mystnb={"image": {"alt": "The public images and all mixtures of DP-MixDiff, each with its two members and lambda"}}
if public is None:
    shown = f"Nothing to show here: synthetic images are not on disk ({dataset})."
else:
    letters = [str(v + 1) for v in range(base)] + [f"P{v + 1}" for v in range(k_diff)]
    shown = plots.picture_rows(
        [
            ("The same augmentations, 1 to 16, and the public images", diff_images[base:pool], letters[base:]),
            (
                counted(len(diff_mixes), "mixture"),
                diff_images[pool:],
                [f"{letters[a]} with {letters[b]}\nλ = {share:.2f}" for a, b, share in diff_mixes],
            ),
        ],
        columns,
    )
shown

# %% [markdown]
# *Public images P1, P2, and the eighteen mixtures of the pool of eighteen; the sixteen augmentations are those above. DP-MixSelf and DP-MixDiff share their augmentations, and
# draw their mixtures apart.*
#
# With two public images among eighteen members, most mixtures hold no public pixel, and now and then one is public in both halves: it then holds nothing of the
# private example. Pure-DP-MixDiff, where all of them are so, is the subject of {doc}`Table 12: Pure-DP-MixDiff, and what it means <table12>`.

# %% tags=["hide-input"]
report.made_note(f"Example {index} of {report.label(dataset)}, seed {seed}, step {step}")

# %% [markdown]
# ## Run it again
#
# ```console
# $ papermill notebooks/figure1.ipynb -p index 12
# $ papermill notebooks/figure1.ipynb out.ipynb -p dataset cifar10 -p index 7
# ```
#
# Any data set on disk will do; without synthetic images beside it, the page shows the half that needs none.
