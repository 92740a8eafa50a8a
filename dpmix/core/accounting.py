"""The privacy of DP-SGD. Budget <-> noise multiplier by three accountants, and Poisson sampling.

The mechanism (Algorithm 2 of the paper; Abadi et al. 2016): at each of T steps every example joins the batch
independently with probability q, each example moves the clipped sum by at most C, and Gaussian noise of standard
deviation sigma * C is added to the sum. Neighbouring data sets differ by one example added or removed ("join"). The
three accountants bound the same mechanism; sigma is the noise multiplier, without units.

A unit that is there in both data sets, joins by the same coin and gives other vectors of norm at most C ("change") is another
pair: (1-q) N(0) + q N(C) against (1-q) N(0) + q N(-C), in one dimension, noise sigma C. So it is with microbatches
(`microbatch`). PLD alone bounds it.

========== ================================== =====================================================
accountant library                            method
========== ================================== =====================================================
rdp        Opacus `RDPAccountant`             Renyi orders, converted; loosest, what the paper used
prv        Opacus `PRVAccountant`             numerical composition (Gopi et al. 2021)
pld        dp_accounting `PLDAccountant`      privacy loss distributions, both directions
========== ================================== =====================================================
"""

import functools
import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from dp_accounting import NeighboringRelation, dp_event, get_epsilon_gaussian
from dp_accounting.pld.pld_privacy_accountant import PLDAccountant
from jaxtyping import Int64
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy.optimize import brentq
from torch import Tensor

from dpmix.core import checks, rng

ACCOUNTANTS = ("rdp", "prv", "pld")
NEIGHBOURS = {"join": NeighboringRelation.ADD_OR_REMOVE_ONE, "change": NeighboringRelation.REPLACE_ONE}
# Above 50 no guarantee worth the name is left, and the numerical accountants run for minutes or overflow.
EPSILON_RANGE = (1e-3, 50.0)
SIGMA_RANGE = (0.2, 1e4)
SECONDS = 9.0
MOST_STEPS = 1_000_000
RDP_ORDERS = [*RDPAccountant.DEFAULT_ALPHAS, *range(64, 256, 8), *range(256, 1025, 64)]


def check_mechanism(
    *, delta: float, sample_rate: float, steps: int, accountant: str = "rdp", neighbours: str = "join"
) -> None:
    """Refuse what no accountant can bound, in one line that names the argument."""
    checks.require(isinstance(delta, float) and 0 < delta < 1, "delta", delta, "must lie strictly between 0 and 1")
    good = isinstance(sample_rate, (int, float)) and 0 < sample_rate <= 1
    checks.require(good, "sample_rate", sample_rate, "must lie in (0, 1]: it is the expected batch size over n")
    checks.whole("steps", steps, 1)
    checks.one_of("accountant", accountant, ACCOUNTANTS)
    checks.one_of("neighbours", neighbours, NEIGHBOURS)
    said = "only accountant='pld' bounds a contribution that changes"
    checks.require(neighbours == "join" or accountant == "pld", "neighbours", neighbours, said)


@functools.lru_cache(maxsize=4096)
def epsilon_spent(
    *,
    noise_multiplier: float,
    delta: float,
    sample_rate: float,
    steps: int,
    accountant: str = "rdp",
    neighbours: str = "join",
) -> float:
    """Epsilon of `steps` Poisson-subsampled Gaussian steps at the given delta: an upper bound, never negative.
    `noise_multiplier` is sigma of Eq. (1): noise standard deviation over clip norm. Zero noise gives infinity, and so does so
    little noise that the PRV accountant would need more memory than there is. `neighbours`: "join" or "change", see the
    module. `steps=0` is not asked here: a run that released nothing has spent nothing. Raises ValueError on bad input."""
    about: dict[str, Any] = dict(delta=delta, sample_rate=sample_rate, steps=steps)
    check_mechanism(**about, accountant=accountant, neighbours=neighbours)
    good = isinstance(noise_multiplier, (int, float)) and math.isfinite(noise_multiplier) and noise_multiplier >= 0
    checks.require(good, "noise_multiplier", noise_multiplier, "must be finite and not negative")
    if noise_multiplier == 0:
        return math.inf
    if sample_rate < 1 and -math.expm1(steps * math.log1p(-sample_rate)) <= delta:
        return 0.0  # that the unit joins at all is less likely than delta
    with warnings.catch_warnings():
        # An optimum at the end of the list of orders is still a valid bound; while searching it is expected.
        warnings.filterwarnings("ignore", message="Optimal order is the", category=UserWarning)
        if accountant == "pld":
            spent = _pld(noise_multiplier, **about, neighbours=neighbours)
        else:
            spent = (_rdp if accountant == "rdp" else _prv)(noise_multiplier, **about)
    # One Gaussian, and exact: a numerical bound may be off at a tiny delta.
    if sample_rate == 1 and neighbours == "join":
        spent = max(spent, float(get_epsilon_gaussian(noise_multiplier / steps**0.5, delta)))
    # Conversions give less than zero where delta alone is more than enough; and what is not a number bounds nothing.
    return math.inf if math.isnan(spent) else max(0.0, spent)


