"""What the knobs of notebooks/explore answer: an example's views, one step, the results that are here.

Each picture takes the settings of its widgets and returns HTML; `answer` puts the line of a refusal in its place. Views
and steps are those of `core`. What a budget comes to stands in `budgets`."""

import base64
import html
import io
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.style import context as look
from PIL import Image, ImageOps
from scipy import stats
from torch import Tensor

from dpmix import models
from dpmix.companion import evidence, report
from dpmix.core import checks, rng, views
from dpmix.core.checks import counted
from dpmix.core.transforms import as_float
from dpmix.images import data

SIDE = 48  # pixels to which photographs are cut for looking at
BLUE, ORANGE = "#0072b2", "#d55e00"  # Okabe and Ito: told apart without red and green


def answer(picture: Callable[..., str], **settings: Any) -> str:
    """`picture(**settings)`; where it refuses them, the line that says why."""
    try:
        return f'<div style="line-height:1.4">{picture(**settings)}</div>'
    except (ValueError, OSError, RuntimeError) as refused:  # RuntimeError: a home folder of nobody
        line = html.escape(str(refused).split("\n")[0])
        return f'<p role="alert" style="border-left:4px solid {ORANGE};padding:.5em 1em">{line}</p>'


_found = lru_cache(maxsize=4)(data.find)  # what follows is one example and its views


def _read(paths: Sequence[Path], labels: Sequence[int], class_names: tuple[str, ...]) -> data.ImageSet:
    pixels = []
    for path in paths:
        try:
            with Image.open(path) as opened:
                pixels.append(np.asarray(ImageOps.fit(opened.convert("RGB"), (SIDE, SIDE))))
        except (OSError, Image.DecompressionBombError) as error:
            raise ValueError(f"image={str(path)!r}: is no image that can be read") from error
    return data.ImageSet(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), torch.tensor(labels), class_names)


@lru_cache(maxsize=64)
def _example(dataset: str, index: int) -> data.ImageSet:
    """Training example `index` alone; no other file is opened."""
    found = _found(dataset)
    n = len(found.train) if isinstance(found, data.Splits) else found.train
    checks.require(0 <= index < n, "index", index, f"must lie in 0..{n - 1}, the training examples of {dataset}")
    if isinstance(found, data.Splits):
        return found.train.subset([index])
    return _read([found.files[index]], [int(found.labels[index])], found.class_names)


@lru_cache(maxsize=4)
def _public(dataset: str, class_names: tuple[str, ...], each: int = 12) -> data.ImageSet:
    """The public images beside a data set; where they are files, the first `each` of every class."""
    if dataset == "digits":
        return data.public_images(dataset)
    folders = [data.find_public(dataset) / data.folder_name(name) for name in class_names]
    files = [(path, c) for c, folder in enumerate(folders) for path in sorted(folder.glob("*.*"))[:each]]
    checks.require(bool(files), "dataset", dataset, f"no synthetic images in {folders[0]}; set k_diff=0")
    return _read([path for path, _ in files], [c for _, c in files], class_names)


def _embedded(picture: Any, kind: str, alt: str, style: str) -> str:
    """An <img> that holds a PIL image or a figure."""
    out = io.BytesIO()
    picture.savefig(out, dpi=76) if isinstance(picture, Figure) else picture.save(out, kind)
    coded = base64.b64encode(out.getvalue()).decode()
    return f'<img src="data:image/{kind};base64,{coded}" alt="{html.escape(alt)}" style="{style}">'


def _tile(image: Tensor, alt: str, width: int = 56) -> str:
    """A picture of [C, H, W] in 0..1."""
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).squeeze(-1).numpy()
    style = f"width:{width}px;height:{width}px;image-rendering:pixelated;display:inline;margin:0"
    return _embedded(Image.fromarray(pixels), "png" if len(pixels) <= 32 else "jpeg", alt, style)


def _block(heading: str, tiles: Sequence[tuple[str, str]]) -> str:
    """A heading over tiles, each with its caption below; nothing where there are none."""
    style, under = "margin:0;text-align:center;font-size:12px;width:9em", "<figcaption style='color:inherit'>"
    figures = (f"<figure style='{style}'>{tile}{under}{html.escape(c)}</figcaption></figure>" for tile, c in tiles)
    row = f"<div style='display:flex;flex-wrap:wrap;gap:10px'>{''.join(figures)}</div>"
    return f"<p style='margin:.8em 0 .3em'><b>{html.escape(heading)}</b></p>{row}" if tiles else ""


def label_of(target: Tensor, class_names: Sequence[str]) -> str:
    """A label as text: "5", or "0.93 · 5 + 0.07 · 8"."""
    parts = sorted(((w, c) for c, w in enumerate(target.tolist()) if w > 0.005), reverse=True)
    return " + ".join(class_names[c] if len(parts) == 1 else f"{w:.2f} · {class_names[c]}" for w, c in parts)


