"""Make the runs that come with the repository, in the background, and write them to data/results/laptop/.

    python benchmarks/evidence.py --list                # the sets, in order of value, with what each costs
    python benchmarks/evidence.py table3/cifar10        # one set, or several; "all" for all of them
    python benchmarks/evidence.py table3/cifar10 --examples 10000     # of a part of the training images, where hours are few
    python benchmarks/evidence.py table3/cifar10 --seeds 2 --export   # write what is there, run nothing
    python benchmarks/evidence.py table3/cifar10 --seeds 3-4    # further seeds, in a file of their own beside the first

Interrupted, the same line goes on: results are in the store (data/runs, or $DPMIX_STORE), a pass has checkpoints, views
are encoded once. After each seed the file of the set is written anew, so that what is there can be looked at. A learning
rate is chosen on the validation split over all seeds; where the set says so, the chosen heads are then trained again on
all training images ("refit"), from the stored views.
"""

import argparse
import base64
import json
import re
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import dpmix
from dpmix.companion import diagnostics, evidence, grids, grids_fid, networks
from dpmix.companion.grids import Cell
from dpmix.companion.report import label
from dpmix.core import files, views
from dpmix.images import data
from dpmix.runs import passes
from dpmix.runs.material import SCALED
from dpmix.runs.result import Result, choose_learning_rate, frame
from dpmix.runs.run import look_up
from dpmix.runs.spec import ComputeFlags
from dpmix.runs.store import Store

BY = ("model", "method", "epsilon")


@dataclass(frozen=True)
class Set:
    """`cells` of given seeds; `by` what a learning rate is chosen for; `note` what is worth knowing before it is started."""

    cells: Callable[[Sequence[int]], list[Cell]]
    seeds: int = 5
    by: tuple[str, ...] = BY
    refit: bool = False
    note: str = ""  # a refit wants the default `by`


def methods(dataset: str, names: Sequence[str], eps: Any, seeds: Sequence[int], **fixed: Any) -> list[Cell]:
    kept = grids.with_public(names, dataset)
    return grids.methods_grid("laptop", dataset=dataset, methods=kept, eps=eps, seeds=list(seeds), **fixed)


def pretraining(seeds: Sequence[int]) -> list[Cell]:
    private, alone = grids.pretraining_grid("laptop", dataset="cifar10", eps=2, seeds=list(seeds))
    return private + alone


def public_only(seeds: Sequence[int]) -> list[Cell]:
    cells = grids.pure_grid("laptop", dataset="cifar10", eps=1, seeds=list(seeds))
    return [c for c in cells if c.labels["method"] not in grids.PURE]


def k_cells(seeds: Sequence[int]) -> list[Cell]:
    rates = (0.5, 1.0, 2.0)
    ks = [8, 16, 24], [8, 16, 24], [0, 2, 4]
    return grids.k_grid("laptop", *ks, dataset="cifar10", eps=1, seeds=list(seeds), learning_rates=rates)


def mixing(dataset: str, seeds: Sequence[int]) -> list[Cell]:
    """What does the mixing do: the same draws, one thing changed at a time."""
    base = methods(dataset, ["mix-self"], 1, seeds)
    half = 1e6  # Beta(a, a) is a half, for a so large
    recipes = {
        "16 views": views.Recipe(k_base=16),
        "34 views": views.Recipe(k_base=34),
        "DP-MixSelf": views.Recipe(k_base=16, k_self=18),
        "DP-MixSelf, α = 1": views.Recipe(k_base=16, k_self=18, alpha=1.0),
        "DP-MixSelf, λ = ½": views.Recipe(k_base=16, k_self=18, alpha=half),
        "CutMix of itself": views.Recipe(k_base=16, k_self=18, mix="cutmix"),
    }
    if grids.with_public(["mix-diff"], dataset):
        recipes |= {
            "DP-MixDiff": views.Recipe(k_base=16, k_self=18, k_diff=2),
            "DP-MixDiff, α = 1": views.Recipe(k_base=16, k_self=18, k_diff=2, alpha=1.0),
            "DP-MixDiff, λ = ½": views.Recipe(k_base=16, k_self=18, k_diff=2, alpha=half),
            "CutMix with D": views.Recipe(k_base=16, k_self=18, k_diff=2, mix="cutmix"),
            "D as views, unmixed": views.Recipe(k_base=16, k_diff=2),
        }
    return [c for name, r in recipes.items() for c in grids.changed_cells(base, name, recipe=r)]


