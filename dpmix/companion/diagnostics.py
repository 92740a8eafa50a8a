"""What a run looks like from inside: its gradients before clipping and noise, and where its time goes.

Gradients are computed from private data without noise. They are for looking at the method on data that are public anyway;
nothing here is stored, and nothing here may be released for data that are not."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from dpmix.companion.report import label
from dpmix.core import checks, clipping, heads, views
from dpmix.core.transforms import as_float
from dpmix.runs import passes, run
from dpmix.runs.identity import pass_of
from dpmix.runs.material import Material, prepare
from dpmix.runs.spec import ComputeFlags, Mechanism, RunSpec
from dpmix.runs.store import Store

PARTS = ("encoder", "views", "clipping", "noise")


class Gradients(NamedTuple):
    """The per-parameter gradient of a run, averaged over the views of an example and then over examples. `stages` [S, P]:
    over the examples of each S-th part of training; `overall` [P]: over all of them. Neither clipped nor noisy. P counts the
    weights and then the biases of the head."""

    stages: Float[Tensor, "S P"]
    overall: Float[Tensor, " P"]


def gradients(specs: Sequence[RunSpec], *, stages: int = 5, compute: ComputeFlags | None = None) -> list[Gradients]:
    """Train the heads of `specs` privately, as ever, and look at each step's unclipped gradients; in the order of `specs`.
    The weights at which the gradients are taken are those of the private run. A part of training in which no example was
    drawn has a gradient of nan. Raises ValueError for training shorter than `stages` and for networks."""
    checks.whole("stages", stages, 1)
    found: dict[RunSpec, Gradients] = {}
    for shared in dict.fromkeys(map(pass_of, specs)):
        group = [spec for spec in specs if pass_of(spec) == shared]
        found |= dict(zip(group, _observed(group, stages, compute or ComputeFlags()), strict=True))
    return [found[spec] for spec in specs]


def _observed(specs: Sequence[RunSpec], stages: int, compute: ComputeFlags) -> list[Gradients]:
    material, bank, m = _bank(specs, compute)
    checks.require(stages <= m.steps, "stages", stages, f"must be at most T = {m.steps} of training")
    union = views.make_union(list(dict.fromkeys(h.recipe for h in bank)))
    row = dict(zip(union.recipes, union.weights, strict=True))
    view_weights = torch.stack([row[h.recipe] for h in bank]).to(compute.where(), torch.float32)
    unclipped = torch.full((len(bank),), torch.inf, device=compute.where())
    assert material.encoder is not None
    sums = torch.zeros(stages, len(bank), material.train.whole.num_classes * (material.encoder.dim + 1))
    counts = torch.zeros(stages)

    def observe(step: int, features: Tensor, targets: Tensor, weights: Tensor, biases: Tensor) -> None:
        stage = step * stages // m.steps
        found = clipping.clipped_head_sums(features, targets, weights, biases, unclipped, view_weights)
        sums[stage] += torch.cat([found.weights.flatten(1), found.biases], dim=1).cpu()
        counts[stage] += len(features)

    _train(material, bank, m, specs[0], m.steps, compute, observe=observe)
    means, overall = sums / counts[:, None, None], sums.sum(dim=0) / counts.sum()
    return [Gradients(means[:, r], overall[r]) for r in range(len(bank))]


def timings(
    runs: Mapping[str, Sequence[RunSpec]], *, steps: int = 4, repeats: int = 3, compute: ComputeFlags | None = None
) -> pd.DataFrame:
    """Time `steps` steps of each named pass, `repeats` times, after one that is not counted; repeats alternate. One row a
    pass (`method`) and repeat (`seed`): `heads`, `views` per example, `views_per_second`, `seconds` of a whole run at that
    rate (T steps, expected batches), the shares `views`, `encoder`, `clipping`, `noise` of the time, and `floor`: the views
    per second of the encoder alone, fed with ready-made images."""
    compute = compute or ComputeFlags(progress=False)
    checks.whole("steps", steps, 1)
    checks.whole("repeats", repeats, 1)
    prepared = {name: _bank(specs, compute) for name, specs in runs.items()}
    rows = []
    for repeat in range(-1, repeats):
        for name, specs in runs.items():
            material, bank, m = prepared[name]
            done = _train(material, bank, m, specs[0], 1 if repeat < 0 else steps, compute)
            spent = sum(done.seconds.values())
            if repeat < 0 or not done.views:
                continue
            each = views.make_union(list(dict.fromkeys(h.recipe for h in bank))).views
            rate, expected = done.views / spent, m.steps * specs[0].batch_size * each
            row = {"method": name, "seed": repeat, "heads": len(bank), "views of an example": each}
            row |= {"views_per_second": rate, "seconds": expected / rate}
            row |= {part: seconds / spent for part, seconds in done.seconds.items()}
            rows.append(row | {"floor": _encoder_alone(material, each, compute)})
    return pd.DataFrame(rows)


def _encoder_alone(material: Material, each: int, compute: ComputeFlags) -> float:
    """Views a second of the encoder, fed with as many ready-made images as a physical batch has views."""
    assert material.encoder is not None
    many = torch.arange(each * (compute.physical_batch or 128)) % len(material.train)
    ready = as_float(material.train.images[many].to(compute.where()))
    start = time.perf_counter()
    material.encoder.features(ready).sum().item()  # .item() waits for the device
    return len(many) / (time.perf_counter() - start)


def _bank(specs: Sequence[RunSpec], compute: ComputeFlags) -> tuple[Material, list[heads.Head], Mechanism]:
    checks.require(len(specs) > 0, "specs", len(specs), "must hold at least one run")
    shared = pass_of(specs[0])
    together = not shared.from_scratch and all(pass_of(s) == shared for s in specs)
    said = "must be heads of one encoder, data set, batch size, number of epochs and seed"
    checks.require(together, "specs", [s.model for s in specs], said)
    tasks = run.plan(run.ask(specs, compute, Store()), compute)
    material = prepare([task.identity for task in tasks], compute)
    return material, passes.heads_of(tasks, material), tasks[0].mechanism


def _train(
    material: Material,
    bank: list[heads.Head],
    m: Mechanism,
    spec: RunSpec,
    steps: int,
    compute: ComputeFlags,
    **how: Any,
) -> heads.Bank:
    seed = passes.training_seed(spec)
    source = passes.source_of(spec, [head.recipe for head in bank], material, compute, once=seed)
    how |= {"physical_batch": passes.physical_batch(compute), "progress": compute.progress, "seed": seed}
    return heads.train(source, bank, expected_batch=spec.batch_size, steps=steps, sample_rate=m.sample_rate, **how)


def gradient_deviations(looked: pd.DataFrame) -> pd.DataFrame:
    """Standard deviation over the parameters, times 1,000 (`deviation`): a row a method, seed and stage ("whole", "20 %")."""
    rows = []
    for row in looked.itertuples():
        parts = {f"{100 * s // len(row.gradients.stages)} %": g for s, g in enumerate(row.gradients.stages, 1)}
        for stage, g in {"whole": row.gradients.overall, **parts}.items():
            same = {c: getattr(row, c) for c in ("dataset", "model", "method", "seed", "epsilon")}
            rows.append(same | {"stage": stage, "deviation": 1000 * float(g.std())})
    return pd.DataFrame(rows)


def time_shares(timed: pd.DataFrame) -> pd.DataFrame:
    """Views a second and the shares of a run's time, medians over the repeats."""
    rows = {}
    for name, part in timed.groupby("method", sort=False):
        rate, floor = part["views_per_second"].median(), part["floor"].median()
        shares = {p: f"{100 * part[p].median():.0f} %" for p in PARTS}
        of_floor = f"{100 * (part['views_per_second'] / part['floor']).median():.0f} %"
        rest = {"floor, views/s": f"{floor:,.0f}", "of the floor": of_floor}
        rows[label(name)] = {"views/s": f"{rate:,.0f}"} | shares | rest
    return pd.DataFrame.from_dict(rows, orient="index")
