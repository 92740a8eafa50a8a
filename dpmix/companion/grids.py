"""The grids of runs behind the tables, at two scales. What a notebook varies, this turns into specs of runs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pandas as pd

from dpmix.companion import paper
from dpmix.core import checks, files, views
from dpmix.images import data
from dpmix.runs import experiments
from dpmix.runs.spec import ComputeFlags, Result, RunSpec

SCALES = ("demo", "paper")
# In the demo these stand for the paper's encoders; a page shows them beside each other.
STANDS_FOR = {"tiny-vit": "vit-b-16", "tiny-convnext": "convnext"}
LABELS = {**paper.LABELS, "digits": "digits", "tiny-vit": "tiny ViT", "tiny-convnext": "tiny ConvNeXt"}


class Cell(NamedTuple):
    """A run and the words that name it in a table."""

    labels: dict[str, Any]
    spec: RunSpec


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The settings of a scale. Learning rates are those of a clip norm of 1; for another C they are divided by C, so that
    a step of clipped gradients, and the noise in it, has the same length (De et al. 2022)."""

    dataset: str
    models: tuple[str, ...]
    batch_size: int
    epochs: float
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    validation: float


DEMO = Preset(
    dataset="digits", models=("tiny-vit", "tiny-convnext"), batch_size=128, epochs=4,
    learning_rates=(2.0, 4.0, 8.0, 16.0, 32.0), validation=0.2,
)  # fmt: skip


def preset(scale: str, dataset: str | None = None) -> Preset:
    """The settings of "demo" (digits, on two cores) or "paper" (Section 4 and Appendix C, on a GPU).

    The learning rates at paper scale, and the share held out to choose among them, are ours: the paper says that it
    searched and not where.
    """
    checks.one_of("scale", scale, SCALES)
    if scale == "demo":
        return replace(DEMO, dataset=dataset or DEMO.dataset)
    dataset = dataset or "cifar10"
    checks.one_of("dataset", dataset, paper.DATASETS)
    published = paper.SETTINGS["fine-tuning"]
    return Preset(
        dataset=dataset, models=published.models, batch_size=published.batch_size, epochs=paper.epochs(dataset),
        learning_rates=(0.5, 1.0, 2.0, 4.0, 8.0, 16.0), validation=0.1,
    )  # fmt: skip


def many(value: Any, default: Iterable, name: str = "parameter") -> list:
    """A notebook parameter as a list: None takes the default, one value stands for a list of it. ValueError for no value."""
    if value is None:
        return list(default)
    said = "is empty; give a value or a list of some, or leave it None for those of the scale"
    checks.require(not isinstance(value, (list, tuple)) or len(value) > 0, name, value, said)
    return list(value) if isinstance(value, (list, tuple)) else [value]


def recipe(method: str, dataset: str) -> views.Recipe:
    """The views of a method; DP-MixDiff takes the paper's K_diff of the data set. "self-aug+X" adds transform X."""
    base, _, extra = method.partition("+")
    checks.one_of("method", base, views.METHODS)
    found = views.METHODS[base]
    if found.k_diff and dataset in paper.DATASETS:
        found = replace(found, k_diff=paper.k_diff(dataset))
    return replace(found, transform=f"{found.transform}+{extra}") if extra else found


def clip_norm(method: str) -> float:
    """C of a method: the paper's (Appendix C), 1 for a method that the paper does not have."""
    return paper.clip_norm(method) if method in paper.METHODS else 1.0


def methods_grid(
    scale: str = "demo", *, dataset: str | None = None, models: Any = None, methods: Sequence[str], eps: Any = None,
    seeds: Any = None, epochs: float | None = None, batch_size: int | None = None, learning_rates: Any = None,
    **fixed: Any,
) -> list[Cell]:  # fmt: skip
    """Every model × method × epsilon × learning rate × seed. Values left out are those of the scale."""
    p = preset(scale, dataset)
    rates = many(learning_rates, p.learning_rates, "learning_rates")
    for rate in rates:
        checks.positive("learning_rates", rate)
    cells = []
    for model in many(models, p.models, "models"):
        for method in many(methods, (), "methods"):
            for epsilon in many(eps, paper.EPSILONS, "eps"):
                for rate in rates:
                    for seed in many(seeds, p.seeds, "seeds"):
                        c = clip_norm(method)
                        spec = RunSpec(
                            recipe=recipe(method, p.dataset), epsilon=epsilon, learning_rate=rate / c, clip_norm=c,
                            dataset=p.dataset, model=paper.ENCODERS.get(model, model), seed=seed,
                            epochs=p.epochs if epochs is None else epochs, validation=p.validation,
                            batch_size=p.batch_size if batch_size is None else batch_size, **fixed,
                        )  # fmt: skip
                        cells.append(Cell({"model": model, "method": method}, spec))
    return cells


