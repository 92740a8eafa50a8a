"""Networks from scratch (Tables 1, 2 and 5): their grids of runs, and what pages show of them beside `report`."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import pandas as pd
from IPython.display import Markdown

from dpmix.companion import grids, paper
from dpmix.companion.report import label, summary
from dpmix.core import accounting, checks, microbatch, views
from dpmix.runs.spec import ComputeFlags, RunSpec, mechanism


@dataclass(frozen=True, kw_only=True)
class NetworkPreset:
    """The settings of a scale for networks from scratch, those of the demo if nothing is said. Two learning rates: of
    per-example clipping, and of microbatches, whose sum has fewer terms and more noise. `views_cut` divides every number of
    views of the paper."""

    dataset: str = "digits"
    model: str = "wrn-10-1"
    batch_size: int = 256
    epochs: float = 2
    epsilons: tuple[float, ...] = (2, 8)
    learning_rate: float = 4.0
    microbatch_learning_rate: float = 1.0
    momentum: float = 0.0
    ema_decay: float | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    views_cut: int = 4

    def views_of(self, method: str, k_base: int = 16, k_self: int | None = None) -> views.Recipe:
        """The recipe of a method with these numbers of views (None: the method's own), cut to the scale."""
        r = views.METHODS[method]
        cut = [max(1, k // self.views_cut) if k else 0 for k in (k_base, r.k_self if k_self is None else k_self)]
        return r if method == "dp-sgd" else replace(r, k_base=cut[0], k_self=cut[1])


def network_preset(scale: str, dataset: str | None = None) -> NetworkPreset:
    """The settings of "demo" (a small network on digits), "laptop" (one on CIFAR-10, hours on two cores) or "paper"
    (Section 4 and Appendix C, a GPU).

    The demo's learning rates come from trials with seed 100 at epsilon 8, a fifth of the training set held out, by validation
    accuracy: 4 among 1, 2 and 4 (no augmentation), among 2 and 4 at two epochs and 4 and 8 at three (4 views), and 1 among
    0.5, 1 and 2 (pairs). At the other scales the learning rate of 2, no momentum and (paper) the EMA of 0.999 are those of
    De et al.'s published configuration, which the paper says to follow without naming them; that of microbatches is ours."""
    checks.one_of("scale", scale, grids.SCALES)
    if scale == "demo":
        return NetworkPreset(dataset=dataset or "digits")
    dataset, published = dataset or "cifar10", paper.SETTINGS["scratch"]
    checks.one_of("dataset", dataset, paper.DATASETS)
    both: dict[str, Any] = dict(dataset=dataset, learning_rate=2.0, microbatch_learning_rate=0.5)
    if scale == "laptop":
        return NetworkPreset(model="wrn-10-2", batch_size=1024, epochs=8, epsilons=(8,), **both)
    theirs: dict[str, Any] = dict(model=published.models[0], batch_size=published.batch_size, epochs=published.epochs)
    return NetworkPreset(epsilons=paper.EPSILONS, ema_decay=0.999, views_cut=1, **theirs, **both)


def network_cells(
    p: NetworkPreset, method: str, recipe: views.Recipe, *, eps: Any = None, seeds: Any = None, **microbatches: Any
) -> list[grids.Cell]:
    """A network from scratch for every epsilon and seed. All training examples are trained on: nothing is chosen by these
    runs, so nothing is held out. `method` names the cells; `microbatches`: their size and mixture, as in `RunSpec`."""
    names = ("dataset", "model", "batch_size", "epochs", "momentum", "ema_decay")
    fixed: dict[str, Any] = {name: getattr(p, name) for name in names} | dict(recipe=recipe, validation=0.0)
    alone = microbatches.get("microbatch", 1) == 1
    fixed |= microbatches | dict(learning_rate=p.learning_rate if alone else p.microbatch_learning_rate)
    return [
        grids.Cell({"model": p.model, "method": method}, RunSpec(epsilon=epsilon, seed=seed, **fixed))
        for epsilon in grids.many(eps, p.epsilons, "eps")
        for seed in grids.many(seeds, p.seeds, "seeds")
    ]


def network_compute(dataset: str) -> ComputeFlags:
    """How the networks are computed: one on digits has so little to do for an example that examples go through it together."""
    return ComputeFlags(engine="grouped", physical_batch=128) if dataset == "digits" else ComputeFlags()


AUGMENTATIONS = (16, 24, 32, 36)  # Table 5's Self-Aug
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


def microbatch_grid(p: NetworkPreset, *, eps: Any = 8, seeds: Any = None) -> list[grids.Cell]:
    """Table 1: per-example clipping and microbatches of two, each with noise for its own sensitivity."""
    cells = []
    for name, (method, size, mix) in TABLE1.items():
        cells += network_cells(p, name, p.views_of(method), eps=eps, seeds=seeds, microbatch=size, microbatch_mix=mix)
    return cells


def augmentations_grid(
    scale: str, p: NetworkPreset, *, counts: Any = None, eps: Any = 8, network_seeds: Any = None, **asked: Any
) -> list[grids.Cell]:
    """Table 5: Self-Aug with several numbers of views against DP-MixSelf (16 base views and 16 mixtures): a network from
    scratch, and linear layers on a frozen encoder (`asked` as in `methods_grid`). A method is named with the paper's number
    of views; a network of a scale with `views_cut` takes that much less."""
    rows = [("self-aug", n, n, 0) for n in grids.many(counts, AUGMENTATIONS, "counts")] + [("mix-self", 32, 16, 16)]
    cells = []
    for method, n, k_base, k_self in rows:
        name = f"{label(method)} {n}"
        cells += network_cells(p, name, p.views_of(method, k_base, k_self), eps=eps, seeds=network_seeds)
        recipe = replace(views.METHODS[method], k_base=k_base, k_self=k_self)
        heads = grids.methods_grid(scale, methods=[method], eps=eps, **asked)
        cells += grids.changed_cells(heads, name, recipe=recipe)
    return cells


def settings(p: NetworkPreset) -> pd.DataFrame:
    """The settings of these runs beside those at paper scale: what has been cut. C is 1 and weights are standardised in both."""
    columns = {}
    for name, s in (("these runs", p), ("paper scale", network_preset("paper"))):
        kept = {k.replace("_", " "): v for k, v in asdict(s).items() if k not in ("epsilons", "seeds", "views_cut")}
        words = {k: label(v) if isinstance(v, str) else "–" if v is None else f"{v:,g}" for k, v in kept.items()}
        r = s.views_of("mix-self")
        columns[name] = words | {"views of Self-Aug": str(r.k_base), "views of DP-MixSelf": f"{r.k_base} + {r.k_self}"}
    return pd.DataFrame(columns)


def privacy_of_pairs(runs: pd.DataFrame) -> pd.DataFrame:
    """What microbatches spend, by PLD, in numbers: a row for each mechanism of `runs` in microbatches, and one for the
    paper's setting (CIFAR-10, whole training set). "accounted": ε of a movement by 2C under the noise 2σC that is added;
    "true": of the pair of neighbours that there is (see `core.microbatch`); "enough": deviation in units of σC at which the
    true pair spends what is accounted; "noise for C": ε of that pair had the noise been made for C."""
    columns = ["dataset", "epsilon", "delta", "sigma", "q", "T"]
    asked = runs.loc[(runs["microbatch"] > 1) & (runs["sigma"] > 0), columns].drop_duplicates().sort_values("epsilon")
    found = [(f"these runs ({label(name)})", *rest) for name, *rest in asked.itertuples(index=False)]
    p = network_preset("paper")
    for epsilon in asked["epsilon"].unique():
        (cell,) = network_cells(p, "", p.views_of("dp-sgd"), eps=float(epsilon), seeds=0, microbatch=2)
        m = mechanism(cell.spec, paper.DATASETS[p.dataset].train)
        name = f"the paper's setting ({label(p.dataset)})"
        found.append((name, epsilon, cell.spec.delta, m.noise_multiplier, m.sample_rate, m.steps))
    table = []
    for name, epsilon, delta, sigma, q, steps in found:
        about: dict[str, Any] = {"delta": delta, "sample_rate": q, "steps": int(steps)}
        accounted = accounting.epsilon_spent(noise_multiplier=sigma, accountant="pld", **about)
        enough = accounting.noise_multiplier(epsilon=accounted, accountant="pld", neighbours="change", **about) / sigma
        true, for_one = (microbatch.epsilon_spent(2, deviation=d, **about) for d in (2 * sigma, sigma))
        spent = {"accounted": accounted, "true": true, "enough": enough, "noise for C": for_one}
        table.append({"setting": name, "q": q, "T": int(steps), "σ": sigma, "ε asked": epsilon, **spent})
    return pd.DataFrame(table).set_index("setting").rename_axis(None)


def published_table1() -> pd.DataFrame:
    """Table 1 under the names of `TABLE1`. The paper has one number for mixup in pairs; it stands at both variants."""
    rows = [(name, m if mix == "none" else "dp-sgd-mixup", size) for name, (m, size, mix) in TABLE1.items()]
    names = pd.DataFrame(rows, columns=["name", "method", "microbatch_size"])
    table = names.merge(paper.table(1), on=["method", "microbatch_size"])
    return table.drop(columns="method").rename(columns={"name": "method"})


def level(runs: pd.DataFrame, classes: int) -> Markdown:
    """Whether the networks have learned at all: the lowest and the highest mean accuracy beside guessing."""
    low, *_, high = summary(runs, ["model", "method", "epsilon"]).sort_values("mean").to_dict("records")
    guess = 100 / classes
    learned = "well above" if low["mean"] > 2 * guess else "**not well above** (such a run has hardly learned)"
    ends = [f"{r['mean']:.1f} % ({label(r['method'])}, ε = {r['epsilon']:g})" for r in (low, high)]
    return Markdown(
        f"In the runs made now the means lie between {ends[0]} and {ends[1]}; the lowest is {learned} guessing, {guess:.0f} %."
    )
