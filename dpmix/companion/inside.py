"""What the notebooks show of the inside of runs: running times, and gradients before clipping and noise."""

import json
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from dpmix.companion import grids, paper
from dpmix.companion.plots import PALETTE
from dpmix.companion.report import label
from dpmix.images import data

PARTS = ("encoder", "views", "clipping", "noise")


def published_rates(published: pd.DataFrame, dataset: str = "caltech256") -> pd.DataFrame:
    """Views a second that the published times come to: training images × epochs × views, over the time."""
    images = paper.DATASETS[dataset].train * paper.epochs(dataset)
    rows = {}
    for row in published.itertuples():
        each = grids.recipe(row.method, dataset).views
        rows[label(row.method)] = {
            "views of an example": each,
            "views": f"{images * each:,}",
            "views/s (published)": f"{images * each / (60 * row.mean):,.0f}",
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def time_shares(timed: pd.DataFrame) -> pd.DataFrame:
    """Views a second and the shares of a run's time, medians over the repeats."""
    rows = {}
    for name, part in timed.groupby("method", sort=False):
        rate, floor = part["views_per_second"].median(), part["floor"].median()
        shares = {p: f"{100 * part[p].median():.0f} %" for p in PARTS}
        rows[label(name)] = {
            "views/s": f"{rate:,.0f}",
            **shares,
            "floor, views/s": f"{floor:,.0f}",
            "of the floor": f"{100 * (part['views_per_second'] / part['floor']).median():.0f} %",
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def time_plot(timed: pd.DataFrame) -> Figure:
    """Microseconds a view, by part, with the encoder alone as a dash."""
    sns.set_theme(style="whitegrid", palette=PALETTE, font_scale=0.95)
    grouped = timed.assign(each=1e6 / timed["views_per_second"], alone=1e6 / timed["floor"]).groupby(
        "method", sort=False
    )
    names = list(grouped.groups)
    names.sort(key=list(dict.fromkeys(timed["method"])).index)
    figure, ax = plt.subplots(figsize=(7.2, 0.6 * len(names) + 1.3))
    left = np.zeros(len(names))
    for part, colour in zip(PARTS, sns.color_palette(PALETTE), strict=False):
        width = np.array([(g["each"] * g[part]).median() for g in (grouped.get_group(n) for n in names)])
        ax.barh(range(len(names)), width, left=left, color=colour, label=part, height=0.6)
        left += width
    for y, name in enumerate(names):
        alone = grouped.get_group(name)["alone"].median()
        ax.plot([alone, alone], [y - 0.42, y + 0.42], color="black", lw=1.6, ls="--", label="" if y else "floor")
    heads = timed.groupby("method")["heads"].first()
    ticks = [f"the bank, {heads[n]} heads" if n == "bank" else label(n) for n in names]
    ax.set_yticks(range(len(names)), ticks)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("microseconds a view")
    ax.legend(loc="upper center", bbox_to_anchor=(0.45, -0.28), ncol=5, frameon=False)
    plt.close(figure)
    return figure


def gradient_plot(looked: pd.DataFrame) -> Figure:
    """Histograms of the gradients of the first seed, a panel a method: all of training, and a line a stage."""
    sns.set_theme(style="whitegrid", palette=PALETTE, font_scale=0.95)
    first = looked[looked["seed"] == looked["seed"].iloc[0]]
    every = np.concatenate([g.stages.flatten().numpy() for g in first["gradients"]])
    edge = np.quantile(np.abs(every[np.isfinite(every)]), 0.999)
    bins = np.linspace(-edge, edge, 61)
    figure, axes = plt.subplots(1, len(first), figsize=(3.7 * len(first), 3.6), sharex=True, sharey=True, squeeze=False)
    for ax, method, g in zip(axes[0], first["method"], first["gradients"], strict=True):
        ax.hist(g.overall.numpy(), bins=bins, density=True, color="0.78", label="all of training")
        styles = ("-", "--", "-.", ":", (0, (5, 1)))
        for s, (stage, colour) in enumerate(
            zip(g.stages.numpy(), sns.color_palette(PALETTE, len(g.stages)), strict=True)
        ):
            density, _ = np.histogram(stage, bins=bins, density=True)
            name = f"{100 * (s + 1) // len(g.stages)} %"
            ax.plot(
                (bins[1:] + bins[:-1]) / 2,
                np.where(density > 0, density, np.nan),
                color=colour,
                lw=1.4,
                ls=styles[s % len(styles)],
                label=name,
            )
        ax.set(title=label(method), xlabel="gradient", yscale="log")
        ax.ticklabel_format(axis="x", style="sci", scilimits=(-2, 2))
    axes[0][0].set_ylabel("density")
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncol=6, frameon=False, bbox_to_anchor=(0.5, -0.08))
    figure.tight_layout()
    plt.close(figure)
    return figure


def gradient_deviations(looked: pd.DataFrame) -> pd.DataFrame:
    """Standard deviation over the parameters, times 1,000 (`deviation`): a row a method, seed and stage ("whole", "20 %")."""
    rows = []
    for row in looked.itertuples():
        parts = {f"{100 * (s + 1) // len(row.gradients.stages)} %": g for s, g in enumerate(row.gradients.stages)}
        for stage, g in {"whole": row.gradients.overall, **parts}.items():
            same = {c: getattr(row, c) for c in ("dataset", "model", "method", "seed", "epsilon")}
            rows.append(same | {"stage": stage, "deviation": 1000 * float(g.std())})
    return pd.DataFrame(rows)


def benchmark(name: str) -> dict[str, Any]:
    """What `python benchmarks/NAME.py` wrote when it was last run for the repository, on a machine of the authors."""
    return json.loads((data.PROJECT / "benchmarks" / "results" / f"{name}.json").read_text())


def head_ratios(measured: dict[str, Any]) -> pd.DataFrame:
    """The ratios of `benchmarks/heads.py` beside their goals."""
    rows = {}
    for name, ratio in measured["ratios"].items():
        what, _, goal = name.rstrip(")").partition(" (goal: ")
        rows[what] = {"measured": f"{ratio:.2f}", "goal": goal}
    return pd.DataFrame.from_dict(rows, orient="index")


def network_ratios(measured: dict[str, Any]) -> pd.DataFrame:
    """The rows of `benchmarks/network.py`: the time of a clipped gradient and step, as a multiple of plain SGD's."""
    rows = [
        {
            "convolutions": r["convolutions"],
            "gradient": r["row"],
            "memory layout": "channels last" if r["channels_last"] else "contiguous",
            "seconds": f"{r['seconds']:.2f}" if "seconds" in r else r["failed"],
            "views/s": f"{r['views_per_second']:,.0f}" if "seconds" in r else "–",
            "÷ plain SGD": f"{r['times_plain']:.2f}" if "seconds" in r else "–",
        }
        for r in measured["rows"]
    ]
    return pd.DataFrame(rows).set_index(["convolutions", "gradient"])


def soak_figures(measured: dict[str, Any]) -> pd.DataFrame:
    """The figures of `benchmarks/soak.py`, one a row."""
    storm, calm, found = measured["disturbed"], measured["undisturbed"], measured["results"]
    thirds = storm["MiB, largest process, median by third"]
    figures = {
        "runs asked for": found["asked"],
        "kills without warning": " and ".join(f"{n} of a {who}" for who, n in storm["kills"].items()),
        "starts": storm["starts"],
        "results present": found["present"],
        "results equal to the undisturbed": found["equal"],
        "weights equal, bit for bit": found["equal weights, bit for bit"],
        "minutes, disturbed and undisturbed": f"{storm['seconds'] / 60:.1f} and {calm['seconds'] / 60:.1f}",
        "memory of the largest process, by thirds of the time": ", ".join(f"{m:.0f} MiB" for m in thirds),
        "memory gained by a pass, undisturbed": f"{calm['MiB gained a pass, once warm']:.2f} MiB",
        "checkpoints and temporary files left": f"{found['checkpoints left']} and {found['temporary files left']}",
    }
    return pd.DataFrame({"": {k: str(v) for k, v in figures.items()}})
