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
# the shared pass of {doc}`Many heads, one pass </one_pass>` saves.
#
# The timings are taken afresh each time this page is made, never from the store: they are those of the machine at hand, and they change with what else it
# does. Each is repeated, in alternation, after one step that warms up.

# %% tags=["hide-input"]
import pandas as pd
from IPython.display import Markdown

from dpmix.companion import diagnostics, evidence, grids, ledger, paper, report, verdicts
from dpmix.companion.verdicts import Comparison
from dpmix.core.checks import counted

ledger.status("table13")

# %% tags=["parameters"]
dataset = None  # None: "digits" at demo scale, "cifar10" at laptop scale, "caltech256" at paper scale
model = None  # None: the first encoder of the scale
methods = ["self-aug", "mix-self", "mix-diff"]
eps = [1, 2, 4, 8]  # of the bank; a single run takes the first
steps = 4  # that are timed, of each repeat
repeats = 5
batch_size = None  # None: the scale's
scale = "demo"  # "demo" | "laptop": real data | "paper": the paper's settings, a GPU
download = False  # let torchvision fetch what is missing at laptop or paper scale

# %% tags=["hide-input"]
dataset = dataset or {"demo": "digits", "laptop": "cifar10", "paper": "caltech256"}[scale]
grids.check_scale(scale, dataset, download)
model = model or grids.preset(scale, dataset).models[0]
methods = grids.with_public(methods, dataset)
# Algorithm 1 to the letter: views are drawn and encoded anew at every step.
asked = {"dataset": dataset, "models": model, "methods": methods, "eps": eps, "seeds": 0, "batch_size": batch_size}
cells = grids.changed_cells(grids.methods_grid(scale, **asked), None, redraw=True)
runs = {m: [next(c.spec for c in cells if c.labels["method"] == m)] for m in methods}
runs["bank"] = [c.spec for c in cells]
timed = diagnostics.timings(runs, steps=steps, repeats=repeats).assign(dataset=dataset, model=model)
report.made_note(
    f"{report.label(model)} on {report.label(dataset)} at {scale} scale, {counted(steps, 'step')} of each pass, {counted(repeats, 'repeat')}"
)

# %% [markdown]
# ## Published, real data, demo
#
# Minutes of the paper on an A100 and seconds here are not comparable; their ratios to Self-Aug are, next to the ratio of views. What is measured is a
# whole run at the measured rate, mean (standard deviation) over the repeats.

# %% tags=["hide-input"]
published = paper.table(13).assign(unit="minutes")
alone = timed[timed["method"] != "bank"].assign(unit="seconds")
real = evidence.read("table13")
real = real.assign(unit="minutes", seconds=real["seconds"] / 60) if len(real) else real
found = report.Sources(published, real, alone, scale)
report.tables(found, columns=("unit",), value="seconds")

# %% tags=["hide-input"]
each = {m: part["views of an example"].iloc[0] for m, part in alone.groupby("method", sort=False)}
Markdown(
    f"Views of an example, in multiples of {report.label(methods[0])}'s: "
    + ", ".join(f"{report.label(m)} {n / each[methods[0]]:.2f}" for m, n in each.items())
    + "."
)

# %% [markdown]
# ## What holds, and what does not
#
# Ratios of running times, a repeat of all methods in turn being one observation; all rows of a table are one family ({doc}`The rule of decision, and what is ours </deviations>` states the rule, here for logarithms).

# %% tags=["hide-input"]
pairs = [Comparison("mix-self", "self-aug"), Comparison("mix-diff", "self-aug"), Comparison("mix-diff", "mix-self")]
verdicts.page(found, pairs, cells=("model",), value="seconds", ratio=True)

# %% [markdown]
# If time were proportional to the number of views, these ratios would be those of the views. The published ratio lies above that of the views, so the paper's mixtures cost more than
# their forward passes. Views that take long to make on the processor would explain it; the paper says no more than that augmentation takes additional steps.
# What the A100 achieved follows from the table, if we read the number of views off Section 6.5:

# %% tags=["hide-input"]
images = paper.DATASETS["caltech256"].train * paper.epochs("caltech256")
pd.DataFrame(
    {
        report.label(r.method): {
            "views of an example": f"{(views := grids.recipe(r.method, 'caltech256').views)}",
            "views/s (published)": f"{images * views / (60 * r.mean):,.0f}",
        }
        for r in published.itertuples()
    }
).T

# %% [markdown]
# The row of DP-MixDiff takes the number of synthetic images that the paper's third footnote gives for Caltech-256. Then it would have passed more views a second than
# DP-MixSelf did, by far. Either this table was measured with fewer, or features of the synthetic images, which need no new crop each time, were kept. The paper does not say.

# %% [markdown]
# ## Where the time goes
#
# Shares of one run by itself. *Floor* is the encoder alone, fed with ready-made images of the same number; *of the floor* is the rate of training over the
# floor's.

# %% tags=["hide-input"]
diagnostics.time_shares(timed)

# %% [markdown]
# In the demo the encoder is tiny, so what surrounds it weighs more than it would beside a ViT-B-16: drawing a crop takes as long for a small encoder as for a large one.
#
# ## What one pass replaces
#
# All runs of the methods above, at every ε and every learning rate of the grid, for one seed. One by one they would take the sum of their own times. The bank computes
# the union of the views once.

