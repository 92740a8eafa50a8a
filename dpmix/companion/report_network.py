"""What the notebooks on networks from scratch show beside `report`: settings, microbatch privacy, the sign flip."""

from collections.abc import Sequence

import pandas as pd
import torch
from IPython.display import Markdown
from torch import nn

from dpmix.companion import grids, paper
from dpmix.companion.report import label, spread, summary
from dpmix.core import accounting, microbatch, views
from dpmix.runs import experiments
from dpmix.runs.experiments import RunSpec, mechanism


def settings(p: grids.NetworkPreset) -> pd.DataFrame:
    """The settings of these runs beside those at paper scale: what a demo has cut."""
    full = grids.network_preset("paper")

    def column(s: grids.NetworkPreset) -> dict[str, str]:
        mixed = s.views_of("mix-self")
        return {
            "data": label(s.dataset), "network": label(s.model), "expected batch B": f"{s.batch_size:,}",
            "epochs": f"{s.epochs:g}", "views of Self-Aug": f"{s.views_of('self-aug').views}",
            "views of DP-MixSelf": f"{mixed.k_base} + {mixed.k_self}", "clip norm C": "1",
            "learning rate": f"{s.learning_rate:g}", "learning rate in microbatches": f"{s.microbatch_learning_rate:g}",
            "momentum": f"{s.momentum:g}", "weights evaluated": "last step" if s.ema_decay is None else
            f"moving average, {s.ema_decay:g}", "weight standardisation": "yes", "ε by default":
            ", ".join(f"{e:g}" for e in s.epsilons),
        }  # fmt: skip

    return pd.DataFrame({"these runs": column(p), "paper scale": column(full)})


def privacy_of_pairs(runs: pd.DataFrame) -> pd.DataFrame:
    """What microbatches spend, by PLD, in numbers: a row for each mechanism of `runs` in microbatches, and one for the paper's
    setting (CIFAR-10, whole training set).

    "accounted": ε of a movement by 2C under the noise 2σC that is added; "true": of the pair of neighbours that there is (see
    `core.microbatch`); "enough": deviation in units of σC at which the true pair spends what is accounted; "noise for C": ε of
    that pair had the noise been made for C.
    """
    rows = runs[(runs["microbatch"] > 1) & (runs["sigma"] > 0)].drop_duplicates(["epsilon", "delta", "sigma", "q", "T"])
    rows = rows.sort_values("epsilon")
    found = [
        (f"these runs ({label(r.dataset)})", r.epsilon, r.delta, r.sigma, r.q, int(r.T)) for r in rows.itertuples()
    ]
    p = grids.network_preset("paper")
    for epsilon in sorted({e for _, e, *_ in found}):
        spec = RunSpec(recipe=views.METHODS["dp-sgd"], epsilon=epsilon, learning_rate=p.learning_rate, dataset=p.dataset,
                       model=p.model, validation=0.0, batch_size=p.batch_size, epochs=p.epochs, microbatch=2)  # fmt: skip
        m = mechanism(spec, paper.DATASETS[p.dataset].train)
        name = f"the paper's setting ({label(p.dataset)})"
        found.append((name, epsilon, spec.delta, m.noise_multiplier, m.sample_rate, m.steps))
    table = []
    for name, epsilon, delta, sigma, q, steps in found:
        about = dict(delta=delta, sample_rate=q, steps=steps)
        accounted = accounting.epsilon_spent(noise_multiplier=sigma, accountant="pld", **about)
        enough = accounting.noise_multiplier(epsilon=accounted, accountant="pld", neighbours="change", **about)
        true, for_one = (microbatch.epsilon_spent(2, deviation=d, **about) for d in (2 * sigma, sigma))
        table.append({"setting": name, "q": q, "T": steps, "σ": sigma, "ε asked": epsilon, "accounted": accounted, "true": true,
                      "enough": enough / sigma, "noise for C": for_one})  # fmt: skip
    return pd.DataFrame(table).set_index("setting").rename_axis(None)


