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
# # Explore: the method under your hands
#
# Four pictures with knobs: the views of an example, what a budget comes to, one step of training, and the results that came with the repository. They move in JupyterLab;
# in the built book they stand still and show a few settings. To turn the knobs, start JupyterLab from a clone and run all cells:
#
# ```console
# $ make lab
# ```
#
# or `jupyter lab notebooks/explore.ipynb` in an environment of your own. Every control has a name, and the keyboard moves it: Tab goes to the next one, arrow keys turn it. A setting
# that makes no sense gets a line that says so, in place of the picture.

# %% tags=["parameters"]
dataset = "digits"  # or any that is on disk: "cifar10", ..., "folder:PATH"
index = 25  # which training example
seed = 0

# %% jupyter={"source_hidden": true} tags=["hide-input"]
import ipywidgets as w
from IPython.display import HTML, display

from dpmix.companion import budgets, explore, paper, report
from dpmix.core import accounting, transforms, views
from dpmix.images import data

# ipywidgets names the row of a slider but not its handle, which screen readers read out: the row's label and value for it.
NAMES = """<script>{
  const name = handle => {
    const row = handle.closest(".widget-inline-hbox");
    handle.setAttribute("aria-label", row.querySelector(".widget-label").innerText);
    handle.setAttribute("aria-valuetext", row.querySelector(".widget-readout").innerText);
  };
  new MutationObserver(() => document.querySelectorAll(".noUi-handle").forEach(name))
    .observe(document.body, {childList: true, subtree: true});
}</script>"""


def live(picture, controls, *others):
    """The picture below its knobs. Where no kernel answers: the picture, and what it is with `others` of the settings."""
    shown, row = w.HTML(layout={"width": "100%"}), w.Box([*controls.values()], layout={"flex_flow": "row wrap"})
    for control in controls.values():
        control.style.description_width = "initial"
        control.layout.margin = "2px 18px 2px 2px"

    def settings():
        return {name: control.value for name, control in controls.items()}

    def draw(_=None):
        shown.value = explore.answer(picture, **settings())

    draw()
    for control in controls.values():
        control.observe(draw, "value")
    still = shown.value
    for changed in others:
        named = ", ".join(f"{controls[name].description} {value}" for name, value in changed.items())
        still += f"<hr><p>{named}:</p>{explore.answer(picture, **settings() | changed)}"
    box = w.VBox([row, shown])
    display({**box._repr_mimebundle_(), "text/html": still}, raw=True)


def one_of(name, options, value):
    return w.Dropdown(options=options, value=value, description=name)


def slider(name, options, value):
    return w.SelectionSlider(options=options, value=value, description=name)


def number(name, low, high, value):
    return w.IntSlider(min=low, max=high, value=value, description=name)


def log(name, low, high, value):
    return w.FloatLogSlider(min=low, max=high, step=0.1, value=value, description=name, readout_format=".2f")


display(HTML(NAMES))


# %% [markdown]
# ## The views of one example
#
# An example contributes $K = K_\text{base} + K_\text{self} + K_\text{diff}$ views. Their gradients are averaged, each with the weight that stands below it, and only then clipped
# ({doc}`Views: Algorithm 1 </views>`). Two members of the pool (base views, and public images P1, P2, …) are the parents of a mixture; λ is the share of the first (of a CutMix, the label tells it). With $K_\text{self} > 0$ the pool
# needs two members.
#
# Data set: a name or `folder:PATH`, with the folders of {doc}`Your own images </own_images>`. Photographs are cut to small squares here. Their public images are the first few of each class; a run draws from all of
# them.

# %% jupyter={"source_hidden": true} tags=["hide-input"]
example_controls = {
    "dataset": w.Combobox(
        options=["digits", *data.KNOWN],
        value=dataset,
        description="data set",
        placeholder="a name, or folder:PATH",
        continuous_update=False,
    ),
    "index": w.BoundedIntText(min=0, max=10**7, value=index, description="example"),
    "k_base": number("K base", 0, 24, 8),
    "k_self": number("K self", 0, 24, 8),
    "k_diff": number("K diff", 0, 24, 2),
    "alpha": log("α", -1.5, 1.5, 0.2),
    "mix": one_of("mix", views.MIXES, "mixup"),
    "transform": one_of("transform", list(transforms.TRANSFORMS), "crop-flip"),
    "seed": w.IntText(value=seed, description="seed"),
}
live(explore.example_views, example_controls, {"mix": "cutmix", "k_diff": 0}, {"alpha": 1.0})

