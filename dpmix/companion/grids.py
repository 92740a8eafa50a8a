"""The grids of runs behind the tables, at three scales. What a notebook varies, this turns into specs of runs."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import pandas as pd

from dpmix.companion import paper
from dpmix.core import checks, views
from dpmix.images import data
from dpmix.runs.result import frame
from dpmix.runs.run import run_all
from dpmix.runs.spec import ComputeFlags, RunSpec

SCALES = ("demo", "laptop", "paper")
# These stand for the paper's data and encoders where a page shows them beside each other.
STANDS_FOR = {
    "tiny-vit": "vit-b-16", "tiny-convnext": "convnext", "wrn-10-1": "wrn-16-4",
    "digits": "cifar10", "caltech101": "caltech256",
}  # fmt: skip
LABELS = paper.LABELS | {
    "tiny-vit": "tiny ViT", "tiny-convnext": "tiny ConvNeXt", "efficientnet-lite0": "EfficientNet-Lite0",
    "wrn-10-1": "WRN-10-1", "caltech101": "Caltech-101",
}  # fmt: skip


class Cell(NamedTuple):
    """A run and the words that name it in a table."""

    labels: dict[str, Any]
    spec: RunSpec


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The settings of a scale; those of the demo if nothing is said. Learning rates are those of a clip norm of 1; for
    another C they are divided by C, so that a step of clipped gradients, and the noise in it, has the same length (De et al.
    2022). The demo draws each example's views once, which on the digits makes no difference that 20 seeds can see
    (`benchmarks/choices.py`), so that ten seeds take as long as three did."""

    dataset: str = "digits"
    models: tuple[str, ...] = ("tiny-vit", "tiny-convnext")
    batch_size: int = 128
    epochs: float = 4
    learning_rates: tuple[float, ...] = (2.0, 4.0, 8.0, 16.0, 32.0)
    seeds: tuple[int, ...] = tuple(range(10))
    validation: float = 0.2
    redraw: bool = False
    image_size: int | None = None
    rates_grow: bool = False

    def rates(self, epsilon: float | None) -> tuple[float, ...]:
        """The learning rates of a budget: where they grow, with its square root (the noise falls with it)."""
        grown = math.sqrt(epsilon) if self.rates_grow and epsilon else 1.0
        return tuple(rate * grown for rate in self.learning_rates)


LAPTOP = ("cifar10", "cifar100", "eurosat", "caltech101")


def preset(scale: str, dataset: str | None = None) -> Preset:
    """The settings of "demo" (digits, minutes on two cores), "laptop" (the paper's own kind of data under a frozen ImageNet
    encoder, views encoded once, hours on two cores) or "paper" (Section 4 and Appendix C, on a GPU). The learning rates, and
    the share held out to choose among them, are ours: the paper says that it searched and not where. `image_size` at laptop
    scale was chosen once, before any private run, for what two cores encode in an hour."""
    checks.one_of("scale", scale, SCALES)
    if scale == "demo":
        return Preset(dataset=dataset or "digits")
    dataset, published = dataset or "cifar10", paper.SETTINGS["fine-tuning"]
    checks.one_of("dataset", dataset, LAPTOP if scale == "laptop" else paper.DATASETS)
    epochs = paper.epochs(STANDS_FOR.get(dataset, dataset))
    both: dict[str, Any] = dict(dataset=dataset, batch_size=published.batch_size, epochs=epochs, validation=0.1)
    if scale == "paper":
        searched = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
        return Preset(models=published.models, learning_rates=searched, seeds=(0, 1, 2), redraw=True, **both)
    # From runs of DP-SGD alone, with a seed of their own, over 11 rates; fewer steps take longer ones.
    rates = (0.5, 1.0, 2.0, 4.0) if dataset == "caltech101" else (0.25, 0.5, 1.0, 2.0)
    own: dict[str, Any] = dict(models=("efficientnet-lite0",), seeds=tuple(range(5)), image_size=96)
    return Preset(learning_rates=rates, rates_grow=True, **own, **both)


def many(value: Any, default: Iterable, name: str = "parameter") -> list:
    """A notebook parameter as a list: None takes the default, one value stands for a list of it. ValueError for no value."""
    if value is None:
        return list(default)
    found = list(value) if isinstance(value, (list, tuple, range)) else [value]
    said = "is empty; give a value or a list of some, or leave it None for those of the scale"
    checks.require(bool(found), name, value, said)
    return found


