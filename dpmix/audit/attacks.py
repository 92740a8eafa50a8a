"""Does a training step keep its promise? The sensitivity of its sum, and privacy audits of its releases.

What is audited is a step or a release in the sense of `audit_steps`, which has them ready for heads and networks.

What each audit finds. `sensitivity` measures the largest movement over data sets that were made to move it: a movement
above C is a bug, none above C is no proof. `step_canary` turns many noisy releases into a lower bound on epsilon, and
sees a factor of two in sensitivity or noise. `one_run` sees one whole training run through its last weights only: it is
loose and finds gross mistakes.

The statistics are those of `jax_privacy.auditing` (`pip install 'dpmix[jax]'`); JAX itself is never imported."""

import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from dp_accounting import get_epsilon_gaussian
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from dpmix.audit.steps import Records, Release, Step, noisy
from dpmix.core import checks, rng
from dpmix.images import data

ROUNDING = 1e-5  # relative; what float32 may add to a movement of C
RELATIONS = {"add": 1.0, "remove": 1.0, "replace": 2.0}  # allowed movement, in clip norms


def worlds(
    shape: tuple[int, int, int], num_classes: int, size: int, *, seed: int, natural: data.ImageSet | None = None
) -> Iterator[tuple[str, Records, Records]]:
    """Data sets of `size` records, each with two newcomers: (name, records, newcomer and its replacement).

    Random pixels and labels; black and white pixels; `natural` images; a blank set and a white or a huge newcomer; grey
    opponents, all of one class, and a white newcomer of another; copies; a newcomer that is not a number; nobody else."""
    draw = rng.generator(seed, "worlds")
    n = size + 2
    noise = torch.from_numpy(draw.random((n, *shape))).float()
    labels = torch.from_numpy(draw.integers(num_classes, size=n))
    ids = torch.from_numpy(draw.permutation(n))
    two = torch.zeros(n, dtype=torch.int64)
    two[size] = min(1, num_classes - 1)

    def world(images: Tensor, of: Tensor, newcomers: Tensor | None = None) -> tuple[Records, Records]:
        images = images.expand(n, *shape).clone()
        if newcomers is not None:
            images[size:] = newcomers.expand(2, *shape)
        everyone = Records(images, of, ids)
        return everyone.take(slice(size)), everyone.take(slice(size, None))

    white = torch.ones(shape)
    yield "random", *world(noise, labels)
    yield "black and white", *world(noise.round(), labels)
    if natural is not None:
        chosen = torch.from_numpy(draw.integers(len(natural), size=n))
        yield "natural", *world(natural.images[chosen].float() / 255, natural.labels[chosen])
    yield "blank, white newcomer", *world(0 * white, two, white)
    yield "blank, huge newcomer", *world(0 * white, two, 1e4 * white)
    yield "opponents", *world(white / 4, two, white)
    yield "copies", *world(white, two)
    yield "not a number", *world(noise, labels, torch.nan * white)
    records, newcomers = world(noise, labels)
    yield "nobody else", records.take(slice(0)), newcomers


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """`movements`: the largest movement in each world and relation, in clip norms. Not finite where the sum was not."""

    movements: dict[tuple[str, str], float]

    @property
    def excess(self) -> float:
        """The largest movement over what its relation allows: at most 1 + ROUNDING for a correct step."""
        return max(moved / RELATIONS[relation] for (_, relation), moved in self.movements.items())

    @property
    def holds(self) -> bool:
        return self.excess <= 1 + ROUNDING

    def largest(self, relation: str = "add") -> float:
        """The largest movement under a relation, in clip norms."""
        return max(moved for (_, r), moved in self.movements.items() if r == relation)


