"""How fast notebooks/explore answers: the median time of each knob's change, as a table and as JSON.

    python benchmarks/explore.py [--out benchmarks/results/explore.json] [--repeats 9]

A change moves one knob from the notebook's default to a value that was not asked for before, so nothing comes from a cache
but what does not depend on it. Timed is what the kernel does, from the settings to the HTML; goal: 200 ms on two cores.
Beside the clock stands the processor time: on a busy machine, where the clock measures the others, the goal is judged by that.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dpmix.companion import budgets, explore
from dpmix.core import views

GOAL = 0.2
EXAMPLE = dict(
    dataset="digits", index=25, k_base=8, k_self=8, k_diff=2, alpha=0.2, mix="mixup", transform="crop-flip", seed=0
)
BUDGET = dict(
    n=50_000,
    batch_size=1000,
    epochs=10,
    epsilon=1.0,
    delta=1e-5,
    accountant="rdp",
    clip_norm=1.0,
    parameters=5_130,
    k=16,
)
STEP = dict(method="mix-self", clip_norm=0.5, sigma=1.0, without=8, seed=0)


def changes() -> dict[str, tuple[Callable[..., str], dict[str, Any], str, Sequence[Any]]]:
    """Name: the picture, its settings, the knob that moves, and where it moves to."""
    some = range(1, 40)
    of = {
        explore.example_views: (EXAMPLE, {
            "index": some, "k_base": range(9, 25), "k_self": range(9, 25), "k_diff": range(3, 25),
            "alpha": [0.1 * i for i in some], "mix": views.MIXES, "transform": ["crop-flip+jitter", "crop-flip+all", "none"],
            "seed": some,
        }),
        budgets.budget: (BUDGET, {
            "n": [21_600 + 100 * i for i in some], "batch_size": [500 + 7 * i for i in some], "epochs": [1.0 + i for i in some],
            "epsilon": [0.3 * i for i in some], "delta": [1e-6 * i for i in range(1, 20)],
            "accountant": ["prv", "pld", "rdp"], "clip_norm": [0.1 * i for i in some], "parameters": [1000 * i for i in some],
            "k": range(2, 40),
        }),
        explore.step: (STEP, {
            "method": [m for m in views.METHODS], "clip_norm": [0.05 * i for i in some], "sigma": [0.1 * i for i in some],
            "without": range(1, 8), "seed": some,
        }),
    }  # fmt: skip
    found = {
        f"{picture.__name__}: {knob}": (picture, settings, knob, values)
        for picture, (settings, knobs) in of.items() for knob, values in knobs.items()
    }  # fmt: skip
    runs = explore.results()
    about = dict(dataset=runs["dataset"][0], model=runs["model"][0], methods=tuple(dict.fromkeys(runs["method"])))
    chosen = [about["methods"][:i] for i in range(1, len(about["methods"]) + 1)]
    return found | {"curves: methods": (explore.curves, about, "methods", chosen)}


def timed(repeats: int) -> dict[str, dict[str, float]]:
    """Median and largest seconds of each change, and the median of its processor time. Knobs take turns, so that a slow
    moment of the machine hits all alike."""
    wanted = changes()
    for picture, settings, *_ in wanted.values():
        explore.answer(picture, **settings)  # encoder, data and the like are there once the notebook has run
    left = {name: itertools.cycle(values) for name, (*_, values) in wanted.items()}
    clock: dict[str, list[float]] = {name: [] for name in wanted}
    processor: dict[str, list[float]] = {name: [] for name in wanted}
    for repeat in range(repeats):
        for name, (picture, settings, knob, _) in wanted.items():
            changed = settings | {knob: next(left[name])}
            if knob == "accountant":  # at a budget that was not asked for before
                changed["epsilon"] = 1.01 + repeat / 64
            start = time.perf_counter(), time.process_time()
            shown = explore.answer(picture, **changed)
            clock[name].append(time.perf_counter() - start[0])
            processor[name].append(time.process_time() - start[1])
            if 'role="alert"' in shown:
                raise RuntimeError(f"{name}: {changed} was refused: {shown}")
    return {
        name: {"median": statistics.median(s), "largest": max(s), "processor": statistics.median(processor[name])}
        for name, s in clock.items()
    }


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--out", type=Path)
    ask.add_argument("--repeats", type=int, default=9)
    asked = ask.parse_args()
    load = os.getloadavg()[0]
    found = timed(asked.repeats)
    for name, of in found.items():
        words = (f"{what} {1000 * seconds:5.0f} ms" for what, seconds in of.items())
        print(f"{name:28} {', '.join(words)}")
    judged = "median" if load < 1 else "processor"
    slow = [name for name, of in found.items() if of[judged] > GOAL]
    said = "kept by all" if not slow else f"not kept by {', '.join(slow)}"
    print(f"goal {1000 * GOAL:.0f} ms, by {judged} at a load of {load:.1f}: {said}")
    if asked.out:
        about = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "python": platform.python_version(),
                 "load": round(load, 1), "judged by": judged, "repeats": asked.repeats, "goal": GOAL}  # fmt: skip
        asked.out.write_text(json.dumps({**about, "seconds": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
