"""Before a budget is spent: what is in the folder, what the run would be, how long it takes and what it may be worth.

`check` trains nothing, draws no noise and releases nothing. What it says is computed from private images: keep it private."""

import json
import math
import os
import resource
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from dpmix.core import files, heads, transforms, views
from dpmix.core.checks import counted
from dpmix.images import data, layouts
from dpmix.images.image_cache import Decoded, printable
from dpmix.images.overlap import overlap
from dpmix.own.report import table
from dpmix.own.settings import OURS, Plan, plan
from dpmix.runs.material import check_channels
from dpmix.runs.spec import Mechanism, mechanism, no_meaningful_guarantee

MEASURED = 50
CLASSES = {"cifar10": 10, "cifar100": 100, "eurosat": 10, "caltech101": 101}  # of the data sets with results
PRIVATE = "This output is computed from private images: keep it private. Nothing was spent: no noise, no training, no release."

Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class Checked:
    """What `check` found, as sections of (what, how much) rows. Its text is a Markdown table each."""

    plan: Plan
    sections: dict[str, Rows]

    def __str__(self) -> str:
        shown = (f"### {title}\n\n{table(('', ''), rows)}" for title, rows in self.sections.items())
        return "\n\n".join([f"**{PRIVATE}**", *shown])

    _repr_markdown_ = __str__


def check(folder: Any, epsilon: Any, **settings: Any) -> Checked:
    """Look at a folder of images before training on it; `settings` as in `train`. The images are decoded, into the cache
    that training reads. Raises as `train` would."""
    p = plan(folder, epsilon, **settings)
    m = mechanism(p.spec, p.listing.train)
    p.make_private(*OURS)
    decoded = data.opened(p.spec.dataset, p.listing, image_size=p.encoder.image_size, cache=p.compute.cache)
    check_channels(p.spec, p.encoder, decoded.images)
    sections = {"The images": _images(p, decoded), "The run": _run(p, m)}
    return Checked(p, sections | {"What it takes": _cost(p, m, decoded), "What it may be worth": _worth(p)})


def _images(p: Plan, decoded: Decoded) -> Rows:
    """Counts and oddities of the private images; of the public ones those that copy private ones."""
    listing, n, base = p.listing, p.listing.train, data.synthetic_folder(p.spec.dataset)

    def called(i: int) -> str:
        return printable(listing.files[i].relative_to(listing.base))

    counts = [np.bincount(part, minlength=len(listing.class_names)) for part in np.split(listing.labels, [n])]
    rows = [("training / test images", f"{n:,} / {len(listing.files) - n:,}")]
    rows += [(f"class {c}", f"{a:,} / {b:,}") for c, a, b in zip(listing.class_names, *counts, strict=True)][:120]
    left = ", ".join(f"{many:,} {suffix}" for suffix, many in listing.left_out.most_common())
    rows.append(("left out", left or f"nothing (taken are {' '.join(layouts.SUFFIXES)})"))
    for oddity, words in {"turned": "turned upright by their EXIF mark", **data.ODDITIES}.items():
        if found := decoded.odd.get(oddity):
            rows.append((words.partition(" (")[0], _some(called(i) for i in found)))
    for words, pairs in zip(("repeat another", "test, equal a training image"), decoded.copies, strict=True):
        rows.append((f"exact copies: {words}", _some(f"{called(i)} = {called(j)}" for i, j in pairs)))
    if not base.is_dir():
        return [*rows, ("synthetic images", f"none in {base}")]
    private = data.ImageSet(decoded.images, torch.from_numpy(listing.labels), listing.class_names)
    public = data.public_images(p.spec.dataset, like=private, cache=p.compute.cache)
    pairs = torch.cat(overlap(private, public)).tolist()
    copied = _some(f"synthetic image {j} = {called(i)}" for i, j in pairs)
    return [*rows, ("synthetic images", f"{len(public):,}"), ("of them copies of private ones", copied)]


def _some(names: Iterable[str]) -> str:
    """How many, and the first five."""
    every = list(names)
    return f"{len(every):,}" + (f": {', '.join(every[:5])}{', ...' if len(every) > 5 else ''}" if every else "")


