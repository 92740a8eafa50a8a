"""Floor 4: the grids of runs behind the tables, at two scales. What a notebook varies, this turns into specs of runs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pandas as pd

from dpmix import checks, data, experiments, paper, views
from dpmix.spec import ComputeFlags, RunSpec

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
    learning_rates=(1.0, 2.0, 4.0, 8.0, 16.0), validation=0.2,
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


def many(value: Any, default: Iterable) -> list:
    """A notebook parameter as a list: None takes the default, one value stands for a list of it."""
    if value is None:
        return list(default)
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
    cells = []
    for model in many(models, p.models):
        for method in many(methods, ()):
            for epsilon in many(eps, paper.EPSILONS):
                for rate in many(learning_rates, p.learning_rates):
                    for seed in many(seeds, p.seeds):
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


def check_scale(scale: str, dataset: str | None = None) -> None:
    """Stop at once where the data of a paper-scale run are not on disk; the message says what to put where."""
    p = preset(scale, dataset)
    if scale == "paper":
        data.load(p.dataset)
