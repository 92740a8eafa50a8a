"""Do choices that leave the method alone move the accuracy? The same runs with one thing changed, paired by seed, as JSON.

    python benchmarks/choices.py [stored] [bfloat16] [--out benchmarks/results/choices.json] [--seeds N]

stored     each example's views drawn once against anew at every step: the digits at demo scale, both tiny encoders, the
           three methods that augment, all budgets and rates, 20 seeds. Runs differ in their noise too: the mean over many
           cells has less of it.
bfloat16   the encoder in bfloat16 against float32: Caltech-101 at laptop scale, one plain view, all budgets, the middle
           rate of each, 5 seeds

A seed's accuracy is the mean over these cells; the interval is Student's, of the differences. What was measured before and
is not asked for now stays in the file.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from dpmix.companion import grids
from dpmix.core.precision import bfloat16_is_fast
from dpmix.runs import passes
from dpmix.runs.run import run_all
from dpmix.runs.spec import ComputeFlags
from dpmix.runs.store import Store

SEEDS = {"stored": 20, "bfloat16": 5}


def middle(cells: Sequence[grids.Cell]) -> list[grids.Cell]:
    """Those of a grid at its middle learning rate."""
    rates: dict[tuple, list[float]] = {}
    for c in cells:
        rates.setdefault((c.labels["method"], c.spec.epsilon), []).append(c.spec.learning_rate)
    chosen = {of: sorted(set(found))[len(set(found)) // 2] for of, found in rates.items()}
    return [c for c in cells if c.spec.learning_rate == chosen[c.labels["method"], c.spec.epsilon]]


def accuracies(cells: Sequence[grids.Cell], compute: ComputeFlags) -> dict[int, float]:
    """Each seed's mean test accuracy in percent, of runs in a store of their own: what is compared shares nothing."""
    with tempfile.TemporaryDirectory() as folder:
        flags = replace(compute, cache=f"{folder}/cache")
        results = run_all([c.spec for c in cells], compute=flags, store=Store(Path(folder) / "runs"))
    by: dict[int, list[float]] = {}
    for result in results:
        by.setdefault(result.spec.seed or 0, []).append(100 * result.test_accuracy)
    return {seed: float(np.mean(found)) for seed, found in by.items()}


def compared(first: dict[int, float], second: dict[int, float]) -> dict[str, Any]:
    """first minus second, in points, with its 95 % interval."""
    moved = np.array([first[seed] - second[seed] for seed in sorted(first)])
    half = float(stats.t.ppf(0.975, len(moved) - 1) * stats.sem(moved))
    mean = float(moved.mean())
    return {"difference": mean, "interval_95": [mean - half, mean + half], "seeds": len(moved),
            "accuracy": float(np.mean(list(second.values())))}  # fmt: skip


def stored(seeds: int) -> dict[str, Any]:
    cells = grids.methods_grid("demo", methods=["self-aug", "mix-self", "mix-diff"], seeds=list(range(seeds)))
    both = [accuracies(grids.changed_cells(cells, None, redraw=redraw), ComputeFlags()) for redraw in (False, True)]
    return {"what": "views drawn once minus drawn at every step", "cells": len(cells) // seeds, **compared(*both)}


def bfloat16(seeds: int) -> dict[str, Any]:
    if not bfloat16_is_fast(torch.device("cpu")):
        raise SystemExit("bfloat16: this processor has no instructions for it, so that both would be float32")
    cells = middle(grids.methods_grid("laptop", dataset="caltech101", methods=["dp-sgd"], seeds=list(range(seeds))))
    both = [accuracies(cells, ComputeFlags(dtype=dtype, workers=1)) for dtype in ("bfloat16", "float32")]
    return {"what": "the encoder in bfloat16 minus in float32", "cells": len(cells) // seeds, **compared(*both)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(SEEDS), help="of what is compared; all by default")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "choices.json")
    parser.add_argument("--seeds", type=int)
    asked = parser.parse_args()
    unknown = set(asked.names) - set(SEEDS)
    if unknown:
        parser.error(f"names: {', '.join(sorted(unknown))}: unknown; choose from {', '.join(SEEDS)}")
    found = json.loads(asked.out.read_text()) if asked.out.is_file() else {}
    for name in asked.names:
        measured = {"stored": stored, "bfloat16": bfloat16}[name](asked.seeds or SEEDS[name])
        made = passes.provenance(ComputeFlags().where(), "")
        found[name] = measured | {k: made[k] for k in ("commit", "dirty", "date", "device", "platform")}
        low, high = measured["interval_95"]
        print(f"{name}: {measured['what']}: {measured['difference']:+.2f} [{low:+.2f}, {high:+.2f}] points", flush=True)
        asked.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
