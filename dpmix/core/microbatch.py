"""Microbatch DP-SGD (Eq. (2)) and the mixup variants of Table 1, honestly accounted.

A microbatch of size b is clipped as one: clip_C{(1/b) sum_j g_ij}. Three things make that private:

* **The partition is fixed.** Example i has its place in the table for good; which microbatch it is in is keyed and does
  not depend on what the others are. A neighbouring data set leaves one place vacant (or fills it). So one microbatch
  changes and no other. Pairs drawn anew from each batch would move every later pair.
* **Poisson sampling is over microbatches**: each joins a step with probability q, whole.
* **The sensitivity is 2C.** Before and after, the clipped average is some vector of norm at most C, and nothing ties
  the two together: with C = 1, members whose gradients are e and -3e average to -e; without the second the average is
  e. The sum moves from -e to e, by 2C (Ponomareva et al. 2023). A microbatch that vanishes moves it by C only, and a
  size of one is per-example clipping. The noise is N(0, (2 C sigma)^2), sigma for (q, T) as always.

Noise for a movement by 2C is safe and not tight, for the microbatch joins by the same coin before and after. With a and a'
the two averages, a step releases (1-q) N(0) + q N(a) or (1-q) N(0) + q N(a'), plus what all others give. `epsilon_spent`
accounts the worst such pair, a = Ce and a' = -Ce; the chapter on microbatches has the proof that no pair is worse.

Whatever the microbatch does among its own members (mixup, augmentation) is covered by the same argument.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from dpmix.core import accounting, rng
from dpmix.core.checks import one_of, require, whole
from dpmix.core.clipping_network import ClippedSum, clipped_gradient_sum

MIXES = ("none", "add", "replace")


def check_mix(size: int, mix: str) -> None:
    """Refuse what is no mix of `MIXES`, and a mix of other than two examples."""
    one_of("microbatch_mix", mix, MIXES)
    require(mix == "none" or size == 2, "microbatch", size, "must be 2 to mix the pair")


def sensitivity(size: int) -> float:
    """By how many clip norms one example moves the clipped sum: 1 alone, 2 in a microbatch of two or more."""
    whole("size", size, 1)
    return 1.0 if size == 1 else 2.0


def epsilon_spent(size: int, *, deviation: float, delta: float, sample_rate: float, steps: int) -> float:
    """Epsilon of microbatches of `size` under noise of standard deviation `deviation` clip norms, by PLD: the true pair.

    Deviation 2 sigma is what training adds for a size of two or more, sigma for one. Raises ValueError on bad input.
    """
    neighbours = "join" if sensitivity(size) == 1.0 else "change"
    return accounting.epsilon_spent(
        noise_multiplier=deviation,
        delta=delta,
        sample_rate=sample_rate,
        steps=steps,
        accountant="pld",
        neighbours=neighbours,
    )


def microbatch_partition(
    n: int, size: int, *, seed: int, ids: Int64[Tensor, " b"] | None = None
) -> Int64[Tensor, "m size"]:
    """A keyed, fixed partition of the places 0..n-1 into m = ceil(n / size) microbatches.

    n is public: the number of places. Where size does not divide n, the last row ends in -1, places that are vacant;
    averages are over the members that are there. `ids` are the places that are taken (all, by default): the table then
    holds their positions in `ids`, and -1 at every other place. Vacating a place changes one row and no other.
    """
    whole("n", n, 1)
    whole("size", size, 1)
    rows = -(-n // size)
    table = torch.full((rows * size,), -1, dtype=torch.int64)
    taken = torch.arange(n) if ids is None else ids
    inside = len(taken) <= n and (not len(taken) or 0 <= int(taken.min()) <= int(taken.max()) < n)
    require(inside, "ids", len(taken), f"must be places in 0..{n - 1}, each once")
    position = torch.full((n,), -1, dtype=torch.int64)
    position[taken] = torch.arange(len(taken))
    table[:n] = position[torch.from_numpy(rng.generator(seed, "microbatches").permutation(n))]
    return table.view(rows, size)


def mixing_weights(
    rows: Int64[Tensor, " m"], views: int, *, alpha: float, seed: int, step: int
) -> Float[Tensor, "m K"]:
    """lambda ~ Beta(alpha, alpha) of Eq. (3), one for each view of each microbatch, keyed by step and row."""
    draws = [rng.generator(seed, "microbatch mixup", step, int(row)).beta(alpha, alpha, views) for row in rows]
    return torch.from_numpy(np.asarray(draws, dtype=np.float64)).view(len(rows), views)


def microbatch_views(
    images: Float[Tensor, "m size K C H W"],
    targets: Float[Tensor, "m size K num_classes"],
    present: Bool[Tensor, "m size"],
    mix: str = "none",
    lam: Float[Tensor, "m K"] | None = None,
) -> tuple[Float[Tensor, "m V C H W"], Float[Tensor, "m V num_classes"], Float[Tensor, "m V"]]:
    """Views, targets and view weights of each microbatch as if it were one example.

    mix "none": the size * K views of the members; "add": also K mixtures, view k of the first member with view k of the
    second (Eq. (3)), each member and the mixture with equal weight; "replace": the mixtures only. The last two need
    size 2. A pair with a vacant place has no mixture: the member that is there stands alone. Weights sum to one, or to
    zero where the whole row is vacant. Images at vacant places are ignored (but must be finite).
    """
    one_of("mix", mix, MIXES)
    m, size, k = images.shape[:3]
    require(mix == "none" or size == 2, "mix", mix, f"pairs two examples; microbatches have size {size}, not 2")
    weights = present.double()[..., None].expand(m, size, k)
    if mix != "none":
        require(lam is not None, "lam", lam, "is needed for mixup")
        assert lam is not None
        both = present.all(1)
        part = lam.to(images)[:, :, None]
        mixed_targets = part * targets[:, 0] + (1 - part) * targets[:, 1]
        part = part[..., None, None]
        images = torch.cat([images, (part * images[:, 0] + (1 - part) * images[:, 1])[:, None]], dim=1)
        targets = torch.cat([targets, mixed_targets[:, None]], dim=1)
        unmixed = weights * (~both[:, None, None]) if mix == "replace" else weights
        weights = torch.cat([unmixed, both.double()[:, None, None].expand(m, 1, k)], dim=1)
    weights = weights.flatten(1)
    return images.flatten(1, 2), targets.flatten(1, 2), weights / weights.sum(1, keepdim=True).clamp(min=1.0)


def microbatch_sum(
    model: nn.Module,
    images: Float[Tensor, "m size K C H W"],
    targets: Float[Tensor, "m size K num_classes"],
    present: Bool[Tensor, "m size"],
    clip_norm: int | float,
    *,
    mix: str = "none",
    lam: Float[Tensor, "m K"] | None = None,
) -> ClippedSum:
    """The sum in Eq. (2): over microbatches, the clipped average gradient of the members' views.

    Adding or removing one example moves it by at most `sensitivity(size)` clip norms (see the module): scale the noise
    for that. The arguments are those of `microbatch_views`; the divisor is the expected number of *microbatches*.
    """
    x, y, weights = microbatch_views(images, targets, present, mix, lam)
    return clipped_gradient_sum(model, x, y, clip_norm, view_weights=weights)
