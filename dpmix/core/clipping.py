"""Clipped per-example gradient sums, the one place where the sensitivity is decided.

For both functions: an example's K views are averaged **first**, the average is clipped to C, and the clipped averages are
summed (Eq. (4) and Algorithm 1, lines "for each (x*, y*)" to the sum). Adding or removing one example moves the sum by
at most C, replacing one by at most 2C; nothing else depends on it. Neither function adds noise.

Linear heads are here; networks are in `clipping_network`.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dpmix.core import checks, precision
from dpmix.core.clipping_network import ClippedSum, clipped_gradient_sum

__all__ = ["ClippedSum", "HeadSums", "clipped_gradient_sum", "clipped_head_sums"]


class HeadSums(NamedTuple):
    """Clipped sums of R heads: `weights` [R, num_classes, D], `biases` [R, num_classes]. `norms` [b, R] are those of the
    averaged gradients before clipping, not finite where an example was dropped. They come from private data without noise:
    diagnostics, not for release."""

    weights: Float[Tensor, "R num_classes D"]
    biases: Float[Tensor, "R num_classes"]
    norms: Float[Tensor, "b R"]


def clipped_head_sums(
    features: Float[Tensor, "b K D"],
    targets: Float[Tensor, "b K num_classes"],
    weights: Float[Tensor, "R num_classes D"],
    biases: Float[Tensor, "R num_classes"],
    clip_norms: Float[Tensor, " R"],
    view_weights: Float[Tensor, "R K"],
    present: int | None = None,
) -> HeadSums:
    """Sum over examples of the clipped, view-averaged cross-entropy gradient, for R linear heads at once.

    Head r averages the views with the weights view_weights[r] (rows sum to one) and clips weight and bias together to
    clip_norms[r]. With delta_k the logit gradient of view k, z_k its features and w its weight, the averaged gradient is
    G = sum_k w_k delta_k (z_k, 1)^T. Its norm comes from the views' Gram matrix (ghost norm; Li et al. 2022, Bu et al. 2022),
    ``|G|^2 = sum_kl w_k w_l (delta_k . delta_l) (z_k . z_l + 1)``, and the clipped sum is one matrix product per group of
    heads that share their views: no per-example gradient is ever stored, and memory is b * K * R * num_classes.

    Guarantee: example i contributes a matrix of norm at most C (1 + 1e-5), whatever its features and whatever precision
    PyTorch is told to use elsewhere (`precision`). The Gram norm of views that nearly cancel has a rounding error; it is
    bounded and added before clipping, which shrinks an ordinary contribution by some 1e-5 (float32). An example with
    features or gradients that are not finite contributes exactly zero.

    `present`: the first so many examples count; those after them are padding to a batch of fixed size and add nothing, so
    that nobody's rounding depends on how many stand beside them (a kernel may be chosen by the number of rows).
    b = 0 gives zeros; K = 1 is plain DP-SGD; an infinite clip norm gives the plain sum. Computed in the dtype of the
    weights, float32 or float64; features of a narrower type are widened first. Raises ValueError for another dtype, a
    clip norm that is not positive or shapes that do not fit.
    """
    heads, _, dim = weights.shape
    b, k, got = features.shape
    present = b if present is None else present
    checks.require(got == dim, "features.shape", tuple(features.shape), f"the heads take features of dimension {dim}")
    checks.require(bool((clip_norms > 0).all()), "clip_norms", clip_norms.tolist(), "must be positive")
    wide = weights.dtype in (torch.float32, torch.float64)
    checks.require(wide, "weights.dtype", weights.dtype, "must be float32 or float64, or no clip would be exact")
    checks.require(0 <= present <= b, "present", present, f"must lie in 0..{b}, the number of examples")
    features, targets = features.to(weights.dtype), targets.to(weights.dtype)
    sums, bias_sums, norms = torch.zeros_like(weights), torch.zeros_like(biases), weights.new_zeros(b, heads)
    groups: dict[tuple[float, ...], list[int]] = {}
    for r, averages in enumerate(view_weights.tolist()):
        groups.setdefault(tuple(averages), []).append(r)
    for together in groups.values():
        row = view_weights[together[0]]
        chosen = row.nonzero()[:, 0]
        # a slice is not copied
        members = slice(None) if len(groups) == 1 else torch.tensor(together, device=weights.device)
        x, y = (features, targets) if len(chosen) == k else (t.index_select(1, chosen) for t in (features, targets))
        averaged = row[chosen].to(weights.dtype)
        with precision.full(weights.device):
            sums[members], bias_sums[members], norms[:, members] = _of_a_group(
                x, y, weights[members], biases[members], clip_norms[members].to(weights.dtype), averaged, present
            )
    return HeadSums(sums, bias_sums, norms)


def _of_a_group(
    features: Tensor,
    targets: Tensor,
    weights: Tensor,
    biases: Tensor,
    clip_norms: Tensor,
    averaged: Tensor,
    present: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums and norms of heads that average the same views, with the same weights `averaged` [K]."""
    heads, num_classes, dim = weights.shape
    b, k, _ = features.shape
    flat = features.reshape(b * k, dim)
    # The logit gradients delta, [b, views, heads, classes], in the memory of the logits. Views are the rows of the product:
    # as its columns some kernels round the last ones otherwise, and an example's rounding would depend on its place.
    logits = torch.addmm(biases.reshape(-1), flat, weights.reshape(-1, dim).T)
    delta = _softmax(logits.view(b, k, heads, num_classes)).sub_(targets[:, :, None])
    gram = (features @ features.mT).add_(1.0).mul_(torch.outer(averaged, averaged))
    # |G|^2 = sum_k delta_k . (sum_l gram_kl delta_l): one matrix product an example, whatever the number of heads.
    across = (gram @ delta.flatten(2)).view_as(delta).mul_(delta)
    squared = across.sum(dim=(1, 3)).clamp_(min=0)
    # Largest rounding error of the line above: the terms in absolute value, times the error of a dot product.
    lengths = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()[..., None]
    error = (torch.linalg.vector_norm(delta, dim=-1) * lengths).sum(dim=1).square()
    error *= 4 * torch.finfo(weights.dtype).eps * max(dim, num_classes, k**2) ** 0.5
    # Logit gradients so small that their squares vanish can meet features that are large.
    error += lengths.sum(dim=1).square() * (torch.finfo(weights.dtype).tiny * num_classes)
    finite = (squared + error).isfinite()
    scale = (clip_norms / (squared + error).sqrt()).clamp(max=1.0).masked_fill(~finite, 0.0)
    scale[present:] = 0.0
    # Zero times infinity is no number: take an example without a finite norm out of both factors.
    if not finite.all():
        delta, flat = delta.masked_fill(~finite[:, None, :, None], 0.0), flat.masked_fill(~flat.isfinite(), 0.0)
    columns = delta.mul_(scale[:, None, :, None] * averaged[:, None, None]).view(b * k, heads * num_classes)
    norms = squared.sqrt().masked_fill(~finite, torch.nan)
    norms[present:] = 0.0
    return (columns.T @ flat).view_as(weights), columns.sum(dim=0).view_as(biases), norms


def _softmax(logits: Tensor) -> Tensor:
    """Over the last dimension. Below 16 classes a CPU is three times as fast across the heads."""
    if logits.device.type == "cpu" and logits.shape[-1] < 16:
        return logits.mT.contiguous().softmax(dim=-2).mT.contiguous()
    return logits.softmax(dim=-1)
