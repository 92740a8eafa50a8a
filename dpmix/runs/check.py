"""Before a budget is spent: what is in the folder, what the run would be, how long it takes and what it may be worth.

`check` trains nothing, draws no noise and releases nothing. What it says is computed from private images: keep it private.
"""

import json
import math
import resource
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from dpmix.core import files, heads, transforms, views
from dpmix.images import data, layouts
from dpmix.images.image_cache import Decoded, printable
from dpmix.images.overlap import overlap
from dpmix.runs.own import Own, Plan, plan
from dpmix.runs.report import cell
from dpmix.runs.spec import Mechanism, mechanism, no_meaningful_guarantee

MEASURED = 50
CLASSES = {"cifar10": 10, "cifar100": 100, "eurosat": 10, "caltech101": 101}  # of the data sets with results
PRIVATE = "This output is computed from private images: keep it private. Nothing was spent: no noise, no training, no release."


@dataclass(frozen=True)
class Checked:
    """What `check` found, as sections of (what, how much) rows. Its text is a Markdown table each."""

    plan: Plan
    sections: dict[str, list[tuple[str, str]]]

    def __str__(self) -> str:
        parts = [f"**{PRIVATE}**"]
        for title, rows in self.sections.items():
            parts += [
                f"### {title}",
                "\n".join(["| | |", "|---|---|", *(f"| {cell(a)} | {cell(b)} |" for a, b in rows)]),
            ]
        return "\n\n".join(parts)

    def _repr_markdown_(self) -> str:
        return str(self)


def check(folder: Any, epsilon: Any, **settings: Any) -> Checked:
    """Look at a folder of images before training on it; `settings` as in `train`. The images are decoded, into the cache
    that training reads. Raises as `train` would."""
    p = plan(Own.of(folder, epsilon, **settings))
    m = mechanism(p.spec, p.listing.train)
    p.private.mkdir(parents=True, exist_ok=True, mode=0o700)
    decoded = data.opened(p.spec.dataset, p.listing, image_size=p.encoder.image_size, cache=p.compute.cache)
    sections = {
        "The images": _images(p, decoded),
        "The run": _run(p, m),
        "What it takes": _cost(p, m, decoded),
        "What it may be worth": _worth(p),
    }
    return Checked(p, sections)


def _images(p: Plan, decoded: Decoded) -> list[tuple[str, str]]:
    listing, n = p.listing, p.listing.train
    called = [printable(f.relative_to(listing.base)) for f in listing.files]
    counts = [np.bincount(part, minlength=len(listing.class_names)) for part in np.split(listing.labels, [n])]
    rows = [("training / test images", f"{n:,} / {len(called) - n:,}")]
    rows += [(f"class {c}", f"{a:,} / {b:,}") for c, a, b in zip(listing.class_names, *counts, strict=True)][:120]
    left = ", ".join(f"{many:,} {suffix}" for suffix, many in listing.left_out.most_common())
    rows.append(("left out", left or f"nothing (taken are {' '.join(layouts.SUFFIXES)})"))
    for what, said in (("turned", "turned upright by their EXIF mark"), *data.ODDITIES.items()):
        found = decoded.odd.get(what, [])
        if found:
            rows.append((said.partition(";")[0], _some(len(found), (called[i] for i in found))))
    for what, pairs in (
        ("repeat another", decoded.copies.train),
        ("test, equal a training image", decoded.copies.test),
    ):
        named = (f"{called[i]} = {called[j]}" for i, j in pairs)
        rows.append((f"exact copies: {what}", _some(len(pairs), named)))
    return rows + _synthetic(p, decoded)


def _synthetic(p: Plan, decoded: Decoded) -> list[tuple[str, str]]:
    """Public images that copy private ones, by name."""
    base = data.synthetic_folder(p.spec.dataset)
    if not base.is_dir():
        return [("synthetic images", f"none in {base}")]
    listing, labels = p.listing, torch.from_numpy(p.listing.labels)
    private = data.ImageSet(decoded.images, labels, listing.class_names)
    public = data.public_images(p.spec.dataset, like=private, cache=p.compute.cache)
    found = overlap(private, public)
    pairs = [*found.exact.tolist(), *found.near.tolist()]
    named = (f"synthetic image {j} = {printable(listing.files[i].relative_to(listing.base))}" for i, j in pairs)
    rows = [("synthetic images", f"{len(public):,}"), ("of them copies of private ones", _some(len(pairs), named))]
    return rows


def _some(many: int, names: Iterable[str]) -> str:
    shown = [name for name, _ in zip(names, range(5), strict=False)]
    return f"{many:,}" + (f": {', '.join(shown)}{', ...' if many > 5 else ''}" if many else "")


