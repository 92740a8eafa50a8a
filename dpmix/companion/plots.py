"""The figures that notebooks show, in colours that are told apart without red and green."""

import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from dpmix.companion.report import Sources, label

PALETTE = "colorblind"


def _panels(parts: Sequence[tuple[str, dict[str, Any], pd.DataFrame]], wide: float, tall: float) -> tuple[Figure, list]:
    """Axes with a title for each of `Sources.parts`, two a row, for narrow pages; one that is left over is blank."""
    sns.set_theme(style="whitegrid", palette=PALETTE, font_scale=0.85)
    columns, rows = min(2, len(parts)), -(-len(parts) // 2)
    figure, axes = plt.subplots(rows, columns, figsize=(wide * columns, tall * rows + 0.6), squeeze=False)
    for ax in axes.flat[len(parts) :]:
        ax.set_axis_off()
    for ax, (source, at, _) in zip(axes.flat, parts, strict=False):
        ax.set_title(f"{', '.join(map(label, at.values()))}\n{source}")
    return figure, list(zip(axes.flat, (part for *_, part in parts), strict=False))


def _finish(figure: Figure, legend: dict[str, Any] | None = None, wide: int = 4) -> Figure:
    if legend:
        figure.legend(legend.values(), legend.keys(), loc="lower center", ncol=min(wide, len(legend)), frameon=False)
    figure.tight_layout(rect=(0, 0.5 / figure.get_figheight() if legend else 0, 1, 1))
    plt.close(figure)
    return figure


def accuracy_plot(s: Sources, split: Sequence[str] = ("dataset", "model")) -> Figure:
    """Test accuracy against ε, a panel a source, data set and encoder: mean over the seeds, bars of one deviation."""
    figure, panels = _panels(list(s.parts(split, ("method", "epsilon"), "accuracy")), 3.3, 2.9)
    methods = list(dict.fromkeys(m for _, part in panels for m in part["method"]))
    look = dict(zip(methods, zip(sns.color_palette(PALETTE, len(methods)), "osD^vPX*" * 3, strict=False), strict=True))
    legend = {}
    for ax, part in panels:
        for method, line in part.groupby("method", sort=False):
            colour, marker = look[method]
            line = line.sort_values("epsilon")
            style = {"marker": marker, "ms": 4, "capsize": 2, "color": colour, "lw": 1.2}
            legend[label(method)] = ax.errorbar(line["epsilon"], line["mean"], line["std"], **style)
        ax.set(xscale="log", xlabel="ε", ylabel="test accuracy (%)")
        ticks = sorted(set(part["epsilon"]))
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks], minor=False)
        ax.minorticks_off()
    return _finish(figure, legend)


def point_plot(
    s: Sources,
    *,
    unit: str = "test accuracy (%)",
    line: str = "method",
    split: Sequence[str] = ("dataset", "model"),
    value: str = "accuracy",
) -> Figure:
    """Means as points with bars of one standard deviation: a panel a source and value of `split`, each with a scale of its
    own, a row a value of `line`."""
    parts = list(s.parts(split, (line,), value))
    figure, panels = _panels(parts, 3.6, 0.26 * max(len(part) for *_, part in parts) + 1.1)
    names = list(dict.fromkeys(n for _, part in panels for n in part[line]))
    colours = dict(zip(names, sns.color_palette("husl" if len(names) > 10 else PALETTE, len(names)), strict=True))
    for ax, part in panels:
        for row, (name, mean, std) in enumerate(zip(part[line], part["mean"], part["std"], strict=True)):
            bars = None if pd.isna(std) else std
            ax.errorbar(mean, row, xerr=bars, fmt="o", ms=5, capsize=3, color=colours[name])
        ax.set(ylim=(len(part) - 0.5, -0.5), xlabel=unit)
        ax.set_yticks(range(len(part)), [label(n) for n in part[line]])
        ax.margins(x=0.15)
        ax.locator_params(axis="x", nbins=4)
    return _finish(figure)


