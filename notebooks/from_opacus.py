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
# # From Opacus
#
# Opacus {cite:p}`Yousefpour-2021` clips the gradient of each row of a batch. Augmentation multiplicity {cite:p}`De-2022` wants the gradients of an example's $K$ views averaged
# *before* the clip, which Opacus' users have asked for since 2022 ([issue 455](https://github.com/meta-pytorch/opacus/issues/455)). With `dpmix.peers.opacus` an existing script needs three
# lines more, for Self-Aug and for DP-MixSelf and DP-MixDiff {cite:p}`Bao-2023` alike. Hooks, clipping, noise, Poisson sampling and accountants stay Opacus'.

# %% tags=["parameters"]
epochs = 6
batch_size = 256
noise = 1.5  # noise multiplier σ
clip_norm = 1.0
learning_rate = 1.0
delta = 1e-5
views = 4  # base views of an example; DP-MixSelf adds as many mixtures
releases = 600  # noisy sums with the canary, and as many without

# %% tags=["hide-input"]
import math
import sys
import warnings

import pandas as pd
from IPython.display import Markdown, display

from dpmix import audit, models
from dpmix.companion import report
from dpmix.core import accounting
from dpmix.core.checks import counted
from dpmix.images import data

sys.path.insert(0, str(data.PROJECT / "tests"))  # the step that is audited below lives with the tests
from peers import opacus_steps

# What Opacus and PyTorch say at every start: the generator is not a cryptographic one, pixels need no gradient.
warnings.filterwarnings("ignore", message="Secure RNG|Full backward hook|Optimal order", category=UserWarning)
digits = data.load("digits")
report.made_note(f"Digits, σ = {noise:g}, {counted(epochs, 'epoch')} of Poisson batches of {batch_size} expected")

# %% [markdown]
# ## A plain Opacus script
#
# The shape of Opacus' own examples: a small convolutional network with GroupNorm, `make_private`, a logical batch in physical pieces, on the digits.

# %%
import torch
from opacus import PrivacyEngine
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 10),
    )  # fmt: skip


def accuracy(model):
    with torch.no_grad():
        predicted = model.eval()(digits.test.images / 255).argmax(1)
    return float((predicted == digits.test.labels).float().mean())


model, engine = network(), PrivacyEngine(accountant="rdp")
train = TensorDataset(digits.train.images / 255, digits.train.labels)
model, optimizer, loader = engine.make_private(
    module=model,
    optimizer=torch.optim.SGD(model.parameters(), lr=learning_rate),
    data_loader=DataLoader(train, batch_size=batch_size),
    noise_multiplier=noise,
    max_grad_norm=clip_norm,
)
with BatchMemoryManager(data_loader=loader, max_physical_batch_size=64, optimizer=optimizer) as pieces:
    for _ in range(epochs):
        for images, labels in pieces:
            optimizer.zero_grad()
            loss = cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
plain = {"test accuracy (%)": 100 * accuracy(model), "ε": engine.get_epsilon(delta)}

# %% [markdown]
# ## The same, with three lines more
#
# Line 1 makes the views: `ViewSet` wraps the data set, and its items are $K$ images $[K, C, H, W]$ with soft targets $[K, \text{classes}]$. Line 2 averages $K$ rows of gradients into one, before
# Opacus clips. In line 3 the model answers for every view, so the targets are flattened to match. A `Recipe` says which views; nothing else tells Self-Aug from DP-MixSelf.

# %%
from dpmix.core.views import Recipe
from dpmix.peers.opacus import ViewSet, average_views


def with_views(recipe):
    model, engine = network(), PrivacyEngine(accountant="rdp")
    views = ViewSet(train, recipe, num_classes=10)  # 1
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=learning_rate),
        data_loader=DataLoader(views, batch_size=batch_size),
        noise_multiplier=noise,
        max_grad_norm=clip_norm,
    )
    optimizer = average_views(model, optimizer, recipe.views)  # 2
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=64, optimizer=optimizer) as pieces:
        for _ in range(epochs):
            for images, targets in pieces:
                optimizer.zero_grad()
                loss = cross_entropy(model(images), targets.flatten(0, 1))  # 3
                loss.backward()
                optimizer.step()
    return {"test accuracy (%)": 100 * accuracy(model), "ε": engine.get_epsilon(delta)}


