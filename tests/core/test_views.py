"""What each view may depend on, and what it is: the laws on which the sensitivity rests, and their wrong twins."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CLASSES, SIDE, image_set
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dpmix.core import augmentations, views
from dpmix.core.views import METHODS, Recipe, make_union, make_views

RECIPES = {
    **METHODS,
    "cutmix": Recipe(k_base=3, k_self=4, k_diff=2, mix="cutmix", alpha=1.0, transform="crop"),
    "jitter": Recipe(k_base=2, k_self=2, transform="crop-flip+jitter"),
    "public only": Recipe(k_base=0, k_diff=3),
    "one of one": Recipe(k_base=1, k_self=2),
}
KWARGS = dict(num_classes=CLASSES, seed=5, step=3)
PUBLIC = image_set(9, seed=1)


def made(recipe, images, labels, ids, **other):
    return make_views(images, labels, ids, recipe, public=PUBLIC, **{**KWARGS, **other})


def batch(n=6, seed=0):
    some = image_set(n, seed)
    return some.images, some.labels, torch.arange(10, 10 + n)


def reaches_others(make) -> bool:
    """Whether the views of any example change when all other examples are replaced, relabelled, removed or moved."""
    images, labels, ids = batch()
    other = image_set(6, seed=9)
    whole = make(images, labels, ids)
    for i in range(6):
        x, y, name = other.images.clone(), (labels + 1) % CLASSES, ids + 100
        x[i], y[i], name[i] = images[i], labels[i], ids[i]
        for found, place in ((make(x, y, name), i), (make(images[i:][:1], labels[i:][:1], ids[i:][:1]), 0),
                             (make(images.flip(0), labels.flip(0), ids.flip(0)), 5 - i)):  # fmt: skip
            if not all(torch.equal(a[place], b[i]) for a, b in zip(found, whole, strict=True)):
                return True
    return False


@pytest.mark.parametrize("name", RECIPES)
def test_views_depend_on_their_own_example_and_on_public_images_only(name):
    assert not reaches_others(lambda x, y, i: made(RECIPES[name], x, y, i))


def test_mixup_with_a_partner_from_the_batch_is_caught():
    """Negative control: naive mixup, and statistics of the batch."""

    def naive(images, labels, ids):
        own = made(METHODS["dp-sgd"], images, labels, ids)
        return views.Views(*((t + t.roll(1, dims=0)) / 2 for t in own))

    def standardised(images, labels, ids):
        own = made(METHODS["dp-sgd"], images, labels, ids)
        return views.Views(own.images - own.images.mean(), own.targets)

    assert reaches_others(naive) and reaches_others(standardised)


@pytest.mark.parametrize("name", RECIPES)
def test_shapes_ranges_and_targets(name):
    recipe = RECIPES[name]
    for n in (6, 1, 0):
        found = made(recipe, *batch(n))
        assert found.images.shape == (n, recipe.views, 1, SIDE, SIDE) and found.images.dtype == torch.float32
        assert found.targets.shape == (n, recipe.views, CLASSES)
        if n:
            assert found.images.min() >= 0 and found.images.max() <= 1
            torch.testing.assert_close(found.targets.sum(-1), torch.ones(n, recipe.views))
            assert found.targets.min() >= 0


@pytest.mark.parametrize("name", RECIPES)
def test_what_each_view_depends_on_it_does_depend_on(name):
    """The other direction: own pixels, label, id, step, seed and the public images each change something."""
    recipe, (images, labels, ids) = RECIPES[name], batch()
    whole = made(recipe, images, labels, ids)
    random = recipe.k_self or recipe.k_diff or recipe.transform != "none"
    same = torch.equal
    assert same(made(recipe, 255 - images, labels, ids).images, whole.images) == (recipe.k_base == 0)
    assert same(made(recipe, images, (labels + 1) % CLASSES, ids).targets, whole.targets) == (recipe.k_base == 0)
    for other in (made(recipe, images, labels, ids + 50), made(recipe, images, labels, ids, step=4),
                  made(recipe, images, labels, ids, seed=6)):  # fmt: skip
        assert same(other.images, whole.images) != bool(random)
    other = make_views(images, labels, ids, recipe, public=image_set(9, seed=2), **KWARGS)
    assert same(other.images, whole.images) == (recipe.k_diff == 0)
    assert same(other.images[:, : recipe.k_base], whole.images[:, : recipe.k_base]), "base views know no public image"


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(sorted(RECIPES)), min_size=1, max_size=4, unique=True),
    st.integers(0, 4),
    st.integers(1, 3),
)
def test_a_recipe_has_the_same_views_alone_and_in_a_union(names, n, cut):
    recipes = [RECIPES[name] for name in names]
    union, (images, labels, ids) = make_union(recipes), batch(n)
    whole = union.make(images, labels, ids, public=PUBLIC, **KWARGS)
    assert whole.images.shape[1] == union.views <= sum(r.views for r in recipes)
    torch.testing.assert_close(union.weights.sum(1), torch.ones(len(recipes), dtype=torch.float64))
    for recipe, row in zip(recipes, union.weights, strict=True):
        assert set(row.unique().tolist()) <= {0.0, 1 / recipe.views} and (row > 0).sum() == recipe.views
        parts = [made(recipe, *(t[place] for t in (images, labels, ids))) for place in torch.arange(n).split(cut)]
        for got, alone in zip(whole, zip(*parts, strict=True) if parts else (), strict=bool(parts)):
            assert torch.equal(got[:, row > 0], torch.cat(alone))


def test_a_union_shares_what_can_be_shared():
    """16 base views, 2 public images, and 18 mixtures for each of three pools: not the sum of all recipes."""
    union = make_union(list(dict.fromkeys(METHODS[m] for m in ("self-aug", "mix-self", "mix-diff", "pure-mix-diff"))))
    assert union.views == 16 + 2 + 3 * 18 < 16 + 34 + 36 + 20


@pytest.mark.parametrize(("small", "large"), [
    (Recipe(k_base=3), Recipe(k_base=16)),
    (Recipe(k_base=4, k_self=2), Recipe(k_base=4, k_self=18)),
    (Recipe(k_base=4, k_self=0), Recipe(k_base=4, k_self=5)),
    (Recipe(k_base=2, k_diff=1), Recipe(k_base=2, k_diff=7)),
    (Recipe(k_base=4, k_self=3, k_diff=2, mix="cutmix"), Recipe(k_base=4, k_self=9, k_diff=2, mix="cutmix")),
])  # fmt: skip
def test_a_smaller_k_takes_the_first_of_a_larger_one(small, large):
    few, many = made(small, *batch()), made(large, *batch())
    parts = (0, small.k_base), (large.k_base, small.k_diff), (large.k_base + large.k_diff, small.k_self)
    places = [start + i for start, count in parts for i in range(count)]
    assert torch.equal(few.images, many.images[:, places])
    assert torch.equal(few.targets, many.targets[:, places])


def test_what_is_added_to_a_crop_leaves_the_crop_as_it_was():
    """The rows of Table 4 differ by the transformation alone: Sobel, which draws nothing, and cutout, which keeps the rest."""
    plain, sobel, cutout = (made(Recipe(k_base=3, transform="crop" + t), *batch()) for t in ("", "+sobel", "+cutout"))
    edges = augmentations.sobel(plain.images.flatten(0, 1), torch.zeros(18, 0)).view_as(plain.images)
    assert torch.equal(sobel.images, edges)
    kept = (cutout.images == plain.images).double().mean(dim=(2, 3, 4))
    assert kept.min() > 0.5 and kept.max() < 1
    boxes = cutout.images != plain.images
    assert not torch.equal(boxes[:, 0], boxes[:, 1]), "a place for each view"


def test_whole_and_broken_numbers_mean_one_recipe():
    """alpha=1 and alpha=1.0 are equal recipes, so they must have equal draws; that failed once."""
    one, same = Recipe(k_base=2, k_self=3, alpha=1), Recipe(k_base=2, k_self=3, alpha=1.0)
    assert one == same and torch.equal(made(one, *batch()).images, made(same, *batch()).images)
    union = make_union([replace(one, k_self=2), same])
    alone = made(same, *batch())
    assert torch.equal(union.make(*batch(), public=PUBLIC, **KWARGS).images[:, union.weights[1] > 0], alone.images)


# Mixtures: Eq. (3).


def fixed_lambda(monkeypatch, value):
    """Replace the drawn lambda; the drawn pairs stay, and are recorded."""
    drawn, seen = views._Draws.mixtures, []

    def patched(self, pool, alpha):
        first, second, lam, centre = drawn(self, pool, alpha)
        seen.append((first, second))
        return first, second, lam if value is None else torch.full_like(lam, value), centre

    monkeypatch.setattr(views._Draws, "mixtures", patched)
    return seen


MIXED = Recipe(k_base=4, k_self=12, k_diff=3, transform="crop")


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_lambda_one_gives_the_first_member_and_zero_the_second(monkeypatch, value):
    seen = fixed_lambda(monkeypatch, value)
    found = made(MIXED, *batch())
    member = seen[0][0] if value == 1 else seen[0][1]
    row = torch.arange(6)[:, None]
    for mixed in found:
        assert torch.equal(mixed[:, 7:], mixed[row, member])
        other = seen[0][1] if value == 1 else seen[0][0]
        assert not torch.equal(mixed[:, 7:], mixed[row, other])


@pytest.mark.parametrize("value", [0.0, 0.25, 0.5, 1.0, None])
def test_mixtures_are_convex_and_image_and_label_share_lambda(monkeypatch, value):
    seen = fixed_lambda(monkeypatch, value)
    images, labels, ids = batch()
    found = made(MIXED, images.clamp(1, 254), labels, ids)
    first, second = seen[0]
    row = torch.arange(6)[:, None]
    a, b, m = found.images[row, first].double(), found.images[row, second].double(), found.images[:, 7:].double()
    assert (m >= torch.minimum(a, b) - 1e-6).all() and (m <= torch.maximum(a, b) + 1e-6).all()
    ya, yb, ym = (t.double() for t in (found.targets[row, first], found.targets[row, second], found.targets[:, 7:]))
    differ = (ya != yb).any(-1)
    assert differ.any() and (~differ).any(), "pairs of one and of two classes"
    lam = (ym * ya).sum(-1)[differ]
    if value is not None:
        torch.testing.assert_close(lam, torch.full_like(lam, value))
    lam = lam[:, None, None, None]
    torch.testing.assert_close(m[differ], lam * a[differ] + (1 - lam) * b[differ], rtol=0, atol=1e-6)
    assert torch.equal(ym[~differ], ya[~differ]), "one class mixed with itself is that class"


def test_pairs_are_different_members_and_equally_likely():
    """p < 1e-6 once in a million seeds; the seed is fixed."""
    draws = views._Draws(torch.arange(400), 0, 0, ("mix", "crop", 5, 0, "mixup", 0.2), 30)
    first, second, _, _ = draws.mixtures(5, 0.2)
    counts = np.bincount((first * 5 + second).flatten().numpy(), minlength=25).reshape(5, 5)
    assert np.trace(counts) == 0, "never a view with itself"
    assert stats.chisquare(counts[~np.eye(5, dtype=bool)]).pvalue > 1e-6


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_lambda_is_beta(alpha):
    draws = views._Draws(torch.arange(300), 0, 0, ("mix", "crop", 5, 0, "mixup", alpha), 30)
    lam = draws.mixtures(5, alpha)[2].flatten().numpy()
    assert stats.kstest(lam, stats.beta(alpha, alpha).cdf).pvalue > 1e-6
    assert stats.kstest(lam, stats.beta(alpha * 1.3, alpha * 1.3).cdf).pvalue < 1e-6, "the test must be able to fail"


def test_a_pool_of_one_is_mixed_with_itself():
    found = made(Recipe(k_base=1, k_self=3), *batch())
    torch.testing.assert_close(found.images[:, 1:], found.images[:, :1].expand(-1, 3, -1, -1, -1))
    assert torch.equal(found.targets[:, 1:], found.targets[:, :1].expand(-1, 3, -1))


def test_cutmix_pastes_a_box_and_the_label_is_its_share():
    draw = np.random.default_rng(0)
    pool = views.Views(torch.stack([torch.zeros(1, 9, 7), torch.ones(1, 9, 7)])[None], torch.eye(2)[None])
    k = 300
    lam, centre = torch.from_numpy(draw.random((1, k))), torch.from_numpy(draw.random((1, k, 2)))
    lam[0, :2] = torch.tensor([1.0, 0.0])
    first, second = torch.zeros(1, k, dtype=torch.int64), torch.ones(1, k, dtype=torch.int64)
    images, targets = views._mixtures(pool, "cutmix", first, second, lam, centre)
    assert set(images.unique().tolist()) == {0.0, 1.0}, "every pixel is one member's"
    torch.testing.assert_close(targets[..., 1], images.mean(dim=(2, 3, 4)))
    torch.testing.assert_close(targets.sum(-1), torch.ones(1, k))
    assert images[0, 0].sum() == 0, "lambda = 1: the first member alone"
    for box in images[0, :, 0]:
        rows, cols = box.amax(1).nonzero()[:, 0], box.amax(0).nonzero()[:, 0]
        inside = box[rows.min() : rows.max() + 1, cols.min() : cols.max() + 1] if len(rows) else box[:0]
        assert inside.numel() == box.sum(), "a rectangle"
    middle = (centre[0] - 0.5).abs().amax(1) < 0.2
    small = middle & (lam[0] > 0.7)
    assert small.sum() > 5
    assert (images[0, small].mean(dim=(1, 2, 3)) - (1 - lam[0, small])).abs().max() < 0.15, "an area of 1 - lambda"


def test_public_images_are_drawn_evenly_with_their_own_labels():
    n = 300
    found = make_views(
        torch.zeros(n, 1, SIDE, SIDE, dtype=torch.uint8), torch.zeros(n, dtype=torch.int64), torch.arange(n),
        Recipe(k_base=0, k_diff=20), public=PUBLIC, **KWARGS,
    )  # fmt: skip
    flat = found.images.reshape(n * 20, -1)
    which = torch.cdist(flat, PUBLIC.images.flatten(1).float() / 255).argmin(1)
    assert torch.equal(flat, PUBLIC.images[which].flatten(1).float() / 255), "as they are"
    assert torch.equal(found.targets.reshape(n * 20, -1).argmax(1), PUBLIC.labels[which])
    assert stats.chisquare(np.bincount(which.numpy(), minlength=9)).pvalue > 1e-6


# Mirrors.


@pytest.mark.parametrize("name", ["self-aug", "mix-diff", "jitter"])
def test_a_data_set_without_mirrors_is_never_mirrored(name):
    """Every base view is compared with all crops of the image; mirrored ones occur in half of them where they may."""
    where = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8) * 3

    def mirrored(recipe):
        recipe = replace(recipe, transform=recipe.transform.replace("+jitter", ""))
        some = image_set(9, seed=1)
        bigger = replace(some, images=torch.zeros(9, 1, 8, 8, dtype=torch.uint8))
        found = make_views(where, torch.zeros(1, dtype=torch.int64), torch.tensor([4]), replace(recipe, k_base=200),
                           public=bigger, **KWARGS)  # fmt: skip
        rows = found.images[0, :200, 0, 4]
        return (rows[:, 5] < rows[:, 4]).float().mean()

    recipe = RECIPES[name]
    assert "flip" in recipe.transform and "flip" not in recipe.for_data(flip=False).transform
    assert mirrored(recipe.for_data(flip=False)) == 0
    assert 0.3 < mirrored(recipe.for_data(flip=True)) < 0.7


# Input.


def test_bytes_and_floats_agree_and_global_randomness_is_left_alone():
    images, labels, ids = batch()
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    for recipe in RECIPES.values():
        torch.testing.assert_close(
            made(recipe, images.float() / 255, labels, ids).images, made(recipe, images, labels, ids).images
        )
    doubles = made(METHODS["mix-self"], images.double() / 255, labels, ids)
    assert doubles.images.dtype == torch.float64
    assert torch.equal(torch.get_rng_state(), before) and (np.random.get_state()[1] == before_numpy).all()


@pytest.mark.parametrize(("bad", "said"), [
    (dict(k_base=-1), "k_base=-1: must be a whole number of at least 0"), (dict(k_self=-2), "k_self=-2"),
    (dict(k_diff=-2), "k_diff=-2"), (dict(k_base=0, k_self=18), "k_base . k_diff=0: the pool is empty"),
    (dict(k_base=0), "the pool is empty"), (dict(mix="mixap"), "mix='mixap': unknown; did you mean 'mixup'"),
    (dict(alpha=0.0), "alpha=0.0"), (dict(alpha=float("nan")), "alpha=nan"),
    (dict(transform="crop-flop"), "did you mean 'crop-flip'"),
])  # fmt: skip
def test_bad_recipes_are_refused_in_one_line(bad, said):
    with pytest.raises(ValueError, match=said) as caught:
        Recipe(**bad)
    assert "\n" not in str(caught.value)


def test_public_images_that_are_missing_or_do_not_fit_are_refused():
    some, recipe = batch(), METHODS["mix-diff"]
    for public, said in (
        (None, "public=None: k_diff > 0 needs synthetic images"),
        (PUBLIC.subset([]), "public=0: is empty"),
        (
            replace(PUBLIC, images=PUBLIC.images[..., :3]),
            r"public.images.shape=\(1, 4, 3\): must be that of the private",
        ),
        (replace(PUBLIC, class_names=("a", "b", "c", "d"), labels=PUBLIC.labels + 1), "public.labels=3: must be below"),
    ):
        with pytest.raises(ValueError, match=said):
            make_views(*some, recipe, public=public, **KWARGS)
    make_views(*some, METHODS["mix-self"], public=None, **KWARGS)


def test_pixels_of_another_type_are_refused():
    images, labels, ids = batch()
    with pytest.raises(ValueError, match=r"images.dtype=torch.int64"):
        made(METHODS["dp-sgd"], images.long(), labels, ids)


def test_a_method_that_is_not_known_is_named_with_the_near_ones():
    with pytest.raises(ValueError, match="method='mixself': unknown; did you mean 'mix-self'"):
        views.METHODS["mixself"]
    assert "mixself" not in views.METHODS and views.METHODS.get("mixself") is None


def test_a_pool_of_two_is_mixed_with_its_other_member():
    """The pool of pure DP-MixDiff: two public images. A member mixed with itself would be no mixture."""
    recipe = METHODS["pure-mix-diff"]
    first, second, _ = views.mixing_draws(recipe, torch.arange(50), seed=1, step=0)
    assert (first + second == 1).all() and 0.4 < first.double().mean() < 0.6


@pytest.mark.parametrize("name", ["mix-self", "mix-diff", "pure-mix-diff"])
def test_the_draws_that_a_picture_shows_are_those_of_the_views(name):
    recipe, (images, labels, ids) = METHODS[name], batch()
    found = made(recipe, images, labels, ids)
    first, second, lam = views.mixing_draws(recipe, ids, seed=KWARGS["seed"], step=KWARGS["step"])
    pool, lam = found.images[:, : recipe.k_base + recipe.k_diff], lam.float()[..., None, None, None]
    rows = torch.arange(len(ids))[:, None]
    torch.testing.assert_close(
        found.images[:, -recipe.k_self :], lam * pool[rows, first] + (1 - lam) * pool[rows, second]
    )


def test_the_methods_are_those_of_the_paper():
    """Section 4: 16 self-augmentations, 18 mixtures, 2 synthetic images; alpha 0.2."""
    views_of = {name: (r.k_base, r.k_self, r.k_diff, r.transform, r.mix, r.alpha) for name, r in METHODS.items()}
    plain, augmented = ("none", "mixup", 0.2), ("crop-flip", "mixup", 0.2)
    assert views_of == {
        "dp-sgd": (1, 0, 0, *plain), "mixed-ghost": (1, 0, 0, *plain), "self-aug": (16, 0, 0, *augmented),
        "mix-self": (16, 18, 0, *augmented), "mix-diff": (16, 18, 2, *augmented), "pure-mix-diff": (0, 18, 2, *augmented),
    }  # fmt: skip
    assert Recipe() == METHODS["self-aug"]
