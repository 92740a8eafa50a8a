"""What a microbatch costs: the pair of neighbours that it really has, accounted as it is."""

import math

import numpy as np
import pytest
import torch
from conftest import CLASSES
from scipy import stats
from scipy.optimize import brentq

from dpmix.core import accounting, microbatch, network, views

DEMO = dict(delta=1e-5, sample_rate=256 / 1437, steps=11)
PAPER = dict(delta=1e-5, sample_rate=4096 / 50_000, steps=2441)
# Found by a numerical composition of its own, not by this code: budget (RDP), what PLD accounts for a movement by 2C, and the
# true pair, under noise of 2 sigma C; then the true pair under noise for C alone.
FIGURES = [(DEMO, 8.0, 6.91, 3.15, 8.38), (DEMO, 2.0, 1.75, 1.25, 2.77), (PAPER, 8.0, 7.42, 7.04, 16.6)]


@pytest.mark.parametrize(("about", "budget", "accounted", "true", "for_one"), FIGURES)
def test_the_true_pair_spends_what_was_found_independently(about, budget, accounted, true, for_one):
    sigma = accounting.noise_multiplier(epsilon=budget, **about)
    assert accounting.epsilon_spent(noise_multiplier=sigma, accountant="pld", **about) == pytest.approx(
        accounted, rel=0.02
    )
    assert microbatch.epsilon_spent(2, deviation=2 * sigma, **about) == pytest.approx(true, rel=0.02)
    assert microbatch.epsilon_spent(2, deviation=sigma, **about) == pytest.approx(for_one, rel=0.02)
    assert microbatch.epsilon_spent(1, deviation=sigma, **about) == pytest.approx(accounted, rel=0.02), (
        "a size of one is none"
    )


def test_the_noise_that_suffices():
    sigma = accounting.noise_multiplier(epsilon=8.0, **DEMO)
    accounted = accounting.epsilon_spent(noise_multiplier=sigma, accountant="pld", **DEMO)
    enough = accounting.noise_multiplier(epsilon=accounted, accountant="pld", neighbours="change", **DEMO)
    assert enough / sigma == pytest.approx(1.13, rel=0.02)
    assert (
        microbatch.epsilon_spent(2, deviation=enough, **DEMO)
        <= accounted
        < microbatch.epsilon_spent(2, deviation=0.99 * enough, **DEMO)
    )


def one_step(sigma: float, q: float, delta: float) -> float:
    """Epsilon of one step from the densities themselves: p > e^eps p' up to the one point where they cross."""
    p = lambda x, m: (1 - q) * stats.norm.cdf(x, scale=sigma) + q * stats.norm.cdf(x, m, sigma)  # noqa: E731

    def excess(eps: float) -> float:
        log_mix = lambda shift: np.logaddexp(np.log1p(-q), np.log(q) + (shift - 1) / (2 * sigma**2))  # noqa: E731
        cross = brentq(lambda x: log_mix(-2 * x) - log_mix(2 * x) - eps, -1e4, 1e4)
        return p(cross, -1.0) - math.exp(eps) * p(cross, 1.0) - delta

    return brentq(excess, 0, 30)


@pytest.mark.parametrize(
    ("sigma", "q", "delta"), [(1.0, 0.2, 1e-5), (0.7, 0.05, 1e-3), (2.0, 0.6, 1e-6), (3.0, 0.01, 1e-6)]
)
def test_one_step_equals_its_closed_form(sigma, q, delta):
    truth = one_step(sigma, q, delta)
    ours = microbatch.epsilon_spent(2, deviation=sigma, delta=delta, sample_rate=q, steps=1)
    assert truth <= ours * (1 + 1e-6) <= truth * 1.001 + 1e-3
    alone = microbatch.epsilon_spent(1, deviation=sigma, delta=delta, sample_rate=q, steps=1)
    assert alone < truth * 0.95, "adding or removing at C is another pair, and cheaper"


@pytest.mark.parametrize(
    "about", [DEMO, dict(delta=1e-5, sample_rate=0.01, steps=300), dict(delta=1e-3, sample_rate=0.9, steps=2)]
)
@pytest.mark.parametrize("deviation", [0.8, 2.0, 6.0])
def test_the_pair_lies_between_a_movement_by_c_and_one_by_2c(deviation, about):
    pair = microbatch.epsilon_spent(2, deviation=deviation, **about)
    by = [accounting.epsilon_spent(noise_multiplier=s, accountant="pld", **about) for s in (deviation, deviation / 2)]
    assert by[0] < pair < by[1]


def test_without_sampling_it_is_a_movement_by_2c():
    about = dict(delta=1e-5, sample_rate=1.0, steps=5)
    twice = accounting.epsilon_spent(noise_multiplier=2.0, accountant="pld", **about)
    assert microbatch.epsilon_spent(2, deviation=4.0, **about) == pytest.approx(twice, rel=1e-3)


