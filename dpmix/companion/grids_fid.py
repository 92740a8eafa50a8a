"""Fréchet distances behind Tables 7 and 8, kept in the store beside the runs."""

import json
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from dpmix import models
from dpmix.companion import fid, grids, paper
from dpmix.core import files, heads, rng, views
from dpmix.images import data
from dpmix.images.image_cache import sha256
from dpmix.runs.identity import Contents, code_digest
from dpmix.runs.material import SCALED
from dpmix.runs.passes import provenance
from dpmix.runs.result import told
from dpmix.runs.spec import ComputeFlags
from dpmix.runs.store import Store

FidRows = Callable[[data.Splits, models.Encoder, int, torch.device], list[dict[str, Any]]]
WORDS = {"test": "training and test", "diffusion": "training and synthetic", "train": "training and training"}


def fid_of_methods(
    methods: Sequence[str],
    *,
    dataset: str,
    examples: int | None = None,
    compute: ComputeFlags | None = None,
    **asked: Any,
) -> pd.DataFrame:
    """Table 7: the Fréchet distance of one epoch of a method's views to the training and to the test images. One row a
    `model` (the encoder), seed, method and reference ("train", "test"): `distance` (times 1,000 where features have unit
    norm), and `n`, the number of views. `asked`: `encoders`, `seeds` (they key the views) and `image_size`. `examples` bounds
    how many training examples give views, drawn by the seed (None: all). Kept in the store."""
    compute = compute or ComputeFlags()

    def rows(splits: data.Splits, encoder: models.Encoder, seed: int, device: torch.device) -> list[dict[str, Any]]:
        train = some_of(splits.train, examples, seed)
        recipes = [grids.recipe(m, dataset).for_data(train.flip) for m in methods]
        synthetic = any(r.k_diff for r in recipes)
        public = data.public_images(dataset, compute.root, like=train, cache=compute.cache) if synthetic else None
        union = views.make_union(recipes)
        seen = [fid.Running() for _ in methods]
        for ids in tqdm(torch.arange(len(train)).split(64), "views", disable=not compute.progress):
            images, labels = train.images[ids].to(device), train.labels[ids].to(device)
            made = union.make(images, labels, ids, seed=seed, step=0, num_classes=train.num_classes, public=public)
            features = encoder.features(made.images.flatten(0, 1)).reshape(len(ids), union.views, -1)
            for running, weights in zip(seen, union.weights, strict=True):
                running.add(features[:, weights.to(device) > 0].flatten(0, 1))
        found = [running.statistics() for running in seen]
        references = {"train": splits.train, "test": splits.test}
        against = {name: fid.statistics(s.images.split(512), encoder) for name, s in references.items()}
        return [
            {"method": method, "reference": name, "n": own.n, "distance": fid.distance(own, other)}
            for method, own in zip(methods, found, strict=True)
            for name, other in against.items()
        ]

    what = {"table": 7, "recipes": {m: repr(grids.recipe(m, dataset)) for m in methods}, "examples": examples}
    return _distances(what, rows, compute, dataset, **asked)


def some_of(images: data.ImageSet, n: int | None, seed: int) -> data.ImageSet:
    """As many of the images, drawn without replacement: folders are sorted by class, the first ones would be one class."""
    return images if n is None else images.subset(rng.generator(seed, "fid examples").permutation(len(images))[:n])


def fid_of_sets(*, dataset: str, compute: ComputeFlags | None = None, **asked: Any) -> pd.DataFrame:
    """Table 8: the Fréchet distance of the training images to the test and to the synthetic images.

    One row a `model` (the encoder), seed and method (`WORDS`). `distance` is between samples of `n` images each, the same
    n for all, so that they share one bias; between two disjoint samples of the training images it is the bias itself.
    `whole` is between the whole sets (nan for those two samples). `asked`: `encoders`, `seeds` (they key the samples) and
    `image_size`. Kept in the store."""
    compute, kept = compute or ComputeFlags(), dict[str, dict[str, torch.Tensor]]()

    def rows(splits: data.Splits, encoder: models.Encoder, seed: int, device: torch.device) -> list[dict[str, Any]]:
        public = data.public_images(dataset, compute.root, like=splits.train, cache=compute.cache)
        sets = {"test": splits.test, "diffusion": public, "train": splits.train}
        if encoder.name not in kept:
            kept[encoder.name] = {name: heads.encode(encoder, s.images, device) for name, s in sets.items()}
        features = kept[encoder.name]
        n, train = min(len(splits.train) // 2, *map(len, sets.values())), features["train"]
        order = {name: rng.generator(seed, "fid", name).permutation(len(f)) for name, f in features.items()}
        total, own = (fid.Running().add(part).statistics() for part in (train, train[order["train"][:n]]))
        found = []
        for name, f in features.items():
            sample = order[name][n : 2 * n] if name == "train" else order[name][:n]
            near, all_of_it = (fid.Running().add(part).statistics() for part in (f[sample], f))
            whole = float("nan") if name == "train" else fid.distance(total, all_of_it)
            found.append({"method": WORDS[name], "n": n, "distance": fid.distance(own, near), "whole": whole})
        return found

    return _distances({"table": 8}, rows, compute, dataset, **asked)


def _distances(
    what: dict,
    rows: FidRows,
    compute: ComputeFlags,
    dataset: str,
    *,
    encoders: Sequence[str],
    seeds: Sequence[int],
    image_size: int | None = None,
) -> pd.DataFrame:
    """`rows` for each encoder and seed, from the store where they are there, with the columns of a provenance."""
    device, store = compute.where(), Store()
    decoded = (image_size or 224) if dataset in SCALED else None  # 224: what ViT-B-16 takes
    splits = data.load(dataset, compute.root, image_size=decoded, cache=compute.cache)
    contents, synthetic = Contents(compute, store.folder), data.synthetic_folder(dataset, compute.root).is_dir()
    images = contents.private(dataset), contents.public(dataset) if synthetic else ""
    code = files.digest(*(sha256(Path(f)) for f in (fid.__file__, __file__)))
    # On a GPU too: distances between sets of images are small beside what bfloat16 rounds away.
    dtype = torch.bfloat16 if compute.dtype == "bfloat16" else torch.float32
    engines = ["torch" if name == fid.INCEPTION else compute.encoder_engine for name in encoders]
    named = [fid.encoder(paper.ENCODERS.get(name, name), image_size) for name in encoders]
    loaded = [e.to(device, dtype, engine=engine) for e, engine in zip(named, engines, strict=True)]
    every: list[dict[str, Any]] = []
    for (name, encoder), seed in product(zip(encoders, loaded, strict=True), seeds):
        shared = {"model": name, "seed": seed, "dataset": dataset}
        asked = json.dumps({**what, **shared, "image_size": image_size}, sort_keys=True)
        path = store.folder / "fid" / f"{store.name('fid', asked, code, code_digest(), *images)}.json"
        content = files.read_json(path)
        if content is None:
            about = provenance(device, splits.digest)
            content = {"rows": rows(splits, encoder, seed, device), "about": about}
            files.write_json(path, content, private=True)
        every += [shared | told(content["about"]) | dict(sorted(row.items())) for row in content["rows"]]
    found = pd.DataFrame(every)
    small = found["model"].str.startswith("tiny")
    for column in {"distance", "whole"} & set(found):
        found[column] = found[column].where(~small, 1000 * found[column])
    return found