def picture_rows(rows: Sequence[tuple[str, Any, Sequence[str]]], columns: int = 6) -> Figure:
    """Blocks of pictures under a heading: (heading, images [n, C, H, W] in 0..1, a caption each), `columns` a row. Lines of
    a caption that are wider than a picture are broken."""
    sns.set_theme(style="white")
    side, head, line = 0.92, 0.36, 0.165  # inches: a picture, the heading of a block, a line of a caption
    wrap, blocks, tall = textwrap.TextWrapper(13), [], 0.0
    for heading, images, captions in rows:
        broken = ["\n".join(t for part in c.split("\n") for t in wrap.wrap(part)) for c in captions]
        each = side + line * max((1 + c.count("\n") for c in broken if c), default=0) + 0.12
        blocks.append((tall, each, heading, zip(images, broken, strict=True)))
        tall += head + max(1, -(-len(images) // columns)) * each
    wide = (side + 0.1) * columns
    figure = plt.figure(figsize=(wide, tall))
    for above, each, heading, pictures in blocks:
        figure.text(0.05 / wide, (tall - above - 0.3) / tall, heading, fontsize=10.5, weight="bold")
        for place, (image, caption) in enumerate(pictures):
            row, column = divmod(place, columns)
            bottom = tall - above - head - row * each - side
            ax = figure.add_axes(((side + 0.1) * column / wide + 0.05 / wide, bottom / tall, side / wide, side / tall))
            pixels = image.detach().cpu().clamp(0, 1).numpy().transpose(1, 2, 0)
            shown = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
            ax.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            ax.set_axis_off()
            ax.text(0.5, -0.04, caption, transform=ax.transAxes, ha="center", va="top", fontsize=9, linespacing=1.15)
    plt.close(figure)
    return figure


def effects_plot(found: pd.DataFrame) -> Figure:
    """The ledger as a picture: each claim's published effect (a ring) and the measured one with its interval (a dot), in
    points; ratios as a logarithm, in per cent. The scale is linear within five and logarithmic beyond."""
    sns.set_theme(style="whitegrid", palette=PALETTE, font_scale=0.85)
    shown = found[found["published"].notna() | found["difference"].notna()].iloc[::-1].reset_index(drop=True)
    words = {"holds": 2, "no effect": 0, "contradicted": 3, "undecided": 7, "not run": 7}
    colours = {w: sns.color_palette(PALETTE)[i] for w, i in words.items()}
    figure, ax = plt.subplots(figsize=(6.4, 0.25 * len(shown) + 1.2))
    legend: dict[str, Any] = {}
    for place, r in enumerate(shown.itertuples()):
        word = next(w for w in words if str(r.verdict).startswith(w))
        published, mean, low, high = (100 * x if r.ratio else x for x in (r.published, r.difference, r.low, r.high))
        legend["published"] = ax.plot(published, place, "o", ms=7, mfc="none", color="0.35")[0]
        if word != "not run":
            bars = [[mean - low], [high - mean]]
            legend[word] = ax.errorbar(mean, place, xerr=bars, fmt="o", ms=4, capsize=2, color=colours[word])
    ax.axvline(0, color="0.4", lw=1)
    ax.set_xscale("symlog", linthresh=5)
    ax.set_xlim(-100, 500)
    ax.set_xticks([-50, -5, 0, 5, 50], ["-50", "-5", "0", "5", "50"])
    ax.set(
        xlabel="difference in points (ratios: 100 ln); logarithmic beyond ±5",
        ylim=(-0.7, len(shown) - 0.3),
    )
    ax.set_yticks(range(len(shown)), shown["key"])
    return _finish(figure, legend)


def gradient_plot(looked: pd.DataFrame) -> Figure:
    """Histograms of the gradients of the first seed, a panel a method: all of training, and a line a stage."""
    sns.set_theme(style="whitegrid", palette=PALETTE, font_scale=0.95)
    first = looked[looked["seed"] == looked["seed"].iloc[0]]
    every = np.concatenate([g.stages.flatten().numpy() for g in first["gradients"]])
    edge = np.quantile(np.abs(every[np.isfinite(every)]), 0.999)
    bins = np.linspace(-edge, edge, 61)
    figure, axes = plt.subplots(1, len(first), figsize=(3.7 * len(first), 3.9), sharex=True, sharey=True, squeeze=False)
    styles: Any = ("-", "--", "-.", ":", (0, (5, 1)))
    for ax, method, g in zip(axes[0], first["method"], first["gradients"], strict=True):
        ax.hist(g.overall.numpy(), bins=bins, density=True, color="0.78", label="all of training")
        for s, stage in enumerate(g.stages.numpy()):
            density, _ = np.histogram(stage, bins=bins, density=True)
            shown, name = np.where(density > 0, density, np.nan), f"{100 * (s + 1) // len(g.stages)} %"
            look = {"color": sns.color_palette(PALETTE, len(g.stages))[s], "ls": styles[s % len(styles)], "lw": 1.4}
            ax.plot((bins[1:] + bins[:-1]) / 2, shown, label=name, **look)
        ax.set(title=label(method), xlabel="gradient", yscale="log")
        ax.ticklabel_format(axis="x", style="sci", scilimits=(-2, 2))
    axes[0][0].set_ylabel("density")
    handles, names = axes[0][0].get_legend_handles_labels()
    return _finish(figure, dict(zip(names, handles, strict=True)), wide=6)