rows = {
    "plain Opacus": plain,
    "Self-Aug": with_views(Recipe(k_base=views, transform="crop")),
    "DP-MixSelf": with_views(Recipe(k_base=views, k_self=views, transform="crop")),
}
pd.DataFrame.from_dict(rows, orient="index").style.format("{:.2f}")

# %% [markdown]
# All three spend the same ε at the same δ: views cost no privacy. One run each, so the accuracies decide nothing; {doc}`Table 2: training from scratch <table2>` and {doc}`Table 3: fine-tuning with differential privacy <table3>` compare the
# methods over seeds. The random crops are drawn anew at every access. Digits have no mirror image, hence `transform="crop"`; for photographs leave it out. Pixels are
# normalised after the views: `model(normalise(images))`.
#
# ## What stays Opacus' and what changes
#
# | | |
# |---|---|
# | `make_private`, `make_private_with_epsilon`, `PrivacyEngine` | unchanged |
# | per-example gradients: `grad_sample_mode` "hooks", "functorch", "ew"; `wrap_model=False` | unchanged; "ew" knows fewer layers, as without views, and wants `optimizer.zero_grad()` before the model is called |
# | clipping: flat, per layer, adaptive; noise; divisor; `secure_mode` | unchanged, on $b$ averaged rows instead of $bK$ |
# | `BatchMemoryManager`, Poisson loader, empty batches | unchanged; sizes count examples, not views ("functorch" and "ew" cannot take an empty batch, as without views) |
# | `DistributedDPOptimizer`, several processes | unchanged |
# | accountants, `save_checkpoint`, `load_checkpoint` | unchanged |
# | memory for gradients | of $b$ rows: a layer's $bK$ rows are averaged as soon as Opacus has made them (with "ew": at the step) |
# | gradients that are not a number | count as zero; in plain Opacus one such example voids the sum |
# | the model in training | takes $[b, K, \ldots]$, refuses anything else; in evaluation as before |
# | `grad_sample_mode="ghost"` | refused by name: norms of rows are taken before views can be averaged. A head on features can do without us, see below |
#
# With $K = 1$ a run is that of Opacus bit for bit. Opacus' package brings tests of its own, which `tests/peers/opacus_suite.py` runs with three views an example: of the 68 of gradient accumulation,
# loaders, sampling and batches in pieces 63 pass, as without views; Opacus skips the other five itself. Of the 256 of its engine, which take minutes, 197 pass; 32 are skipped by Opacus, and 27
# train with the batch in the second dimension, where views cannot be averaged:
#
# ```console
# $ export PYTHONPATH=.:tests DPMIX_VIEWS=3 DPMIX_EXAMPLES=2
# $ python -m pytest -o addopts= -W ignore -p peers.opacus_suite --pyargs opacus.tests.privacy_engine_test
# ```
#
# ## Which batch size was that?
#
# Opacus derives the sampling rate from the length of the loader, $q = 1/\lceil N/B \rceil$, and divides by $\lfloor Nq \rfloor$. Both fit each other, so the guarantee holds, but for another batch
# size than was asked for. `exact_sampling(engine, optimizer, loader, batch_size=B, noise_multiplier=sigma)`, called once after line 2, sets Opacus' sampler, divisor, accountant and noise to $q = B/N$, $B$ and $\sigma$. It asks for the noise multiplier of that rate: the one that `make_private_with_epsilon` found is for the rounded one, and would spend more than the target.