# %% tags=["hide-input"]
seconds = timed.groupby("method")["seconds"].median()
single = sum(seconds[c.labels["method"]] for c in cells)
Markdown(
    f"One by one, the runs ({len(cells)}) take {single:,.0f} s. One pass trains them all in {seconds['bank']:.0f}: {single / seconds['bank']:.0f} times less."
)

# %% [markdown]
# ## Encoding once
#
# Stored views ({doc}`Many heads, one pass </one_pass>`) are drawn and encoded once, by an inference engine. Images a second of EfficientNet-Lite0, by side of the input in pixels, as
# `python benchmarks/encoding.py` measured them:

# %% tags=["hide-input"]
once = report.benchmark("encoding")
named = [(*name.removeprefix("a view, ").split(" px, "), s) for name, s in once["seconds"].items() if " px, " in name]
rates = pd.DataFrame(
    [(int(size), engine, 1 / clock) for size, engine, (clock, _) in named], columns=["pixels", "engine", "rate"]
)
rates.pivot(index="pixels", columns="engine", values="rate").rename_axis(columns=None).map(
    lambda v: "–" if pd.isna(v) else f"{v:,.0f}"
)

# %% [markdown]
# Ratios of times on the same machine, beside what was aimed at, and what encoding CIFAR-10 for five methods and training a grid of heads on it would take, reckoned from these rates:

# %% tags=["hide-input"]
pd.DataFrame({"measured": {name: f"{clock:.2f}" for name, (clock, _) in once["ratios"].items()}})

# %% tags=["hide-input"]
kept = report.benchmark("choices")
Markdown(
    f"*Medians of one run: {once['date'][:10]}, commit {once['commit'][:7]}, {once['machine']}, {counted(once['threads'], 'thread')}, torch {once['torch']}, load at the start "
    f"{once['load at the start']:.1f}; bfloat16: {'yes' if once['bfloat16'] else 'this processor has none'}.*\n\nWhat these choices do to accuracy (`python benchmarks/choices.py`), in points, with the interval of 95 % over the seeds:\n\n"
    + "\n".join(
        f"- {of['what']}: {of['difference']:+.2f} [{of['interval_95'][0]:+.2f}, {of['interval_95'][1]:+.2f}], {counted(of['seeds'], 'seed')}, "
        f"mean over {counted(of['cells'], 'run')} of each"
        for of in kept.values()
    )
)

# %% [markdown]
# ## The gradient by itself
#
# Two benchmarks leave everything else out. Their figures came with the repository; `python benchmarks/heads.py` and `python benchmarks/network.py` take them anew.
#
# The clipped gradient of a linear head on 64 examples of 34 views, 512 features and 257 classes, against the plain gradient of the same batch, per-example gradients by `einsum`,
# and Opacus on all views; and a whole pass with 64 heads against one with a single head:

# %% tags=["hide-input"]
ratios = report.benchmark("heads")["ratios"]
pd.DataFrame({"measured": {name: f"{ratio:.2f}" for name, ratio in ratios.items()}})

# %% [markdown]
# A whole network, where the views of an example share one backward pass. The limit is plain SGD on the same images:

# %% tags=["hide-input"]
measured = report.benchmark("network")
rows = pd.DataFrame(measured["rows"]).sort_values(["convolutions", "row"], kind="stable")
rows["memory layout"] = rows["channels_last"].map({True: "channels last", False: "contiguous"})
rows = rows.rename(columns={"row": "gradient", "views_per_second": "views/s", "times_plain": "÷ plain SGD"})
rows[["convolutions", "gradient", "memory layout", "views/s", "÷ plain SGD"]].round({"views/s": 0, "÷ plain SGD": 2})

# %% tags=["hide-input"]
about = measured["about"]
Markdown(
    f"*{about['model']}, {about['side']} pixels, {about['device']} with {counted(about['threads'], 'thread')}, torch {about['torch']}. Medians over rounds in which all rows take turns.*"
)

# %% [markdown]
# The same on a GPU, in bfloat16 (`benchmarks/gpu.sh` takes these figures; `--device cpu --smoke` tries the script without one):

# %% tags=["hide-input"]
measured = report.benchmark("gpu-network")
rows = pd.DataFrame(measured["rows"]).rename(
    columns={"row": "gradient", "views_per_second": "views/s", "times_plain": "÷ plain SGD", "batch": "examples"}
)
rows[["examples", "gradient", "views/s", "÷ plain SGD"]].dropna().round({"views/s": 0, "÷ plain SGD": 2})

# %% tags=["hide-input"]
about = measured["about"]
alone = report.benchmark("gpu-scratch")
done = alone["results"][0]
Markdown(
    f"*{about['model']}, 16 views an example, {about['device']}, torch {about['torch']}. {about['note']}*\n\n"
    f"Training from scratch on that GPU was begun, with the epochs that a budget of minutes allowed: {report.label(done['method'])} "
    f"({counted(done['spec']['recipe']['k_base'], 'view')}, {counted(done['steps'], 'step')} with B = {done['divisor']:,.0f}, ε = {alone['results'][0]['epsilon']['rdp']:.2f}) "
    f"reached {100 * done['test_accuracy']:.1f} % on CIFAR-10's test images. {alone['about']['note']}"
)

# %% [markdown]
# ## Run it again
#
# ```console
# $ papermill notebooks/table13.ipynb out.ipynb -p model tiny-convnext -p steps 16
# $ papermill notebooks/table13.ipynb out.ipynb -p scale paper
# ```