def example_views(
    *,
    dataset: str,
    index: int,
    k_base: int,
    k_self: int,
    k_diff: int,
    alpha: float,
    mix: str,
    transform: str,
    seed: int,
) -> str:
    """All views that stand for one example in a step, with labels and weights; mixtures with their parents."""
    one, ids, pool = _example(dataset.strip(), index), torch.tensor([index]), k_base + k_diff
    recipe = views.Recipe(k_base, k_self, k_diff, mix, alpha, transform).for_data(one.flip)
    said = "a mixture needs a pool of two; raise one of them, or set k_self=0"
    checks.require(pool > 1 or not k_self, "k_base + k_diff", pool, said)
    public = _public(dataset.strip(), one.class_names) if k_diff else None
    about: dict[str, Any] = dict(num_classes=len(one.class_names), seed=seed, step=0, public=public)
    made = views.make_views(one.images, one.labels, ids, recipe, **about)
    labels = [f"label {label_of(target, one.class_names)}" for target in made.targets[0]]
    weights = [f"weight {weight:.3f}" for weight in views.make_union([recipe]).weights[0]]
    called = [*(str(v + 1) for v in range(k_base)), *(f"P{v + 1}" for v in range(k_diff))]
    if k_self:
        first, second, share = (t[0].tolist() for t in views.mixing_draws(recipe, ids, seed=seed, step=0))
        # Of a CutMix the label tells: its box is cut at the border.
        shares = [f", λ = {s:.2f}" if mix == "mixup" else "" for s in share]
        called += [f"{called[a]} with {called[b]}{s}" for a, b, s in zip(first, second, shares, strict=True)]
    words = [", ".join(parts) for parts in zip(called, labels, weights, strict=True)]
    tiles = [_tile(*shown) for shown in zip(made.images[0], words, strict=True)]
    for m in range(k_self):
        tiles[pool + m] += "".join(_tile(made.images[0, p], f"parent {called[p]}", 24) for p in (first[m], second[m]))
    views_of = list(zip(tiles, words, strict=True))
    own = _tile(as_float(one.images)[0], "the example"), f"label {one.class_names[one.labels[0]]}"
    return (
        _block("The example", [own])
        + _block(f"{counted(k_base, 'base view')}: {recipe.transform}", views_of[:k_base])
        + _block(counted(k_diff, "public image"), views_of[k_base:pool])
        + _block(f"{counted(k_self, 'mixture')}: {mix}, each with its two parents", views_of[pool:])
    )


def _gradients(features: Tensor, targets: Tensor, head: Tensor) -> Tensor:
    """Each example's cross-entropy gradient [b, parameters], averaged over its views and not clipped; the last column of
    `head` holds the biases."""
    z = torch.nn.functional.pad(features, (0, 1), value=1.0)
    return torch.einsum("bkc,bkd->bcd", (z @ head.T).softmax(-1) - targets, z).flatten(1) / z.shape[1]


@lru_cache(maxsize=1)
def _public_head(steps: int = 25, rate: float = 8.0) -> tuple[models.Encoder, Tensor, Tensor]:
    """An encoder, a head on it that was trained on synthetic digits, and the two directions [2, parameters] in which their
    gradients spread most."""
    encoder, public = models.encoder("tiny-convnext"), data.public_images("digits").subset(slice(0, 400))
    features, targets = encoder.features(as_float(public.images))[:, None], torch.eye(10)[public.labels][:, None]
    head = torch.zeros(10, features.shape[-1] + 1)
    for _ in range(steps):
        head = head - rate * _gradients(features, targets, head).mean(0).view_as(head)
    return encoder, head, torch.linalg.svd(_gradients(features, targets, head), full_matrices=False).Vh[:2]


@lru_cache(maxsize=64)
def _eight(method: str, seed: int) -> Tensor:
    """The averaged gradients of eight training digits, [8, parameters]."""
    encoder, head, _ = _public_head()
    train, recipe = data.load("digits").train, views.METHODS[method].for_data(False)
    ids = torch.from_numpy(rng.generator(seed, "explore").permutation(len(train))[:8])
    about: dict[str, Any] = dict(num_classes=10, seed=seed, step=0, public=data.public_images("digits"))
    made = views.make_views(train.images[ids], train.labels[ids], ids, recipe, **about)
    return _gradients(encoder.features(made.images.flatten(0, 1)).unflatten(0, (8, -1)), made.targets, head)