def hockey_stick(a: tuple[float, float], b: tuple[float, float], *, q: float, sigma: float, eps: float) -> float:
    """Of (1-q) N(0) + q N(a) against (1-q) N(0) + q N(b) in the plane, by a sum over a grid."""
    x = np.linspace(-9 * sigma - 1, 9 * sigma + 1, 401)
    at = lambda m: np.outer(stats.norm.pdf(x, m[0], sigma), stats.norm.pdf(x, m[1], sigma))  # noqa: E731
    origin = (1 - q) * at((0.0, 0.0))
    return float((origin + q * at(a) - math.exp(eps) * (origin + q * at(b))).clip(min=0).sum() * (x[1] - x[0]) ** 2)


@pytest.mark.parametrize(
    ("q", "sigma", "eps"), [(0.2, 0.8, 0.0), (0.2, 0.8, 1.5), (0.7, 1.5, 0.5), (0.05, 0.5, 2.0), (0.3, 1.0, -0.5)]
)
def test_no_pair_of_clipped_averages_is_worse_than_opposite_ones(q, sigma, eps):
    about = dict(q=q, sigma=sigma, eps=eps)
    worst = hockey_stick((1.0, 0.0), (-1.0, 0.0), **about)
    for length in (0.0, 0.5, 1.0):
        for other in (0.0, 0.5, 1.0):
            for angle in (0.0, 0.5, 0.8, 1.0):
                b = other * math.cos(angle * math.pi), other * math.sin(angle * math.pi)
                assert hockey_stick((length, 0.0), b, **about) <= worst + 1e-7
    assert hockey_stick((1.1, 0.0), (-1.1, 0.0), **about) > worst + 1e-5, "longer ones would be"


@pytest.mark.parametrize(("change", "said"), [
    (dict(neighbours="change", accountant="rdp"), "neighbours='change': only accountant='pld' bounds"),
    (dict(neighbours="change", accountant="prv"), "neighbours='change': only accountant='pld' bounds"),
    (dict(neighbours="chance", accountant="pld"), "neighbours='chance': unknown; did you mean 'change'"),
])  # fmt: skip
def test_a_pair_that_an_accountant_does_not_know_is_refused(change, said):
    for how in (dict(epsilon=1.0), dict(noise_multiplier=1.0)):
        solve = accounting.noise_multiplier if "epsilon" in how else accounting.epsilon_spent
        with pytest.raises(ValueError, match=said):
            solve(**how, **DEMO, **change)
    for wrong in (
        lambda: microbatch.epsilon_spent(0, deviation=1.0, **DEMO),
        lambda: microbatch.microbatch_partition(4, 0, seed=1),
    ):
        with pytest.raises(ValueError, match="size=0"):
            wrong()


def linear(classes: int) -> torch.nn.Sequential:
    layer = torch.nn.utils.skip_init(torch.nn.Linear, 16, classes)
    torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
    return torch.nn.Sequential(torch.nn.Flatten(), layer)


@pytest.mark.parametrize("mix", microbatch.MIXES)
def test_a_step_of_training_is_the_sum_over_pairs(mix, private):
    """Eq. (2), written out for one step in which everybody is. Negative control: every example clipped alone."""
    recipe, n = views.Recipe(k_base=2, transform="crop"), len(private.labels)
    about = dict(
        num_classes=CLASSES, clip_norm=0.05, noise_multiplier=0.0, learning_rate=1.0, expected_batch=4, sample_rate=1.0
    )
    done = network.train(
        linear(CLASSES), private.images, private.labels, recipe=recipe, steps=1, seed=3, microbatch=2, microbatch_mix=mix,
        progress=False, physical_batch=6, **about,
    )  # fmt: skip
    ids = torch.arange(n)
    made = views.make_views(private.images, private.labels, ids, recipe, num_classes=CLASSES, seed=3, step=0)

    def moved(table: torch.Tensor, mix: str) -> torch.Tensor:
        lam = microbatch.mixing_weights(torch.arange(len(table)), 2, alpha=recipe.alpha, seed=3, step=0)
        present = torch.ones(table.shape, dtype=torch.bool)
        total = microbatch.microbatch_sum(
            linear(CLASSES), made.images[table], made.targets[table], present, 0.05, mix=mix, lam=lam
        )
        return -total.grads["1.weight"] / 4

    pairs = microbatch.microbatch_partition(n, 2, seed=3)
    torch.testing.assert_close(done.state["1.weight"], moved(pairs, mix), rtol=1e-4, atol=1e-6)
    assert (done.state["1.weight"] - moved(ids[:, None], "none")).norm() > 0.1 * done.state["1.weight"].norm()