# %% [markdown]
# Try this: turn $\alpha$ up, and mixtures grow less faint. Take $K_\text{diff} = 0$, and no label is mixed any more. Take $K_\text{base} = 0$ and $K_\text{diff} = 2$: no view shows the private example.
#
# ## What a budget comes to
#
# Each budget $(\varepsilon, \delta)$ asks for a noise multiplier σ ({doc}`Differential privacy and DP-SGD </dp_sgd>`). The noise on a mean gradient grows with the number of parameters $D'$, the gradient of an example never exceeds $C$.
# Below are ε by the three accountants, and ε of a run that makes a mistake and adds the same noise: pairs of examples clipped as one ({doc}`Why microbatches fail </microbatches>`), each view clipped by itself
# ({doc}`Why the sensitivity stays C </sensitivity>`), or batches that were shuffled and not sampled, for which an attack proves the number ({doc}`Can you trust it? <trust>`). Bars are logarithmic. The numbers come from the accountants on
# coarser grids than elsewhere in this book: at most 3 % too high.

# %% jupyter={"source_hidden": true} tags=["hide-input"]
sizes = {f"{facts.train:,}: {report.label(name)}": facts.train for name, facts in paper.DATASETS.items()}
budget_controls = {
    "n": slider("N", [("1,437: digits", 1437), *sorted(sizes.items(), key=lambda pair: pair[1])], 50_000),
    "batch_size": slider("B", [64, 128, 256, 512, 1000, 2048, 4096, 8192], 1000),
    "epochs": slider("epochs", [1, 2, 4, 10, 20, 50, 100, 200], 10),
    "epsilon": log("ε", -1, 1.8, 1.0),
    "delta": slider("δ", [(f"{d:g}", d) for d in (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)], 1e-5),
    "accountant": one_of("accountant", [(a.upper(), a) for a in accounting.ACCOUNTANTS], "rdp"),
    "clip_norm": log("C", -2, 1, 1.0),
    "parameters": slider("D′", [(f"{p:,}", p) for p in (650, 5_130, 12_810, 131_841, 2_750_000)], 5_130),
    "k": number("K", 2, 40, 16),
}
live(budgets.budget, budget_controls, {"epsilon": 8.0}, {"batch_size": 4096, "epochs": 200}, {"accountant": "pld"})

# %% [markdown]
# Try this: larger batches at the same number of epochs need more noise, but less of it is left on the mean. δ above 1/N is refused.
#
# ## One step
#
# Eight digits of the training set, seen from a head that was trained on synthetic images. Each arrow is the average over the views of one example, projected on the two directions in
# which the gradients of *public* images spread most; faint as it is, strong as it is clipped. Then the sum, with all eight (orange, as the arrow of that one) and with one left out (blue), and what the noise makes of both. The privacy of the example is that the two clouds overlap.

# %% jupyter={"source_hidden": true} tags=["hide-input"]
step_controls = {
    "method": one_of("method", [(report.label(m), m) for m in views.METHODS], "mix-self"),
    "clip_norm": w.FloatSlider(min=0.05, max=2, step=0.05, value=0.5, description="C"),
    "sigma": w.FloatSlider(min=0, max=4, step=0.1, value=1, description="σ"),
    "without": number("left out", 1, 8, 4),
    "seed": number("seed", 0, 50, seed),
}
live(explore.step, step_controls, {"sigma": 0.3}, {"clip_norm": 1.5})

# %% [markdown]
# Try this: a small $C$ makes all arrows equally long and the noise small with them; a large $C$ clips nothing, and the noise grows. The distance of the two clouds, in standard deviations, is never
# more than 1/σ.
#
# ## What came with the repository

# %% jupyter={"source_hidden": true} tags=["hide-input"]
runs = explore.results()
pairs = list(dict.fromkeys(zip(runs["dataset"], runs["model"], strict=True)))
methods = list(dict.fromkeys(runs["method"]))


def chosen(*, pair, methods):
    return explore.curves(dataset=pair[0], model=pair[1], methods=methods)


result_controls = {
    "pair": w.Dropdown(
        options=[(f"{report.label(d)}, {report.label(m)}", (d, m)) for d, m in pairs],
        value=pairs[0],
        description="data and model",
        layout={"width": "auto"},
    ),
    "methods": w.SelectMultiple(
        options=[(report.label(m), m) for m in methods], value=methods, rows=min(7, len(methods)), description="methods"
    ),
}
live(chosen, result_controls)

# %% [markdown]
# These are runs that were made once and committed under `data/results`; where only a few are there, so are the points. Hold Ctrl or Shift to choose several methods.
#
# ## Run it again
#
# ```console
# $ papermill notebooks/explore.ipynb out.ipynb -p index 12
# ```