# %% tags=["hide-input"]
sizes = {}
for n, asked in ((50_000, 4096), (len(train), batch_size)):
    q, exact = 1 / math.ceil(n / asked), asked / n
    about = dict(noise_multiplier=noise, delta=delta, steps=10 * math.ceil(n / asked))
    sizes[f"N = {n:,}, B = {asked:,}"] = {
        "Opacus' q": q, "its divisor": int(n * q), "exact q": exact, "divisor": asked,
        "ε of 10 passes at Opacus' q": accounting.epsilon_spent(sample_rate=q, **about),
        "at the exact q": accounting.epsilon_spent(sample_rate=exact, **about),
    }  # fmt: skip
pd.DataFrame(sizes).T.style.format("{:.4f}", subset=["Opacus' q", "exact q"]).format(
    "{:,.0f}", subset=["its divisor", "divisor"]
).format("{:.3f}", subset=["ε of 10 passes at Opacus' q", "at the exact q"])

# %% [markdown]
# For the same $q$, σ and number of steps Opacus' ε is that of `core.accounting`:

# %% tags=["hide-input"]
((sigma, q, steps),) = engine.accountant.history
ours = accounting.epsilon_spent(noise_multiplier=sigma, sample_rate=q, steps=steps, delta=delta)
pd.DataFrame({"q": q, "steps": steps, "Opacus": plain["ε"], "core.accounting": ours, "difference": abs(ours - plain["ε"])},
             index=["ε"]).style.format("{:.6f}").format("{:.0e}", subset=["difference"]).format("{:.0f}", subset=["steps"])  # fmt: skip

# %% [markdown]
# ## Why not just repeat the examples?
#
# The shortcut is to put the $K$ views into the batch as $K$ rows and to leave everything else alone. It trains well and prints the same ε, and it is **not** private at that ε: each row is
# clipped by itself, so one person moves the sum by up to $K$ clip norms, under noise for one. Opacus cannot see it
# ([issue 461](https://github.com/meta-pytorch/opacus/issues/461), closed: each input is taken for another person). The audits of {doc}`Can you trust it? <trust>` do. First the largest movement of Opacus' clipped sum when
# one example joins, over data sets made to move it; then lower bounds on ε from an attack on many noisy sums (`releases`), noise included, all from Opacus' own optimizer.

# %% tags=["hide-input"]
K = opacus_steps.RECIPE.views
worlds = {w: (r, new) for w, r, new in audit.worlds(opacus_steps.SHAPE, opacus_steps.CLASSES, 4, seed=0)}
records, newcomers = worlds["opponents"]
audited = {}
for name, average in (("average_views", True), (f"{K} views as {K} rows", False)):
    step, release = opacus_steps.opacus_step(average), opacus_steps.opacus_step(average, noise=1.0, copies=40)
    moved = audit.sensitivity(step, shape=opacus_steps.SHAPE, num_classes=opacus_steps.CLASSES, trials=1, size=4)
    attack = audit.step_canary(
        step, records=records, canary=newcomers.take([0]), noise_multiplier=1.0, delta=delta, releases=releases, release=release
    )  # fmt: skip
    audited[name] = {
        "movement (C)": max(m for (w, r), m in moved.movements.items() if r == "add" and w != "not a number"),
        "claimed ε": attack.claimed, "ε at least, Gaussian": attack.gdp, "ε at least, counting": attack.clopper_pearson,
    }  # fmt: skip
audited = pd.DataFrame(audited).T
exceeds = (audited["ε at least, Gaussian"] > audited["claimed ε"]).map({True: "yes", False: "no"})
audited.assign(**{"claim refuted": exceeds}).style.format("{:.2f}", subset=list(audited.columns))

# %% [markdown]
# With K views the repetition moves the sum by almost K clip norms, and the attack refutes its claim. Averaged views keep to one.
#
# ## What it costs
#
# One step of a network of eight convolutions, per-example gradients, clipping and noise included. A loop that calls the model once a view and averages the losses is the other correct way: Opacus adds up
# the calls of one backward pass. Figures came with the repository; `python benchmarks/in_opacus.py` takes them anew.