def run_cells(cells: Sequence[Cell], *, compute: ComputeFlags | None = None) -> pd.DataFrame:
    """Run (or look up) the cells: one row each, `experiments.frame` with the labels of the cells in front."""
    results = experiments.run_all([c.spec for c in cells], compute=compute)
    runs = experiments.frame(results)
    for name in dict.fromkeys(name for c in cells for name in c.labels):
        runs[name] = [c.labels.get(name) for c in cells]
    return runs


def reference(name: str) -> pd.DataFrame:
    """Runs that came with the repository, `data/results/NAME/*.json`, as `experiments.frame`. They were made once, with the
    code, on the machine and at the date that each states."""
    found = [files.read_json(path) for path in sorted((data.RESULTS / name).glob("*.json"))]
    return experiments.frame([Result.from_json(content) for content in found if content is not None])


def check_scale(scale: str, dataset: str | None = None) -> None:
    """Stop at once where the data of a paper-scale run are not on disk; the message says what to put where."""
    p = preset(scale, dataset)
    if scale == "paper":
        data.find(p.dataset)  # not opened: they are decoded at the size that the encoder wants


# Networks from scratch: Tables 1, 2 and 5.
STANDS_FOR["wrn-10-1"] = "wrn-16-4"
LABELS["wrn-10-1"] = "WRN-10-1"