def same_epsilon(dataset: str, seeds: Sequence[int]) -> list[Cell]:
    """A waterfall: each step keeps those before it. A step's rates are so many times those before it, from the pilot of
    `LONGER`: more steps, and momentum, want shorter ones, and scaled features are shorter themselves."""
    n = {"cifar10": 45_000, "eurosat": 19_440}[dataset]
    changes: dict[str, tuple[float, dict[str, Any]]] = {
        "the paper's settings": (1, {}),
        "PLD instead of RDP": (1, {"accountant": "pld"}),
        "every example in each of 200 steps": (1 / 2, {"batch_size": n, "epochs": 200.0}),
        "momentum of 0.9": (1 / 8, {"momentum": 0.9}),
        "features scaled by public constants": (12, {"feature_scaling": "public"}),
    }
    if not grids.with_public(["mix-diff"], dataset):
        del changes["features scaled by public constants"]  # they are those of D
    rate, settings, cells = 1.0, dict[str, Any](), list[Cell]()
    for name, (factor, change) in changes.items():
        rate, settings = rate * factor, settings | change
        changed = grids.changed_cells(methods(dataset, ["dp-sgd"], (1, 8), seeds), name, **settings)
        cells += [Cell(c.labels, replace(c.spec, learning_rate=c.spec.learning_rate * rate)) for c in changed]
    return cells


# On what does the gain of views depend? One setting changed at a time; "as in Table 3" is 96 pixels, a crop out of an image
# padded by an eighth, views drawn once.
CONDITIONS: dict[str, dict[str, Any]] = {
    "as in Table 3": {},
    "64 pixels": {"image_size": 64},
    "128 pixels": {"image_size": 128},
    "mirrors, no crops": {"transform": "flip"},
    "64 pixels, views drawn anew": {"image_size": 64, "redraw": True},
    "224 pixels": {"image_size": 224},
}


