"""The figures that notebooks show, in colours that are told apart without red and green."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from dpmix.companion.grids import STANDS_FOR
from dpmix.companion.report import label, spread, summary

PALETTE = "colorblind"


def accuracy_plot(runs: pd.DataFrame, published: pd.DataFrame | None = None) -> Figure:
    """Test accuracy against ε, a panel an encoder: mean over the seeds, bars of one standard deviation."""
    sns.set_theme(style="whitegrid", palette=PALETTE, font_scale=0.95)
    models = list(dict.fromkeys(runs["model"]))
    methods = list(dict.fromkeys(runs["method"]))
    colours = dict(zip(methods, sns.color_palette(PALETTE, len(methods)), strict=True))
    rows = 1 if published is None else 2
    figure, axes = plt.subplots(rows, len(models), figsize=(4.6 * len(models), 3.4 * rows), sharex=True, squeeze=False)
    for col, model in enumerate(models):
        sources = [("measured here", summary(runs[runs["model"] == model], ["method", "epsilon"]))]
        if published is not None:
            twin = published[published["model"] == STANDS_FOR.get(model, model)]
            sources.insert(0, ("published", twin))
        for row, (source, table) in enumerate(sources):
            ax = axes[row][col]
            for marker, method in zip("osD^vPX*", methods, strict=False):
                line = table[table["method"] == method].sort_values("epsilon")
                ax.errorbar(line["epsilon"], line["mean"], line["std"], marker=marker, ms=5, capsize=2, color=colours[method],
                            label=label(method), lw=1.4)  # fmt: skip
            ax.set(title=f"{label(STANDS_FOR.get(model, model) if source == 'published' else model)}, {source}",
                   ylabel="test accuracy (%)", xscale="log")  # fmt: skip
            ticks = sorted(set(runs["epsilon"]))
            ax.set_xticks(ticks, [f"{t:g}" for t in ticks], minor=False)
            ax.minorticks_off()
    for ax in axes[-1]:
        ax.set_xlabel("ε (δ = 1e-5)")
    handles, names = axes[-1][0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="lower center", ncol=min(3, len(names)), frameon=False, bbox_to_anchor=(0.5, -0.08)
    )
    figure.tight_layout()
    plt.close(figure)
    return figure


def bar_plot(panels: dict[str, pd.DataFrame]) -> Figure:
    """Accuracies as bars, a panel a source (`method`, `mean`, `std`), one below the other: bars of one deviation, in words
    too, since differences of a point do not show on bars that start at zero. A colour a method."""
    sns.set_theme(style="whitegrid", palette=PALETTE)
    methods = list(dict.fromkeys(m for table in panels.values() for m in table["method"]))
    colours = dict(zip(methods, sns.color_palette(PALETTE, len(methods)), strict=True))
    tall = [0.34 * len(table) + 0.8 for table in panels.values()]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(5.6, sum(tall)), height_ratios=tall, sharex=True, squeeze=False
    )
    for ax, (title, table) in zip(axes[:, 0], panels.items(), strict=True):
        names = [label(m) for m in table["method"]]
        ax.barh(names, table["mean"], xerr=table["std"], color=[colours[m] for m in table["method"]], capsize=2)
        for row, (mean, std) in enumerate(zip(table["mean"], table["std"], strict=True)):
            ends = mean + (0 if pd.isna(std) else std) + 1
            ax.text(ends, row, spread(mean, std), va="center", fontsize=9)
        ax.set(title=title, xlim=(0, 138))
        ax.invert_yaxis()
        ax.grid(visible=False, axis="y")
        ax.set_xticks(range(0, 101, 20))
    axes[-1, 0].set_xlabel("test accuracy (%)")
    figure.tight_layout()
    plt.close(figure)
    return figure


def grid_plot(panels: dict[str, pd.DataFrame]) -> Figure:
    """K_base × K_self as heatmaps (`k_base`, `k_self`, `k_diff`, `mean`): a column a source, with colours of its own, and a
    row a K_diff. The best cell of a source is framed."""
    sns.set_theme(style="white")
    k_diffs = sorted({k for table in panels.values() for k in table["k_diff"]})
    figure, axes = plt.subplots(
        len(k_diffs), len(panels), figsize=(3.1 * len(panels), 2.6 * len(k_diffs)), squeeze=False
    )
    for col, (title, table) in enumerate(panels.items()):
        best = table.loc[table["mean"].idxmax()]
        for row, k_diff in enumerate(k_diffs):
            ax = axes[row][col]
            wide = table[table["k_diff"] == k_diff].pivot(index="k_base", columns="k_self", values="mean")
            if wide.empty:
                ax.set_axis_off()
                continue
            sns.heatmap(wide, ax=ax, annot=True, fmt=".1f", cmap="cividis", cbar=False, square=True, linewidths=1,
                        vmin=table["mean"].min(), vmax=table["mean"].max(), annot_kws={"size": 12})  # fmt: skip
            if best["k_diff"] == k_diff:
                place = wide.columns.get_loc(best["k_self"]), wide.index.get_loc(best["k_base"])
                ax.add_patch(plt.Rectangle(place, 1, 1, fill=False, edgecolor="#d55e00", lw=3))
            head = f"{title}\n" if row == 0 else ""
            ax.set(title=f"{head}$K_{{diff}}$ = {k_diff}", xlabel="$K_{self}$", ylabel="$K_{base}$")
            ax.tick_params(axis="y", rotation=0)
    figure.tight_layout()
    plt.close(figure)
    return figure


def point_plot(parts: dict[str, pd.DataFrame], panel: str = "model", line: str = "method", *, unit: str) -> Figure:
    """Means as points with bars of one standard deviation: a row of panels a source of `parts`, a column a value of
    `panel`, a line a value of `line`. Every panel has a scale of its own."""
    sns.set_theme(style="whitegrid", palette=PALETTE, font_scale=0.9)
    columns = max(table[panel].nunique() for table in parts.values())
    lines = [list(dict.fromkeys(table[line])) for table in parts.values()]
    names = list(dict.fromkeys(name for part in lines for name in part))
    colours = dict(zip(names, sns.color_palette(PALETTE, len(names)), strict=True))
    tall = [0.32 * len(part) + 1.0 for part in lines]
    figure, axes = plt.subplots(
        len(parts), columns, figsize=(3.0 * columns + 1.6, sum(tall)), height_ratios=tall, squeeze=False
    )
    for row, (source, table), order in zip(axes, parts.items(), lines, strict=True):
        for ax, (value, part) in zip(row, table.groupby(panel, sort=False), strict=False):
            for name, mean, std in zip(part[line], part["mean"], part["std"], strict=True):
                ax.errorbar(mean, order.index(name), xerr=None if pd.isna(std) else std, fmt="o", ms=6, capsize=3,
                            color=colours[name])  # fmt: skip
            ax.set(title=f"{label(value)}\n{source}", ylim=(len(order) - 0.5, -0.5), xlabel=unit)
            ax.set_yticks(range(len(order)), [label(n) for n in order] if ax is row[0] else [""] * len(order))
            ax.margins(x=0.15)
        for ax in row[table[panel].nunique() :]:
            ax.set_axis_off()
    figure.tight_layout()
    plt.close(figure)
    return figure


def picture_rows(rows: Sequence[tuple[str, Any, Sequence[str]]], columns: int = 6) -> Figure:
    """Blocks of pictures under a heading: (heading, images [n, C, H, W] in 0..1, a caption each), `columns` a row."""
    sns.set_theme(style="white")
    side, head, line = 0.92, 0.36, 0.165  # inches: a picture, the heading of a block, a line of a caption
    lines = [max((1 + c.count("\n") for c in captions if c), default=0) for *_, captions in rows]
    used = [max(1, -(-len(images) // columns)) for _, images, _ in rows]
    tall = sum(head + n * (side + line * deep + 0.12) for n, deep in zip(used, lines, strict=True))
    wide = (side + 0.1) * columns
    figure = plt.figure(figsize=(wide, tall))
    top = tall
    for (heading, images, captions), deep in zip(rows, lines, strict=True):
        figure.text(0.05 / wide, (top - 0.3) / tall, heading, fontsize=10.5, weight="bold")
        top -= head
        for place, (image, caption) in enumerate(zip(images, captions, strict=True)):
            row, column = divmod(place, columns)
            bottom = top - row * (side + line * deep + 0.12) - side
            ax = figure.add_axes(((side + 0.1) * column / wide + 0.05 / wide, bottom / tall, side / wide, side / tall))
            pixels = image.detach().cpu().clamp(0, 1).numpy().transpose(1, 2, 0)
            shown = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
            ax.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            ax.set_axis_off()
            ax.text(0.5, -0.04, caption, transform=ax.transAxes, ha="center", va="top", fontsize=9, linespacing=1.15)
        top -= max(1, -(-len(images) // columns)) * (side + line * deep + 0.12)
    plt.close(figure)
    return figure
