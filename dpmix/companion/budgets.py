"""What a budget comes to, at once: sigma and epsilon by the accountants on coarser grids than `core.accounting` takes."""

import math
import warnings
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pandas as pd
from dp_accounting import dp_event
from dp_accounting.pld.pld_privacy_accountant import PLDAccountant
from opacus.accountants import RDPAccountant
from opacus.accountants.analysis import prv
from scipy.fft import next_fast_len

from dpmix import audit
from dpmix.core import accounting, checks
from dpmix.core.checks import counted

_WHOLE = [i for i, order in enumerate(accounting.RDP_ORDERS) if order == int(order)]
MOST = 100.0  # no guarantee is left above it


@lru_cache(maxsize=4096)
def spent(sigma: float, delta: float, q: float, steps: int, accountant: str, neighbours: str = "join") -> float:
    """`accounting.epsilon_spent` by the same libraries in milliseconds: an upper bound too, at most 3 % above it."""
    with warnings.catch_warnings(), np.errstate(divide="ignore", over="ignore"):
        warnings.filterwarnings("ignore", message="Optimal order is the", category=UserWarning)
        if accountant == "rdp":
            rdp, orders = RDPAccountant(), accounting.RDP_ORDERS
            rdp.history = [(sigma, q, steps)]
            by = lru_cache(lambda i: rdp.get_epsilon(delta, alphas=[orders[i]]))
            # Over the orders it falls and then rises: bisection finds the least, among the whole ones first, which cost less.
            some: Sequence[int] = _WHOLE
            for _ in range(2):
                at = bisect_left(range(len(some) - 1), True, key=lambda i: not by(some[i]) > by(some[i + 1]))
                best, some = some[at], range(some[at - 1] if at else 0, some[min(at + 1, len(some) - 1)] + 1)
            return max(0.0, by(best))
        if accountant == "prv":
            return _prv(sigma, delta, q, steps)
        rough = spent(sigma, delta, q, steps, "rdp")
        # A grid of this interval adds 1.3 * steps * interval ** 2 to epsilon, and to the variance of a step's loss (at least
        # q ** 2 / sigma ** 2) a sixth of interval ** 2: neither may be more than some 1 %, of epsilon that is.
        interval = min(0.008 * rough / steps, 0.12 * q * q * math.expm1(min(sigma**-2, 99.0))) ** 0.5
        pld = PLDAccountant(accounting.NEIGHBOURS[neighbours], interval)
        event = dp_event.PoissonSampledDpEvent(q, dp_event.GaussianDpEvent(sigma))
        return float(pld.compose(event, steps).get_epsilon(delta))


def _prv(sigma: float, delta: float, q: float, steps: int) -> float:
    """Opacus' `PRVAccountant` with an error in proportion to epsilon, on a grid whose length suits the Fourier transform."""
    rough, off = spent(sigma, delta, q, steps, "pld"), delta / 1000
    error = max(rough / 75, min(rough / 40, 0.004))
    # As in Opacus: losses beyond `end` and the rounding to the grid cost `off` of delta and `error` of epsilon.
    end = 3 + max(error, spent(sigma, off / 4, q, steps, "rdp"), spent(sigma, off / 8 / steps, q, 1, "rdp"))
    half = next_fast_len(math.ceil(end / error * (steps * math.log(12 / off) / 2) ** 0.5) + 1, real=True)
    domain = prv.Domain(-end, end * half / (half - 1), 2 * half)
    one = prv.PoissonSubsampledGaussianPRV(q, sigma)
    step = prv.discretize(prv.TruncatedPrivacyRandomVariable(one, domain.t_min, domain.t_max), domain)
    return float(prv.compose_heterogeneous([step], [steps]).compute_epsilon(delta, off, error)[2])