def conditions(names: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    cells = list[Cell]()
    for name in names:
        settings = dict(CONDITIONS[name])
        transform = settings.pop("transform", None)
        # Anew at every step, a view more is ten: Self-Aug alone.
        compared = ["dp-sgd", "self-aug", "mix-self"][: 2 if settings.get("redraw") else 3]
        for c in methods("cifar10", compared, (1, 8), seeds, **settings):
            plain = transform is None or c.labels["method"] == "dp-sgd"
            recipe = c.spec.recipe if plain else replace(c.spec.recipe, transform=transform)
            cells.append(Cell(c.labels | {"condition": name}, replace(c.spec, recipe=recipe)))
    return cells


def more_views(seeds: Sequence[int]) -> list[Cell]:
    cells = networks.augmentations_grid(
        "laptop", networks.network_preset("laptop"), seeds=list(seeds), network_seeds=[0]
    )
    return [c for c in cells if not c.spec.from_scratch]


# Networks from scratch on two cores: WRN-10-1, one epoch (49 steps of 1,024 examples), four views. Chosen before any was
# trained, by what so short a run can show. Noise for 2C on half as many terms is four times the noise of DP-SGD: that
# must cost many points, so pairs can differ from single examples. What a mixture brings within pairs, and DP-MixSelf over
# Self-Aug, was published as a point or less, which three seeds of such networks cannot tell from nothing. Rates are De et
# al.'s (`network_preset`), whose step adds as much noise to a weight as theirs; none was tried.
SHORT: dict[str, Any] = {"model": "wrn-10-1", "epochs": 1.0}


def scratch(table: str, seeds: Sequence[int], **changed: Any) -> list[Cell]:
    """The networks of Table 1, 2 or 5 (of Table 5 the rows that a claim names); `changed` settings of the preset."""
    p = networks.changed(networks.network_preset("laptop"), **SHORT | changed)
    asked: dict[str, Any] = {"eps": 8, "seeds": list(seeds)}
    if table == "table1":
        return networks.microbatch_grid(p, **asked)
    if table == "table2":
        return [c for m in ("self-aug", "mix-self") for c in networks.network_cells(p, m, p.views_of(m), **asked)]
    cells = networks.augmentations_grid("laptop", p, counts=(16, 32), network_seeds=list(seeds), seeds=[0])
    return [c for c in cells if c.spec.from_scratch]


CLAIMED = ("blur", "sobel", "all")  # of Table 4's transformations
HALVES = {d: Set(lambda s, d=d: grids.halves_grid("laptop", dataset=d, eps=2, seeds=list(s))) for d in grids.LAPTOP}
SETS: dict[str, Set] = {
    **{f"table3/{d}": Set(partial(methods, d, grids.TABLE3[:5], None), refit=True)
       for d in ("cifar10", "eurosat", "caltech101", "cifar100")},
    **{f"table10/{d}": HALVES[d] for d in ("cifar10", "eurosat", "caltech101", "cifar100")},
    "table12/cifar10": Set(partial(methods, "cifar10", grids.PURE, 1),
                           note="CIFAR-10 in place of CIFAR-100: there is no D for it"),
    "table12/cifar10/public": Set(public_only, seeds=3, note="the rows of Table 12 that train on D alone"),
    "table6/cifar10": Set(pretraining, note="CIFAR-10 in place of Caltech-256: there is no D for it"),
    "table4/cifar10": Set(partial(methods, "cifar10", ["self-aug", *(f"self-aug+{t}" for t in CLAIMED), "mix-self"], 1), seeds=3,
                          note="the transformations that a claim names; the other four take 64 views more"),
    "mixing/caltech101": Set(partial(mixing, "caltech101"), seeds=10),
    "mixing/cifar10": Set(partial(mixing, "cifar10"), seeds=10),
    "same-epsilon/cifar10": Set(partial(same_epsilon, "cifar10")),
    "same-epsilon/eurosat": Set(partial(same_epsilon, "eurosat")),
    "conditions/cifar10": Set(partial(conditions, list(CONDITIONS)[:5]), seeds=3, by=(*BY, "condition")),
    "conditions/cifar10/224": Set(partial(conditions, list(CONDITIONS)[5:]), seeds=3, by=(*BY, "condition")),
    "table9/cifar10": Set(k_cells, seeds=3, by=("k_base", "k_self", "k_diff"), note="244 views an example"),
    "table5/cifar10": Set(more_views, note="linear layers; the networks are a set of their own"),
    "table1/cifar10": Set(partial(scratch, "table1"), seeds=3, by=(), note="networks from scratch: hours"),
    "table2/cifar10": Set(partial(scratch, "table2"), by=(), note="networks from scratch: hours"),
    "table5/cifar10/scratch": Set(partial(scratch, "table5"), by=(), note="networks from scratch: hours"),
}  # fmt: skip


def part_of(dataset: str, examples: int, root: Path = data.ROOT) -> Path:
    """A data root of links: so many training images (and synthetic ones), the first of each class by name; all test images."""
    part = root / "parts" / f"{dataset}-{examples}"
    there = [sum(1 for _ in kind.iterdir()) for kind in (root / dataset / "train").glob("*") if kind.is_dir()]
    if not there:
        raise SystemExit(f"dataset={dataset!r}: has no folder {root / dataset / 'train'} of classes to take a part of")
    if examples < 1 or examples % len(there) or examples // len(there) > min(there):
        said = f"must be a multiple of {len(there)}, the classes of {dataset}, and at most {len(there) * min(there):,}"
        raise SystemExit(f"examples={examples}: {said}")
    for folder in (root / dataset / "train", root / "synthetic" / dataset, root / dataset / "test"):
        classes = sorted(p for p in folder.glob("*") if p.is_dir())
        each = None if folder.name == "test" else examples // len(there)
        for kind in classes:
            (part / kind.relative_to(root)).mkdir(parents=True, exist_ok=True)
            for image in sorted(kind.iterdir())[:each]:
                link = part / image.relative_to(root)
                if not link.exists():
                    link.hardlink_to(image)  # a symbolic link would leave the data root, which is refused
    return part


# A part has fewer steps, which take longer ones: from runs of DP-SGD and Mixed Ghost Clipping on 10,000 images of CIFAR-10,
# with a seed of their own (100), over 7 rates. Mixtures then took the least of the four, so half of it is tried too.
LONGER = 1.6


def for_part(cells: Sequence[Cell], examples: int | None) -> list[Cell]:
    """The cells as they are run on a part of the training images: longer steps, a rate more at the lower end, and no batch
    larger than the part."""
    if examples is None:
        return list(cells)
    found = list[Cell]()
    conditions = [replace(c.spec, learning_rate=1.0) for c in cells]
    for c, condition in zip(cells, conditions, strict=True):
        most = round(0.9 * examples) // (2 if "half" in c.spec.train_on else 1)
        rate, spec = c.spec.learning_rate, replace(c.spec, batch_size=min(c.spec.batch_size, most))
        lowest = rate == min(o.spec.learning_rate for o, k in zip(cells, conditions, strict=True) if k == condition)
        rates = [rate] if spec.epsilon is None else [LONGER * rate / 2] * lowest + [LONGER * rate]
        found += [Cell(c.labels, replace(spec, learning_rate=r)) for r in rates]
    return found


def distances(dataset: str, seeds: Sequence[int], compute: ComputeFlags, _: int | None) -> pd.DataFrame:
    """Table 7, of the views of 1,000 images."""
    there = grids.with_public(["self-aug", "self-aug+jitter", "mix-self", "mix-diff"], dataset)
    return grids_fid.fid_of_methods(there, examples=1000, **under_the_encoder(dataset, seeds, compute))


def sets(dataset: str, seeds: Sequence[int], compute: ComputeFlags, _: int | None) -> pd.DataFrame:
    """Table 8."""
    return grids_fid.fid_of_sets(**under_the_encoder(dataset, seeds, compute))


def under_the_encoder(dataset: str, seeds: Sequence[int], compute: ComputeFlags) -> dict[str, Any]:
    p = grids.preset("laptop", dataset)
    return dict(dataset=dataset, encoders=p.models, image_size=p.image_size, seeds=seeds, compute=compute)


def gradients(dataset: str, seeds: Sequence[int], compute: ComputeFlags, examples: int | None) -> pd.DataFrame:
    """Figure 2, of the runs of Table 3 at epsilon = 1: the runs come from the store where they are there."""
    cells = for_part(methods(dataset, ["self-aug", "mix-self", "mix-diff"], 1, seeds), examples)
    runs, _ = run(cells, compute)
    chosen, specs = evidence.choose(runs, ["method"]), dict(zip(runs["key"], (c.spec for c in cells), strict=True))
    looked = diagnostics.gradients([specs[k] for k in chosen["key"]], compute=compute)
    return diagnostics.gradient_deviations(chosen.assign(gradients=looked))


def times(dataset: str, seeds: Sequence[int], compute: ComputeFlags, examples: int | None) -> pd.DataFrame:
    """Table 13, views drawn and encoded at every step; a "seed" is a repeat."""
    names = grids.with_public(["self-aug", "mix-self", "mix-diff"], dataset)
    cells = grids.changed_cells(for_part(methods(dataset, names, 1, [0]), examples), None, redraw=True)
    runs = {m: [next(c.spec for c in cells if c.labels["method"] == m)] for m in names}
    timed = diagnostics.timings(runs, steps=2, repeats=len(seeds), compute=compute)
    return timed.assign(dataset=dataset, model=cells[0].labels["model"])


# Figures that are no accuracies of runs: the rows of a table, for given seeds.
MEASURED: dict[str, Callable[[Sequence[int], ComputeFlags, int | None], pd.DataFrame]] = {
    "table7/eurosat": partial(distances, "eurosat"),
    "table7/cifar10": partial(distances, "cifar10"),
    "table8/cifar10": partial(sets, "cifar10"),
    "table13/eurosat": partial(times, "eurosat"),
    "figure2/caltech101": partial(gradients, "caltech101"),
    "figure2/cifar10": partial(gradients, "cifar10"),
}


def measure(name: str, seeds: Sequence[int], compute: ComputeFlags, examples: int | None) -> None:
    start, (_, dataset) = time.time(), name.split("/")
    p = grids.preset("laptop", dataset)
    # Asked first: what cannot be opened is told before the work.
    images = data.load(dataset, compute.root, image_size=p.image_size if dataset in SCALED else None).digest
    runs = MEASURED[name](seeds, compute, examples).drop(columns=["date", "device", "versions"], errors="ignore")
    made = passes.provenance(compute.where(), images)
    hours = (time.time() - start) / 3600
    about = described(name, runs, made, made, hours, seen_by(p.models[0], [p.image_size], compute))
    path = place(name, seeds)
    write(path, runs, about | {"dirty": made["dirty"]} | ({"examples": examples} if examples else {}))
    print(f"{name}: rows: {len(runs)}, {60 * hours:.0f} min: {path}", flush=True)


def place(name: str, seeds: Sequence[int] = (0,)) -> Path:
    """The file of a set: TABLE/DATASET.json, or TABLE/DATASET-KIND.json; seeds beyond the first ones stand beside it."""
    table, *rest = name.split("/")
    further = [f"seeds-{seeds[0]}-{seeds[-1]}"] if seeds[0] else []
    return evidence.FOLDER / table / f"{'-'.join(rest + further)}.json"


def described(
    name: str, runs: pd.DataFrame, first: dict[str, Any], last: dict[str, Any], hours: float, encoder: str
) -> dict[str, Any]:
    """What stands beside the rows of a set: from where, when and what they are."""
    table, dataset, *_ = name.split("/")
    return {
        "table": table, "dataset": dataset, "seeds": sorted(int(s) for s in set(runs["seed"])), "runs": len(runs),
        "encoder": encoder, "commit": last["commit"] or "", "code": last["code"], "data": last["splits"],
        "machine": f"{last['device']} ({last['platform']})", "versions": last["versions"],
        "from": first["date"], "until": last["date"], "hours": hours,
    }  # fmt: skip


def rounded(compute: ComputeFlags) -> str:
    """What the encoder, or the network, was rounded to; nothing is said of float32."""
    return ", in bfloat16" if compute.precision() == torch.bfloat16 else ""


def seen_by(model: str, sizes: Sequence[int], compute: ComputeFlags) -> str:
    """ "EfficientNet-Lite0 at 64, 96 pixels, in bfloat16"; no size where the encoder has its own."""
    return label(model) + (f" at {', '.join(map(str, sizes))} pixels" if sizes else "") + rounded(compute)


def run(cells: Sequence[Cell], compute: ComputeFlags) -> tuple[pd.DataFrame, list[Result]]:
    results = dpmix.run_all([c.spec for c in cells], compute=compute)
    return grids.labelled(cells, frame(results)), results


def write(path: Path, runs: pd.DataFrame, about: dict[str, Any]) -> None:
    """The runs of one table and data set as one file; constant columns once."""
    table = runs.drop(columns=["recipe"], errors="ignore")
    if "right" in table:
        table["right"] = [None if r is None else packed(r) for r in table["right"]]
    table = table.astype(object).where(table.notna(), None)
    shared = {c: table[c].iloc[0] for c in table if table[c].nunique(dropna=False) == 1}
    rest = table.drop(columns=list(shared))
    rows = [json.dumps(row, default=lambda v: v.item()) for row in rest.itertuples(index=False, name=None)]
    content = {"about": about, "shared": json.dumps(shared, default=lambda v: v.item())}
    files.write_json(path, content | {"columns": list(rest), "rows": rows})


def packed(right: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(np.packbits(right).tobytes(), 9)).decode()


def export(
    name: str,
    runs: pd.DataFrame,
    results: Sequence[Result],
    final: pd.DataFrame,
    compute: ComputeFlags,
    examples: int | None,
    path: Path,
) -> Path:
    """Write what there is of a set: all runs, and which test images those in `final` got right."""
    scored = (
        evidence.outcomes(final, compute=compute)[["key", "right"]].drop_duplicates("key").set_index("key")["right"]
    )
    runs = runs.assign(right=[scored.get(k) for k in runs["key"]]).drop(
        columns=["key", "device", "versions", "weights"]
    )
    first, last = (pick((r.provenance for r in results), key=lambda p: p["date"]) for pick in (min, max))
    sizes = sorted({int(s) for s in runs["image_size"].dropna()})
    # Seconds of passes that ran side by side, each of which had a share of the machine.
    hours = sum({(r.spec.seed, r.timing["seconds"]): r.timing["seconds"] for r in results}.values()) / 3600
    hours /= compute.workers or 1
    encoder = seen_by(runs["model"].iloc[0], sizes, compute)
    if results[0].spec.from_scratch:
        epochs = runs["epochs"].iloc[0]
        encoder = (
            label(runs["model"].iloc[0]) + f" from scratch, {'one epoch' if epochs == 1 else f'{epochs:g} epochs'}"
        )
        jpeg = next((Path(compute.root) / runs["dataset"].iloc[0] / "train").rglob("*.jp*g"), None)
        encoder += (", on a JPEG copy" if jpeg else "") + rounded(compute)
    about = described(name, runs, first, last, hours, encoder) | {
        "dirty": any(r.provenance["dirty"] for r in results),
        "test_images": max((len(r) for r in scored if r is not None), default=0),
    }
    if examples:
        about["examples"] = examples
    write(path, runs, about)
    return path


def beside(name: str, seeds: Sequence[int], examples: int | None) -> pd.DataFrame:
    """The runs of the set that lie there for other seeds, of as many images: further seeds have a share in the choice of a
    learning rate, and do not choose for themselves."""
    first = place(name)
    further = [p.name for p in first.parent.glob(f"{first.stem}-seeds-*.json")]
    if not seeds[0]:
        if further:
            raise SystemExit(
                f"seeds: {', '.join(further)} has further ones, chosen with the first; remove it to begin anew"
            )
        return pd.DataFrame({"seed": [], "refit": []})
    found = [evidence.read(first.parent.name, name=name) for name in (first.name, *further)]
    for about in (a for runs in found for a in runs.attrs["about"]):
        if about.get("examples") != examples:
            of = about.get("examples")
            raise SystemExit(f"examples={examples}: the seeds beside it are of {f'--examples {of}' if of else 'all'}")
    runs = pd.concat(found, ignore_index=True)
    return runs[~runs["seed"].isin(seeds)].astype({"refit": bool})


def together(frames: Sequence[pd.DataFrame], others: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([*frames, *([others] if len(others) else [])], ignore_index=True)


def make(
    name: str, seeds: Sequence[int], compute: ComputeFlags, only_export: bool, examples: int | None = None
) -> None:
    wanted, start, path = SETS[name], time.time(), place(name, seeds)
    store, by = Store(), list(wanted.by)
    others = beside(name, seeds, examples)
    frames, results = [], list[Result]()
    for stage in ("search", "refit") if wanted.refit else ("search",):
        rates = pd.Series(dtype=float)
        if stage == "refit":
            best = choose_learning_rate(together(frames, others).query("not refit"), by)
            rates = best.drop_duplicates(by).set_index(by)["learning_rate"]
        # A choice that the further seeds changed is trained again for the others too.
        more = sorted({int(s) for s in others["seed"]}) if stage == "refit" else []
        for some in [[*more, *seeds]] if compute.workers > 1 else [[seed] for seed in (*more, *seeds)]:
            cells = for_part(wanted.cells(some), examples)
            if stage == "refit":
                there = list(
                    others[others["refit"]]
                    .get([*by, "learning_rate", "seed"], others[:0])
                    .itertuples(index=False, name=None)
                )
                mine = [(c, tuple({**c.labels, "epsilon": c.spec.epsilon}[b] for b in by)) for c in cells]
                cells = [
                    Cell(c.labels, replace(c.spec, validation=0.0))
                    for c, at in mine
                    if c.spec.learning_rate == rates[at] and (*at, c.spec.learning_rate, c.spec.seed) not in there
                ]
            if only_export:
                known = look_up([c.spec for c in cells], compute=compute, store=store)
                cells = [c for c, r in zip(cells, known, strict=True) if r is not None]
            if not cells:
                continue
            found, got = run(cells, compute)
            frames, results = [*frames, found.assign(refit=stage == "refit")], [*results, *got]
            runs = pd.concat(frames, ignore_index=True)
            again = runs[runs["refit"]]
            chosen = evidence.choose(together([runs], others), by)
            final = again if len(again) else chosen[chosen["seed"].isin(runs["seed"])]
            export(name, runs, results, final, compute, examples, path)
            print(
                f"{name}: {stage}, seeds {list(some)}, runs: {len(runs)}, {(time.time() - start) / 60:.0f} min: {path}",
                flush=True,
            )


def seeds_asked(text: str | None, otherwise: int) -> list[int]:
    """ "5": the first five; "3-4": those."""
    asked = re.fullmatch(r"(?:(\d+)-)?(\d+)", text or str(otherwise))
    found = range(int(asked[1] or 0), int(asked[2]) + bool(asked[1])) if asked else range(0)
    if not found:
        raise SystemExit(f"seeds={text!r}: names none; 5 are the first five, 3-4 two further ones")
    return list(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--seeds", help="how many (5), or which further ones (3-4)")
    parser.add_argument("--examples", type=int, help="take so many training images, as many of each class, and say so")
    parser.add_argument("--export", action="store_true", help="write what the store has, run nothing")
    parser.add_argument("--workers", type=int, default=1, help="seeds at a time (1: it has all the threads)")
    asked = parser.parse_args()
    if asked.list or not asked.names:
        for name, s in SETS.items():
            print(
                f"{name}: heads a seed: {len(s.cells([0]))}, seeds: {s.seeds}{', refit' if s.refit else ''}. {s.note}"
            )
        print(*(f"{name}: no runs, figures; 5 seeds." for name in MEASURED), sep="\n")
        return
    names = [*SETS, *MEASURED] if asked.names == ["all"] else asked.names
    unknown = [n for n in names if n not in SETS and n not in MEASURED]
    if unknown:
        raise SystemExit(f"names={unknown}: unknown; --list names them")
    for name in names:
        # A small network takes its examples together at thrice the speed.
        from_scratch = name in SETS and not SETS[name].by
        short = {"engine": "grouped", "physical_batch": 16} if from_scratch else {}
        compute = ComputeFlags(workers=asked.workers, **short)
        if asked.examples is not None:
            compute = replace(compute, root=str(part_of(name.split("/")[1], asked.examples)))
        if name in SETS:
            make(name, seeds_asked(asked.seeds, SETS[name].seeds), compute, asked.export, asked.examples)
        else:
            measure(name, seeds_asked(asked.seeds, 5), compute, asked.examples)


if __name__ == "__main__":
    main()
