"""Resident memory of a run on a folder of images that hold 2 GB of pixels, above that of the encoder; as JSON.

    python benchmarks/memory.py [--out benchmarks/results/memory.json] [--images 14000] [--side 224]

The folder is made anew in a temporary place. A process of its own loads the encoder, then trains a head for an epoch and
tests it; this one looks at its resident memory every 20 ms, the pages of mapped files included.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from dpmix.core import views
from dpmix.runs.passes import environment
from dpmix.runs.spec import RunSpec

MODEL = "timm:test_resnet"  # small: its time is not the question, and the memory of its activations is bounded anyway


def paint(folder: Path, images: int) -> None:
    """Ten classes, a tenth of the images for testing; small files, which are decoded at the encoder's size."""
    for i in range(images):
        place = folder / ("test" if i % 10 == 0 else "train") / f"class {i // 10 % 10}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{i:06d}.png")


def spec_of(folder: Path, side: int, images: int) -> RunSpec:
    return RunSpec(recipe=views.Recipe(k_base=1, transform="crop"), epsilon=8.0, learning_rate=1.0, validation=0.1,
                   dataset=f"folder:{folder}", model=MODEL, weights="random", image_size=side, batch_size=images // 20,
                   epochs=1.0)  # fmt: skip


def child(base: Path, side: int, images: int) -> None:
    """What is measured. It waits for a line once the encoder is there and has seen as many images as in training."""
    import torch

    from dpmix import models
    from dpmix.runs.run import run
    from dpmix.runs.spec import ComputeFlags
    from dpmix.runs.store import Store

    encoder = models.encoder(MODEL, "random", image_size=side)
    encoder.features(torch.rand(128, 3, side, side))
    print("ready", flush=True)
    input()
    compute = ComputeFlags(cache=str(base / "cache"), progress=False, workers=1)
    result = run(spec_of(base / "photos", side, images), compute=compute, store=Store(base / "runs"))
    print(json.dumps({"seconds": result.timing["seconds"], "views": result.timing["views"]}), flush=True)


def measured(base: Path, side: int, images: int) -> dict:
    command = [sys.executable, __file__, "--child", str(base), "--side", str(side), "--images", str(images)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    looked, seen, peaks = psutil.Process(process.pid), threading.Event(), [0.0]

    def watch() -> None:
        while not seen.wait(0.02) and process.poll() is None:
            peaks[0] = max(peaks[0], looked.memory_info().rss / 1e9)

    assert process.stdout.readline() == "ready\n"
    before = looked.memory_info().rss / 1e9
    watcher = threading.Thread(target=watch)
    watcher.start()
    process.stdin.write("\n")
    process.stdin.flush()
    told = json.loads(process.stdout.readline())
    seen.set()
    watcher.join()
    assert process.wait() == 0
    return {"GB with the encoder": round(before, 3), "GB at the peak of the run": round(peaks[0], 3),
            "GB above the encoder": round(peaks[0] - before, 3), **told}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "memory.json")
    parser.add_argument("--images", type=int, default=14_000)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        return child(asked.child, asked.side, asked.images)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        paint(base / "photos", asked.images)
        found = measured(base, asked.side, asked.images)
    spec = {k: v for k, v in asdict(spec_of(Path("photos"), asked.side, asked.images)).items() if k != "seed"}
    about = {"GB of pixels": round(asked.images * 3 * asked.side**2 / 1e9, 3), "date": time.strftime("%Y-%m-%d")}
    content = {**about, **found, "spec": spec, **environment()}
    asked.out.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps({**about, **found}, indent=1))


if __name__ == "__main__":
    main()