def calibrated(epsilon: float, delta: float, q: float, steps: int, accountant: str) -> float:
    """`accounting.noise_multiplier` to 1 %, by `spent`. ValueError for an epsilon that is out of reach."""
    (least, most), (left, right) = accounting.EPSILON_RANGE, map(math.log, accounting.SIGMA_RANGE)
    checks.require(least <= epsilon <= most, "epsilon", epsilon, f"must lie between {least:g} and {most:g}")

    def excess(x: float, by: str) -> float:  # nearly a line, where it is not cut
        return math.log(min(max(spent(math.exp(x), delta, q, steps, by) / epsilon, 0.05), 400.0))

    # A guess from the central limit; then secants, by each accountant from where the one before ended, at last bisection.
    mu = (2 * (math.log(1 / delta) + epsilon)) ** 0.5 - (2 * math.log(1 / delta)) ** 0.5
    x, order = min(max(-0.5 * math.log(math.log1p(mu * mu / (q * q * steps))), left), right), ("rdp", "pld", "prv")
    slope = -1.3
    for by in order[: order.index(accountant) + 1]:
        low, high, y, within = left, right, excess(x, by), 1e-4 if by == accountant == "rdp" else 5e-3
        for tries in range(30):
            low, high = (x, high) if y > 0 else (low, x)
            to = min(max(x - y / slope, low), high) if tries < 6 else (low + high) / 2
            if abs(y) < within or to == x:
                break
            at = excess(to, by)
            slope, x, y = min((at - y) / (to - x), -0.5), to, at
        out = f"out of reach at q={q:.3g}, T={steps}, delta={delta:g}; take fewer steps, a smaller batch or a larger epsilon"
        checks.require(abs(y) < 1e-2 or x == left, "epsilon", epsilon, out)
    return math.exp(x)


def budget(
    *,
    n: int,
    batch_size: int,
    epochs: float,
    epsilon: float,
    delta: float,
    accountant: str,
    clip_norm: float,
    parameters: int,
    k: int,
) -> str:
    """What a budget comes to: q, T, sigma, noise beside signal, the accountants' epsilons, and those of three mistakes.

    The mistakes take the sigma of the budget: pairs clipped as one with the noise of single examples (`core.microbatch`), k
    views clipped one by one, which move the sum by kC, and shuffled batches, for which an attack proves a lower bound."""
    steps, q = accounting.steps_for(n=n, batch_size=batch_size, epochs=epochs), batch_size / n
    checks.require(0 < delta < 1 / n, "delta", delta, f"must be below 1/N = {1 / n:.2g}")
    sigma = calibrated(epsilon, delta, q, steps, accountant)
    noise = sigma * clip_norm * parameters**0.5 / batch_size
    facts = f"q = B/N = {q:.4g}, T = {steps:,}, <b>σ = {sigma:.3g}</b>. A mean gradient's noise has length σC√D′/B = "
    facts += f"{noise:.3g}, {noise / clip_norm:.2g} times the C = {clip_norm:g} that one example may have."
    values = {f"ε of this run by {a.upper()}": spent(sigma, delta, q, steps, a) for a in accounting.ACCOUNTANTS}
    values["mistake: pairs clipped as one, noise for one (PLD)"] = spent(sigma, delta, q, steps, "pld", "change")
    values[f"mistake: each of {counted(k, 'view')} clipped by itself (PLD)"] = spent(sigma / k, delta, q, steps, "pld")
    values["mistake: shuffled batches, at least (an attack)"] = audit.shuffled_epsilon(
        noise_multiplier=sigma, batches=max(1, round(1 / q)), epochs=max(1, int(epochs)), delta=delta
    )
    shown = np.log10(pd.DataFrame({"ε": values}).clip(0.011, MOST)).style
    shown = shown.format(lambda v: f"{10**v:.3g}" if v < np.log10(MOST) else f"over {MOST:g}")
    shown = shown.bar(color="#9ecae1", align="left", vmin=-2, vmax=np.log10(MOST))
    looks = [{"selector": "*", "props": "text-align:left;white-space:normal"}]
    return f"<p>{facts}</p>{shown.set_properties(width='11em', color='black').set_table_styles(looks).to_html()}"
