"""Mixtures that are made otherwise (benchmarks/mixing.py) are what they are called: checked with an encoder that is linear,
under which mixtures of features are features of mixtures."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from dpmix.core import heads, sources, views

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
mixing = importlib.import_module("mixing")
sys.path.pop(0)

N, SEED = 12, 5
IMAGES, LABELS = torch.rand(N, 1, 6, 6), torch.arange(N) % 3
SOME = torch.tensor([7, 2, 9])


class Linear:
    dim, channels, name = 4, (1,), "linear"
    weight = torch.randn(36, 4, generator=torch.Generator().manual_seed(0))

    def features(self, images):
        return images.flatten(1) @ self.weight


class Public:
    images, labels = torch.rand(5, 1, 6, 6), torch.arange(5) % 3


def arranged(*found):
    about = dict(num_classes=3, seed=SEED, public=Public(), ids=torch.arange(N) + 40, redraw=False)
    source = sources.FreshViews(Linear(), IMAGES, LABELS, [a.plain for a in found], **about)
    return mixing.Arranged(source, torch.arange(N) + 40, SEED, found)


def of(change="", **more):
    return mixing.Arrangement(**{"k_base": 3, "k_self": 5, "k_diff": 2} | more, change=change)


def average(found, source, features):
    """The mean view of each example under an arrangement: [b, D] and [b, classes]."""
    row = source.union.weights[source.union.recipes.index(found)]
    return [torch.einsum("k,bkd->bd", row.to(t), t) for t in features]


@pytest.mark.parametrize("k_diff", [0, 2])
def test_under_a_linear_encoder_mixed_features_are_those_of_mixed_images(k_diff):
    mixed, plain = of("features", k_diff=k_diff), of(k_diff=k_diff)
    source = arranged(mixed, plain)
    both = source.batch(SOME, 0)
    for one, other in zip(average(mixed, source, both), average(plain, source, both), strict=True):
        torch.testing.assert_close(one, other)


def test_images_or_labels_alone_are_mixed():
    """Against the draws: what is mixed is Eq. (3), what is not is the member with the larger share."""
    images, labels, plain = of("images"), of("labels"), of()
    source = arranged(images, labels, plain)
    features, targets = both = source.batch(SOME, 0)
    x, y = features[:, :5], targets[:, :5]  # three views of an example and two public images
    first, second, lam = views.mixing_draws(plain.plain, SOME + 40, seed=SEED, step=None)
    larger, rows = torch.where(lam >= 0.5, first, second), torch.arange(3)[:, None]
    lam = lam[..., None].float()
    mixed_x = lam * x[rows, first] + (1 - lam) * x[rows, second]
    mixed_y = lam * y[rows, first] + (1 - lam) * y[rows, second]
    for a, wanted in ((images, (mixed_x, y[rows, larger])), (labels, (x[rows, larger], mixed_y))):
        for got, said in zip(average(a, source, both), zip((x, y), wanted, strict=True), strict=True):
            torch.testing.assert_close(got, torch.cat(said, dim=1).mean(dim=1))
    assert (mixed_y - y[rows, larger]).abs().max() > 0.1, "the labels of the members differ"


def test_a_share_of_the_mixtures_is_their_weight():
    usual, quarter, half = of(), of(share=0.25), of(share=0.5)
    source = arranged(usual, quarter, half)
    both = source.batch(SOME, 0)
    pool, mixtures = both[0][:, :5].mean(dim=1), both[0][:, 5:].mean(dim=1)
    torch.testing.assert_close(average(quarter, source, both)[0], 0.25 * mixtures + 0.75 * pool)
    for found in (usual, half):  # five of ten views
        torch.testing.assert_close(average(found, source, both)[0], 0.5 * mixtures + 0.5 * pool)
    assert torch.allclose(source.union.weights.sum(1), torch.ones(3, dtype=torch.float64))


def test_an_arrangement_without_a_change_trains_as_its_recipe_does():
    recipe = views.Recipe(k_base=3, k_self=5)
    source = arranged(of(k_diff=0))
    how = dict(learning_rate=1.0, noise_multiplier=1.0)
    steps = dict(expected_batch=4, steps=3, seed=1, progress=False)
    quiet = dict(learning_rate=1.0, noise_multiplier=0.0)
    ours = heads.train(source, [heads.Head(recipe=source.union.recipes[0], **quiet)], **steps)
    theirs = heads.train(source.source, [heads.Head(recipe=recipe, **quiet)], **steps)
    torch.testing.assert_close(ours.weights, theirs.weights)
    noisy = heads.train(source, [heads.Head(recipe=source.union.recipes[0], **how)], **steps)
    assert not torch.equal(noisy.weights, ours.weights)


def test_every_row_of_the_page_can_be_run_and_named():
    found = mixing.arrangements("cifar100")
    assert list(found) == ["DP-MixSelf of features", "DP-MixSelf, mixtures weigh ¼", "DP-MixSelf, mixtures weigh ¾"]
    assert all(a.plain == views.METHODS["mix-self"] for a in found.values())


def test_a_small_set_is_made_written_and_read(tmp_path, monkeypatch):
    monkeypatch.setattr(mixing.evidence, "FOLDER", tmp_path / "results")
    monkeypatch.setenv("DPMIX_STORE", str(tmp_path / "store"))
    asked = dict(models="tiny-vit", eps=1, epochs=0.3, learning_rates=[2.0, 8.0])
    small = lambda dataset, names, eps, seeds: mixing.grids.methods_grid("demo", methods=names, seeds=seeds, **asked)  # noqa: E731
    monkeypatch.setattr(mixing, "methods", lambda *a: [
        mixing.grids.Cell(c.labels, mixing.replace(c.spec, redraw=False)) for c in small(*a)])  # fmt: skip
    monkeypatch.setattr(mixing.grids, "preset", lambda scale, dataset=None: mixing.grids.Preset(image_size=16))
    compute = mixing.ComputeFlags(progress=False, workers=1, cache=str(tmp_path / "cache"))
    mixing.make("digits", [0, 1], compute, None)
    runs = mixing.evidence.read("mixing")
    assert len(runs) == 2 * 2 * len(mixing.arrangements("digits")) and set(runs["seed"]) == {0, 1}
    best = mixing.evidence.chosen("mixing", mixing.BY)
    assert [100 * r.mean() for r in best["right"]] == pytest.approx(best["accuracy"].tolist())
    (about,) = runs.attrs["about"]
    assert about["seeds"] == [0, 1] and about["commit"] and about["hours"] > 0
    monkeypatch.setattr(mixing, "trained", None)
    mixing.make("digits", [0, 1], compute, None)  # from the store