@look("default")  # whatever a notebook has set
def step(*, method: str, clip_norm: float, sigma: float, without: int, seed: int) -> str:
    """One step on eight digits in two public directions: averaged, clipped, summed, noised, with and without one of them."""
    checks.require(1 <= without <= 8, "without", without, "must be one of the examples 1 to 8")
    raw, plane = _eight(method, seed), _public_head()[2]
    norms, scale = raw.norm(dim=1), sigma * clip_norm
    order = [i for i in range(8) if i != without - 1] + [without - 1]
    flat = (raw @ plane.T)[order].numpy()
    cut = flat * (clip_norm / norms[order]).clamp(max=1)[:, None].numpy()
    path, noise = np.vstack([np.zeros(2), cut.cumsum(0)]), rng.generator(seed, "explore noise").normal(size=(2, 60, 2))
    figures = [Figure(figsize=(4.4, 4.1)) for _ in range(2)]
    left, right = (figure.subplots(gridspec_kw={"left": 0.2, "right": 0.95}) for figure in figures)
    arrow: dict[str, Any] = dict(angles="xy", scale_units="xy", scale=1, width=0.006, color=[BLUE] * 7 + [ORANGE])
    left.quiver(*np.zeros((2, 8)), *flat.T, alpha=0.3, **arrow)
    left.quiver(*np.zeros((2, 8)), *cut.T, **arrow)
    left.add_patch(Circle((0, 0), clip_norm, fill=False, color="#777777"))
    right.quiver(*path[:-1].T, *cut.T, **arrow)
    for end, draws, colour, mark, name in ((-1, noise[0], ORANGE, "^", "with"), (-2, noise[1], BLUE, "o", "without")):
        right.plot(*(path[end] + scale * draws).T, mark, color=colour, ms=4, alpha=0.5, label=name)
        right.add_patch(Circle(path[end], scale, fill=False, color=colour, ls="-" if name == "with" else "--"))
    right.legend(title=f"example {without}")
    far = 1.1 * max(clip_norm, np.abs(flat).max())
    for ax in (left, right):
        ax.set(xlabel="along the first public direction", ylabel="along the second")
        ax.locator_params(nbins=4)  # fewer ticks are drawn sooner
    # A title that says where it stands need not look for its place.
    left.set_title("Averaged (faint), clipped to the circle C", y=1.0)
    right.set_title("Summed, and 60 noisy sums; circles σC", y=1.0)
    left.set(xlim=(-far, far), ylim=(-far, far), aspect="equal")
    right.set(aspect="equal", adjustable="datalim")
    moved = min(clip_norm, float(norms[without - 1]))
    words = f"Lengths before clipping ({raw.shape[1]} parameters): {norms.min():.2f} to {norms.max():.2f}; "
    words += f"{int((norms > clip_norm).sum())} of 8 are above C = {clip_norm:g}. Example {without} moves the sum by {moved:.3f}"
    words += f", {moved / scale:.2f} standard deviations of the noise." if scale else "; without noise, that shows."
    shown = (_embedded(f, "png", f.axes[0].get_title(), "max-width:100%;height:auto") for f in figures)
    return f"<div style='display:flex;flex-wrap:wrap'>{''.join(shown)}</div><p>{words}</p>"


@lru_cache(maxsize=1)
def results() -> pd.DataFrame:
    """The runs of Tables 3 and 2 that came with the repository, at the learning rates that validation chose."""
    found = [evidence.chosen(table, ["dataset", "model", "method", "epsilon"]) for table in ("table3", "table2")]
    found = [runs for runs in found if len(runs)]
    checks.require(bool(found), "data/results", str(evidence.FOLDER), "holds no results; they are in a clone of dpmix")
    return pd.concat(found, ignore_index=True)


@look("default")
def curves(*, dataset: str, model: str, methods: Sequence[str]) -> str:
    """Test accuracy against epsilon of runs that came with the repository: means and 95 % intervals over the seeds."""
    runs = results().query("dataset == @dataset and model == @model and method in @methods")
    checks.require(len(runs) > 0, "methods", list(methods), f"no runs of them on {dataset} with {model}; choose others")
    seen = runs.groupby(["method", "epsilon"])["accuracy"].agg(["mean", "sem", "count"]).unstack(0)
    half = seen["sem"] * stats.t.ppf(0.975, seen["count"] - 1)
    figure = Figure(figsize=(7.4, 4.1))
    ax, colours = figure.subplots(), (BLUE, ORANGE, "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999")
    for name, colour, style in zip(seen["mean"], colours, ("o-", "s--", "^-.", "D:", "v-", "P--", "X-."), strict=False):
        about: dict[str, Any] = dict(fmt=style, color=colour, capsize=4, label=report.label(name))
        ax.errorbar(seen.index, seen["mean"][name], half[name].fillna(0), **about)
    ax.set(xlabel="ε", ylabel="test accuracy (%)", xscale="log")
    ax.set_title(f"{report.label(dataset)}, {report.label(model)}")
    ax.set_xticks(seen.index, [f"{e:g}" for e in seen.index])
    ax.minorticks_off()
    ax.legend(frameon=False)
    told = f"{counted(len(runs), 'run')} that came with the repository. Bars: 95 % intervals over seeds; a single one has none."
    return f"{_embedded(figure, 'png', f'Accuracy against ε on {dataset}', 'max-width:100%;height:auto')}<p>{told}</p>"
