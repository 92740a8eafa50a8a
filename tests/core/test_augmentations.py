"""The transformations of Table 4: each against another implementation, each a function of its own image and numbers."""

import numpy as np
import pytest
import scipy.ndimage
import torch
import torchvision.transforms.functional as tv
from scipy import stats

from dpmix.companion.paper import TRANSFORMS as PUBLISHED
from dpmix.core import augmentations, transforms, views
from dpmix.core.augmentations import AUGMENTATIONS, SINGLE
from dpmix.images import data

GREY, COLOUR = (1, 8, 8), (3, 32, 32)
NAMES = [f"{crop}+{name}" for crop in ("crop", "crop-flip") for name in AUGMENTATIONS]


def problem(shape, name, n=12, seed=0):
    """n smooth-ish images, and the uniforms that augmentation `name` needs for them."""
    g = torch.Generator().manual_seed(seed)
    images = torch.rand(n, *shape, generator=g)
    uniforms = torch.rand(n, AUGMENTATIONS[name].draws(shape), generator=g, dtype=torch.float64)
    return images, uniforms


def test_table_4_is_complete_and_recipes_accept_it():
    assert set(AUGMENTATIONS) == set(PUBLISHED) - {"crop-flip"}
    for name in AUGMENTATIONS:
        recipe = views.Recipe(transform=f"crop-flip+{name}")
        assert recipe.for_data(flip=False).transform == f"crop+{name}" == transforms.without_flip(recipe.transform)
        assert recipe.for_data(flip=True) == recipe
    with pytest.raises(ValueError, match=r"transform='crop-flip\+jiter': unknown; did you mean 'crop-flip\+jitter'"):
        views.Recipe(transform="crop-flip+jiter")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [GREY, COLOUR, (2, 5, 9), (1, 1, 1)])
def test_a_view_depends_on_its_own_image_and_numbers_alone(name, shape):
    g = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (5, *shape), generator=g, dtype=torch.uint8)
    draws = transforms.draws(name, shape)
    uniforms = torch.rand(5, 4, draws, generator=g, dtype=torch.float64)
    before = torch.get_rng_state()
    made = transforms.apply(name, images, uniforms)
    assert torch.equal(before, torch.get_rng_state()), "no draw from the global generator"
    assert made.shape == (5, 4, *shape) and made.dtype == torch.float32
    assert made.isfinite().all() and made.min() >= 0 and made.max() <= 1
    others = torch.randint(0, 256, images.shape, generator=g, dtype=torch.uint8)
    others[2] = images[2]
    moved = torch.rand(uniforms.shape, generator=g, dtype=torch.float64)
    moved[2, 1] = uniforms[2, 1]
    torch.testing.assert_close(transforms.apply(name, others, moved)[2, 1], made[2, 1], rtol=0, atol=1e-6)
    torch.testing.assert_close(
        transforms.apply(name, images[2:3], uniforms[2:3, 1:2])[0, 0], made[2, 1], rtol=0, atol=1e-6
    )
    for b, k in ((0, 4), (5, 0)):
        assert transforms.apply(name, images[:b], uniforms[:b, :k]).shape == (b, k, *shape)


@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_matter(name):
    """Negative control of the test above: other numbers, another view, also where the crop stays put."""
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    uniforms = torch.full((1, 2, transforms.draws(name, (3, 16, 16))), 0.5, dtype=torch.float64)
    uniforms[:, 1, 3:] = 0.9
    first, second = transforms.apply(name, images, uniforms)[0]
    assert torch.equal(first, second) == name.endswith("+sobel")  # it has no numbers of its own


@pytest.mark.parametrize("shape", [GREY, COLOUR])
def test_jitter_equals_torchvision(shape):
    images, uniforms = problem(shape, "jitter")
    made = augmentations.jitter(images, uniforms)
    for image, u, ours in zip(images, uniforms.tolist(), made, strict=True):
        factors = [0.6 + 0.8 * value for value in u]
        expected = tv.adjust_contrast(tv.adjust_brightness(image, factors[0]), factors[1])
        if shape == COLOUR:
            expected = tv.adjust_hue(tv.adjust_saturation(expected, factors[2]), 0.2 * u[3] - 0.1)
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-3)  # its weights of grey have a digit more


