"""Shared by the tests: a result store of their own, and a private problem so small that a pass takes milliseconds."""

import atexit
import os
import shutil
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dpmix.images.data import ImageSet
from dpmix.models.encoders import Encoder

# A shell ignores Ctrl-C for what it starts in the background; the tests that send it, and what they start, must not.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before dpmix.runs.store is imported: no test, and no notebook that a test runs, reads or writes the user's own store.
os.environ["DPMIX_STORE"] = tempfile.mkdtemp(prefix="dpmix-tests-")
atexit.register(shutil.rmtree, os.environ["DPMIX_STORE"], ignore_errors=True)

CLASSES, DIM, SIDE = 3, 5, 4


def image_set(n: int, seed: int = 0, *, flip: bool = True) -> ImageSet:
    """n random images [n, 1, 4, 4] of three classes."""
    draw = np.random.default_rng(seed)
    images = torch.from_numpy(draw.integers(0, 256, (n, 1, SIDE, SIDE), dtype=np.uint8))
    labels = torch.from_numpy(draw.integers(0, CLASSES, n))
    return ImageSet(images, labels, ("a", "b", "c"), flip)


@pytest.fixture
def private() -> ImageSet:
    return image_set(40)


@pytest.fixture
def public() -> ImageSet:
    return image_set(9, seed=1)


@pytest.fixture
def projection() -> Encoder:
    """A frozen random projection of the pixels."""
    matrix = torch.from_numpy(np.random.default_rng(2).normal(size=(SIDE * SIDE, DIM)))
    return Encoder(lambda x: x.flatten(1) @ matrix.to(x), SIDE, DIM, (1,), "projection")


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of forty training and eight test images of two classes, grey, 8x8, no two alike."""
    base = tmp_path / "photos"
    for part, count in (("train", 20), ("test", 4)):
        for c in (0, 1):
            (base / part / "ab"[c]).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng([i, c, part == "test"]).integers(0, 256, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(base / part / "ab"[c] / f"{i}.png")
    return base


@pytest.fixture
def store(tmp_path):
    """A store of results, empty."""
    from dpmix.runs.store import Store

    return Store(tmp_path / "runs")
