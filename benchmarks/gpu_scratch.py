"""CIFAR-10 from scratch on one GPU in a budget of time: Self-Aug against DP-MixSelf, epsilon = 8.

    python benchmarks/gpu_scratch.py --data data/datasets --seconds 400

Everything is fixed before a weight is trained, but for the number of epochs and of views, which follow from the speed of a
step, measured here first on throw-away networks (no accuracy is looked at):

- The paper's model, WRN-16-4, C = 1, delta = 1e-5, RDP accountant, EMA of 0.999, no momentum, all 50,000 images; as
  published but for the following.
- Views: the paper's (16; 16 + 18), or a half, or a quarter of them: the most with which both methods get ten epochs. In a
  short run a step that is made matters more than a view that is averaged.
- B = 2,048, half of the paper's: at B = 4,096 a run of ten epochs has 122 steps. It costs a fifth of sqrt(T) B / sigma
  (signal against the noise of all steps), at B = 1,024 a third.
- Rate: 2 B sigma' / (B' sigma), where B' = 4,096 and sigma' (200 epochs) are the paper's: De et al.'s published rate of 2,
  at the same deviation of the noise that a step adds to a weight. The same for both methods.
- Seeds are the same for both methods. The accuracy is that of the last step (EMA), on the 10,000 test images.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

os.environ.setdefault("TQDM_MININTERVAL", "15")

import torch

from dpmix.core import accounting, network, views
from dpmix.images import data
from dpmix.models.wide_resnet import wide_resnet
from dpmix.runs.passes import environment
from dpmix.runs.run import run
from dpmix.runs.spec import ComputeFlags, RunSpec
from dpmix.runs.store import Store

METHODS = ("self-aug", "mix-self", "dp-sgd")  # in this order; the last only if there is time left
EPSILON, DELTA, PAPER_BATCH, PAPER_EPOCHS, PAPER_RATE = 8.0, 1e-5, 4096, 200, 2.0
FEWEST, MOST = 10.0, 200.0  # epochs
PILOT_SEED = 100


def recipe(method: str, cut: int) -> views.Recipe:
    r = views.METHODS[method]
    return r if method == "dp-sgd" else replace(r, k_base=max(1, 16 // cut), k_self=-(-r.k_self // cut))


def sigma(n: int, batch: int, epochs: float) -> float:
    steps = accounting.steps_for(n=n, batch_size=batch, epochs=epochs)
    return accounting.noise_multiplier(
        epsilon=EPSILON, delta=DELTA, sample_rate=batch / n, steps=steps, accountant="rdp"
    )


def pilots(splits: data.Splits, asked: argparse.Namespace) -> Iterator[tuple[str, int, int, float]]:
    """(method, cut, physical batch, seconds of a step): two steps each after one that warms up, of a quarter of a batch,
    so that what does not grow with the batch (noise, padding) is counted four times: on the safe side."""
    train, on_gpu = splits.train, asked.device == "cuda"
    compute = ComputeFlags(device=asked.device)
    some = max(1, asked.batch // 4)
    for method in METHODS[:2]:
        for cut in asked.cuts:
            for physical in asked.physical:
                model = wide_resnet(*asked.network, 10, seed=PILOT_SEED)
                times = []
                try:
                    network.train(
                        model, train.images, train.labels, seed=PILOT_SEED, recipe=recipe(method, cut), num_classes=10,
                        clip_norm=1.0, noise_multiplier=1.0, learning_rate=1.0, expected_batch=some, steps=3,
                        sample_rate=some / len(train), physical_batch=physical, device=asked.device, ema_decay=0.999,
                        autocast=torch.bfloat16 if compute.precision() == torch.bfloat16 else None, channels_last=on_gpu,
                        progress=False, evaluate=lambda *_, times=times: times.append(time.monotonic()), evaluate_every=1,
                    )  # fmt: skip
                except MemoryError as error:
                    print(f"pilot: {method}, cut {cut}, physical batch {physical}: {error}", flush=True)
                    continue
                yield method, cut, physical, (times[-1] - times[0]) / 2 * asked.batch / some
                if on_gpu:
                    torch.cuda.empty_cache()


def plan(splits: data.Splits, asked: argparse.Namespace, until: float) -> dict:
    """How many views and epochs fit, from the speed of a step; all that the runs are then made with."""
    n, best, measured = len(splits.train), {}, []
    for method, cut, physical, seconds in pilots(splits, asked):
        k = recipe(method, cut).views
        rate = asked.batch * k / seconds
        print(
            f"pilot: {method}, K = {k}, physical batch {physical}: {seconds:.2f} s a step, {rate:,.0f} views/s",
            flush=True,
        )
        measured.append({"method": method, "views": k, "physical_batch": physical, "step_seconds": seconds})
        if seconds < best.get((method, cut), (float("inf"), 0))[0]:
            best[method, cut] = seconds, physical
    left = until - time.monotonic()
    for cut in asked.cuts:
        pair = [best.get((m, cut), (float("inf"), 0)) for m in METHODS[:2]]
        epoch = n / asked.batch * sum(seconds for seconds, _ in pair)
        epochs = min(
            MOST, int(10 * 0.93 * left / (len(asked.seeds) * epoch)) / 10
        )  # the rest is for loading and testing
        print(
            f"views cut by {cut}: an epoch of both takes {epoch:.1f} s; {epochs:g} epochs fit into {left:.0f} s",
            flush=True,
        )
        if epochs >= FEWEST:
            break
    if epochs <= 0:
        raise SystemExit(f"{left:.0f} seconds are too few for a tenth of an epoch")
    ours, theirs = sigma(n, asked.batch, epochs), sigma(n, PAPER_BATCH, PAPER_EPOCHS) if n > PAPER_BATCH else 3.0
    rate = float(f"{PAPER_RATE * (theirs / PAPER_BATCH) / (ours / asked.batch):.2g}")
    physical = {m: best[m, cut][1] for m in METHODS[:2]}
    return {"cut": cut, "epochs": epochs, "batch_size": asked.batch, "learning_rate": rate, "sigma": ours,
            "sigma_of_the_paper": theirs, "physical_batch": physical, "seconds_left": left, "pilots": measured}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=data.ROOT, help="the folder in which cifar10 lies")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--seconds", type=float, default=400, help="for all of it, loading and measuring included")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--physical", type=int, nargs="+", default=[64, 128], help="examples at a time, to choose from")
    parser.add_argument("--cuts", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--model", default="wrn-16-4")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--store", type=Path, default=Path("/tmp/dpmix-gpu/runs"))
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "gpu_scratch.json")
    asked = parser.parse_args()
    asked.network = tuple(int(word) for word in asked.model.split("-")[1:])
    until = time.monotonic() + asked.seconds
    cache = asked.store.parent / "cache"
    splits = data.load(asked.dataset, asked.data, cache=cache)
    print(
        f"images: {len(splits.train):,} for training, {len(splits.test):,} for the test; {until - time.monotonic():.0f} s left",
        flush=True,
    )
    out: dict = {"about": {"date": datetime.now(UTC).isoformat(timespec="seconds"), **environment()}, "results": []}
    if asked.device == "cuda":
        out["about"] |= {"device": torch.cuda.get_device_name()}
    p = out["plan"] = plan(splits, asked, until)
    print({k: v for k, v in p.items() if k != "pilots"}, flush=True)
    asked.json.parent.mkdir(parents=True, exist_ok=True)
    store, slowest = Store(asked.store), 0.0
    for seed in asked.seeds:
        for method in METHODS:
            left = until - time.monotonic()
            if method not in p["physical_batch"] and left < slowest / 2:
                print(f"{method}, seed {seed}: left out, {left:.0f} s are left", flush=True)
                continue
            spec = RunSpec(
                recipe=recipe(method, p["cut"]), epsilon=EPSILON, delta=DELTA, learning_rate=p["learning_rate"],
                dataset=asked.dataset, model=asked.model, validation=0.0, batch_size=asked.batch, epochs=p["epochs"],
                seed=seed, ema_decay=0.999,
            )  # fmt: skip
            compute = ComputeFlags(
                device=asked.device, root=str(asked.data), cache=str(cache), workers=1,
                physical_batch=p["physical_batch"].get(method, max(asked.physical)),
            )  # fmt: skip
            began = time.monotonic()
            result = run(spec, compute=compute, store=store)
            slowest = max(slowest, time.monotonic() - began)
            out["results"].append({"method": method, **result.to_json()})
            out["about"] |= {"seconds": round(asked.seconds - until + time.monotonic(), 1)}
            asked.json.write_text(json.dumps(out, indent=1) + "\n")
            print(
                f"{method}, K = {spec.recipe.views}, seed {seed}: test accuracy {100 * result.test_accuracy:.2f} % after "
                f"T = {result.steps} ({p['epochs']:g} epochs), epsilon {json.dumps(result.epsilon)}, "
                f"sigma {result.noise_multiplier:.3f}, rate {spec.learning_rate:g}, {result.timing['seconds']:.0f} s, "
                f"{result.timing['views_per_second']:,.0f} views/s, dropped {result.diagnostics.dropped_gradients}",
                flush=True,
            )


if __name__ == "__main__":
    main()