@pytest.mark.parametrize("shape", [GREY, COLOUR, (1, 9, 6)])
def test_affine_equals_scipy_and_rests_at_one_half(shape):
    images, uniforms = problem(shape, "affine")
    torch.testing.assert_close(augmentations.affine(images, torch.full_like(uniforms, 0.5)), images, rtol=0, atol=1e-5)
    made = augmentations.affine(images, uniforms)
    _, height, width = shape
    centre = np.array([(height - 1) / 2, (width - 1) / 2])
    for image, u, ours in zip(images, uniforms.tolist(), made, strict=True):
        angle = np.deg2rad(15 * (2 * u[0] - 1))
        shift = np.array([0.1 * (2 * u[2] - 1) * height, 0.1 * (2 * u[1] - 1) * width])
        back = np.array(
            [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
        )  # output to input, rows first
        offset = centre - back @ (centre + shift)
        for channel, got in zip(image.numpy(), ours.numpy(), strict=True):
            want = scipy.ndimage.affine_transform(channel.astype(np.float64), back, offset, order=1, mode="mirror")
            np.testing.assert_allclose(got, want, atol=1e-4)


def test_cutout_paints_a_square_in_the_mean():
    images, uniforms = problem(COLOUR, "cutout")
    uniforms[0] = torch.tensor([0.5, 0.5])
    uniforms[1] = torch.tensor([0.0, 0.0])
    made = augmentations.cutout(images, uniforms)
    hole = made != images
    area = hole.any(dim=1).sum(dim=(1, 2))
    assert area[0] == 64 and area[1] == 16, "a square of 8x8 of 32x32, a quarter of it in the corner"
    assert ((area > 0) & (area <= 64)).all()
    means = images.mean(dim=(2, 3), keepdim=True).expand_as(images)
    assert torch.equal(made[hole], means[hole])


def test_noise_is_normal_with_its_deviation():
    """Kolmogorov-Smirnov on 60,000 pixels: accepts 0.1, rejects two thirds and three halves of it. Seeded: no flakes."""
    images = torch.full((60, 1, 10, 100), 0.5)
    uniforms = torch.from_numpy(np.random.default_rng(0).random((60, 1000)))
    values = (augmentations.noise(images, uniforms) - 0.5).flatten().double().numpy()
    inside = values[np.abs(values) < 0.49]
    assert len(inside) > 59_990, "clamped: beyond 5 deviations"
    assert stats.kstest(inside, "norm", args=(0, 0.1)).pvalue > 0.01
    for wrong in (0.1 / 1.5, 0.15):
        assert stats.kstest(inside, "norm", args=(0, wrong)).pvalue < 1e-6
    for edge in (0.0, 1 - 2.0**-53):
        extreme = augmentations.noise(images[:1], torch.full((1, 1000), edge, dtype=torch.float64))
        assert extreme.isfinite().all()


@pytest.mark.parametrize("shape, window, most", [(GREY, 3, 0.5), (COLOUR, 3, 2.0), ((3, 64, 64), 7, 2.0)])
def test_blur_equals_torchvision(shape, window, most):
    images, uniforms = problem(shape, "blur", n=4)
    made = augmentations.blur(images, uniforms)
    for image, u, ours in zip(images, uniforms[:, 0].tolist(), made, strict=True):
        sigma = 0.1 + (most - 0.1) * u
        torch.testing.assert_close(ours, tv.gaussian_blur(image, [window, window], [sigma, sigma]), rtol=0, atol=1e-5)
    assert (made - images).abs().max() > 0.05


@pytest.mark.parametrize("shape", [GREY, COLOUR])
def test_sobel_equals_scipy(shape):
    images, uniforms = problem(shape, "sobel")
    made = augmentations.sobel(images, uniforms).numpy()
    for image, ours in zip(images.double().flatten(0, 1).numpy(), made.reshape(-1, *shape[1:]), strict=True):
        rows, columns = (scipy.ndimage.sobel(image, axis=axis, mode="nearest") / 4 for axis in (0, 1))
        np.testing.assert_allclose(ours, np.hypot(rows, columns).clip(0, 1), atol=1e-5)
    step = torch.zeros(1, 1, 8, 8)
    step[..., 4:] = 1
    edge = augmentations.sobel(step, torch.zeros(1, 0, dtype=torch.float64))
    assert edge.amax() == 1 and edge[..., :3].sum() == 0, "an edge of full height gives 1, a flat field 0"


@pytest.mark.parametrize("shape", [GREY, COLOUR])
def test_all_takes_one_of_the_six_at_random(shape):
    images, uniforms = problem(shape, "all", n=600)
    made = augmentations.one_of_all(images, uniforms)
    counts = []
    for place, single in enumerate(SINGLE.values()):
        chosen = (uniforms[:, 0] * 6).long() == place
        own = uniforms[chosen, 1 : 1 + single.draws(shape)]
        torch.testing.assert_close(made[chosen], single.apply(images[chosen], own), rtol=0, atol=1e-6)
        counts.append(int(chosen.sum()))
    assert sum(counts) == 600 and stats.chisquare(counts).pvalue > 1e-3


def nearest(name, k=2, still=True):
    """Share of augmented training digits whose nearest other training digit has their label; `still`: crop not shifted."""
    train = data.load("digits").train
    images, labels = train.images[:500], train.labels[:500]
    draws = transforms.draws(name, GREY)
    uniforms = torch.from_numpy(np.random.default_rng(3).random((500, k, draws)))
    if still:
        uniforms[..., :3] = 0.5
    made = transforms.apply(name, images, uniforms).flatten(2)
    known = transforms.as_float(train.images[500:]).flatten(1)
    guess = train.labels[500:][torch.cdist(made.flatten(0, 1), known).argmin(dim=1)].view(500, k)
    return (guess == labels[:, None]).double().mean().item()


def test_digits_stay_what_they_are(monkeypatch):
    """On 8x8 pixels no strength hides the digit: all cost less than the shift of the crop. The Sobel filter does hide it."""
    plain, cropped = nearest("crop"), nearest("crop", still=False)
    shares = {name: nearest(f"crop+{name}") for name in SINGLE}
    assert plain > 0.95
    for name in ("jitter", "cutout", "noise", "blur"):
        assert shares[name] > plain - 0.05, shares
    assert shares["affine"] > cropped + 0.1, "it shifts too, by less than a pixel"
    assert shares["sobel"] < cropped, shares
    monkeypatch.setattr(augmentations, "ROTATION", 180.0)
    assert nearest("crop+affine") < cropped, "negative control: digits turned upside down are other digits"


def test_a_recipe_has_the_same_views_alone_and_in_a_union_and_only_its_own_example_matters():
    train = data.load("digits").train
    ids = torch.arange(6)
    recipes = [views.Recipe(k_base=3, k_self=2, transform=f"crop+{name}") for name in ("noise", "all", "jitter")]
    about = dict(num_classes=10, seed=0, step=3)
    together = views.make_union(recipes)
    made = together.make(train.images[:6], train.labels[:6], ids, **about)
    for recipe, weights in zip(recipes, together.weights, strict=True):
        alone = views.make_views(train.images[:6], train.labels[:6], ids, recipe, **about)
        torch.testing.assert_close(made.images[:, weights > 0], alone.images, rtol=0, atol=1e-6)
        one = views.make_views(train.images[4:5], train.labels[4:5], ids[4:5], recipe, **about)
        torch.testing.assert_close(one.images[0], alone.images[4], rtol=0, atol=1e-6)
