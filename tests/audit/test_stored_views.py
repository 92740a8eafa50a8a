"""The audit's worlds on views that are drawn and encoded once: the bound of a step is that of fresh views."""

import pytest
import torch

from dpmix import audit, models
from dpmix.audit.steps import duel
from dpmix.core import clipping, views
from dpmix.images import data
from dpmix.models.stored import StoredViews

RECIPE, CLASSES, SHAPE, CLIP = views.Recipe(k_base=3, k_self=2), 10, (1, 8, 8), 0.01


@pytest.fixture(scope="module")
def encoder():
    return models.encoder("tiny-convnext")


@pytest.fixture
def step_from(encoder, tmp_path):
    def of(change=lambda features: features, key=None):
        """`key`: the ids of n examples; their own, by default, while the seed is one that everybody knows."""

        def step(records, seed, number):
            weights, biases = duel(CLASSES, encoder.dim)
            if not len(records):
                return torch.zeros(weights.numel() + biases.numel())
            kept = StoredViews(
                encoder, records.images, records.labels, [RECIPE], num_classes=CLASSES, folder=tmp_path, seed=0,
                ids=key and key(len(records)), progress=False,
            )  # fmt: skip
            features, targets = kept.batch(torch.arange(len(records)), number)
            row = torch.full((1, RECIPE.views), 1 / RECIPE.views, dtype=torch.float64)
            sums = clipping.clipped_head_sums(
                change(features), targets, weights[None], biases[None], torch.tensor([CLIP]), row
            )
            return torch.cat([sums.weights.flatten(), sums.biases.flatten()]) / CLIP

        return step

    return of


def test_one_example_moves_the_sum_by_at_most_c(step_from):
    natural = data.load("digits").train
    found = audit.sensitivity(step_from(), shape=SHAPE, num_classes=CLASSES, natural=natural, trials=1)
    assert found.holds and 0.99 < found.largest("add") <= 1 + 1e-5


def test_features_centred_by_private_ones_are_caught(step_from):
    """The tempting mistake of whoever has all features on the disk."""
    natural = data.load("digits").train
    step = step_from(lambda features: features - features.mean(dim=(0, 1)))
    assert not audit.sensitivity(step, shape=SHAPE, num_classes=CLASSES, natural=natural, trials=1).holds


def test_views_that_are_keyed_by_places_under_a_known_seed_are_caught(step_from):
    """One example less, and all that follow it have other views."""
    natural = data.load("digits").train
    step = step_from(key=torch.arange)
    assert not audit.sensitivity(step, shape=SHAPE, num_classes=CLASSES, natural=natural, trials=1).holds