@dataclass(frozen=True, kw_only=True)
class NetworkPreset:
    """The settings of a scale for networks from scratch. Two learning rates: of per-example clipping, and of microbatches,
    whose sum has fewer terms and more noise. `views_cut` divides every number of views of the paper."""

    dataset: str
    model: str
    batch_size: int
    epochs: float
    epsilons: tuple[float, ...]
    learning_rate: float
    microbatch_learning_rate: float
    momentum: float = 0.0
    ema_decay: float | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    views_cut: int = 1

    def views_of(self, method: str, k_base: int = 16, k_self: int | None = None) -> views.Recipe:
        """The recipe of a method with these numbers of views (None: the method's own), cut to the scale."""
        r = views.METHODS[method]
        cut = [max(1, k // self.views_cut) if k else 0 for k in (k_base, r.k_self if k_self is None else k_self)]
        return r if method == "dp-sgd" else replace(r, k_base=cut[0], k_self=cut[1])


def network_preset(scale: str, dataset: str | None = None) -> NetworkPreset:
    """The settings of "demo" (a small network on digits, two cores) or "paper" (Section 4 and Appendix C, a GPU).

    The demo's learning rates come from trials with seed 100 at epsilon 8, a fifth of the training set held out, by validation
    accuracy: 4 among 1, 2 and 4 (no augmentation), among 2 and 4 at two epochs and 4 and 8 at three (4 views), and 1 among
    0.5, 1 and 2 (pairs). At paper scale
    the learning rate of 2, no momentum and the EMA of 0.999 are those of De et al.'s published configuration for this
    network, which the paper says to follow without naming them; that of microbatches is ours.
    """
    checks.one_of("scale", scale, SCALES)
    if scale == "demo":
        return NetworkPreset(
            dataset=dataset or "digits", model="wrn-10-1", batch_size=256, epochs=2, epsilons=(2, 8), learning_rate=4.0,
            microbatch_learning_rate=1.0, views_cut=4,
        )  # fmt: skip
    dataset = dataset or "cifar10"
    checks.one_of("dataset", dataset, paper.DATASETS)
    published = paper.SETTINGS["scratch"]
    return NetworkPreset(
        dataset=dataset, model=published.models[0], batch_size=published.batch_size, epochs=published.epochs,
        epsilons=paper.EPSILONS, learning_rate=2.0, microbatch_learning_rate=0.5, ema_decay=0.999,
    )  # fmt: skip


def network_cells(
    p: NetworkPreset, method: str, recipe: views.Recipe, *, eps: Any = None, seeds: Any = None,
    microbatch: int = 1, microbatch_mix: str = "none", **labels: Any,
) -> list[Cell]:  # fmt: skip
    """A network from scratch for every epsilon and seed. All training examples are trained on: nothing is chosen by these
    runs, so nothing is held out. `method` and `labels` name the cells."""
    rate = p.learning_rate if microbatch == 1 else p.microbatch_learning_rate
    return [
        Cell({"model": p.model, "method": method, **labels}, RunSpec(
            recipe=recipe, epsilon=epsilon, learning_rate=rate, dataset=p.dataset, model=p.model, validation=0.0,
            batch_size=p.batch_size, epochs=p.epochs, seed=seed, momentum=p.momentum, ema_decay=p.ema_decay,
            microbatch=microbatch, microbatch_mix=microbatch_mix,
        ))
        for epsilon in many(eps, p.epsilons, "eps") for seed in many(seeds, p.seeds, "seeds")
    ]  # fmt: skip


def network_compute(dataset: str) -> ComputeFlags:
    """How the networks are computed: one on digits has so little to do for an example that examples go through it together."""
    return ComputeFlags(engine="grouped", physical_batch=128) if dataset == "digits" else ComputeFlags()


# Table 1: what is printed, and the microbatch of each row. The paper gives one number for mixup in pairs.
TABLE1: dict[str, tuple[str, int, str]] = {
    "DP-SGD": ("dp-sgd", 1, "none"),
    "DP-SGD in pairs": ("dp-sgd", 2, "none"),
    "pairs with their mixture": ("dp-sgd", 2, "add"),
    "mixtures of pairs alone": ("dp-sgd", 2, "replace"),
    "Self-Aug": ("self-aug", 1, "none"),
    "Self-Aug in pairs": ("self-aug", 2, "none"),
}


def changed(p: Any, **settings: Any) -> Any:
    """A preset with those settings replaced that are not None."""
    return replace(p, **{name: value for name, value in settings.items() if value is not None})


def microbatch_grid(p: NetworkPreset, *, eps: Any = 8, seeds: Any = None) -> list[Cell]:
    """Table 1: per-example clipping and microbatches of two, each with noise for its own sensitivity."""
    cells = []
    for name, (method, size, mix) in TABLE1.items():
        cells += network_cells(p, name, p.views_of(method), eps=eps, seeds=seeds, microbatch=size, microbatch_mix=mix)
    return cells


AUGMENTATIONS = (16, 24, 32, 36)  # Table 5's Self-Aug; its DP-MixSelf has 16 base views and 16 mixtures


def augmentations_grid(
    p: NetworkPreset, head: Preset, *, eps: Any = 8, counts: Any = None, seeds: Any = None, learning_rates: Any = None
) -> list[Cell]:
    """Table 5: Self-Aug with several numbers of views against DP-MixSelf, a network from scratch and a frozen encoder.

    `n_augmentations` is the paper's number; a network of a scale with `views_cut` takes that much less. The encoder's
    heads share one pass a seed, and have a validation split to choose a learning rate on.
    """
    rows = [("self-aug", n, n, 0) for n in many(counts, AUGMENTATIONS, "counts")] + [("mix-self", 32, 16, 16)]
    cells = []
    for method, n, k_base, k_self in rows:
        cells += network_cells(p, method, p.views_of(method, k_base, k_self), eps=eps, seeds=seeds, n_augmentations=n)
    for method, n, k_base, k_self in rows:
        for model in head.models:
            cells += [
                Cell({"model": model, "method": method, "n_augmentations": n}, RunSpec(
                    recipe=replace(views.METHODS[method], k_base=k_base, k_self=k_self), epsilon=epsilon,
                    learning_rate=rate, dataset=head.dataset, model=paper.ENCODERS.get(model, model), seed=seed,
                    epochs=head.epochs, validation=head.validation, batch_size=head.batch_size,
                ))
                for epsilon in many(eps, (8,), "eps") for rate in many(learning_rates, head.learning_rates, "learning_rates")
                for seed in many(seeds, head.seeds, "seeds")
            ]  # fmt: skip
    return cells
