"""CIFAR-10's class folders from lossless mosaics of a thousand images, 25 rows of 40, and an index with names and digests.

    python benchmarks/gpu_data.py MOSAICS... --to data/datasets/cifar10

For a machine to which 60,000 files cannot be taken. Every pixel is compared with its digest before a file is written.
"""

import argparse
import hashlib
import json
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image


def unpack(mosaic: Path, about: dict, to: Path) -> int:
    pixels = np.asarray(Image.open(mosaic).convert("RGB"))
    images = pixels.reshape(25, 32, 40, 32, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3)
    if hashlib.sha256(images.tobytes()).hexdigest() != about["sha256"]:
        raise SystemExit(f"{mosaic}: its pixels are not those that were packed")
    folder = to / about["part"] / about["class"]
    folder.mkdir(parents=True, exist_ok=True)
    for image, name in zip(images, about["files"], strict=True):
        Image.fromarray(image).save(folder / name, compress_level=1)
    return len(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--to", type=Path, required=True)
    asked = parser.parse_args()
    there = {path.name: path for folder in asked.folders for path in folder.iterdir()}
    index = json.loads(there["index.json"].read_text())
    missing = [about["mosaic"] for about in index if about["mosaic"] not in there]
    if missing:
        raise SystemExit(f"mosaics that are missing: {', '.join(missing)}")
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(unpack, there[about["mosaic"]], about, asked.to) for about in index]
        print(f"images in {asked.to}: {sum(job.result() for job in jobs):,}")


if __name__ == "__main__":
    main()
