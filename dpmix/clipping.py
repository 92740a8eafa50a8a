"""Floor 0: clipped per-example gradient sums, the one place where the sensitivity is decided.

For both functions: an example's K views are averaged **first**, the average is clipped to C, and the clipped averages are
summed (Eq. (4) and Algorithm 1, lines "for each (x*, y*)" to the sum). Adding or removing one example moves the sum by
at most C, replacing one by at most 2C; nothing else depends on it. Neither function adds noise.

Linear heads are here; networks are in `clipping_network`.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dpmix import checks
from dpmix.clipping_network import ClippedSum, clipped_gradient_sum

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
    G = sum_k w_k delta_k (z_k, 1)^T. Its norm comes from two Gram matrices (ghost norm; Li et al. 2022, Bu et al. 2022),
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
    features = features.to(weights.dtype)
    dropped = ~features.isfinite().all(dim=(1, 2))
    features = features.masked_fill(dropped[:, None, None], 0.0)
    sums = torch.zeros_like(weights)
    bias_sums = torch.zeros_like(biases)
    norms = weights.new_zeros(b, heads)
    groups, member = torch.unique(view_weights, dim=0, return_inverse=True)
    for g, row in enumerate(groups):
        views = row.nonzero()[:, 0]
        heads_of = (member == g).nonzero()[:, 0]
        whole = len(views) == k
        z = features if whole else features[:, views]
        y = targets if whole else targets[:, views]
        w = row[views].to(weights.dtype)
        n_views, n_heads = len(views), len(heads_of)
        flat = z.reshape(b * n_views, dim)
        W = weights[heads_of].reshape(n_heads * num_classes, dim)
        logits = torch.addmm(biases[heads_of].reshape(-1), flat, W.T).view(b, n_views, n_heads, num_classes)
        delta = logits.softmax(dim=-1).sub_(y[:, :, None].to(weights.dtype)).mul_(w[:, None, None])
        per_head = delta.transpose(1, 2)  # [b, heads, views, classes]
        gram_delta = per_head @ per_head.transpose(-1, -2)
        gram_z = (z @ z.transpose(-1, -2)).add_(1.0)
        squared = (gram_delta * gram_z[:, None]).sum(dim=(-1, -2)).clamp_(min=0)
        # Largest rounding error of the line above: the terms in absolute value, times the error of a dot product.
        lengths = (gram_delta.diagonal(dim1=-2, dim2=-1) * gram_z.diagonal(dim1=-2, dim2=-1)[:, None]).clamp_(min=0)
        error = lengths.sqrt().sum(dim=-1).square() * (
            4 * torch.finfo(weights.dtype).eps * max(dim, num_classes) ** 0.5
        )
        norm = squared.sqrt()
        finite = norm.isfinite() & error.isfinite()
        scale = (clip_norms[heads_of].to(norm) / (squared + error).sqrt()).nan_to_num_(nan=1.0).clamp_(max=1.0)
        scale = torch.where(finite, scale, torch.zeros_like(scale))
        delta.mul_(scale[:, None, :, None]).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        columns = delta.view(b * n_views, n_heads * num_classes)
        sums[heads_of] = (columns.T @ flat).view(n_heads, num_classes, dim)
        bias_sums[heads_of] = columns.sum(dim=0).view(n_heads, num_classes)
        norms[:, heads_of] = norm
    norms[dropped] = torch.nan
    return HeadSums(sums, bias_sums, norms)