# %% tags=["hide-input"]
measured = report.benchmark("in_opacus")
about = measured["about"]
times = pd.DataFrame(measured["rows"]).set_index("row")
shown = times[["times_average_views", "rows_mib"]].set_axis(
    ["time of a step, × average_views", "gradients held (MiB)"], axis=1
)
shown = shown.rename_axis(None).style.format("{:.2f}", subset=["time of a step, × average_views"])
display(shown.format(lambda m: f"{m:.0f}" if m else "–", subset=["gradients held (MiB)"]))
display(
    Markdown(
        f"*{counted(about['batch'], 'example')} × {counted(about['views'], 'view')} of {about['side']} pixels, {about['parameters']:,} parameters, "
        f"{counted(about['threads'], 'thread')}, opacus {about['versions']['opacus']}; medians over {counted(about['rounds'], 'round')} in which all rows take turns.*"
    )
)

# %% [markdown]
# Who is free to leave Opacus gets the same sum from
# `core.clipping.clipped_gradient_sum` in less time, since the views of an example share one backward pass there ({doc}`Table 13: running time <table13>`).
#
# ## A head on a frozen encoder
#
# With a frozen encoder the views are drawn and encoded once (`redraw=False`), and line 1 becomes a data set of their features. `models.stored.StoredViews` keeps such features on disk and reads
# like `FreshViews`. They are as private as the images.

# %%
from dpmix.core import rng
from dpmix.core.sources import FreshViews

recipe = Recipe(k_base=views, k_self=views, transform="crop")
encoder = models.encoder("tiny-convnext")
source = FreshViews(
    encoder, digits.train.images, digits.train.labels, [recipe], num_classes=10, seed=rng.fresh_seed(), redraw=False
)
features = TensorDataset(*source.batch(torch.arange(source.n), 0))  # [N, K, D] and [N, K, classes]

engine, head = PrivacyEngine(accountant="rdp"), nn.Linear(encoder.dim, 10)
head, optimizer, loader = engine.make_private(
    module=head,
    optimizer=torch.optim.SGD(head.parameters(), lr=4.0),
    data_loader=DataLoader(features, batch_size=batch_size),
    noise_multiplier=noise,
    max_grad_norm=clip_norm,
)
optimizer = average_views(head, optimizer, recipe.views)
for _ in range(epochs):
    for z, targets in loader:
        optimizer.zero_grad()
        cross_entropy(head(z), targets.flatten(0, 1)).backward()
        optimizer.step()
tested = encoder.features(digits.test.images / 255)
right = (head.eval()(tested).argmax(1) == digits.test.labels).float().mean()
pd.DataFrame(
    {"test accuracy (%)": 100 * float(right), "ε": engine.get_epsilon(delta)}, index=["DP-MixSelf, head"]
).style.format("{:.2f}")

# %% [markdown]
# Such a head is linear in $[b, K, D]$, so Opacus' ghost clipping can train it without `average_views`: give `make_private(..., grad_sample_mode="ghost", criterion=...)` a criterion that averages the $K$
# losses of each example. A test compares it with `core.clipping.clipped_head_sums`.
#
# ## Killed and resumed
#
# `save_checkpoint` and `load_checkpoint` of Opacus keep weights, optimizer and accountant; there is nothing of ours to save. For a run that shall be repeated exactly, in science and never for a release,
# give `ViewSet` a `seed`, call `train.set_epoch(epoch)` and seed PyTorch before each pass: a test kills such a script in the middle of a pass and finds the same weights and the same ε after resuming.
#
# ## What Opacus leaves to you
#
# Sampling and noise come from PyTorch's generator unless `secure_mode=True`. In several processes Opacus' Poisson loader leaves out a process' empty batch, so that processes may fall out of step when $q$ is small.
# `make_private(rand_on_empty=True)` puts a random row in the place of an empty batch, which is clipped and added like an example: who joins such a batch replaces it, and the sum may move by $2C$. Leave it out. The
# floating-point attacks on noise that {doc}`Limits </limits>` names concern it too.
#
# ## Run it again
#
# ```console
# $ papermill notebooks/from_opacus.ipynb out.ipynb -p noise 1.0 -p views 8
# ```
