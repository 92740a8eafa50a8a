"""The other single-image transformations of Table 4, each applied on top of the crop of `transforms`.

An augmentation is a pure function of n images in 0..1 and of the uniforms of each, on the device of the images, all at
once. Output i depends on image i and on row i of the uniforms, on nothing else: a statistic of the data set, such as its
mean colour, would be one more thing to protect.

The paper names its transformations after Chen et al. 2020 (SimCLR) and states no strengths. Those here are SimCLR's where
it has some, scaled to the image, and kept small enough that a digit of 8x8 pixels stays what it is:

========  ==========================================================================================================
jitter    SimCLR at strength 0.5 (its CIFAR-10 setting): brightness, contrast and saturation times 0.6 to 1.4, hue by up
          to a tenth of the circle, in this order. Without colour (not 3 channels): brightness and contrast only.
affine    rotation by up to 15 degrees (SimCLR turns by multiples of 90, and a 6 would be a 9), translation by up to a
          tenth of each side; bilinear, border reflected
cutout    a square of a quarter of the side, its centre anywhere, painted in the mean of the image
noise     Gaussian, standard deviation 0.1 for pixels in 0..1
blur      Gaussian, a window of a tenth of the side (at least 3 pixels), sigma 0.1 to 2 pixels; on sides below 32, up to
          a sixteenth of the side
sobel     the magnitude of the Sobel gradient of each channel, in place of the image; an edge from 0 to 1 gives 1
all       one of these six, drawn for each image
========  ==========================================================================================================

Every image is transformed (SimCLR leaves some alone), and the result is clamped to 0..1.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from kornia import enhance, filters, geometry
from torch import Tensor

Shape = tuple[int, ...]

JITTER, HUE, ROTATION, TRANSLATION, CUTOUT, NOISE, BLUR = 0.4, 0.1, 15.0, 0.1, 0.25, 0.1, (0.1, 2.0)


class Augmentation(NamedTuple):
    """`draws(C, H, W)` uniforms an image; `apply(images [n, C, H, W], uniforms [n, draws]) -> [n, C, H, W]`, n > 0."""

    draws: Callable[[Shape], int]
    apply: Callable[[Tensor, Tensor], Tensor]


def _between(uniforms: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * uniforms


def jitter(images: Float[Tensor, "n C H W"], uniforms: Float[Tensor, "n draws"]) -> Float[Tensor, "n C H W"]:
    """Brightness (a factor), contrast (away from the mean grey), and with 3 channels saturation (away from grey) and hue."""
    factors = _between(uniforms, 1 - JITTER, 1 + JITTER).to(images)
    images = (images * factors[:, 0, None, None, None]).clamp(0, 1)
    images = enhance.adjust_contrast_with_mean_subtraction(images, factors[:, 1])
    if images.shape[1] != 3:
        return images
    images = enhance.adjust_saturation_with_gray_subtraction(images, factors[:, 2])
    turns = _between(uniforms[:, 3], -HUE, HUE).to(images)
    return enhance.adjust_hue(images, 2 * torch.pi * turns).clamp(0, 1)


def affine(images: Float[Tensor, "n C H W"], uniforms: Float[Tensor, "n draws"]) -> Float[Tensor, "n C H W"]:
    """Rotation about the centre, then translation. Uniforms: angle, columns, rows; one half of each is no change."""
    height, width = images.shape[-2:]
    signed = _between(uniforms, -1.0, 1.0).to(images)
    centre = torch.tensor([(width - 1) / 2, (height - 1) / 2]).to(images).expand(len(images), 2)
    matrix = geometry.get_rotation_matrix2d(centre, ROTATION * signed[:, 0], torch.ones_like(centre))
    shift = TRANSLATION * signed[:, 1:3] * torch.tensor([width, height]).to(images)
    matrix = torch.cat([matrix[..., :2], matrix[..., 2:] + shift[..., None]], dim=-1)
    return geometry.affine(images, matrix, padding_mode="reflection").clamp(0, 1)


def cutout(images: Float[Tensor, "n C H W"], uniforms: Float[Tensor, "n draws"]) -> Float[Tensor, "n C H W"]:
    """Paint over a square, cut off at the border, with each channel's mean. Uniforms: row and column of its centre."""
    inside = []
    for axis, side in enumerate(images.shape[-2:]):
        size = max(1, round(CUTOUT * side))
        first = (uniforms[:, axis] * side).long() - size // 2
        offset = torch.arange(side, device=images.device) - first[:, None]
        inside.append((offset >= 0) & (offset < size))
    hole = (inside[0][:, :, None] & inside[1][:, None, :])[:, None]
    return torch.where(hole, images.mean(dim=(2, 3), keepdim=True), images)


def noise(images: Float[Tensor, "n C H W"], uniforms: Float[Tensor, "n draws"]) -> Float[Tensor, "n C H W"]:
    """Add a normal number to each pixel, by the inverse of its distribution function: one uniform a pixel and channel."""
    normal = torch.special.ndtri(uniforms.double().clamp(2.0**-54, 1 - 2.0**-53))  # 0 would be minus infinity
    return (images + NOISE * normal.view(images.shape).to(images)).clamp(0, 1)


def blur(images: Float[Tensor, "n C H W"], uniforms: Float[Tensor, "n draws"]) -> Float[Tensor, "n C H W"]:
    """A Gaussian window, border reflected. Uniform: sigma."""
    side = min(images.shape[-2:])
    window = min(max(3, 2 * (side // 20) + 1), 2 * side - 1)
    low, high = BLUR
    sigma = _between(uniforms[:, :1], low, max(low, min(high, side / 16))).to(images)
    return filters.gaussian_blur2d(images, window, sigma.expand(-1, 2)).clamp(0, 1)


def sobel(images: Float[Tensor, "n C H W"], uniforms: Float[Tensor, "n draws"]) -> Float[Tensor, "n C H W"]:
    """The length of the gradient at each pixel. No randomness of its own."""
    return (2 * filters.sobel(images, eps=0.0)).clamp(0, 1)


SINGLE: dict[str, Augmentation] = {
    "jitter": Augmentation(lambda shape: 4 if shape[0] == 3 else 2, jitter),
    "affine": Augmentation(lambda shape: 3, affine),
    "cutout": Augmentation(lambda shape: 2, cutout),
    "noise": Augmentation(lambda shape: shape[0] * shape[1] * shape[2], noise),
    "blur": Augmentation(lambda shape: 1, blur),
    "sobel": Augmentation(lambda shape: 0, sobel),
}


def one_of_all(images: Float[Tensor, "n C H W"], uniforms: Float[Tensor, "n draws"]) -> Float[Tensor, "n C H W"]:
    """One of `SINGLE` for each image, all equally likely. Uniforms: which, then those of the one."""
    which = (uniforms[:, 0] * len(SINGLE)).long()
    shape = images.shape[1], images.shape[2], images.shape[3]
    out = torch.empty_like(images)
    for place, single in enumerate(SINGLE.values()):
        chosen = which == place
        if chosen.any():
            out[chosen] = single.apply(images[chosen], uniforms[chosen, 1 : 1 + single.draws(shape)])
    return out


AUGMENTATIONS: dict[str, Augmentation] = {
    **SINGLE,
    "all": Augmentation(lambda shape: 1 + max(single.draws(shape) for single in SINGLE.values()), one_of_all),
}