def parts(method: str) -> tuple[str, str, str]:
    """ "self-aug+blur@0.05": method, added transform, C."""
    name, _, c = method.partition("@")
    base, _, extra = name.partition("+")
    return base, extra, c


def recipe(method: str, dataset: str) -> views.Recipe:
    """The views of a method; DP-MixDiff takes the paper's K_diff of the data set. "self-aug+X" adds transform X."""
    base, extra, _ = parts(method)
    checks.one_of("method", base, views.METHODS)
    found = views.METHODS[base]
    if found.k_diff and dataset in paper.DATASETS:
        found = replace(found, k_diff=paper.k_diff(dataset))
    return replace(found, transform=f"{found.transform}+{extra}") if extra else found


def with_public(methods: Sequence[str], dataset: str) -> list[str]:
    """The methods that can run: those that mix in synthetic images only where such images are on disk."""
    there = dataset == "digits" or data.synthetic_folder(dataset).is_dir()
    return [m for m in methods if there or not recipe(m, dataset).k_diff]


def methods_grid(
    scale: str = "demo",
    *,
    dataset: str | None = None,
    models: Any = None,
    methods: Sequence[str],
    eps: Any = None,
    seeds: Any = None,
    learning_rates: Any = None,
    **fixed: Any,
) -> list[Cell]:
    """Every model × method × epsilon × learning rate × seed. What is left out, and epochs or batch_size of None, are those of
    the scale; `fixed` are other settings of `RunSpec`. C is the paper's (Appendix C), or x of "METHOD@x"."""
    p = preset(scale, dataset)
    asked = None if learning_rates is None else many(learning_rates, (), "learning_rates")
    for rate in asked or ():
        checks.positive("learning_rates", rate)
    names = ("dataset", "epochs", "batch_size", "validation", "redraw", "image_size")
    settings: dict[str, Any] = {name: getattr(p, name) for name in names}
    settings |= {name: v for name, v in fixed.items() if v is not None or name not in ("epochs", "batch_size")}
    conditions = many(models, p.models, "models"), many(methods, (), "methods"), many(eps, paper.EPSILONS, "eps")
    cells = []
    for model, method, epsilon, seed in product(*conditions, many(seeds, p.seeds, "seeds")):
        settings |= dict(recipe=recipe(method, p.dataset), model=paper.ENCODERS.get(model, model))
        base, _, own = parts(method)
        c = float(own or paper.clip_norm(base))
        for rate in asked or p.rates(epsilon):
            spec = RunSpec(epsilon=epsilon, seed=seed, clip_norm=c, learning_rate=rate / c, **settings)
            cells.append(Cell({"model": model, "method": method}, spec))
    return cells


# What the tables compare. Without augmentation, Mixed Ghost Clipping is DP-SGD with another C: "METHOD@C" sets it for others.
TABLE3 = ("dp-sgd", "mixed-ghost", "self-aug", "mix-self", "mix-diff", "self-aug@0.05", "mix-self@0.05")
TABLE4 = ("jitter", "affine", "cutout", "noise", "blur", "sobel", "all")


def changed_cells(cells: Sequence[Cell], name: str | None, **settings: Any) -> list[Cell]:
    """The cells under another method's name (None: their own), with settings of the spec replaced."""
    new = {} if name is None else {"method": name}
    return [Cell(c.labels | new, replace(c.spec, **settings)) for c in cells]


NO_NOISE: dict[str, Any] = {"train_on": "synthetic", "epsilon": None, "clip_norm": 1e9}  # no gradient reaches that C
PRETRAINED = {m: f"SGD on synthetic, then {LABELS[m]}" for m in ("self-aug", "mix-self")}
ALONE = "SGD on synthetic alone"


def pretraining_grid(scale: str, *, pretrain_epochs: float = 10, **asked: Any) -> tuple[list[Cell], list[Cell]]:
    """Table 6: private runs with and without pretraining on D, and the pretrained heads as they are (rate 1)."""
    private = methods_grid(scale, methods=["self-aug", "mix-self", "mix-diff"], **asked)
    for method, name in PRETRAINED.items():
        own = [c for c in private if c.labels["method"] == method]
        private += changed_cells(own, name, pretrain_epochs=pretrain_epochs)
    one = asked | {"eps": 1, "epochs": pretrain_epochs, "learning_rates": 1.0}
    plain = methods_grid(scale, methods=["dp-sgd"], **one)
    view = views.Recipe(k_base=1)
    return private, changed_cells(plain, ALONE, recipe=view, validation=0.0, learning_rate=1.0, **NO_NOISE)


