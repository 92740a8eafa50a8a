"""The single-image transformations T of Algorithm 1, on whole batches, on the device of the images.

A transform is a pure function of an image and of some uniform numbers: who draws them, and under which key, is the
business of `views`. View k of image i depends on image i and on row (i, k) of the numbers, on nothing else.
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Num
from torch import Tensor

from dpmix.core import checks
from dpmix.core.augmentations import AUGMENTATIONS, Shape


def as_float(images: Tensor) -> Tensor:
    """Pixels as floats in 0..1: uint8 is divided by 255, floats pass unchanged."""
    if images.dtype == torch.uint8:
        return images.float() / 255
    if images.is_floating_point():
        return images
    raise ValueError(f"images.dtype={images.dtype}: must be uint8 (0..255) or floating point (0..1)")


def identity(images: Tensor, uniforms: Tensor) -> Tensor:
    """The image itself, k times."""
    return as_float(images)[:, None].expand(-1, uniforms.shape[1], -1, -1, -1)


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


def mirror(images: Tensor, uniforms: Tensor) -> Tensor:
    """The whole image, mirrored with probability 1/2: the framing stays. Uniform: mirror."""
    views = identity(images, uniforms)
    return torch.where(uniforms[..., 0, None, None, None] < 0.5, views.flip(-1), views)


# Names: a crop or none, and what Table 4 adds to a crop. The uniforms of the crop come first.
Crop = Callable[[Tensor, Tensor], Tensor]
CROPS: dict[str, tuple[int, Crop]] = {
    "none": (0, identity),
    "flip": (1, mirror),
    "crop": (3, crop),
    "crop-flip": (3, partial(crop, flip=True)),
}
TRANSFORMS = [*CROPS, *(f"{name}+{more}" for name in ("crop", "crop-flip") for more in AUGMENTATIONS)]


def draws(name: str, shape: Shape) -> int:
    """How many uniforms a view of an image of `shape` [C, H, W] takes under the transform `name`."""
    crop_name, _, more = name.partition("+")
    return CROPS[crop_name][0] + (AUGMENTATIONS[more].draws(shape) if more else 0)


def without_flip(name: str) -> str:
    """The transform for a data set in which a mirrored image has another meaning (digits: a mirrored 2 is no 2)."""
    return "none" if name == "flip" else name.replace("crop-flip", "crop")


def apply(
    name: str, images: Num[Tensor, "b C H W"], uniforms: Float[Tensor, "b k draws"]
) -> Float[Tensor, "b k C H W"]:
    """k views of each image under the transform `name`; pixels 0..1. b = 0 and k = 0 give empty tensors.

    Raises ValueError for an unknown name (with near matches) or pixels that are neither uint8 nor floats.
    """
    checks.one_of("transform", name, TRANSFORMS)
    crop_name, _, more = name.partition("+")
    used, first = CROPS[crop_name]
    uniforms = uniforms.to(images.device)
    views = first(images, uniforms[..., :used])
    if not more or not views.numel():
        return views
    return AUGMENTATIONS[more].apply(views.flatten(0, 1), uniforms[..., used:].flatten(0, 1)).reshape(views.shape)
