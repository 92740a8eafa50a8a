"""Unpack image files kept in one npz into the layout of `folder:`, train/CLASS/NNNNN.jpg and test/CLASS/NNNNN.jpg.

    python benchmarks/unpack_cifar10.py cifar10_jpeg.npz data/datasets/cifar10_jpeg

Arrays: `bytes` (the files one after the other), `offsets` [n + 1], `labels` [n], `is_test` [n], `classes` (names).
"""

import argparse
from pathlib import Path

import numpy as np


def unpack(npz: Path, folder: Path) -> int:
    """Write the files below `folder`; returns how many."""
    with np.load(npz, allow_pickle=False) as arrays:
        content, offsets, labels, is_test, classes = (
            arrays[k] for k in ("bytes", "offsets", "labels", "is_test", "classes")
        )
    for part in ("train", "test"):
        for name in classes:
            if Path(str(name)).name != str(name):
                raise ValueError(f"classes={str(name)!r}: must be a plain folder name")
            (folder / part / str(name)).mkdir(parents=True, exist_ok=True)
    for i, label in enumerate(labels):
        path = folder / ("test" if is_test[i] else "train") / str(classes[label]) / f"{i:05d}.jpg"
        path.write_bytes(content[offsets[i] : offsets[i + 1]].tobytes())
    return len(labels)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("npz", type=Path)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    print(f"images in {given.folder}: {unpack(given.npz, given.folder):,}")