def sensitivity(
    step: Step,
    *,
    shape: tuple[int, int, int],
    num_classes: int,
    clip_norm: float = 1.0,
    size: int = 6,
    trials: int = 3,
    relations: Sequence[str] = ("add", "replace"),
    natural: data.ImageSet | None = None,
    seed: int = 0,
) -> Sensitivity:
    """The largest movement of the sum between neighbouring data sets, over `worlds`, places of the newcomer and draws.

    Allowed are C for "add" and "remove" (the same pairs, hence one figure) and 2C for "replace". Raises ValueError for an
    unknown relation or an empty grid."""
    for relation in relations:
        checks.one_of("relations", relation, RELATIONS)
    checks.whole("trials", trials, 1)
    checks.whole("size", size, 1)
    movements: dict[tuple[str, str], float] = {}
    for trial in range(trials):
        for name, records, new in worlds(shape, num_classes, size, seed=seed + trial, natural=natural):
            for place in dict.fromkeys((0, len(records) // 2, len(records))):
                joined = step(records.insert(place, new.take([0])), seed, trial).double()
                other = replace(new.take([1]), ids=new.ids[:1])
                for relation in relations:
                    before = records.insert(place, other) if relation == "replace" else records
                    moved = float((joined - step(before, seed, trial).double()).norm()) / clip_norm
                    moved = moved if np.isfinite(moved) else float("inf")
                    movements[name, relation] = max(moved, movements.get((name, relation), 0.0))
    return Sensitivity(movements=movements)


@dataclass(frozen=True, kw_only=True)
class CanaryAudit:
    """`claimed` epsilon, and lower bounds at the asked confidence: by Gaussian DP and by Clopper-Pearson. `inside` and
    `outside` are the scores of the releases with and without the canary, in clip norms."""

    claimed: float
    gdp: float
    clopper_pearson: float
    inside: np.ndarray
    outside: np.ndarray

    @property
    def flagged(self) -> bool:
        """Whether a lower bound exceeds the claim: a bug. Each bound holds at 95 %, so of correct steps at most one in ten."""
        return max(self.gdp, self.clopper_pearson) > self.claimed


def step_canary(
    step: Step,
    *,
    records: Records,
    canary: Records,
    noise_multiplier: float,
    clip_norm: float = 1.0,
    delta: float = 1e-5,
    releases: int = 2000,
    release: Release | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> CanaryAudit:
    """Gradient-canary audit of one step (Nasr et al. 2023): `releases` noisy sums with the canary and as many without.

    The adversary is the one of the proof: it knows records, canary, weights and the draws of the views, all but the
    noise. It takes the noise-free sum of the records (`step`) off each release and projects what is left on the
    direction in which the canary moves that sum. `release` (default: the step plus Gaussian noise of `noise_multiplier`
    clip norms) is what is audited against the claim, epsilon of one Gaussian mechanism at `delta`.

    It looks along that direction alone: noise that is missing on some coordinates is for `noise_level` to find.
    The Gaussian-DP bound supposes that the release is Gaussian; Clopper-Pearson supposes nothing and is weaker."""
    checks.require(len(canary) == 1, "canary", len(canary), "must be one record")
    checks.whole("releases", releases, 100)
    checks.positive("noise_multiplier", noise_multiplier)
    joined, release = records.insert(len(records), canary), release or noisy(step, noise_multiplier * clip_norm)

    def scores(of: Records, parity: int) -> np.ndarray:
        found = np.empty(0)
        for draw in itertools.count(parity, 2):
            own = int(rng.generator(seed, "draws", draw).integers(2**62))
            known = step(records, own, 0).double()
            direction = F.normalize(step(joined, own, 0).double() - known, dim=0)
            found = np.append(found, ((release(of, own, 0) - known) @ direction / clip_norm).numpy())
            if len(found) >= releases:
                break
        return found[:releases]

    inside, outside = scores(joined, 0), scores(records, 1)
    bounds = lower_bounds(inside, outside, delta=delta, confidence=confidence)
    claimed = float(get_epsilon_gaussian(noise_multiplier, delta))
    return CanaryAudit(claimed=claimed, gdp=bounds[0], clopper_pearson=bounds[1], inside=inside, outside=outside)


def lower_bounds(
    inside: np.ndarray, outside: np.ndarray, *, delta: float, confidence: float = 0.95
) -> tuple[float, float]:
    """Lower bounds on epsilon from scores with and without the canary: by Gaussian DP and by Clopper-Pearson.

    jax_privacy 2.0.0 overstates `epsilon_from_gdp` where thresholds lie far in a tail: on scores of pure noise it finds
    3.5 (its pull request 270). So a tenth of the scores choose one threshold, the bound is taken at that threshold from
    the others, and counts as zero unless both error rates together are below one at the same confidence."""
    miss, tenth = 1 - confidence, max(1, len(inside) // 10)
    middle = (inside[:tenth].mean() + outside[:tenth].mean()) / 2
    said = auditor((inside[tenth:] >= middle).astype(float), (outside[tenth:] >= middle).astype(float))
    # three thresholds (0, 1 and infinity) share the confidence in the library; the check takes the same share
    at = _statistics().Explicit(0.5)
    told_apart = said.epsilon_clopper_pearson(miss / 3, 0.0, threshold_strategy=at) > 0
    gdp = float(said.epsilon_from_gdp(miss, delta)) if told_apart else 0.0
    return gdp, float(auditor(inside, outside).epsilon_clopper_pearson(miss, delta))


def noise_level(releases: Float[Tensor, "m p"], deviation: float, flake: float = 1e-6) -> tuple[float, float, float]:
    """Estimated over claimed standard deviation of the noise, and the interval in which a correct one lies.

    `releases` share the noise-free sum. The estimate is that of all coordinates together (m p - p degrees of freedom), or, where
    that is as it should be, of one that stands out (m - 1); a correct noise is outside with probability `flake`."""
    m, p = releases.shape
    ratios = releases.double().var(dim=0) / deviation**2

    def between(freedom: int, share: float) -> tuple[float, float]:
        low, high = np.sqrt(stats.chi2.ppf([share / 2, 1 - share / 2], freedom) / freedom)
        return float(low), float(high)

    together, (low, high) = float(ratios.mean()) ** 0.5, between((m - 1) * p, flake / 2)
    one_low, one_high = between(m - 1, flake / 2 / p)
    for one in (float(ratios.min()) ** 0.5, float(ratios.max()) ** 0.5):
        if low < together < high and not one_low < one < one_high:
            return one, one_low, one_high
    return together, low, high


@dataclass(frozen=True, kw_only=True)
class OneRun:
    """Lower bounds on epsilon from one run: by Steinke et al. 2023, and by Mahloujifar et al. 2024, which supposes that
    the trade-off is Gaussian. `inside`, `outside`: scores of the canaries that were trained on and of those left out."""

    steinke: float
    fdp: float
    inside: np.ndarray
    outside: np.ndarray


def one_run(
    train: Callable[[Tensor], Tensor],
    count: int,
    *,
    delta: float = 1e-5,
    confidence: float = 0.95,
    guesses: Sequence[float] = (0.05, 0.2),
    seed: int = 0,
) -> list[OneRun]:
    """Audit whole training runs: a fair keyed coin for each of `count` canaries, one training, and guesses who was in.

    `train(included [count] bool)` returns scores [R, count] of R models, higher for "was in"; see `bank_run`. The shares
    `guesses` of highest scores are guessed to be in, each share with its part of the confidence; the best bound counts.
    Valid for any dependence between the canaries, for coins that nothing else looks at."""
    checks.whole("count", count, 10)
    included = torch.from_numpy(rng.generator(seed, "canaries").random(count) < 0.5)
    found, miss = [], (1 - confidence) / len(guesses)
    for row in train(included).double():
        inside, outside = row[included].numpy(), row[~included].numpy()
        by, ranked = auditor(inside, outside), row.sort(descending=True).values
        ats = [_statistics().Explicit(float(ranked[max(1, round(share * count)) - 1])) for share in guesses]
        steinke = max(float(by.epsilon_one_run(miss, delta, threshold_strategy=at)) for at in ats)
        fdp = max(float(by.epsilon_one_run_fdp(miss, delta, threshold_strategy=at)) for at in ats)
        found.append(OneRun(steinke=steinke, fdp=fdp, inside=inside, outside=outside))
    return found


def shuffled_epsilon(*, noise_multiplier: float, batches: int, epochs: int, delta: float) -> float:
    """Epsilon, at least, of DP-SGD on a set that was shuffled once into `batches` and passed over `epochs` times.

    The adversary does not know which batch the example is in, and all other gradients are zero. It averages each batch's
    releases over the epochs and says "was in" if the largest of them exceeds a threshold; both error rates are exact."""
    mean = epochs**0.5 / noise_multiplier
    h = np.linspace(0, mean + 10, 20_000)
    quiet = (batches - 1) * stats.norm.logcdf(h)
    hit, false = -np.expm1(quiet + stats.norm.logcdf(h - mean)), -np.expm1(quiet + stats.norm.logcdf(h))
    good = (hit > delta) & (false > 0)
    return float(np.log((hit[good] - delta) / false[good]).max(initial=0.0))


def auditor(inside: np.ndarray, outside: np.ndarray) -> Any:
    """`CanaryScoreAuditor` of jax_privacy. Its package imports JAX and the auditing module does not: the file alone is
    loaded, at the first audit. Raises ModuleNotFoundError with the remedy if it is not installed."""
    return _statistics().CanaryScoreAuditor(inside, outside)


def _statistics() -> ModuleType:
    name = "dpmix._jax_privacy_auditing"
    if name not in sys.modules:
        package = importlib.util.find_spec("jax_privacy")
        if package is None or package.origin is None:
            raise ModuleNotFoundError("jax_privacy: not installed; the audits need it: pip install 'dpmix[jax]'")
        spec = importlib.util.spec_from_file_location(name, Path(package.origin).with_name("auditing.py"))
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    return sys.modules[name]