def _rdp(sigma: float, *, delta: float, sample_rate: float, steps: int) -> float:
    rdp = RDPAccountant()
    rdp.history = [(sigma, sample_rate, steps)]
    return float(rdp.get_epsilon(delta, alphas=RDP_ORDERS))


def _prv(sigma: float, *, delta: float, sample_rate: float, steps: int) -> float:
    prv = PRVAccountant()
    prv.history = [(sigma, sample_rate, steps)]
    # The error bound is part of the result, and a small one costs time.
    error = max(0.01, _rdp(sigma, delta=delta, sample_rate=sample_rate, steps=steps) / 800)
    with np.errstate(divide="ignore", over="ignore"):  # both branches of a numpy.where, one of them unused
        try:
            coarse = float(prv.get_epsilon(delta, eps_error=error))
        except MemoryError:
            return math.inf  # a bound all the same: epsilon lies in the thousands here
        # Refine the error where it would dominate, within some 100 MB.
        error = max(coarse / 50, 1e-5 * steps**0.5)
        return coarse if error >= 0.01 or not 0 < coarse < 0.1 else float(prv.get_epsilon(delta, eps_error=error))


def _pld(sigma: float, *, delta: float, sample_rate: float, steps: int, neighbours: str) -> float:
    event = dp_event.PoissonSampledDpEvent(sample_rate, dp_event.GaussianDpEvent(sigma))

    def rounded_to(interval: float) -> float:
        pld = PLDAccountant(NEIGHBOURS[neighbours], value_discretization_interval=interval)
        return float(pld.compose(event, steps).get_epsilon(delta))

    # Losses are rounded upwards to a grid, which adds up to 1.3 * steps * interval ** 2 to epsilon: refine it where
    # that exceeds one part in ten thousand, down to the library's own 1e-4. A coarse grid is ten times as fast.
    coarse = rounded_to(1e-3)
    interval = max(1e-4, (1e-4 * coarse / (1.3 * steps)) ** 0.5)
    return coarse if interval >= 1e-3 or coarse in (0.0, math.inf) else rounded_to(interval)


@functools.lru_cache(maxsize=4096)
def noise_multiplier(
    *, epsilon: float, delta: float, sample_rate: float, steps: int, accountant: str = "rdp", neighbours: str = "join"
) -> float:
    """The smallest sigma (to 0.01 %) whose `epsilon_spent` does not exceed `epsilon`: it was evaluated at what is returned.

    A bracketed root search over the accountant's own epsilon. Ends within ten seconds of computing, else raises ValueError:
    budgets outside [0.001, 50] and those that need a noise multiplier above 10,000 are refused by name. Where less than
    0.2 would do, 0.2 is the answer.
    """
    checks.positive("epsilon", epsilon, "; for example epsilon=2.0")
    about: dict[str, Any] = dict(delta=delta, sample_rate=sample_rate, steps=steps)
    check_mechanism(**about, accountant=accountant, neighbours=neighbours)
    low, high = EPSILON_RANGE
    said = f"cannot be calibrated: choose an epsilon between {low} and {high:g}"
    checks.require(low <= epsilon <= high, "epsilon", epsilon, said)
    clock = _Clock()

    def excess_by(name: str, pair: str) -> Excess:
        def excess(log_sigma: float) -> float:
            with clock:
                spent = epsilon_spent(noise_multiplier=math.exp(log_sigma), **about, accountant=name, neighbours=pair)
            return 50.0 if not math.isfinite(spent) else math.log(max(spent, 1e-12) / epsilon)  # nearly linear

        clock.said = (
            f"epsilon={epsilon!r}: the {name} accountant did not reach this budget in {SECONDS:g} s at "
            f"sample_rate={sample_rate:g}, steps={steps}; try accountant='rdp' or a smaller epsilon"
        )
        return excess

    log_sigma = _search(excess_by("rdp", "join"), 0.0, 0.4)
    if accountant != "rdp":  # the tighter accountants need at most as much noise as a rule, and rarely 15 % less
        excess = excess_by(accountant, neighbours)
        log_sigma = _search(excess, 0.0, 0.4) if log_sigma is None else _refine(excess, log_sigma)
    if log_sigma is None:
        raise ValueError(
            f"epsilon={epsilon!r}: out of reach of the {accountant} accountant at sample_rate={sample_rate:g}, "
            f"steps={steps}, delta={delta:g}; take fewer steps, a smaller batch or a larger epsilon"
        )
    return math.exp(log_sigma)