def _run(p: Plan, m: Mechanism) -> list[tuple[str, str]]:
    spec, why = p.spec, p.reasons
    weights = (p.encoder.dim + 1) * len(p.listing.class_names)
    ratio = spec.batch_size / (m.noise_multiplier * math.sqrt(weights))
    rate = f"{spec.learning_rate:g}" if not p.rates else f"one of {', '.join(f'{r:g}' for r in p.rates)}"
    rows = [
        ("N", f"{m.population:,} training images; becomes public"),
        ("encoder", f"{spec.model} at {p.encoder.image_size} pixels, {p.encoder.dim} features: {why['model']}"),
        ("views of an image, K", f"{spec.recipe.views}: {why['method']}"),
        ("expected batch, B", f"{spec.batch_size:,}: {why['batch_size']}"),
        ("epochs, steps", f"{spec.epochs:g}, {m.steps:,}: {why['epochs']}"),
        ("clip norm, C", f"{spec.clip_norm:g}: {why['clip_norm']}"),
        ("learning rate", f"{rate}: {why['learning_rate']}"),
        ("ε, δ", f"{spec.epsilon:g}, {spec.delta:g} by {spec.accountant.upper()}; δ {why['delta']}"),
        ("noise multiplier, σ", f"{m.noise_multiplier:.4g}"),
        ("signal to noise", f"at most {ratio:.2g} a step, B / (σ √{weights:,}); {ratio * m.steps**0.5:.2g} over all"),
    ]  # fmt: skip
    assert spec.epsilon is not None
    return rows + [("WARNING", said) for said in no_meaningful_guarantee(spec.epsilon, spec.delta, m.population)]


def _cost(p: Plan, m: Mechanism, decoded: Decoded) -> list[tuple[str, str]]:
    """From fifty images."""
    spec, n, tested = p.spec, p.listing.train, len(p.listing.files) - p.listing.train
    some = decoded.images[: min(MEASURED, n)]
    where = p.compute.where()
    encoder = p.encoder.to(where, p.compute.precision(), engine="auto")
    heads.encode(encoder, some[:2], where)  # compiled, if it is
    recipe = views.Recipe(k_base=1, transform=spec.recipe.transform)
    start = time.perf_counter()
    made = views.make_views(some, torch.zeros(len(some), dtype=torch.int64), torch.arange(len(some)), recipe,
                            num_classes=2, seed=0, step=0)  # fmt: skip
    encoder.features(transforms.as_float(made.images[:, 0]).to(where))
    each = (time.perf_counter() - start) / len(some)
    many = n * spec.recipe.views if not spec.redraw else m.steps * spec.batch_size * spec.recipe.views
    minutes = each * (many + 2 * tested) / 60
    # Six operations a feature and class; to read a feature takes as long as sixty.
    each_step = spec.batch_size * spec.recipe.views * p.encoder.dim * (6 * len(p.listing.class_names) + 60)
    steps = m.steps * each_step / 2e10 / 60
    kept = decoded.images.numel() + (0 if spec.redraw else n * spec.recipe.views * p.encoder.dim * 2)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return [
        (
            "encoding",
            f"{_minutes(minutes)}: {many:,} views and twice {tested:,} test images, {1000 * each:.1f} ms each",
        ),
        ("steps", f"about {_minutes(steps)}, on two cores"),
        ("memory", f"{memory:.1f} GiB so far; images and features lie on disk"),
        ("disk", f"{kept / 1e9:.2g} GB in {p.private}, {p.compute.cache} among it"),
    ]


def _minutes(m: float) -> str:
    return f"{m * 60:.0f} s" if m < 2 else f"{m:.0f} min" if m < 120 else f"{m / 60:.1f} h"


def _worth(p: Plan) -> list[tuple[str, str]]:
    """Accuracy against epsilon on the public data set, of those that come with the repository, most like this one."""
    n, classes = p.listing.train, len(p.listing.class_names)
    found = {path.stem: path for path in sorted((data.RESULTS / "laptop" / "table3").glob("*.json"))}
    tables = {name: _table(found[name]) for name in CLASSES if name in found}
    if not tables:
        return [("accuracy on public data", "no results of public data come with this copy (data/results/laptop)")]
    far = {k: abs(math.log(t["N"].max() / n)) + abs(math.log(CLASSES[k] / classes)) for k, t in tables.items()}
    like = min(far, key=lambda name: far[name])
    best = tables[like].groupby(["epsilon", "method", "learning_rate"])["accuracy"].mean().groupby("epsilon").max()
    rows = [("most like it", f"{like}: {tables[like]['N'].max():,.0f} images, {CLASSES[like]} classes")]
    return rows + [(f"ε = {epsilon:g}", f"at best {accuracy:.1f} % there") for epsilon, accuracy in best.items()]


def _table(path: Path) -> pd.DataFrame:
    content = files.read_json(path) or {"rows": [], "columns": ["N"], "shared": "{}"}
    rows = [json.loads(row) for row in content["rows"]]
    return pd.DataFrame(rows, columns=content["columns"]).assign(**json.loads(content["shared"]))
