"""Golden numbers, bounds that hold, budgets that are kept, and a sampler that really is Poisson."""

import math
import time
import warnings

import numpy as np
import pytest
import torch
from dp_accounting import get_epsilon_gaussian
from dp_accounting.pld.pld_privacy_accountant import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dpmix.core import accounting
from dpmix.core.accounting import ACCOUNTANTS, epsilon_spent, noise_multiplier, poisson_batch, steps_for

# Computed by Opacus 1.5 (RDP, PRV) and dp_accounting 0.5 (PLD) at delta = 1e-5, q = B/N, T = round(epochs N / B).
GOLDEN = [
    (dict(n=50_000, batch_size=4096, epochs=200.0), 8.0, dict(rdp=2.700, prv=2.551, pld=2.548)),
    (dict(n=21_600, batch_size=1000, epochs=20.0), 1.0, dict(rdp=4.046, prv=3.766, pld=3.734)),
]
CASES = [(about, epsilon, by, sigma) for about, epsilon, sigmas in GOLDEN for by, sigma in sigmas.items()]


def mechanism(about):
    return dict(delta=1e-5, sample_rate=about["batch_size"] / about["n"], steps=steps_for(**about))


@pytest.mark.parametrize(("about", "epsilon", "by", "sigma"), CASES, ids=[f"{c[2]}-{c[1]}" for c in CASES])
def test_golden_noise_multipliers_and_the_way_back(about, epsilon, by, sigma):
    found = noise_multiplier(epsilon=epsilon, accountant=by, **mechanism(about))
    assert found == pytest.approx(sigma, rel=5e-3)
    spent = [epsilon_spent(noise_multiplier=s, accountant=by, **mechanism(about)) for s in (found, found * 0.9995)]
    assert epsilon * 0.995 < spent[0] <= epsilon < spent[1], "the smallest noise that keeps the budget"


def test_the_accountants_are_told_apart_by_the_golden_numbers():
    """Negative control for the half percent: no accountant passes for another, except PRV and PLD at epsilon 8."""
    for _, _, sigmas in GOLDEN:
        assert abs(sigmas["rdp"] / sigmas["prv"] - 1) > 0.05
    assert abs(3.766 / 3.734 - 1) > 5e-3


def exact(sigma: float, steps: int, delta: float) -> float:
    """Epsilon of the Gaussian mechanism without sampling, from the closed form of Balle and Wang (2018)."""
    mu = steps**0.5 / sigma

    def excess(eps: float) -> float:
        return (
            stats.norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * stats.norm.cdf(-mu / 2 - eps / mu) - delta
        )  # falls in eps

    low, high = 0.0, 100.0
    for _ in range(80):
        mid = (low + high) / 2
        low, high = (mid, high) if excess(mid) > 0 else (low, mid)
    return high


@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 1), (4.0, 10), (30.0, 100)])
def test_without_sampling_the_bounds_hold_and_the_tight_ones_are_tight(sigma, steps):
    truth = exact(sigma, steps, 1e-5)
    about = dict(noise_multiplier=sigma, delta=1e-5, sample_rate=1.0, steps=steps)
    rdp, prv, pld = (epsilon_spent(accountant=by, **about) for by in ACCOUNTANTS)
    assert truth <= pld * (1 + 1e-9) <= truth * 1.005 + 1e-3
    assert truth <= prv <= truth * 1.005 + 0.011
    assert truth * 1.02 < rdp < truth * 1.25
    less = epsilon_spent(accountant="pld", **{**about, "noise_multiplier": sigma * 1.5})
    assert less < truth * 0.9, "the bound must be able to fail"


@pytest.mark.parametrize("by", ACCOUNTANTS)
def test_epsilon_falls_with_noise_and_grows_with_steps_and_rate(by):
    def at(**other):
        about = dict(noise_multiplier=3.0, delta=1e-5, sample_rate=0.1, steps=50)
        return epsilon_spent(accountant=by, **{**about, **other})

    assert at(noise_multiplier=4.0) < at() < at(noise_multiplier=2.5)
    assert at(steps=20) < at() < at(steps=100)
    assert at(sample_rate=0.05) < at() < at(sample_rate=0.15)
    assert at(delta=1e-4) < at() < at(delta=1e-6)
    assert at(noise_multiplier=0.0) == math.inf


def test_small_epsilons_are_not_drowned_by_the_error_bound_of_prv():
    about = dict(noise_multiplier=100.0, delta=1e-5, sample_rate=0.1, steps=1)
    prv, pld = (epsilon_spent(accountant=by, **about) for by in ("prv", "pld"))
    assert pld < prv < pld * 1.3


