"""Runs that read stored views: what is encoded when, what may differ, and what `feature_scaling` and `momentum` do."""

from dataclasses import replace

import pytest
import torch

import dpmix
from dpmix.core import files, heads, views
from dpmix.images import data
from dpmix.models import encoders, stored
from dpmix.runs import passes
from dpmix.runs.material import Material, Part
from dpmix.runs.spec import ComputeFlags, RunSpec
from dpmix.runs.store import Store

RECIPE = views.Recipe(k_base=3, k_self=2)
SPEC = RunSpec(recipe=RECIPE, epsilon=4.0, learning_rate=2.0, redraw=False, epochs=1.0, batch_size=256, seed=3)


@pytest.fixture
def compute(tmp_path):
    return ComputeFlags(
        progress=False, cache=str(tmp_path / "cache"), workers=1, encoder_engine="torch", dtype="float32"
    )


@pytest.fixture
def seen(monkeypatch):
    """How many images each call gave to an encoder."""
    counts: list[int] = []
    real = encoders.Frozen.forward

    def forward(self, images):
        counts.append(len(images))
        return real(self, images)

    monkeypatch.setattr(encoders.Frozen, "forward", forward)
    return counts


def test_a_second_run_encodes_nothing_and_a_longer_list_only_what_is_missing(tmp_path, compute, seen):
    """Other budget, rate, batch size, epochs, momentum or clip norm; fewer views; one method more; other seeds."""
    store = Store(tmp_path / "store")
    first = dpmix.run(SPEC, compute=compute, store=store)
    made = sum(seen)
    assert made == 1437 * (5 + 1) + 360, "views, the images as they are for validation, and the test images"
    others = [dict(epsilon=1.0, learning_rate=1.0, clip_norm=0.5), dict(batch_size=128), dict(epochs=2.0, momentum=0.5),
              dict(recipe=views.Recipe(k_base=2)), dict(validation=0.1)]  # fmt: skip
    for change in others:
        assert dpmix.run(replace(SPEC, **change), compute=compute, store=store).key != first.key
        assert sum(seen) == made, change
    dpmix.run(replace(SPEC, recipe=replace(RECIPE, k_diff=1)), compute=compute, store=store)
    assert sum(seen) - made == 1437 * (1 + 2), "a public image and two mixtures of another pool"
    for change, encoded in ((dict(seed=9), 5), (dict(seed=None), 5), (dict(seed=None, epsilon=1.0), 0)):
        made = sum(seen)
        dpmix.run(replace(SPEC, **change), compute=compute, store=store)
        assert sum(seen) - made == 1437 * encoded, (
            "views follow a given seed; those of a drawn one are there the next time"
        )


def test_stored_and_fresh_views_that_are_drawn_once_give_one_head(tmp_path, compute, monkeypatch):
    from dpmix.core.sources import FreshViews

    specs = [replace(SPEC, epsilon=e) for e in (2.0, None)]
    one = dpmix.run_all(specs, compute=compute, store=Store(tmp_path / "one"))

    def fresh(spec, recipes, material, compute, scaling, once):
        train = material.train
        return FreshViews(material.encoder, train.images, train.labels, recipes, num_classes=train.whole.num_classes,
                          seed=once, ids=train.rows, redraw=False)  # fmt: skip

    monkeypatch.setattr(passes, "source_of", fresh)
    two = dpmix.run_all(specs, compute=compute, store=Store(tmp_path / "two"))
    for a, b in zip(one, two, strict=True):  # each store has names of its own, in an order of its own
        ((mine, _),) = (files.load_tensors(path) for path in (tmp_path / "one").rglob(f"{a.key}.safetensors"))
        ((theirs, _),) = (files.load_tensors(path) for path in (tmp_path / "two").rglob(f"{b.key}.safetensors"))
        assert (mine["weight"] - theirs["weight"]).norm() < 5e-3 * mine["weight"].norm()
    assert [r.test_accuracy for r in one] == pytest.approx([r.test_accuracy for r in two], abs=0.006)


