"""Are public images copies of private ones? Then mixing them in would release private data unprotected."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dpmix.core.checks import counted, require
from dpmix.images.data import ImageSet, Splits
from dpmix.images.image_cache import pixel_hash


class Overlap(NamedTuple):
    """Pairs (private id, public id), int64 `[m, 2]`: equal pixel by pixel, and nearly equal."""

    exact: Int64[Tensor, "exact 2"]
    near: Int64[Tensor, "near 2"]


def _outlines(images: Tensor, side: int) -> Float[Tensor, "n c h w"]:
    """Averages over a grid of at most side × side cells, in 0..255; a few images in memory at a time."""
    size = (min(side, images.shape[2]), min(side, images.shape[3]))
    return torch.cat([torch.nn.functional.adaptive_avg_pool2d(some.float(), size) for some in images.split(256)])


def _directions(outlines: Tensor) -> Float[Tensor, "n d"]:
    """Flat, without each channel's mean, of length one; zero where the contrast is below one level of 255."""
    flat = (outlines - outlines.mean((2, 3), keepdim=True)).flatten(1)
    length = flat.norm(dim=1, keepdim=True)
    return torch.where(length >= flat.shape[1] ** 0.5, flat / length, 0)


def overlap(private: ImageSet, public: ImageSet) -> Overlap:
    """Public images that are copies, or nearly, of private ones. Exact: same shape and pixels. Near: outlines on a grid of 8
    × 8 greys are correlated by 0.99 or more, and those on 16 × 16 colours by 0.995 or more, and differ on average by at most
    10 of 255 levels. That finds copies that were resized, encoded again or made slightly noisy; not mirrored
    or shifted ones, nor images without contrast. Two different digits of scikit-learn are correlated by at most 0.9942."""
    known: dict[str, list[int]] = {}
    if private.images.shape[1:] == public.images.shape[1:]:
        for i, image in enumerate(private.images):
            known.setdefault(pixel_hash(image.numpy()), []).append(i)
    exact = [(i, j) for j, image in enumerate(public.images) for i in known.get(pixel_hash(image.numpy()), [])]
    ours, theirs = _outlines(private.images, 16), _outlines(public.images, 16)
    if ours.shape[1:] != theirs.shape[1:]:
        side = min(*ours.shape[2:], *theirs.shape[2:])
        ours, theirs = (_outlines(some.mean(1, keepdim=True), side) for some in (ours, theirs))
    fine, coarse = _directions(theirs), _directions(_outlines(theirs.mean(1, keepdim=True), 8))
    near: list[list[int]] = []
    for first in range(0, len(ours), 1024):
        some = ours[first : first + 1024]
        row, column = (_directions(_outlines(some.mean(1, keepdim=True), 8)) @ coarse.T >= 0.99).nonzero(as_tuple=True)
        alike = (_directions(some)[row] * fine[column]).sum(1) >= 0.995
        alike &= (some[row] - theirs[column]).abs().flatten(1).mean(1) <= 10
        near += torch.stack([row + first, column], 1)[alike].tolist()
    others = sorted({(i, j) for i, j in near} - set(exact))
    return Overlap(*(torch.tensor(pairs, dtype=torch.int64).view(-1, 2) for pairs in (exact, others)))


def refuse_overlap(splits: Splits, public: ImageSet) -> None:
    """Raise ValueError if public images are copies of training or test images, with how many and which."""
    for part, private in (("training images", splits.train), ("test images", splits.test)):
        exact, near = overlap(private, public)
        pairs = ", ".join(f"{j} of number {i}" for i, j in [*exact.tolist(), *near.tolist()][:3])
        told = f"{len(exact)} exact and {len(near)} near copies of {part} (public image {pairs}); remove them"
        require(len(exact) + len(near) == 0, "public_images", counted(len(public), "image"), told)