@pytest.mark.parametrize(
    ("sigma", "rate", "steps"), [(0.65513, 0.02, 500), (6.3974, 0.2717, 37), (15.1476, 0.08192, 2441)]
)
def test_the_grid_of_pld_costs_a_ten_thousandth_and_stays_on_the_safe_side(sigma, rate, steps):
    """Beside the library's own grid of 1e-4. Negative control: the coarse grid alone would cost more where steps are many."""

    def by_library(interval):
        event = accounting.dp_event.PoissonSampledDpEvent(rate, accounting.dp_event.GaussianDpEvent(sigma))
        return PLDAccountant(value_discretization_interval=interval).compose(event, steps).get_epsilon(1e-5)

    ours = epsilon_spent(noise_multiplier=sigma, delta=1e-5, sample_rate=rate, steps=steps, accountant="pld")
    assert by_library(1e-4) <= ours <= by_library(1e-4) * (1 + 1.5e-4)
    assert steps < 2000 or by_library(1e-3) > by_library(1e-4) * 1.002


@pytest.mark.parametrize("by", ACCOUNTANTS)
def test_calibration_leaves_a_slow_machine_room(by):
    """The dearest budgets of the paper take a fraction of the ten seconds, so that a machine half as fast still calibrates."""
    for about in (dict(sample_rate=0.02, steps=500), dict(sample_rate=1000 / 3680, steps=37)):
        start = time.thread_time()
        sigma = noise_multiplier.__wrapped__(epsilon=8.0, delta=1.1e-5, accountant=by, **about)
        assert sigma > 0 and time.thread_time() - start < accounting.SECONDS / 2


