"""Crops and mirrors: equal to a slow version in NumPy, all shifts reached, nothing shared between images.

The transformations of Table 4 are in test_augmentations.
"""

import numpy as np
import pytest
import torch
from scipy import stats

from dpmix.core import transforms

SHAPES = [(1, 8, 8), (3, 32, 32), (2, 5, 9), (1, 2, 2), (1, 1, 4), (1, 1, 1)]
CROPS = ["crop", "crop-flip"]


def slow_crop(image: np.ndarray, numbers: np.ndarray, flip: bool) -> np.ndarray:
    """Pad a whole image by reflection, mirror it if told, cut out a window."""
    _, height, width = image.shape
    pads = [max(1, side // 8) if side > 1 else 0 for side in (height, width)]
    padded = np.pad(image, [(0, 0), (pads[0],) * 2, (pads[1],) * 2], mode="reflect")
    top, left = (int(u * (2 * pad + 1)) for u, pad in zip(numbers[:2], pads, strict=True))
    window = padded[:, top : top + height, left : left + width]
    return window[:, :, ::-1] if flip and numbers[2] < 0.5 else window


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CROPS)
def test_crops_equal_the_slow_version(name, shape):
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (4, *shape), dtype=np.uint8)
    numbers = draw.random((4, 30, 3))
    numbers[0, 0], numbers[0, 1], numbers[0, 2] = 0, 1 - 2**-53, 0.5
    made = transforms.apply(name, torch.from_numpy(images), torch.from_numpy(numbers))
    assert made.shape == (4, 30, *shape) and made.dtype == torch.float32
    for i in range(4):
        for k in range(30):
            want = slow_crop(images[i], numbers[i, k], name == "crop-flip") / np.float32(255)
            assert (made[i, k].numpy() == want.astype(np.float32)).all()


def test_a_mirror_keeps_the_framing():
    images = torch.arange(12, dtype=torch.uint8).reshape(1, 1, 3, 4)
    made = transforms.apply("flip", images, torch.tensor([[[0.49], [0.5], [0.0]]]))[0]
    whole = images[0] / 255
    assert torch.equal(made, torch.stack([whole.flip(-1), whole, whole.flip(-1)]))
    assert transforms.without_flip("flip") == "none" and transforms.without_flip("crop-flip+blur") == "crop+blur"


def positions(name: str, views: int) -> tuple[np.ndarray, np.ndarray]:
    """Of an image that says where each pixel was: the original place of the middle pixel, and whether it is mirrored."""
    where = torch.arange(64, dtype=torch.float64).reshape(1, 1, 8, 8)
    numbers = torch.from_numpy(np.random.default_rng(1).random((1, views, 3)))
    made = transforms.apply(name, where, numbers)[0, :, 0]
    return made[:, 4, 4].long().numpy(), (made[:, 4, 4] > made[:, 4, 5]).numpy()


def test_every_shift_is_equally_likely_and_half_are_mirrored():
    """p < 1e-6 once in a million seeds; the seed is fixed."""
    place, mirrored = positions("crop", 9000)
    counts = np.bincount(place, minlength=64)
    assert sorted(np.flatnonzero(counts)) == [r * 8 + c for r in (3, 4, 5) for c in (3, 4, 5)], "one pixel of eight"
    assert stats.chisquare(counts[counts > 0]).pvalue > 1e-6
    assert not mirrored.any(), "a plain crop never mirrors"
    _, mirrored = positions("crop-flip", 9000)
    assert stats.binomtest(int(mirrored.sum()), 9000).pvalue > 1e-6


@pytest.mark.parametrize("name", ["none", "flip", *CROPS])
def test_a_view_depends_on_its_own_image_and_numbers(name):
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (5, 2, 8, 8), generator=draw, dtype=torch.uint8)
    numbers = torch.rand(5, 4, transforms.draws(name, (2, 8, 8)), generator=draw, dtype=torch.float64)
    made = transforms.apply(name, images, numbers)
    others = torch.randint(0, 256, (5, 2, 8, 8), generator=draw, dtype=torch.uint8)
    others[2] = images[2]
    assert torch.equal(transforms.apply(name, others, numbers)[2], made[2])
    assert not torch.equal(transforms.apply(name, others, numbers)[3], made[3])
    assert torch.equal(transforms.apply(name, images[2:3], numbers[2:3, 1:2])[0, 0], made[2, 1])


@pytest.mark.parametrize("name", ["none", "flip", *CROPS])
def test_empty_batches_and_no_views(name):
    draws = transforms.draws(name, (1, 8, 8))
    for b, k in ((0, 3), (2, 0), (0, 0)):
        images, numbers = torch.zeros(b, 1, 8, 8, dtype=torch.uint8), torch.zeros(b, k, draws, dtype=torch.float64)
        assert transforms.apply(name, images, numbers).shape == (b, k, 1, 8, 8)


def test_pixels():
    bytes_ = torch.tensor([[[[0, 51, 255]]]], dtype=torch.uint8)
    torch.testing.assert_close(transforms.as_float(bytes_), torch.tensor([[[[0.0, 0.2, 1.0]]]]))
    doubles = torch.rand(1, 1, 2, 2, dtype=torch.float64)
    assert transforms.as_float(doubles) is doubles
    with pytest.raises(ValueError, match=r"images.dtype=torch.int64: must be uint8"):
        transforms.as_float(torch.zeros(1, dtype=torch.int64))


def test_names():
    assert transforms.without_flip("crop-flip") == "crop"
    for name in transforms.TRANSFORMS:
        assert "flip" not in transforms.without_flip(name) and transforms.without_flip(name) in transforms.TRANSFORMS
    with pytest.raises(ValueError, match="transform='crop_flip': unknown; did you mean 'crop-flip'"):
        transforms.apply("crop_flip", torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 3, dtype=torch.float64))