def sign_flip(clip_norm: float = 1.0) -> pd.DataFrame:
    """The sum of Eq. (2), in units of C along e, with and without the second of two examples, by the code that trains.

    A linear layer of two logits and one input, weights zero: the gradient of an example x of class 0 is x / sqrt(2) e,
    of class 1 it is -x / sqrt(2) e, where e = (-1, 1) / sqrt(2). Example 1 has gradient -2C e, example 2 has 4C e.
    """
    layer = nn.utils.skip_init(nn.Linear, 1, 2, bias=False, dtype=torch.float64)  # no global random state is touched
    nn.init.zeros_(layer.weight)
    model = nn.Sequential(nn.Flatten(), layer)
    e = torch.tensor([[-1.0], [1.0]], dtype=torch.float64) / 2**0.5
    pixels = torch.tensor([2.0, 4.0], dtype=torch.float64) * 2**0.5 * clip_norm
    targets = torch.eye(2, dtype=torch.float64)[[1, 0]]
    cases = {"one example, clipped alone": (1, "none"), "pair": (2, "none"), "pair and its mixture": (2, "add"),
             "mixture of the pair alone": (2, "replace")}  # fmt: skip

    def along(size: int, mix: str, second: bool) -> float:
        shape = (2 // size, size, 1)  # microbatches, their size, one view
        present = torch.tensor([True, second]).view(shape[:2])
        lam = torch.full((len(present), 1), 0.25, dtype=torch.float64)
        x, y = pixels.view(*shape, 1, 1, 1), targets.view(*shape, 2)
        total = microbatch.microbatch_sum(model, x, y, present, clip_norm, mix=mix, lam=lam)
        return float((total.grads["1.weight"] * e).sum()) / clip_norm

    rows = {}
    for name, (size, mix) in cases.items():
        both, alone = along(size, mix, True), along(size, mix, False)
        rows[name] = {"both present": f"{both:+.2f} C", "without the second": f"{alone:+.2f} C",
                      "moved by": f"{abs(both - alone):.2f} C", "noise is scaled for":
                      f"{microbatch.sensitivity(size):g} C"}  # fmt: skip
    return pd.DataFrame.from_dict(rows, orient="index")


def cost(runs: pd.DataFrame, by: Sequence[str] = ("method",)) -> pd.DataFrame:
    """What the networks cost where they were computed: runs, mean seconds of one, views a second."""
    own = runs[runs["model"].str.startswith("wrn")].drop_duplicates("key")
    parts = own.groupby(list(by), sort=False)
    table = parts.agg(**{"runs": ("key", "count"), "seconds a run": ("seconds", "mean"),
                         "views/s": ("views_per_second", "mean")}).reset_index()  # fmt: skip
    table["method"] = [label(m) for m in table["method"]]
    table["seconds a run"] = [f"{s:.1f}" for s in table["seconds a run"]]
    table["views/s"] = [f"{v:,.0f}" for v in table["views/s"]]
    return table


def published_table1() -> pd.DataFrame:
    """Table 1 under the names of `grids.TABLE1`. The paper has one number for mixup in pairs; it stands at both variants."""
    names: dict[tuple[str, int], list[str]] = {}
    for name, (method, size, mix) in grids.TABLE1.items():
        names.setdefault((method if mix == "none" else "dp-sgd-mixup", size), []).append(name)
    table = paper.table(1)
    table["method"] = [names[m, b] for m, b in zip(table["method"], table["microbatch_size"], strict=True)]
    table = table.explode("method")
    order = list(grids.TABLE1)
    return table.sort_values("method", key=lambda column: column.map(order.index)).reset_index(drop=True)


def level(runs: pd.DataFrame, classes: int) -> Markdown:
    """Whether the networks have learned at all: the lowest and the highest mean accuracy beside guessing."""
    table = summary(runs, ["model", "method", "epsilon"]).sort_values("mean")
    low, high = table.iloc[0], table.iloc[-1]
    guess = 100 / classes
    said = "well above" if low["mean"] > 2 * guess else "**not** well above"
    return Markdown(
        f"The means lie between {low['mean']:.1f} % ({label(low['method'])}, ε = {low['epsilon']:g}) and {high['mean']:.1f} % "
        f"({label(high['method'])}, ε = {high['epsilon']:g}); even the lowest is {said} guessing, {guess:.0f} %."
        if said == "well above"
        else f"The lowest mean, {low['mean']:.1f} % ({label(low['method'])}, ε = {low['epsilon']:g}), is {said} guessing, "
        f"{guess:.0f} %: such a run has hardly learned. The highest is {high['mean']:.1f} % ({label(high['method'])})."
    )


def chosen(runs: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Networks as they are (one learning rate), and heads at the learning rate that validation chose for each condition."""
    network = runs["model"].str.startswith("wrn")
    return pd.concat([runs[network], experiments.choose_learning_rate(runs[~network], by)], ignore_index=True)


def as_run(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs that came with the repository: what each condition was, and its test accuracy."""
    columns = ["model", "epsilon", "k_base", "k_self", "batch_size", "epochs", "T", "sigma", "learning_rate"]
    table = summary(runs, columns).sort_values(columns)  # files are named by their keys: their order says nothing
    named = {
        (r.k_base > 1, r.k_self > 0): name
        for name, r in views.METHODS.items()
        if name in ("dp-sgd", "self-aug", "mix-self")
    }
    found = {
        "method": [label(named[b > 1, s > 0]) for b, s in zip(table["k_base"], table["k_self"], strict=True)],
        "network": [label(m) for m in table["model"]], "ε": [f"{e:g}" for e in table["epsilon"]],
        "views": [f"{b} + {s}" if s else f"{b}" for b, s in zip(table["k_base"], table["k_self"], strict=True)],
        "B": table["batch_size"], "epochs": [f"{e:g}" for e in table["epochs"]], "T": table["T"],
        "σ": [f"{s:.3f}" for s in table["sigma"]], "learning rate": [f"{r:g}" for r in table["learning_rate"]],
        "test accuracy": [spread(m, s) for m, s in zip(table["mean"], table["std"], strict=True)], "n": table["n"],
    }  # fmt: skip
    return pd.DataFrame(found).set_index("method").rename_axis(None)


def numbered(table: pd.DataFrame) -> pd.DataFrame:
    """`method` with the number of augmentations behind it: "Self-Aug 24"."""
    words = [f"{label(m)} {n}" for m, n in zip(table["method"], table["n_augmentations"], strict=True)]
    return table.assign(method=words)
