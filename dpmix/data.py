"""Floor 0: images and their labels. `load` gives the private data, `public_images` the synthetic images beside it.

Everything is uint8 `[n, C, H, W]` in 0..255, in a fixed order, with a fixed split: the same call gives the same arrays.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from sklearn.datasets import load_digits
from torch import Tensor

from .checks import one_of, require
from .rng import generator

_HERE = Path(__file__).resolve().parents[1]
PROJECT = _HERE if (_HERE / "data" / "public").is_dir() else Path.cwd()  # the clone; else where Python was started
ROOT = PROJECT / "data" / "datasets"
PUBLIC = PROJECT / "data" / "public"
SPLIT_SEED = 0  # of every split that the authors of a data set did not fix; part of the data, not of a run


@dataclass(frozen=True)
class ImageSet:
    """Labelled images. `images` may lie over a memory map: index it, do not copy it needlessly.

    `class_names[labels[i]]` names the class of image i. `flip` says whether a mirrored image keeps its label (false for
    digits). Raises ValueError for any other dtype or shape, for labels that do not fit and for repeated class names.
    """

    images: UInt8[Tensor, "n C H W"]
    labels: Int64[Tensor, " n"]
    class_names: tuple[str, ...]
    flip: bool = True

    def __post_init__(self) -> None:
        for name, array, dtype, dims in (
            ("images", self.images, torch.uint8, 4),
            ("labels", self.labels, torch.int64, 1),
        ):
            require(isinstance(array, Tensor), name, type(array).__name__, "must be a torch tensor")
            good = array.dtype == dtype and array.ndim == dims
            require(good, name, f"{array.dtype} {list(array.shape)}", f"must be {dtype} with {dims} dimensions")
        require(min(self.images.shape[1:]) > 0, "images", list(self.images.shape), "must hold at least one pixel each")
        require(
            len(self.images) == len(self.labels), "labels", len(self.labels), f"must match {len(self.images)} images"
        )
        require(len(set(self.class_names)) == len(self.class_names) > 0, "class_names", self.class_names, "must differ")
        if len(self.labels):
            low, high = int(self.labels.min()), int(self.labels.max())
            last = len(self.class_names) - 1
            require(low >= 0 and high <= last, "labels", f"{low}..{high}", f"must lie in 0..{last}, one per class name")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def subset(self, ids: Tensor | np.ndarray | Sequence[int] | slice) -> "ImageSet":
        """The images `ids`, in that order (a slice is a view, anything else a copy)."""
        ids = ids if isinstance(ids, slice) else torch.as_tensor(ids, dtype=torch.int64)
        return ImageSet(self.images[ids], self.labels[ids], self.class_names, self.flip)


@dataclass(frozen=True)
class Splits:
    """Training and test set. `digest` (sha256, hex) tells apart any two splits, file lists, labels or contents."""

    train: ImageSet
    test: ImageSet
    digest: str

    def __post_init__(self) -> None:
        for field in ("class_names", "flip"):
            ours, theirs = getattr(self.train, field), getattr(self.test, field)
            require(ours == theirs, f"test.{field}", theirs, f"must equal train.{field}={ours!r}")
        ours, theirs = self.train.images.shape[1:], self.test.images.shape[1:]
        require(ours == theirs, "test.images", list(theirs), f"must have the shape of train.images, {list(ours)}")


def stratified_split(labels: np.ndarray, name: str, test_fraction: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Ids of training and test set, ascending: n_train = floor((1 - test_fraction)·n), each class in proportion.

    Keyed by `(SPLIT_SEED, "split", name, class)`. What rounding leaves goes to the classes with the largest remainder.
    """
    counts = np.bincount(labels)
    test_total = len(labels) - int(len(labels) * (1 - test_fraction) + 1e-9)
    quota = counts * test_total / len(labels)
    take = np.floor(quota).astype(int)
    take[np.argsort(take - quota, kind="stable")[: test_total - take.sum()]] += 1
    test = [
        generator(SPLIT_SEED, "split", name, c).permutation(np.flatnonzero(labels == c))[: take[c]]
        for c in range(len(counts))
    ]
    chosen = np.sort(np.concatenate(test))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def _digest(**parts: object) -> str:
    """sha256 over named parts: arrays by content, everything else as JSON."""
    total = hashlib.sha256()
    for key, value in sorted(parts.items()):
        if isinstance(value, np.ndarray):
            value = [str(value.dtype), value.shape, hashlib.sha256(np.ascontiguousarray(value).data).hexdigest()]
        total.update(json.dumps([key, value]).encode())
    return total.hexdigest()


def _load_digits() -> Splits:
    """The 1,797 handwritten digits of scikit-learn, 0..16 scaled to 0..255: 1,437 for training, 360 for testing."""
    raw = load_digits()
    images = np.rint(raw.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = raw.target.astype(np.int64)
    train, test = stratified_split(labels, "digits")
    whole = ImageSet(torch.from_numpy(images), torch.from_numpy(labels), tuple("0123456789"), flip=False)
    return Splits(
        whole.subset(train), whole.subset(test), _digest(name="digits", images=images, labels=labels, test=test)
    )


def load(name: str, root: str | Path = ROOT, *, image_size: int | None = None, download: bool = False) -> Splits:
    """Training and test set of a data set, always the same arrays in the same order."""
    one_of("dataset", name, ["digits"])
    return _load_digits()


def public_images(name: str) -> ImageSet:
    """The synthetic public images that go with a data set: made from public data alone, never from the private set."""
    one_of("dataset", name, ["digits"])
    path = PUBLIC / "synthetic_digits.npz"
    if not path.is_file() or not path.with_suffix(".json").is_file():
        raise FileNotFoundError(
            f"{path} or its .json is missing: run notebooks/public_standins, or restore it from git"
        )
    wanted = json.loads(path.with_suffix(".json").read_text())["sha256"]
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    require(
        found == wanted,
        str(path),
        f"sha256 {found[:12]}",
        f"the record beside it says {wanted[:12]}; restore it from git",
    )
    with np.load(path, allow_pickle=False) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    public = ImageSet(torch.from_numpy(images), torch.from_numpy(labels), tuple("0123456789"), flip=False)
    missing = [c for i, c in enumerate(public.class_names) if not (labels == i).any()]
    require(not missing, "public_images", name, f"no synthetic images of {', '.join(missing)}")
    return public