def _run(p: Plan, m: Mechanism) -> Rows:
    spec, why = p.spec, p.reasons
    weights = (p.encoder.dim + 1) * len(p.listing.class_names)
    ratio = spec.batch_size / (m.noise_multiplier * math.sqrt(weights))
    rate = f"one of {', '.join(f'{r:g}' for r in p.rates)}" if p.rates else f"{spec.learning_rate:g}"
    encoder = f"{spec.model} at {p.encoder.image_size} pixels, {counted(p.encoder.dim, 'feature')}"
    assert spec.epsilon is not None
    warned = [f"{printable(p.out)} is there already; train will refuse it"] if os.path.lexists(p.out) else []
    warned += no_meaningful_guarantee(spec.epsilon, spec.delta, m.population)
    return [
        ("N", f"{counted(m.population, 'training image')}; becomes public"),
        ("encoder", f"{encoder}: {why['model']}"),
        ("feature scaling", spec.feature_scaling),
        ("views of an image, K", f"{spec.recipe.views}: {why['method']}"),
        ("expected batch, B", f"{spec.batch_size:,}: {why['batch_size']}"),
        ("epochs, steps", f"{spec.epochs:g}, {m.steps:,}: {why['epochs']}"),
        ("clip norm, C", f"{spec.clip_norm:g}: {why['clip_norm']}"),
        ("learning rate", f"{rate}: {why['learning_rate']}"),
        ("ε, δ", f"{spec.epsilon:g}, {spec.delta:g} by {spec.accountant.upper()}; δ {why['delta']}"),
        ("noise multiplier, σ", f"{m.noise_multiplier:.4g}"),
        ("signal to noise", f"at most {ratio:.2g} a step, B / (σ √{weights:,}); {ratio * m.steps**0.5:.2g} over all"),
        *(("WARNING", words) for words in warned),
    ]


def _cost(p: Plan, m: Mechanism, decoded: Decoded) -> Rows:
    """From fifty images."""
    spec, n, tested = p.spec, p.listing.train, len(p.listing.files) - p.listing.train
    some, device = decoded.images[: min(MEASURED, n)], p.compute.where()
    encoder = p.encoder.to(device, p.compute.precision(), engine="auto")
    heads.encode(encoder, some[:2], device)  # compiled, if it is
    ids, recipe = torch.arange(len(some)), views.Recipe(k_base=1, transform=spec.recipe.transform)
    start = time.perf_counter()
    fresh = views.make_views(some, torch.zeros_like(ids), ids, recipe, num_classes=2, seed=0, step=0)
    encoder.features(transforms.as_float(fresh.images[:, 0]).to(device))
    each = (time.perf_counter() - start) / len(some)
    many = spec.recipe.views * n  # drawn once
    encoding = f"{_time(each * (many + 2 * tested))}: {counted(many, 'view')} and twice {counted(tested, 'test image')}"
    # Six operations a feature and class; to read a feature takes as long as sixty.
    operations = m.steps * spec.batch_size * spec.recipe.views * encoder.dim * (6 * len(p.listing.class_names) + 60)
    kept = decoded.images.numel() + many * encoder.dim * 2
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return [
        ("encoding", f"{encoding}, {1000 * each:.1f} ms each"),
        ("steps", f"about {_time(operations / 2e10)}, on two cores"),
        ("memory", f"{memory:.1f} GiB so far; images and features lie on disk"),
        ("disk", f"{kept / 1e9:.2g} GB in {p.private}, {p.compute.cache} among it"),
    ]


def _time(seconds: float) -> str:
    m = seconds / 60
    return f"{seconds:.0f} s" if m < 2 else f"{m:.0f} min" if m < 120 else f"{m / 60:.1f} h"


def _worth(p: Plan) -> Rows:
    """Accuracy against epsilon on the public data set, of those that come with the repository, most like this one."""
    tables = dict[str, pd.DataFrame]()
    for name in CLASSES:
        if content := files.read_json(data.RESULTS / "laptop" / "table3" / f"{name}.json"):
            rows = pd.DataFrame(map(json.loads, content["rows"]), columns=content["columns"])
            tables[name] = rows.assign(**json.loads(content["shared"]))
    if not tables:
        return [("accuracy on public data", "no results of public data come with this copy (data/results/laptop)")]
    sizes = {name: (t["N"].max(), CLASSES[name]) for name, t in tables.items()}
    ours = p.listing.train, len(p.listing.class_names)
    like = min(sizes, key=lambda name: np.abs(np.log(np.divide(sizes[name], ours))).sum())
    best = tables[like].groupby(["epsilon", "method", "learning_rate"])["accuracy"].mean().groupby("epsilon").max()
    n, fewer = sizes[like][0], sizes[like][0] / ours[0]
    found = [("most like it", f"{like}: N = {n:,.0f}, classes: {CLASSES[like]}")]
    found += [("yours has fewer images", f"{fewer:.0f} times: expect less")] if fewer >= 2 else []
    return found + [(f"ε = {epsilon:g}", f"at best {accuracy:.1f} % there") for epsilon, accuracy in best.items()]
