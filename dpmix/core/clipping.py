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

from dpmix.core import checks
from dpmix.core.clipping_network import ClippedSum, clipped_gradient_sum

__all__ = ["ClippedSum", "HeadSums", "clipped_gradient_sum", "clipped_head_sums"]


class HeadSums(NamedTuple):
    """Clipped sums of R heads: `weights` [R, num_classes, D], `biases` [R, num_classes].

    `norms` [b, R] are those of the averaged gradients before clipping, not finite where an example was dropped. They
    come from private data without noise: diagnostics, not for release.
    """

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
) -> HeadSums:
    """Sum over examples of the clipped, view-averaged cross-entropy gradient, for R linear heads at once.

    Head r averages the views with the weights view_weights[r] (rows sum to one) and clips weight and bias together to
    clip_norms[r]. With delta_k the logit gradient of view k, z_k its features and w its weight, the averaged gradient is
    G = sum_k w_k delta_k (z_k, 1)^T. Its norm comes from the views' Gram matrix (ghost norm; Li et al. 2022, Bu et al. 2022),
    ``|G|^2 = sum_kl w_k w_l (delta_k . delta_l) (z_k . z_l + 1)``, and the clipped sum is one matrix product per group of
    heads that share their views: no per-example gradient is ever stored, and memory is b * K * R * num_classes.

    Guarantee: example i contributes a matrix of norm at most C, whatever its features. The Gram norm of views that
    nearly cancel has a rounding error; it is bounded and added before clipping, which shrinks an ordinary contribution
    by some 1e-5 (float32). An example with features or gradients that are not finite contributes exactly zero.

    b = 0 gives zeros; K = 1 is plain DP-SGD; an infinite clip norm gives the plain sum. Computed in the dtype of the
    weights; features of a narrower type are widened first. On a GPU float32 products must not run in TF32 (PyTorch's
    default). Raises ValueError for a clip norm that is not positive or shapes that do not fit.
    """
    heads, num_classes, dim = weights.shape
    b, k, got = features.shape
    checks.require(got == dim, "features.shape", tuple(features.shape), f"the heads take features of dimension {dim}")
    checks.require(bool((clip_norms > 0).all()), "clip_norms", clip_norms.tolist(), "must be positive")
    features, targets = features.to(weights.dtype), targets.to(weights.dtype)
    sums, bias_sums, norms = torch.zeros_like(weights), torch.zeros_like(biases), weights.new_zeros(b, heads)
    groups, member = torch.unique(view_weights, dim=0, return_inverse=True)
    for g, row in enumerate(groups):
        views, members = row.nonzero()[:, 0], int((member == g).sum())
        own = slice(None) if members == heads else (member == g).nonzero()[:, 0]  # a slice is not copied
        z, y = (features, targets) if len(views) == k else (features[:, views], targets[:, views])
        w = row[views].to(weights.dtype)
        flat = z.reshape(b * len(views), dim)
        # The logit gradients delta, [b, views, heads, classes], in the memory of the logits.
        logits = torch.addmm(biases[own].reshape(-1), flat, weights[own].reshape(-1, dim).T)
        delta = logits.view(b, len(views), members, num_classes).softmax(dim=-1).sub_(y[:, :, None])
        gram = (z @ z.transpose(-1, -2)).add_(1.0).mul_(torch.outer(w, w))
        # |G|^2 = sum_k delta_k . (sum_l gram_kl delta_l): one matrix product an example, whatever the number of heads.
        across = (gram @ delta.flatten(2)).view_as(delta).mul_(delta)
        squared = across.sum(dim=(1, 3)).clamp_(min=0)
        # Largest rounding error of the line above: the terms in absolute value, times the error of a dot product.
        lengths = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()[..., None]
        error = (torch.linalg.vector_norm(delta, dim=-1) * lengths).sum(dim=1).square()
        error *= 4 * torch.finfo(weights.dtype).eps * max(dim, num_classes, len(views) ** 2) ** 0.5
        # Logit gradients so small that their squares vanish can meet features that are large.
        reach = lengths.sum(dim=1).square()
        error += reach * (torch.finfo(weights.dtype).tiny * num_classes)
        finite = (squared + error).isfinite()
        if not finite.all():  # zero times infinity is no number: take the example out of both factors
            delta = delta.masked_fill(~finite[:, None, :, None], 0.0)
            flat = flat.masked_fill(~flat.isfinite(), 0.0)
        scale = (clip_norms[own].to(weights.dtype) / (squared + error).sqrt()).clamp(max=1.0).masked_fill(~finite, 0.0)
        columns = delta.mul_(scale[:, None, :, None] * w[:, None, None]).view(b * len(views), members * num_classes)
        sums[own] = (columns.T @ flat).view(members, num_classes, dim)
        bias_sums[own] = columns.sum(dim=0).view(members, num_classes)
        norms[:, own] = squared.sqrt().masked_fill(~finite, torch.nan)
    return HeadSums(sums, bias_sums, norms)