def test_prv_without_the_memory_for_it_bounds_by_infinity(monkeypatch):
    def too_much(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(accounting.PRVAccountant, "get_epsilon", too_much)
    assert epsilon_spent(noise_multiplier=0.123, delta=1e-5, sample_rate=0.1, steps=3, accountant="prv") == math.inf


def test_a_budget_that_little_noise_keeps_takes_the_least_noise():
    sigma = noise_multiplier(epsilon=50.0, delta=1e-5, sample_rate=0.001, steps=10)
    assert sigma == pytest.approx(accounting.SIGMA_RANGE[0], rel=1e-9)
    assert epsilon_spent(noise_multiplier=sigma, delta=1e-5, sample_rate=0.001, steps=10) <= 50


@pytest.mark.parametrize("by", ACCOUNTANTS)
def test_calibration_ends_or_says_why(by, monkeypatch):
    """The hardest corner that is not refused outright, with a tenth of the time: it stops before an evaluation too many."""
    assert accounting.SECONDS <= 9.5
    monkeypatch.setattr(accounting, "SECONDS", accounting.SECONDS / 10)
    accounting.epsilon_spent.cache_clear()
    start = time.thread_time()
    try:
        sigma = noise_multiplier(epsilon=49.9, delta=1e-6, sample_rate=0.5, steps=9999, accountant=by)
        assert epsilon_spent(noise_multiplier=sigma, delta=1e-6, sample_rate=0.5, steps=9999, accountant=by) <= 49.9
    except ValueError as error:
        assert "epsilon=49.9: the " in str(error) and "did not reach this budget in 0.9 s" in str(error)
        assert "try accountant='rdp' or a smaller epsilon" in str(error) and "\n" not in str(error)
    assert time.thread_time() - start < 5.0


@pytest.mark.parametrize(("change", "said"), [
    (dict(epsilon=0.0), "epsilon=0.0: must be a positive finite number; for example epsilon=2.0"),
    (dict(epsilon=-1.0), "epsilon=-1.0"), (dict(epsilon=math.nan), "epsilon=nan"), (dict(epsilon=math.inf), "epsilon=inf"),
    (dict(epsilon=1e-4), "epsilon=0.0001: cannot be calibrated: choose an epsilon between 0.001 and 50"),
    (dict(epsilon=51.0), "epsilon=51.0: cannot be calibrated"),
    (dict(epsilon=0.001, steps=10**7, sample_rate=1.0), "epsilon=0.001: out of reach of the rdp accountant.*take fewer steps"),
    (dict(delta=0.0), "delta=0.0: must lie strictly between 0 and 1"), (dict(delta=1.0), "delta=1.0"),
    (dict(delta=math.nan), "delta=nan"), (dict(sample_rate=0.0), "sample_rate=0.0"), (dict(sample_rate=1.5), "sample_rate=1.5"),
    (dict(steps=0), "steps=0: must be a whole number of at least 1"), (dict(accountant="rpd"), "did you mean 'rdp'"),
])  # fmt: skip
def test_bad_budgets_are_refused_in_one_line(change, said):
    good = dict(epsilon=1.0, delta=1e-5, sample_rate=0.1, steps=10)
    with pytest.raises(ValueError, match=said) as caught:
        noise_multiplier(**{**good, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_bad_noise_is_refused(bad):
    with pytest.raises(ValueError, match="noise_multiplier="):
        epsilon_spent(noise_multiplier=bad, delta=1e-5, sample_rate=0.1, steps=10)


def test_accounting_is_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for by in ACCOUNTANTS:
            for q in (0.01, 1.0):
                epsilon_spent(noise_multiplier=1.21, delta=1e-5, sample_rate=q, steps=7, accountant=by)


def test_steps():
    assert steps_for(n=50_000, batch_size=4096, epochs=200.0) == 2441
    assert steps_for(n=21_600, batch_size=1000, epochs=20.0) == 432
    assert steps_for(n=10, batch_size=10, epochs=0.01) == 1
    assert steps_for(n=11, batch_size=4, epochs=1.0) == 3, "2.75: to the nearest, not down"
    assert steps_for(n=9, batch_size=4, epochs=1.0) == 2, "2.25: not up"
    assert steps_for(n=3, batch_size=1, epochs=2.0) == 6
    assert steps_for(n=10, batch_size=5, epochs=500_000.0) == 1_000_000
    for bad, name in (
        (dict(batch_size=11), "batch_size=11"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(epochs=0.0), "epochs="),
        (dict(epochs=1e9), r"epochs=1000000000\.0: these are 2e\+09 steps; at most 1,000,000"),
        (dict(epochs=500_001.0), "epochs=500001.0"),
    ):
        with pytest.raises(ValueError, match=name):
            steps_for(**{**dict(n=10, batch_size=5, epochs=1.0), **bad})


# Poisson sampling. Each check below gives a z score; |z| < 5.5 fails by chance with probability 4e-8 each, 2e-7 for all
# of them, over seeds; the seed is fixed, so the tests do not flake.

N, Q, STEPS = 200, 0.1, 3000


def joins(sampler) -> np.ndarray:
    """[steps, n] zeros and ones."""
    table = np.zeros((STEPS, N))
    for step in range(STEPS):
        table[step, sampler(step)] = 1
    return table


def scores(table: np.ndarray) -> dict[str, float]:
    """z of the mean, of the variance of batch sizes (independence of examples), of each example's rate, of pairs in time."""
    variance = Q * (1 - Q)
    centred = table - Q
    sizes = centred.sum(axis=1)
    kurt = variance * (1 - 3 * variance)  # fourth central moment of a coin
    var_of_square = N * (kurt - variance**2) + 2 * N * (N - 1) * variance**2 - 0.0
    neighbours = centred[:, :-1] * centred[:, 1:]
    in_time = centred[:-1] * centred[1:]
    rates = centred.sum(axis=0) / (STEPS * variance) ** 0.5
    return {
        "mean": sizes.sum() / (STEPS * N * variance) ** 0.5,
        "variance": (sizes**2 - N * variance).sum() / (STEPS * var_of_square) ** 0.5,
        "neighbours": neighbours.sum() / (neighbours.size * variance**2) ** 0.5,
        "steps": in_time.sum() / (in_time.size * variance**2) ** 0.5,
        "spread of rates": ((rates**2).sum() - N) / (2 * N) ** 0.5,
    }


def ours(step: int) -> np.ndarray:
    return poisson_batch(N, Q, seed=11, step=step).numpy()


def test_batches_are_poisson_samples():
    found = scores(joins(ours))
    assert max(abs(z) for z in found.values()) < 5.5, found


def fixed_size(step):
    return np.random.default_rng(step).choice(N, int(N * Q), replace=False)


def shuffled_epochs(step):
    epoch, place = divmod(step, int(1 / Q))
    return np.random.default_rng(epoch).permutation(N)[place * int(N * Q) :][: int(N * Q)]


def in_pairs(step):
    return np.flatnonzero(np.repeat(np.random.default_rng(step).random(N // 2) < Q, 2))


def sticky(step):
    return np.flatnonzero(np.random.default_rng(step // 2).random(N) < Q)


def favourites(step):
    return np.flatnonzero(np.random.default_rng(step).random(N) < Q * np.linspace(0.8, 1.2, N))


def too_often(step):
    return np.flatnonzero(np.random.default_rng(step).random(N) < 0.105)


@pytest.mark.parametrize(("sampler", "sees"), [
    (fixed_size, "variance"), (shuffled_epochs, "steps"), (in_pairs, "neighbours"), (in_pairs, "variance"), (sticky, "steps"),
    (favourites, "spread of rates"), (too_often, "mean"),
])  # fmt: skip
def test_other_samplers_fail_the_same_test(sampler, sees):
    assert abs(scores(joins(sampler))[sees]) > 5.5


def test_a_draw_depends_on_seed_step_and_example_only():
    base = poisson_batch(100, 0.3, seed=1, step=4)
    assert torch.equal(base, poisson_batch(100, 0.3, seed=1, step=4))
    more = poisson_batch(150, 0.3, seed=1, step=4)
    assert torch.equal(more[more < 100], base), "a hundred and first example moves nobody"
    assert not torch.equal(base, poisson_batch(100, 0.3, seed=2, step=4))
    assert not torch.equal(base, poisson_batch(100, 0.3, seed=1, step=5))
    assert base.dtype == torch.int64 and (base.diff() > 0).all()


def test_the_ends_of_sampling():
    assert torch.equal(poisson_batch(7, 1.0, seed=0, step=0), torch.arange(7))
    assert poisson_batch(0, 0.5, seed=0, step=0).shape == (0,)
    assert poisson_batch(5, 1e-12, seed=0, step=0).shape == (0,)
    for n, q in ((-1, 0.5), (5, 0.0), (5, 1.1)):
        with pytest.raises(ValueError, match=r"n=-1|sample_rate="):
            poisson_batch(n, q, seed=0, step=0)


# Corners: nearly no noise, nearly no sampling, a delta that is enough alone, budgets at both ends.
CORNERS = [
    (32.0, 1e-5, 0.25, 1), (32.0, 0.1, 0.02, 40), (50.0, 1e-5, 0.25, 1), (50.0, 0.5, 1e-4, 3), (0.05, 0.1, 0.02, 40),
    (8.0, 1e-3, 0.02, 1), (0.001, 0.1, 0.02, 3), (0.001, 1e-3, 0.01, 10), (0.05, 1e-3, 0.7, 3), (32.0, 1e-10, 1.0, 1),
    (24.0, 1e-5, 0.1, 1), (50.0, 1e-5, 1.0, 3), (40.0, 1e-5, 0.5, 2),
]  # fmt: skip


@pytest.mark.parametrize("by", ACCOUNTANTS)
@pytest.mark.parametrize(("epsilon", "delta", "rate", "steps"), CORNERS)
def test_the_search_for_sigma_never_overspends(epsilon, delta, rate, steps, by):
    about = dict(delta=delta, sample_rate=rate, steps=steps, accountant=by)
    sigma = noise_multiplier(epsilon=epsilon, **about)
    assert sigma >= accounting.SIGMA_RANGE[0] * (1 - 1e-12)
    assert 0 <= epsilon_spent(noise_multiplier=sigma, **about) <= epsilon


@given(
    epsilon=st.floats(0.05, 50.0), delta=st.floats(-10, -0.5).map(lambda x: 10.0**x),
    rate=st.floats(-4, 0).map(lambda x: 10.0**x), steps=st.integers(1, 300),
)  # fmt: skip
@settings(max_examples=25, deadline=None, derandomize=True)
def test_the_search_for_sigma_never_overspends_anywhere(epsilon, delta, rate, steps):
    about = dict(delta=delta, sample_rate=rate, steps=steps)
    sigma = noise_multiplier(epsilon=epsilon, **about)
    assert 0 <= epsilon_spent(noise_multiplier=sigma, **about) <= epsilon
    assert sigma < 0.2001 or epsilon_spent(noise_multiplier=sigma * 0.999, **about) > epsilon, (
        "the smallest, or the least"
    )


def test_the_least_noise_can_be_too_little():
    """Negative control for the corners: what the search once returned for three of them without looking."""
    for epsilon, delta, rate, steps in CORNERS[:2]:
        spent = epsilon_spent(noise_multiplier=accounting.SIGMA_RANGE[0], delta=delta, sample_rate=rate, steps=steps)
        assert epsilon < spent < 1.01 * epsilon


@pytest.mark.parametrize("by", ACCOUNTANTS)
@pytest.mark.parametrize(("sigma", "rate", "steps", "delta"), [
    (50.0, 0.02, 20, 1e-3), (30.0, 0.1, 10, 1e-2), (5.0, 0.05, 20, 0.05), (1.0, 0.1, 10, 0.3), (1000.0, 0.01, 10, 1e-5),
    (9000.0, 1.0, 1, 0.9),
])  # fmt: skip
def test_epsilon_is_never_negative(sigma, rate, steps, delta, by):
    assert epsilon_spent(noise_multiplier=sigma, delta=delta, sample_rate=rate, steps=steps, accountant=by) >= 0
    raw = accounting._rdp(1.0, delta=0.3, sample_rate=0.1, steps=10)
    assert raw < 0, "the conversion alone does go below"


def test_what_is_not_a_number_bounds_nothing(monkeypatch):
    monkeypatch.setattr(accounting.RDPAccountant, "get_epsilon", lambda *a, **k: math.nan)
    assert epsilon_spent(noise_multiplier=0.777, delta=1e-5, sample_rate=0.1, steps=3) == math.inf


def test_a_budget_that_rdp_cannot_reach_is_left_to_the_others():
    """Renyi orders end at 1024: at delta 1e-5 no noise brings RDP below 0.011."""
    about = dict(delta=1e-5, sample_rate=0.02, steps=3)
    with pytest.raises(ValueError, match="out of reach of the rdp accountant"):
        noise_multiplier(epsilon=0.001, **about)
    sigma = noise_multiplier(epsilon=0.001, accountant="pld", **about)
    assert 0.0009 < epsilon_spent(noise_multiplier=sigma, accountant="pld", **about) <= 0.001


@pytest.mark.parametrize("by", ["prv", "pld"])
def test_budgets_that_delta_alone_nearly_covers(by):
    about = dict(delta=1e-3, sample_rate=0.01, steps=10)
    sigma = accounting.noise_multiplier(epsilon=0.001, accountant=by, **about)
    assert accounting.epsilon_spent(noise_multiplier=sigma, accountant=by, **about) <= 0.001 and 0 < sigma < 50


@pytest.mark.parametrize(("sigma", "least", "most"), [(2.7, 0.01, 0.0101), (20.0, 0.02, 0.1)])
def test_prv_is_asked_for_no_more_precision_than_shows(sigma, least, most, monkeypatch):
    """An error of 0.01 in an epsilon of 40 takes half a minute to calibrate; an eight-hundredth of it is enough."""
    asked, steps = [], 2441 if sigma < 3 else 20_000

    def answer(self, delta, eps_error=0.01):
        asked.append(eps_error)
        return 8.0

    monkeypatch.setattr(accounting.PRVAccountant, "get_epsilon", answer)
    rate = 0.08192 if sigma < 3 else 0.5
    assert epsilon_spent(noise_multiplier=sigma, delta=1.3e-5, sample_rate=rate, steps=steps, accountant="prv") == 8.0
    assert len(asked) == 1 and least <= asked[0] <= most


@pytest.mark.parametrize("by", ["prv", "pld"])
def test_a_search_that_would_last_too_long_says_so(by, monkeypatch):
    monkeypatch.setattr(accounting, "SECONDS", 0.05)
    with pytest.raises(
        ValueError, match=rf"epsilon=8\.0: the (rdp|{by}) accountant did not reach this budget in 0\.05 s"
    ):
        accounting.noise_multiplier(epsilon=8.0, delta=1.2e-5, sample_rate=0.02, steps=500, accountant=by)


@pytest.mark.parametrize("slope", [-1.5, -0.8])
def test_a_start_within_the_budget_is_refined_in_three_evaluations(slope):
    """With a bracket it takes eight, of seconds each. The budget is kept exactly at -0.07."""
    asked = []

    def excess(x):
        asked.append(x)
        return slope * (x + 0.07)

    found = accounting._refine(excess, 0.0)
    assert -1e-4 <= slope * (found + 0.07) <= 0 and len(asked) == 3


@pytest.mark.parametrize("by", ["rdp", "prv", "pld"])
@pytest.mark.parametrize(("sigma", "steps", "delta"), [(10.0, 200, 1e-12), (10.0, 200, 1e-14), (60.0, 200, 1e-14)])
def test_no_accountant_is_below_the_exact_epsilon_at_a_tiny_delta(by, sigma, steps, delta):
    try:
        found = epsilon_spent(noise_multiplier=sigma, delta=delta, sample_rate=1.0, steps=steps, accountant=by)
    except ValueError as refusal:
        assert by == "prv" and "such small values of delta" in str(refusal)
        return
    assert found >= get_epsilon_gaussian(sigma / steps**0.5, delta)
