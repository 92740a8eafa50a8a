"""The privacy of DP-SGD. Budget <-> noise multiplier by three accountants, and Poisson sampling.

The mechanism (Algorithm 2 of the paper; Abadi et al. 2016): at each of T steps every example joins the batch
independently with probability q, each example moves the clipped sum by at most C, and Gaussian noise of standard
deviation sigma * C is added to the sum. Neighbouring data sets differ by one example added or removed. The three
accountants bound the same mechanism; sigma is the noise multiplier, without units.

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

import numpy as np
import torch
from dp_accounting import dp_event
from dp_accounting.pld.pld_privacy_accountant import PLDAccountant
from jaxtyping import Int64
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy.optimize import brentq
from torch import Tensor

from dpmix.core import checks, rng

ACCOUNTANTS = ("rdp", "prv", "pld")
# Above 50 no guarantee worth the name is left, and the numerical accountants run for minutes or overflow.
EPSILON_RANGE = (1e-3, 50.0)
SIGMA_RANGE = (0.2, 1e4)
SECONDS = 9.0
RDP_ORDERS = [*RDPAccountant.DEFAULT_ALPHAS, *range(64, 256, 8), *range(256, 1025, 64)]


def check_mechanism(*, delta: float, sample_rate: float, steps: int, accountant: str = "rdp") -> None:
    """Refuse what no accountant can bound, in one line that names the argument."""
    checks.require(isinstance(delta, float) and 0 < delta < 1, "delta", delta, "must lie strictly between 0 and 1")
    good = isinstance(sample_rate, (int, float)) and 0 < sample_rate <= 1
    checks.require(good, "sample_rate", sample_rate, "must lie in (0, 1]: it is the expected batch size over n")
    checks.whole("steps", steps, 1)
    checks.one_of("accountant", accountant, ACCOUNTANTS)


@functools.lru_cache(maxsize=4096)
def epsilon_spent(
    *, noise_multiplier: float, delta: float, sample_rate: float, steps: int, accountant: str = "rdp"
) -> float:
    """Epsilon of `steps` Poisson-subsampled Gaussian steps at the given delta: an upper bound.

    `noise_multiplier` is sigma of Eq. (1): noise standard deviation over clip norm. Zero noise gives infinity, and so does
    so little noise that the PRV accountant would need more memory than there is.
    `steps=0` is not asked here: a run that released nothing has spent nothing. Raises ValueError on bad input.
    """
    check_mechanism(delta=delta, sample_rate=sample_rate, steps=steps, accountant=accountant)
    good = isinstance(noise_multiplier, (int, float)) and math.isfinite(noise_multiplier) and noise_multiplier >= 0
    checks.require(good, "noise_multiplier", noise_multiplier, "must be finite and not negative")
    if noise_multiplier == 0:
        return math.inf
    with warnings.catch_warnings():
        # An optimum at the end of the list of orders is still a valid bound; while searching it is expected.
        warnings.filterwarnings("ignore", message="Optimal order is the", category=UserWarning)
        if accountant == "pld":
            event = dp_event.PoissonSampledDpEvent(sample_rate, dp_event.GaussianDpEvent(noise_multiplier))

            def rounded_to(interval: float) -> float:
                pld = PLDAccountant(value_discretization_interval=interval)
                return float(pld.compose(event, steps).get_epsilon(delta))

            # Losses are rounded upwards to a grid, which adds up to 1.3 * steps * interval ** 2 to epsilon: refine it where
            # that exceeds one part in ten thousand, down to the library's own 1e-4. A coarse grid is ten times as fast.
            coarse = rounded_to(1e-3)
            interval = max(1e-4, (1e-4 * coarse / (1.3 * steps)) ** 0.5)
            return coarse if interval >= 1e-3 or not math.isfinite(coarse) else rounded_to(interval)
        if accountant == "rdp":
            rdp = RDPAccountant()
            rdp.history = [(noise_multiplier, sample_rate, steps)]
            return float(rdp.get_epsilon(delta, alphas=RDP_ORDERS))
        prv = PRVAccountant()
        prv.history = [(noise_multiplier, sample_rate, steps)]
        about = dict(noise_multiplier=noise_multiplier, delta=delta, sample_rate=sample_rate, steps=steps)
        # The error bound is part of the result, and a small one costs time.
        error = max(0.01, epsilon_spent(**about, accountant="rdp") / 800)
        with np.errstate(divide="ignore", over="ignore"):  # both branches of a numpy.where, one of them unused
            try:
                coarse = float(prv.get_epsilon(delta, eps_error=error))
            except MemoryError:
                return math.inf  # a bound all the same: epsilon lies in the thousands here
            # Refine the error where it would dominate, within some 100 MB.
            error = max(coarse / 50, 1e-5 * steps**0.5)
            return coarse if error >= 0.01 or coarse >= 0.1 else float(prv.get_epsilon(delta, eps_error=error))


@functools.lru_cache(maxsize=4096)
def noise_multiplier(*, epsilon: float, delta: float, sample_rate: float, steps: int, accountant: str = "rdp") -> float:
    """The smallest sigma (to 0.01 %) whose `epsilon_spent` does not exceed `epsilon`.

    A bracketed root search over the accountant's own epsilon. Ends within ten seconds of computing, else raises ValueError:
    budgets outside [0.001, 50] and those that need a noise multiplier outside [0.2, 10,000] are refused by name.
    """
    checks.positive("epsilon", epsilon, "; for example epsilon=2.0")
    check_mechanism(delta=delta, sample_rate=sample_rate, steps=steps, accountant=accountant)
    low, high = EPSILON_RANGE
    said = f"cannot be calibrated: choose an epsilon between {low} and {high:g}"
    checks.require(low <= epsilon <= high, "epsilon", epsilon, said)
    start, longest = time.thread_time(), 0.0  # not the clock: a busy machine must not change the answer

    def excess(log_sigma: float, by: str) -> float:
        nonlocal longest
        before = time.thread_time()
        if before - start + longest > SECONDS:  # the next one may take as long as the longest so far
            raise ValueError(
                f"epsilon={epsilon!r}: the {by} accountant did not reach this budget in {SECONDS:g} s at "
                f"sample_rate={sample_rate:g}, steps={steps}; try accountant='rdp' or a smaller epsilon"
            )
        spent = epsilon_spent(
            noise_multiplier=math.exp(log_sigma), delta=delta, sample_rate=sample_rate, steps=steps, accountant=by
        )
        longest = max(longest, time.thread_time() - before)
        return 50.0 if not math.isfinite(spent) else math.log(max(spent, 1e-12) / epsilon)  # nearly linear in log sigma

    def search(by: str, left: float, right: float) -> float:
        least, most = (math.log(s) for s in SIGMA_RANGE)
        while excess(right, by) > 0:
            left, right = right, right + 0.4
            if right > most:
                raise ValueError(
                    f"epsilon={epsilon!r}: out of reach of the {by} accountant at sample_rate={sample_rate:g}, "
                    f"steps={steps}, delta={delta:g}; take fewer steps, a smaller batch or a larger epsilon"
                )
        while excess(left, by) <= 0:
            left, right = left - 0.4, left
            if left < least:
                return least  # this little noise is already within the budget
        root = brentq(excess, left, right, args=(by,), xtol=5e-5, rtol=1e-12)
        while excess(root, by) > 0:
            root += 5e-5
        return root

    def refine(by: str, start: float) -> float:
        """Secants from a point within the budget: three evaluations as a rule, where a bracket takes eight."""
        x, f = start, excess(start, by)
        step = max(-0.15, f / 1.2)  # epsilon falls by about 1.2 % for 1 % more noise
        for _ in range(6 if f <= 0 else 0):
            at = excess(x + step, by)
            if -1e-4 <= at <= 0:
                return x + step
            slope = (at - f) / step if step else -1.0
            if not -10 < slope < -0.1:  # far from a power law: near epsilon = 0, say
                break
            x, f, step = x + step, at, min(0.15, max(-0.15, -(at + 5e-5) / slope))  # aim a little inside the budget
        return search(by, start - 0.15, start)

    log_sigma = search("rdp", 0.0, 0.4)
    if accountant != "rdp":  # the tighter accountants need at most as much noise as a rule, and rarely 15 % less
        log_sigma = refine(accountant, log_sigma)
    return math.exp(log_sigma)


def steps_for(*, n: int, batch_size: int, epochs: float) -> int:
    """T = round(epochs * N / B), at least one: how many Poisson steps make `epochs` epochs."""
    checks.whole("n", n, 1)
    checks.positive("epochs", epochs)
    allowed = f"must be a whole number from 1 to the {n} training examples"
    checks.require(isinstance(batch_size, int) and 1 <= batch_size <= n, "batch_size", batch_size, allowed)
    return max(1, round(epochs * n / batch_size))


def poisson_batch(n: int, sample_rate: float, *, seed: rng.Seed, step: int) -> Int64[Tensor, " b"]:
    """The ids that join step `step`: each of 0..n-1 independently with probability `sample_rate`, in order.

    b is random, may be 0, and is never a divisor. Algorithm 1, line "Take a random sample". The draw of example i
    depends on (seed, step, i) only: appending examples changes nobody else's membership. `seed=None` takes fresh entropy.
    """
    checks.whole("n", n, 0)
    checks.require(0 < sample_rate <= 1, "sample_rate", sample_rate, "must lie in (0, 1]")
    joins = rng.generator(seed, "sample", step).random(n) < sample_rate
    return torch.from_numpy(np.flatnonzero(joins).astype(np.int64))
