"""Labelled images, and the two parts of a data set."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpmix.core.checks import counted, require


@dataclass(frozen=True)
class ImageSet:
    """Labelled images. `images` may lie over a memory map: index it, do not copy it needlessly. `class_names[labels[i]]`
    names the class of image i. `flip` says whether a mirrored image keeps its label (false for digits). Raises ValueError for
    any other dtype or shape, for labels that do not fit and for repeated class names."""

    images: Tensor  # uint8 [n, C, H, W]
    labels: Tensor  # int64 [n]
    class_names: tuple[str, ...]
    flip: bool = True

    def __post_init__(self) -> None:
        for name, dtype, dims in (("images", torch.uint8, 4), ("labels", torch.int64, 1)):
            array = getattr(self, name)
            good = array.dtype == dtype and array.ndim == dims
            require(good, name, f"{array.dtype} {list(array.shape)}", f"must be {dtype} with {dims} dimensions")
        n, shape = len(self.images), list(self.images.shape)
        require(min(shape[1:]) > 0, "images", shape, "must hold at least one pixel each")
        require(n == len(self.labels), "labels", len(self.labels), f"must be as many as images: {n}")
        require(len(set(self.class_names)) == len(self.class_names) > 0, "class_names", self.class_names, "must differ")
        if len(self.labels):
            low, high, last = int(self.labels.min()), int(self.labels.max()), len(self.class_names) - 1
            require(low >= 0 and high <= last, "labels", f"{low}..{high}", f"must lie in 0..{last}, one per class name")

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:  # no pixels and no labels, wherever it is printed
        shape = " × ".join(map(str, self.images.shape[1:]))
        return f"ImageSet({counted(len(self), 'image')}, {shape}, {counted(self.num_classes, 'class')})"

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
