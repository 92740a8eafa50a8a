"""The single-image transformations T of Algorithm 1, on whole batches, on the device of the images.

A transform is a pure function of an image and of some uniform numbers: who draws them, and under which key, is the
business of `views`. View k of image i depends on image i and on row (i, k) of the numbers, on nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Num
from torch import Tensor

from dpmix.core import augmentations, checks

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Transform:
    """`draws(C, H, W)` uniforms a view; `apply(images [b, C, H, W], uniforms [b, k, draws]) -> [b, k, C, H, W]`."""

    draws: Callable[[Shape], int]
    apply: Callable[[Tensor, Tensor], Tensor]


def as_float(images: Tensor) -> Tensor:
    """Pixels as floats in 0..1: uint8 is divided by 255, floats pass unchanged."""
    return (
        images.float() / 255
        if images.dtype == torch.uint8
        else images
        if images.is_floating_point()
        else _refuse(images)
    )


def _refuse(images: Tensor) -> Tensor:
    raise ValueError(f"images.dtype={images.dtype}: must be uint8 (0..255) or floating point (0..1)")


def identity(images: Tensor, uniforms: Tensor) -> Tensor:
    """The image itself, k times."""
    k = uniforms.shape[1]
    return as_float(images)[:, None].expand(-1, k, -1, -1, -1)


def _reflect(index: Tensor, size: int) -> Tensor:
    """Reflection without repeating the border: -1 -> 1, size -> size - 2."""
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)


def crop(images: Tensor, uniforms: Tensor, flip: bool = False) -> Tensor:
    """Pad by reflection by an eighth of each side (4 pixels of 32, 1 of 8), crop at random, mirror with probability 1/2.

    The padding is never materialised: a crop is a gather with reflected indices. Uniforms: row shift, column shift, mirror.
    """
    b, channels, height, width = images.shape
    k = uniforms.shape[1]
    uniforms = uniforms.to(images.device)
    pad_rows, pad_cols = (max(1, side // 8) if side > 1 else 0 for side in (height, width))
    shift_rows = (uniforms[..., 0] * (2 * pad_rows + 1)).long() - pad_rows
    shift_cols = (uniforms[..., 1] * (2 * pad_cols + 1)).long() - pad_cols
    rows = torch.arange(height, device=images.device).expand(b, k, height)
    cols = torch.arange(width, device=images.device).expand(b, k, width)
    if flip:
        cols = torch.where(uniforms[..., 2, None] < 0.5, width - 1 - cols, cols)
    rows = _reflect(rows + shift_rows[..., None], height)
    cols = _reflect(cols + shift_cols[..., None], width)
    flat = (rows[..., :, None] * width + cols[..., None, :]).reshape(b, 1, k * height * width)
    pixels = images.reshape(b, channels, height * width).gather(2, flat.expand(-1, channels, -1))
    return as_float(pixels).reshape(b, channels, k, height, width).transpose(1, 2)


CROPS: dict[str, Transform] = {
    "crop": Transform(lambda shape: 3, crop),
    "crop-flip": Transform(lambda shape: 3, lambda images, uniforms: crop(images, uniforms, flip=True)),
}


def _then(first: Transform, second: augmentations.Augmentation) -> Transform:
    """A crop, and what Table 4 adds to it: the uniforms of the crop come first."""

    def both(images: Tensor, uniforms: Tensor) -> Tensor:
        uniforms = uniforms.to(images.device)
        used = first.draws(_shape(images))
        views = first.apply(images, uniforms[..., :used])
        flat = augmentations.apply(second, views.flatten(0, 1), uniforms[..., used:].flatten(0, 1))
        return flat.reshape(views.shape)

    return Transform(lambda shape: first.draws(shape) + second.draws(shape), both)


def _shape(images: Tensor) -> Shape:
    return images.shape[-3], images.shape[-2], images.shape[-1]


TRANSFORMS: dict[str, Transform] = {
    "none": Transform(lambda shape: 0, identity),
    **CROPS,
    **{
        f"{crop_name}+{name}": _then(first, second)
        for crop_name, first in CROPS.items()
        for name, second in augmentations.AUGMENTATIONS.items()
    },
}


def without_flip(name: str) -> str:
    """The transform for a data set in which a mirrored image has another meaning (digits: a mirrored 2 is no 2)."""
    return name.replace("crop-flip", "crop")


def apply(
    name: str, images: Num[Tensor, "b C H W"], uniforms: Float[Tensor, "b k draws"]
) -> Float[Tensor, "b k C H W"]:
    """k views of each image under the transform `name`; pixels 0..1. b = 0 and k = 0 give empty tensors.

    Raises ValueError for an unknown name (with near matches) or pixels that are neither uint8 nor floats.
    """
    checks.one_of("transform", name, TRANSFORMS)
    return TRANSFORMS[name].apply(images, uniforms)