Excess = Callable[[float], float]  # log(epsilon spent / epsilon) at log sigma: at most 0 within the budget


class _Clock:
    """Refuses an evaluation that may end after SECONDS of computing: it may take as long as the longest so far."""

    def __init__(self) -> None:
        self.start, self.longest, self.said = time.thread_time(), 0.0, ""  # a busy machine must not change the answer

    def __enter__(self) -> None:
        self.before = time.thread_time()
        if self.before - self.start + self.longest > SECONDS:
            raise ValueError(self.said)

    def __exit__(self, *error: object) -> None:
        self.longest = max(self.longest, time.thread_time() - self.before)


def _search(excess: Excess, left: float, right: float) -> float | None:
    """Where a budget is just kept, from a bracket; None where all noise of SIGMA_RANGE is too little."""
    least, most = (math.log(sigma) for sigma in SIGMA_RANGE)
    while excess(right) > 0:
        if right >= most:
            return None
        left, right = right, min(right + 0.4, most)
    left, stride = max(left, least), 0.4
    while excess(left) <= 0:
        if left <= least:
            return least
        left, right, stride = max(left - stride, least), left, 2 * stride
    root = brentq(excess, left, right, xtol=5e-5, rtol=1e-12)
    while excess(root) > 0:
        root = min(root + 5e-5, right)
    return root


def _refine(excess: Excess, start: float) -> float | None:
    """Secants from a point within the budget: three evaluations as a rule, where a bracket takes eight."""
    least = math.log(SIGMA_RANGE[0])
    x, f = start, excess(start)
    step = max(-0.15, f / 1.2)  # epsilon falls by about 1.2 % for 1 % more noise
    for _ in range(6 if f <= 0 else 0):
        step = max(step, least - x)
        at = excess(x + step)
        if -1e-4 <= at <= 0 or (at <= 0 and x + step <= least):
            return x + step
        slope = (at - f) / step if step else -1.0
        if not -10 < slope < -0.1:  # far from a power law: near epsilon = 0, say
            break
        x, f, step = x + step, at, min(0.15, max(-0.15, -(at + 5e-5) / slope))  # aim a little inside the budget
    return _search(excess, start - 0.15, start)


def steps_for(*, n: int, batch_size: int, epochs: float) -> int:
    """T = round(epochs * N / B), at least one and at most `MOST_STEPS`: how many Poisson steps make `epochs` epochs."""
    checks.whole("n", n, 1)
    checks.positive("epochs", epochs)
    allowed = f"must be a whole number from 1 to the {checks.counted(n, 'training example')}"
    checks.require(isinstance(batch_size, int) and 1 <= batch_size <= n, "batch_size", batch_size, allowed)
    steps = max(1, round(epochs * n / batch_size))
    checks.require(steps <= MOST_STEPS, "epochs", epochs, f"these are {steps:.3g} steps; at most {MOST_STEPS:,}")
    return steps


def poisson_batch(n: int, sample_rate: float, *, seed: rng.Seed, step: int) -> Int64[Tensor, " b"]:
    """The ids that join step `step`: each of 0..n-1 independently with probability `sample_rate`, in order. b is random, may
    be 0, and is never a divisor. Algorithm 1, line "Take a random sample". The draw of example i depends on (seed, step, i)
    only: appending examples changes nobody else's membership. `seed=None` takes fresh entropy."""
    checks.whole("n", n, 0)
    checks.require(0 < sample_rate <= 1, "sample_rate", sample_rate, "must lie in (0, 1]")
    joins = rng.generator(seed, "sample", step).random(n) < sample_rate
    return torch.from_numpy(np.flatnonzero(joins).astype(np.int64))
