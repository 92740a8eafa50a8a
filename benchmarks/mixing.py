"""What does the mixing do, where no further image has to be encoded: mixtures of features instead of pixels, of images or of
labels alone, and other weights of mixtures against their members. To be run beside `evidence.py mixing/DATASET`: the same
views, draws, batches, splits and learning rates, from the same store of encoded views.

    python benchmarks/mixing.py cifar10 --examples 10000 --seeds 3
    python benchmarks/mixing.py cifar10 --examples 10000 --seeds 3-9      # further seeds, beside the first

Writes data/results/laptop/mixing/DATASET-rearranged.json. A seed that was done lies in the store ($DPMIX_STORE) and is not
trained again; one that was interrupted goes on.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import pandas as pd
import torch
from evidence import beside, described, for_part, methods, part_of, place, seeds_asked, seen_by, together, write
from torch import Tensor

from dpmix.companion import evidence, grids
from dpmix.core import files, heads, views
from dpmix.core.sources import Source
from dpmix.runs import passes
from dpmix.runs.identity import Contents
from dpmix.runs.material import Material, prepare
from dpmix.runs.spec import ComputeFlags, mechanism
from dpmix.runs.store import Store

CHANGES = ("", "features", "images", "labels")
BY = ["dataset", "model", "method", "epsilon"]


@dataclass(frozen=True)
class Arrangement(views.Recipe):
    """The views of a recipe, its mixtures made otherwise. `change`: "features" mixes what the encoder made of the two members
    (labels too); "images" gives a mixture the label of the member with the larger share; "labels" gives that member the mixed
    label. `share` is the weight of all mixtures in the average over views; None: as many views, as much weight."""

    change: str = ""
    share: float | None = None

    @property
    def plain(self) -> views.Recipe:
        return views.Recipe(**{f.name: getattr(self, f.name) for f in fields(views.Recipe)})


class Rows(NamedTuple):
    """Which views of a source each arrangement averages: what `heads.train` asks of a union."""

    recipes: tuple[Arrangement, ...]
    weights: Tensor
    views: int


class Arranged:
    """A `Source` on another, whose views are drawn once by `seed` for the examples `ids`: its own views, then the mixtures of
    each arrangement that makes them otherwise. Row i depends on the features and targets of example i alone."""

    def __init__(self, source: Source, ids: Tensor, seed: int, arrangements: Sequence[Arrangement]) -> None:
        self.source, self.ids, self.seed = source, ids, seed
        self.n, self.dim, self.num_classes, self.name = source.n, source.dim, source.num_classes, source.name
        self.device, self.seconds = source.device, source.seconds
        starts, column = dict[tuple, int](), 0
        for key, count in source.union.parts.items():
            starts[key], column = column, column + count
        self.columns = {a: [_range(starts[k], n) for k, n in a.parts.items() if n] for a in arrangements}
        self.changed = [a for a in arrangements if a.change]
        total = column + sum(a.k_self for a in self.changed)
        weights = torch.zeros(len(arrangements), total, dtype=torch.float64)
        for row, a in zip(weights, arrangements, strict=True):
            *members, mixtures = self.columns[a]
            share = a.k_self / a.views if a.share is None else a.share
            row[torch.cat(members)] = (1 - share) / (a.k_base + a.k_diff)
            if a.change:
                mixtures, column = _range(column, a.k_self), column + a.k_self
            row[mixtures] = share / a.k_self
        self.union = Rows(tuple(arrangements), weights, total)

    def batch(self, places: Tensor, step: int) -> tuple[Tensor, Tensor]:
        features, targets = self.source.batch(places, step)
        made = [self._changed(a, features, targets, self.ids[places]) for a in self.changed]
        return tuple(torch.cat(both, dim=1) for both in zip((features, targets), *made, strict=True))

    def _changed(self, a: Arrangement, features: Tensor, targets: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        *members, mixtures = self.columns[a]
        pool, example = torch.cat(members), torch.arange(len(ids))[:, None]
        first, second, lam = views.mixing_draws(a.plain, ids, seed=self.seed, step=None)
        larger = pool[torch.where(lam >= 0.5, first, second)]
        if a.change == "images":
            return features[:, mixtures], targets[example, larger]
        if a.change == "labels":
            return features[example, larger], targets[:, mixtures]
        share = lam[..., None].to(features)
        return share * features[example, pool[first]] + (1 - share) * features[example, pool[second]], targets[
            :, mixtures
        ]


def _range(start: int, count: int) -> Tensor:
    return torch.arange(start, start + count)


def arrangements(dataset: str) -> dict[str, Arrangement]:
    """The rows of the page."""
    own, found = {"k_base": 16, "k_self": 18}, dict[str, Arrangement]()
    for name, more in {"DP-MixSelf": {}, "DP-MixDiff": {"k_diff": 2}}.items():
        if more and not grids.with_public(["mix-diff"], dataset):
            continue
        found[f"{name} of features"] = Arrangement(**own | more, change="features")
        if more:  # the mixtures of DP-MixSelf have one label
            found[f"{name}, images only"] = Arrangement(**own | more, change="images")
            found[f"{name}, labels only"] = Arrangement(**own | more, change="labels")
        found[f"{name}, mixtures weigh ¼"] = Arrangement(**own | more, share=0.25)
        found[f"{name}, mixtures weigh ¾"] = Arrangement(**own | more, share=0.75)
    return found


def trained(dataset: str, seed: int, compute: ComputeFlags, examples: int | None) -> pd.DataFrame:
    """The rows of one seed: every arrangement at every learning rate, with `right`, the test images that it gets right."""
    richest = grids.with_public(["mix-self", "mix-diff"], dataset)[-1]
    specs = [c.spec for c in for_part(methods(dataset, [richest], 1, [seed]), examples)]
    spec, store, wanted = specs[0], Store(), arrangements(dataset)
    identity = Contents(compute, store.folder).identity(spec)
    material = prepare([identity], compute)
    flip, m = material.train.whole.flip, mechanism(spec, len(material.pool))
    changed = {name: replace(a, transform=a.for_data(flip).transform) for name, a in wanted.items()}
    bank = [
        heads.Head(
            recipe=a, learning_rate=s.learning_rate, noise_multiplier=m.noise_multiplier, clip_norm=spec.clip_norm,
            identity=identity.run,
        )
        for a in changed.values() for s in specs
    ]  # fmt: skip
    source = passes.source_of(spec, [a.plain for a in changed.values()], material, compute, once=seed)
    arranged = Arranged(source, material.train.rows, seed, list(changed.values()))
    checkpoint = store.checkpoint(files.digest(identity.run, "rearranged"))
    how: dict[str, Any] = dict(expected_batch=spec.batch_size, steps=m.steps, sample_rate=m.sample_rate, seed=seed)
    start = time.perf_counter()
    done = heads.train(
        arranged, bank, checkpoint=checkpoint, physical_batch=passes.physical_batch(compute, specs), **how
    )
    checkpoint.unlink(missing_ok=True)
    runs = scores(done, spec, material, compute).assign(
        method=[name for name in changed for _ in specs], learning_rate=[h.learning_rate for h in bank],
        **{name: getattr(spec, name) for name in ("dataset", "model", "epsilon", "seed", "validation", "clip_norm")},
        batch_size=spec.batch_size, epochs=spec.epochs, sigma=m.noise_multiplier, q=m.sample_rate, T=m.steps, N=m.population,
        seconds=time.perf_counter() - start, refit=False,
    )  # fmt: skip
    runs.attrs["made"] = passes.provenance(compute.where(), material.digest)
    return runs


def scores(bank: heads.Bank, spec: Any, material: Material, compute: ComputeFlags) -> pd.DataFrame:
    everything = torch.arange(len(material.test))
    features = {
        "validation_accuracy": (material.pool, material.held_out),
        "accuracy": (material.test, everything),
    }
    found = {}
    for name, (part, rows) in features.items():
        x, y = passes.features_of(spec, part, rows, material, compute), part.labels[rows]
        found[name] = (100 * heads.accuracy(bank, x, y)).tolist()
    right = [(x @ w.T + b).argmax(1).eq(y).numpy() for w, b in zip(bank.weights, bank.biases, strict=True)]
    return pd.DataFrame(found | {"right": right})


def make(dataset: str, seeds: Sequence[int], compute: ComputeFlags, examples: int | None) -> None:
    name, memory = f"mixing/{dataset}/rearranged", Store().folder / "rearranged"
    memory.mkdir(parents=True, exist_ok=True)
    others = beside(name, seeds, examples)
    done, start = list[pd.DataFrame](), time.time()
    for seed in seeds:
        here = memory / f"{dataset}-{examples}-{seed}-{passes.code_digest()[:16]}.pickle"
        if not here.exists():
            pd.to_pickle(trained(dataset, seed, compute, examples), here)
        done.append(pd.read_pickle(here))
        runs = pd.concat(done, ignore_index=True)
        chosen = evidence.choose(together([runs], others), BY)
        kept = list(chosen[[*BY, "learning_rate", "seed"]].itertuples(index=False, name=None))
        rows = runs[[*BY, "learning_rate", "seed"]].itertuples(index=False, name=None)
        right = [r if row in kept else None for r, row in zip(runs["right"], rows, strict=True)]
        first, last = done[0].attrs["made"], done[-1].attrs["made"]
        hours = sum(d["seconds"].iloc[0] for d in done) / 3600
        encoder = seen_by(runs["model"].iloc[0], [grids.preset("laptop", dataset).image_size], compute)
        about = described(name, runs, first, last, hours, encoder)
        about |= {"dirty": any(d.attrs["made"]["dirty"] for d in done), "test_images": len(runs["right"].iloc[0])}
        write(place(name, seeds), runs.assign(right=right), about | ({"examples": examples} if examples else {}))
        print(f"{name}: seed {seed}, runs: {len(runs)}, {(time.time() - start) / 60:.0f} min", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=grids.LAPTOP)
    parser.add_argument("--seeds", help="how many (10), or which further ones (3-9)")
    parser.add_argument("--examples", type=int, help="take so many training images, as many of each class, and say so")
    asked = parser.parse_args()
    compute = ComputeFlags(workers=1)
    if asked.examples is not None:
        compute = replace(compute, root=str(part_of(asked.dataset, asked.examples)))
    make(asked.dataset, seeds_asked(asked.seeds, 10), compute, asked.examples)


if __name__ == "__main__":
    main()