def k_grid(scale: str, k_base: Sequence[int], k_self: Sequence[int], k_diff: Sequence[int], **asked: Any) -> list[Cell]:
    """Table 9: DP-MixDiff with every combination of the three numbers of views."""
    base = methods_grid(scale, methods=["mix-diff"], **asked)
    every: Any = (dict(k_base=b, k_self=s, k_diff=d) for b, s, d in product(k_base, k_self, k_diff))
    return [Cell(c.labels | k, replace(c.spec, recipe=replace(c.spec.recipe, **k))) for k in every for c in base]


# What Section 6.5 says about Table 9, as groups of its cells; one of a pair is compared with the other.
K_GROUPS = {
    "K_diff of 2 or 4": "k_diff in [2, 4]", "K_diff of 0": "k_diff == 0",
    "K_diff of 4": "k_diff == 4", "K_diff of 2": "k_diff == 2",
    "K_self up to K_base": "k_self <= k_base", "K_self above K_base": "k_self > k_base",
    "K_base of 8": "k_base == 8", "K_base of 24": "k_base == 24",
}  # fmt: skip


def k_groups(table: pd.DataFrame, value: str = "accuracy") -> pd.DataFrame:
    """The average over the cells of each group that has some, as rows whose `method` is the group."""
    by = [c for c in ("dataset", "model", "epsilon", "seed") if c in table]
    found = [(name, table.query(of).groupby(by, sort=False)[value].mean()) for name, of in K_GROUPS.items()]
    return pd.concat([part.reset_index().assign(method=name) for name, part in found], ignore_index=True)


def halves_grid(scale: str, *, dataset: str | None = None, **asked: Any) -> list[Cell]:
    """Table 10: A, B and C on one half of the training set; A and C alone where there are no synthetic images."""
    there = with_public(["mix-diff"], preset(scale, dataset).dataset)
    # A mixes nothing in: it names the public images of another variant, so that one pass trains both.
    own = "synthetic-half" if there else "half-2"
    variants = {"A": ("mix-self", own), "B": ("mix-diff", "synthetic-half"), "C": ("mix-diff", "half-2")}
    cells, asked = [], asked | {"dataset": dataset, "train_on": "half-1"}
    for name in list(variants) if there else ["A", "C"]:
        method, public = variants[name]
        cells += changed_cells(methods_grid(scale, methods=[method], public=public, **asked), name)
    return cells


PURE = ("self-aug", "mix-self", "mix-diff", "pure-mix-diff")
PUBLIC_ONLY = {"pure-mix-diff": "public only, same views", "self-aug": "public only, augmented"}


def pure_grid(scale: str, *, longer: float = 10, **asked: Any) -> list[Cell]:
    """Table 12: four private methods, and training on the public images alone, without noise."""
    private = methods_grid(scale, methods=PURE, **asked)
    cells = list(private)
    for method, name in PUBLIC_ONLY.items():
        cells += changed_cells([c for c in private if c.labels["method"] == method], name, **NO_NOISE)
    if longer:
        own = [c for c in private if c.labels["method"] == "self-aug"]
        once = {"recipe": views.Recipe(k_base=1), "epochs": longer * own[0].spec.epochs, **NO_NOISE}
        cells += changed_cells(own, f"public only, {longer:g} times as long", **once)
    return cells


def run_cells(cells: Sequence[Cell], *, compute: ComputeFlags | None = None) -> pd.DataFrame:
    """Run (or look up) the cells: one row each, `frame` with the labels of the cells in front."""
    return labelled(cells, frame(run_all([c.spec for c in cells], compute=compute)))


def labelled(cells: Sequence[Cell], runs: pd.DataFrame) -> pd.DataFrame:
    """Runs, one a cell and in their order, with the labels of the cells as columns."""
    for name in dict.fromkeys(name for c in cells for name in c.labels):
        runs[name] = [c.labels.get(name) for c in cells]
    return runs


def check_scale(scale: str, dataset: str | None = None, download: bool = False) -> None:
    """Stop at once where the data of a run at laptop or paper scale are not on disk; the message says what to put where.
    With `download`, torchvision fetches what it can."""
    p = preset(scale, dataset)
    if scale != "demo":
        data.find(p.dataset, download=download)  # not opened: they are decoded at the size that the encoder wants
