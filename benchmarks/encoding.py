"""Speed of encoding views and of training heads on stored ones. Medians of one run, as a table and as JSON.

    python benchmarks/encoding.py [--out benchmarks/results/encoding.json] [--repeats 3] [--examples 256] [--sizes 64 96 128 224]

EfficientNet-Lite0, images of 32 x 32 pixels (noise: speed does not depend on what they show), the 55 views an example of
five methods (DP-SGD, Mixed Ghost, Self-Aug, Mix-Self, Mix-Diff), ten classes.

1. Engines on views that are ready: PyTorch and OpenVINO, in float32, and in bfloat16 where the processor has it (elsewhere
   OpenVINO computes float32 whatever it is asked for).
2. The whole path (draw views, encode, write) against the engine's own rate on ready views.
3. Ten epochs of one head a method from stored views, encoding included, against the same with fresh ones: 1,024 examples,
   a quarter of them a step. In five turns, each with all ten epochs from stored views and two of fresh ones.
4. A step of 240 heads (4 noises x 5 methods x 12 rates) from the store, of the paper's 1,000 examples, against the matrix
   products alone that it needs.
5. From 1, 2 and 4: what 50,000 examples take, encoded once and trained on for ten epochs.

Peers take turns. Each figure is by the clock and by the seconds of processor that the process used; on a machine that is
busy with other work only the latter compares, and the load is told.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

from dpmix import models
from dpmix.core import heads, rng, sources, views
from dpmix.core.precision import bfloat16_is_fast
from dpmix.images.data import ImageSet
from dpmix.models.stored import StoredViews

METHODS = ("dp-sgd", "mixed-ghost", "self-aug", "mix-self", "mix-diff")
RECIPES = [views.METHODS[name] for name in METHODS]
CLASSES, AT_ONCE, N, BATCH = 10, 32, 50_000, 1_000
DTYPES = (torch.float32, *((torch.bfloat16,) if bfloat16_is_fast(torch.device("cpu")) else ()))
FAST = DTYPES[-1]
Seconds = tuple[float, float]  # by the clock, of processor


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).partition(".")[2]


def images(n: int) -> ImageSet:
    draw = rng.generator(0, "benchmark images")
    pixels = draw.integers(0, 256, (n, 3, 32, 32), dtype="uint8")
    return ImageSet(torch.from_numpy(pixels), torch.from_numpy(draw.integers(0, CLASSES, n)), tuple("abcdefghij"))


def timed(work: Callable[[], object]) -> Seconds:
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - processor


def in_turn(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, Seconds]:
    """Median seconds of each, after one call that is not counted."""
    times: dict[str, list[Seconds]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            found = timed(call)
            if turn:
                times[name].append(found)
    return {name: tuple(statistics.median(t[i] for t in found) for i in (0, 1)) for name, found in times.items()}  # type: ignore[misc]


def bank() -> list[heads.Head]:
    """240 heads; those of "mixed-ghost" differ from those of "dp-sgd" in their rates only."""
    return [
        heads.Head(recipe=recipe, learning_rate=2.0**rate * (1 + place / 100), noise_multiplier=sigma)
        for place, recipe in enumerate(RECIPES) for rate in range(-4, 8) for sigma in (0.8, 1.2, 2.0, 3.0)
    ]  # fmt: skip


def engines(size: int, data: ImageSet, public: ImageSet, repeats: int) -> dict[str, Seconds]:
    """Seconds a view of each engine on ready views."""
    ready = views.make_union(RECIPES).make(data.images[:8], data.labels[:8], torch.arange(8), num_classes=CLASSES, seed=0,
                                           step=None, public=public).images.flatten(0, 1)  # fmt: skip
    plain = models.encoder("efficientnet-lite0", image_size=size)
    calls = {}
    for name in ("torch", "openvino"):
        for dtype in DTYPES:
            features = plain.to("cpu", dtype, engine=name).features
            calls[f"{name} {name_of(dtype)}"] = lambda features=features: features(ready)
    return {name: (a / len(ready), b / len(ready)) for name, (a, b) in in_turn(calls, repeats).items()}


def whole_path(size: int, data: ImageSet, public: ImageSet, repeats: int) -> dict[str, Seconds]:
    """Seconds a view of drawing, encoding and writing, and of the engine on the same views when they are ready."""
    encoder = models.encoder("efficientnet-lite0", image_size=size).to("cpu", FAST, engine="openvino")
    ready = sources.FreshViews(encoder, data.images, data.labels, RECIPES, num_classes=CLASSES, seed=0, public=public,
                               redraw=False).made(torch.arange(32), 0).images.flatten(0, 1)  # fmt: skip
    count = len(data) * len(ready) // 32

    def engine() -> None:
        for _ in range(len(data) // 32):
            encoder.features(ready)

    def path() -> None:
        with tempfile.TemporaryDirectory() as folder:
            StoredViews(encoder, data.images, data.labels, RECIPES, num_classes=CLASSES, public=public, folder=folder,
                        progress=False)  # fmt: skip

    found = in_turn({"engine": engine, "whole path": path}, repeats)
    return {name: (a / count, b / count) for name, (a, b) in found.items()}


def stored_against_fresh(data: ImageSet, public: ImageSet) -> dict[str, Seconds]:
    """Ten epochs at 64 pixels: encoding once and reading (median of the turns), or encoding at every step (their sum)."""
    encoder = models.encoder("efficientnet-lite0", image_size=64).to("cpu", FAST, engine="openvino")
    about = dict(expected_batch=len(data) // 4, seed=0, progress=False, physical_batch=AT_ONCE)
    given = encoder, data.images, data.labels, RECIPES
    some = bank()[::48]  # one of each method

    def stored() -> None:
        with tempfile.TemporaryDirectory() as folder:
            source = StoredViews(*given, num_classes=CLASSES, public=public, folder=folder, progress=False)
            heads.train(source, some, steps=40, **about)

    def fresh() -> None:
        heads.train(sources.FreshViews(*given, num_classes=CLASSES, seed=0, public=public), some, steps=8, **about)

    encoder.features(torch.rand(1, 3, 32, 32))
    turns = [(timed(stored), timed(fresh)) for _ in range(5)]
    of_stored, of_fresh = ([tuple(turn[peer][i] for turn in turns) for i in (0, 1)] for peer in (0, 1))
    return {
        "stored, 10 epochs": (statistics.median(of_stored[0]), statistics.median(of_stored[1])),
        "fresh, 10 epochs": (sum(of_fresh[0]), sum(of_fresh[1])),
    }


def training(data: ImageSet, public: ImageSet, repeats: int) -> dict[str, Seconds]:
    """Seconds an example of one step of 240 heads from the store, and of the two products a group of heads that it needs."""
    encoder = models.encoder("efficientnet-lite0", image_size=32).to("cpu", FAST, engine="openvino")
    all_heads = bank()
    widths = [recipe.views for recipe in RECIPES[1:]]  # DP-SGD and Mixed Ghost have the same views
    counts = [96, 48, 48, 48]
    with tempfile.TemporaryDirectory() as folder:
        source = StoredViews(encoder, data.images, data.labels, RECIPES, num_classes=CLASSES, public=public, folder=folder,
                             progress=False)  # fmt: skip
        batch = len(data)

        def train() -> None:
            heads.train(source, all_heads, expected_batch=batch, sample_rate=1.0, steps=1, seed=0, progress=False,
                        physical_batch=AT_ONCE)  # fmt: skip

        z = [torch.rand(AT_ONCE * k, encoder.dim) for k in widths]
        w = [torch.rand(count * CLASSES, encoder.dim) for count in counts]
        out = [torch.rand(AT_ONCE * k, count * CLASSES) for k, count in zip(widths, counts, strict=True)]

        def products() -> None:
            for _ in range(batch // AT_ONCE):
                for x, weights, delta in zip(z, w, out, strict=True):
                    torch.mm(x, weights.T, out=delta)
                    delta.T @ x

        found = in_turn({"training from the store": train, "matrix products": products}, repeats)
    return {name: (a / batch, b / batch) for name, (a, b) in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "encoding.json")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 96, 128, 224])
    args = parser.parse_args()
    load, data, public = os.getloadavg()[0], images(args.examples), images(64)
    K, seconds, ratios = views.make_union(RECIPES).views, {}, {}
    by_size = {size: engines(size, data, public, args.repeats) for size in args.sizes}
    for size, found in by_size.items():
        seconds |= {f"a view, {size} px, {name}": s for name, s in found.items()}
        for dtype in map(name_of, DTYPES):
            ratios[f"OpenVINO / PyTorch, {size} px, {dtype} (goal: at least 2.5)"] = [
                a / b for a, b in zip(found[f"torch {dtype}"], found[f"openvino {dtype}"], strict=True)
            ]
    paths = {s: whole_path(s, data, public, args.repeats) for s in sorted({64, 96} & set(args.sizes)) or [64]}
    for size, found in paths.items():
        seconds |= {f"a view, {size} px, {name}": s for name, s in found.items()}
        ratios[f"whole path / engine, {size} px (goal: at least 0.85)"] = [
            a / b for a, b in zip(found["engine"], found["whole path"], strict=True)
        ]
    trained = training(images(BATCH), public, args.repeats)
    seconds |= {f"an example, {name}": s for name, s in trained.items()}
    ratios["matrix products / training from the store (goal: at least 0.6)"] = [
        a / b for a, b in zip(trained["matrix products"], trained["training from the store"], strict=True)
    ]
    runs = stored_against_fresh(images(4 * args.examples), public)
    seconds |= runs
    ratios["stored / fresh, 10 epochs (goal: at least 8)"] = [
        a / b for a, b in zip(*reversed(runs.values()), strict=True)
    ]
    largest = paths[max(paths)]
    kept = [engine / path for engine, path in zip(largest["engine"], largest["whole path"], strict=True)]
    for size, goal in ((64, 45), (128, 60), (224, 140)):
        if size in by_size:
            encoding, training_s = by_size[size][f"openvino {name_of(FAST)}"], trained["training from the store"]
            minutes = [(N * K * e / r + 10 * N * t) / 60 for e, r, t in zip(encoding, kept, training_s, strict=True)]
            minutes[1] /= torch.get_num_threads()
            ratios[
                f"minutes, 50,000 x {K} views and 240 heads for 10 epochs, {size} px, reckoned (goal: at most {goal})"
            ] = minutes
    print(f"{'':<92} {'by the clock':>14} {'of processor':>14}")
    for name, (clock, processor) in seconds.items():
        print(f"{name:<92} {1e3 * clock:>11.3f} ms {1e3 * processor:>11.3f} ms")
    for name, (clock, processor) in ratios.items():
        print(f"{name:<92} {clock:>14.2f} {processor:>14.2f}")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    about = {
        "threads": torch.get_num_threads(), "torch": torch.__version__, "machine": platform.machine(), "commit": commit,
        "bfloat16": len(DTYPES) > 1,
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "load at the start": load, "views an example": K,
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"seconds": seconds, "ratios": ratios, **about}, indent=1) + "\n")


if __name__ == "__main__":
    main()