@pytest.mark.parametrize(("once", "stay"), [(None, True), (3, False)])
def test_an_image_more_leaves_the_views_of_the_others_as_they_are_where_the_seed_of_views_is_known(
    tmp_path, compute, once, stay
):
    """The first file moves all places. A seed that is given must be secret: then draws are worth the same at any place."""
    recipe, features = views.Recipe(k_base=2, k_self=2, k_diff=1), []
    splits, public = dpmix.load("digits"), data.public_images("digits")
    for first in (0, 1):
        rows = torch.arange(first, 80)
        pool = Part(splits.train.subset(rows), torch.arange(len(rows)))
        material = Material(pool=pool, kept=pool.rows, held_out=pool.rows[:0], train=pool, test=pool, public=public,
                            synthetic=public, encoder=dpmix.encoder("tiny-vit"), digest="")  # fmt: skip
        source = passes.source_of(replace(SPEC, seed=None), [recipe], material, compute, None, once)
        features.append(source.batch(torch.arange(1 - first, 80 - first), step=0))
    (a, a_targets), (b, b_targets) = features
    assert (torch.equal(a, b) and torch.equal(a_targets, b_targets)) == stay


def test_scaled_features_train_and_the_head_takes_features_as_they_are(tmp_path, compute):
    """The released head must work without the constants; and scaling does something."""
    spec = replace(SPEC, epsilon=None, feature_scaling="public", epochs=5.0)
    scaled = dpmix.run(spec, compute=compute, store=Store(tmp_path / "store"))
    plain = dpmix.run(replace(spec, feature_scaling="none"), compute=compute, store=Store(tmp_path / "store"))
    assert scaled.test_accuracy > 0.7 and scaled.test_accuracy != plain.test_accuracy


def test_constants_of_public_images():
    from dpmix.core.sources import public_scaling, scaled

    features = torch.randn(500, 6, dtype=torch.float64).float() * torch.tensor([1.0, 5.0, 0.1, 0.0, 2.0, 30.0]) + 7
    mean, scale = public_scaling(features)
    found = scaled(features, (mean, scale))
    assert found.mean(0).abs().max() < 1e-4 and found.isfinite().all()
    assert float(found.square().sum(1).mean()) == pytest.approx(5 / 6, abs=0.01), (
        "the dimension that does not vary adds nothing"
    )
    with pytest.raises(ValueError, match="public=1: feature scaling needs at least two public images"):
        public_scaling(features[:1])
    bank = heads.Bank(weights=torch.randn(2, 3, 6), biases=torch.randn(2, 3), views=0, seconds={}, dropped=0)
    raw = heads.unscaled(bank, (mean, scale))
    for r in range(2):
        wanted = found @ bank.weights[r].T + bank.biases[r]
        torch.testing.assert_close(features @ raw.weights[r].T + raw.biases[r], wanted, atol=2e-3, rtol=2e-3)


def test_no_room_is_told_before_any_work(tmp_path, compute, seen, monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr(stored.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(OSError, match=r"cache=.* need 0\.00.* GB more and 1e-08 GB are free"):
        dpmix.run(SPEC, compute=compute, store=Store(tmp_path / "store"))
    assert not seen
    with pytest.raises(ValueError, match=r"redraw=False: .*network from scratch"):
        replace(SPEC, model="wrn-10-1")


@pytest.mark.parametrize(("change", "examples"), [
    (dict(batch_size=20_000, recipe=views.METHODS["dp-sgd"]), 512), (dict(batch_size=20_000, recipe=views.Recipe(k_base=4)), 128),
    (dict(batch_size=1000, recipe=views.METHODS["dp-sgd"]), 62), (dict(batch_size=20_000, redraw=True), 32),
    (dict(batch_size=20_000, recipe=views.METHODS["mix-diff"]), 32), (dict(batch_size=8), 32),
])  # fmt: skip
def test_stored_views_are_read_in_parts_worth_their_overhead(change, examples):
    """As many views as of fresh images, but never so many that a batch is padded by more than a sixteenth."""
    quiet = ComputeFlags(device="cpu")
    asked = [replace(SPEC, **change)]
    assert passes.physical_batch(quiet, asked) == examples
    assert passes.physical_batch(replace(quiet, physical_batch=7), asked) == 7
    assert passes.physical_batch(quiet, [*asked, replace(SPEC, redraw=True)]) <= examples


def test_views_of_a_drawn_seed_are_released_and_those_of_a_method_that_draws_nothing(tmp_path, compute):
    store = Store(tmp_path / "store")
    for number, change in enumerate((dict(), dict(recipe=views.METHODS["dp-sgd"]))):
        result = dpmix.run(replace(SPEC, seed=None, **change), compute=compute, store=store)
        assert result.provenance["views_keyed_by"] == "image"
        assert (dpmix.release(result, tmp_path / str(number), store=store) / "model.safetensors").is_file()
    old = replace(result, provenance={k: v for k, v in result.provenance.items() if k != "views_keyed_by"})
    store.put(old, store.tensors(result))
    assert dpmix.release(old, tmp_path / "old", store=store), "of one plain view"
