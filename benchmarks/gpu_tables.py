"""Tables 1, 2 and 5 from scratch on one GPU in a budget of time: the networks of laptop scale, on real CIFAR-10, epsilon = 8.

    python benchmarks/gpu_tables.py --data data/datasets --seconds 500

Everything is fixed before a weight is trained (`networks.network_preset("laptop")`), but for the number of epochs: the most
of `EPOCHS` with which three seeds of every row take about half of the time. It follows from throw-away networks (seed 100, half
an epoch), of which no accuracy is looked at. Then seed after seed is trained until the time is over; what is not
done by then is left out. Several networks run side by side, since one alone leaves the GPU waiting for its next view.

The learning rate of 2 is De et al.'s, and its step adds to a weight as much noise as theirs does: 2 sigma / B with their
sigma = 2.7 and B = 4,096, and ours. The sum over pairs has twice the noise and half the terms, so its rate is a quarter.
"""

import argparse
import json
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evidence import SETS, make

from dpmix.images import data
from dpmix.runs.passes import environment
from dpmix.runs.result import Result
from dpmix.runs.run import look_up, run_all
from dpmix.runs.spec import ComputeFlags, RunSpec

NAMES = ("table1/cifar10", "table2/cifar10", "table5/cifar10/scratch")
EPOCHS = (8, 6, 5, 4, 3, 2)
SEEDS, PILOT_SEED, PILOT_EPOCHS = range(5), 100, 0.5


def networks(seeds: Sequence[int], **changed: Any) -> list[RunSpec]:
    """All rows of the three tables once (they share some), seed after seed, those with most views first: then what is left at
    the end of a seed is short."""
    specs = dict.fromkeys(c.spec for name in NAMES for c in SETS[name].cells(seeds, **changed))
    return sorted(specs, key=lambda s: (seeds.index(s.seed), -s.recipe.views))


def views_of(results: Sequence[Result]) -> int:
    return sum(r.timing["views"] for r in results)


def pilot(compute: ComputeFlags, changed: dict[str, Any], left: float) -> dict[str, Any]:
    """How many epochs there is time for. A network of every row, side by side: what a view takes is the slope of their
    seconds over their views, which leaves out the start of each."""
    epochs, began = changed.get("epochs", PILOT_EPOCHS), time.monotonic()
    results = run_all(networks([PILOT_SEED], **changed | {"epochs": epochs}), compute=compute)
    spent = time.monotonic() - began
    seconds, views = ([r.timing[name] for r in results] for name in ("seconds", "views"))
    a_view = max(float(np.polyfit(views, seconds, 1)[0]), 1e-9) / (compute.workers or 1)
    epoch = a_view * sum(views) / epochs
    fitting = [e for e in EPOCHS if 3 * e * epoch < 0.5 * (left - spent)]
    found = {"seconds": spent, "views": sum(views), "seconds_of_an_epoch_of_all_rows": epoch}
    print(f"pilot: {found}, by row {sorted(zip(views, seconds, strict=True))}; {left - spent:.0f} s left", flush=True)
    return found | {"epochs": (fitting or EPOCHS[-1:])[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=data.ROOT, help="the folder in which cifar10 lies")
    parser.add_argument("--seconds", type=float, default=500, help="for all of it, loading and measuring included")
    parser.add_argument("--workers", type=int, default=8, help="networks at a time")
    parser.add_argument("--physical", type=int, default=280, help="examples at a time: four times that hold a batch")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--smoke", action="store_true", help="tiny networks, a hundredth of an epoch")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "gpu-tables.json")
    asked = parser.parse_args()
    until = time.monotonic() + asked.seconds
    tiny = {"model": "wrn-10-1", "epochs": 0.01, "batch_size": 100}
    changed: dict[str, Any] = tiny if asked.smoke else {"model": "wrn-10-2"}
    compute = ComputeFlags(
        device=asked.device, root=str(asked.data), workers=asked.workers, physical_batch=asked.physical
    )
    # Read once here, into the cache that the workers open.
    n = len(data.load("cifar10", asked.data, cache=Path(compute.cache)).train)
    print(f"training images: {n:,}; {until - time.monotonic():.0f} s left", flush=True)
    plan = pilot(compute, changed, until - time.monotonic())
    changed = {"epochs": plan["epochs"]} | changed
    specs = networks(list(SEEDS), **changed)

    def over(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, over)
    signal.alarm(max(1, round(until - time.monotonic())))
    began = time.monotonic()
    try:
        run_all(specs, compute=compute)
    except (KeyboardInterrupt, RuntimeError) as error:
        print(f"stopped after {time.monotonic() - began:.0f} s: {error!r}", flush=True)
    signal.alarm(0)
    seconds = time.monotonic() - began
    done = [r for r in look_up(specs, compute=compute) if r is not None]
    about = {"date": datetime.now(UTC).isoformat(timespec="seconds"), **environment()}
    about["device"] = torch.cuda.get_device_name() if asked.device == "cuda" else "CPU"
    figures = {"networks": len(done), "asked": len(specs), "seconds": seconds, "workers": asked.workers}
    figures |= {"views": views_of(done), "views_per_second": views_of(done) / seconds, "model": specs[0].model}
    asked.json.parent.mkdir(parents=True, exist_ok=True)
    asked.json.write_text(json.dumps({"about": about, "plan": plan, **figures}, indent=1) + "\n")
    print(figures, flush=True)
    for name in NAMES:
        SETS[name] = replace(SETS[name], cells=partial(SETS[name].cells, **changed))
        make(name, SEEDS, compute, only_export=True)


if __name__ == "__main__":
    main()
