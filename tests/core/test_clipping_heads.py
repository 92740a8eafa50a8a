"""The fast path for linear heads equals per-view autograd, clips, and never exceeds C."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpmix.core.clipping import clipped_head_sums


def oracle(features, targets, weights, biases, clip_norms, view_weights):
    """Slow and obvious: one autograd call per (head, example), float64, clip, add."""
    total_w, total_b = torch.zeros_like(weights), torch.zeros_like(biases)
    norms = torch.zeros(len(features), len(weights), dtype=weights.dtype)
    for r in range(len(weights)):
        for i in range(len(features)):
            w, b = weights[r].clone().requires_grad_(), biases[r].clone().requires_grad_()
            loss = sum(
                view_weights[r, k] * -(targets[i, k] * torch.log_softmax(features[i, k] @ w.T + b, dim=-1)).sum()
                for k in range(features.shape[1])
            )
            gw, gb = torch.autograd.grad(loss, (w, b))
            norm = (gw.square().sum() + gb.square().sum()).sqrt()
            scale = min(1.0, (clip_norms[r] / norm).item()) if norm > 0 else 1.0
            total_w[r] += scale * gw
            total_b[r] += scale * gb
            norms[i, r] = norm
    return total_w, total_b, norms


def problem(b=5, k=6, d=7, classes=4, heads=3, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(b, k, d, generator=g, dtype=dtype)
    targets = torch.rand(b, k, classes, generator=g, dtype=dtype).softmax(-1)
    weights = torch.randn(heads, classes, d, generator=g, dtype=dtype)
    biases = torch.randn(heads, classes, generator=g, dtype=dtype)
    view_weights = torch.zeros(heads, k, dtype=dtype)
    for r in range(heads):  # head r averages the first r + 1 views, the last head all of them
        own = k if r == heads - 1 else min(r + 1, k)
        view_weights[r, :own] = 1 / own
    return features, targets, weights, biases, torch.linspace(0.3, 1.0, heads, dtype=dtype), view_weights


@pytest.mark.parametrize("classes", [4, 20])  # either way of the softmax
def test_equals_the_oracle_with_clipping_biting(classes):
    *args, clips, view_weights = problem(classes=classes)
    args += [clips / 2, view_weights]
    sums = clipped_head_sums(*args)
    total_w, total_b, norms = oracle(*args)
    assert (norms > args[4]).any() and (norms[:, 2] > args[4][2]).any(), "the test must clip to mean anything"
    torch.testing.assert_close(sums.weights, total_w, rtol=0, atol=1e-10)
    torch.testing.assert_close(sums.biases, total_b, rtol=0, atol=1e-10)
    torch.testing.assert_close(sums.norms, norms, rtol=1e-10, atol=1e-10)


def test_unequal_view_weights_and_no_clipping_equal_the_oracle():
    features, targets, weights, biases, _, _ = problem(heads=2)
    g = torch.Generator().manual_seed(1)
    view_weights = torch.rand(2, 6, generator=g, dtype=torch.float64)
    args = features, targets, weights, biases, torch.full((2,), torch.inf, dtype=torch.float64), view_weights
    sums, (total_w, total_b, _) = clipped_head_sums(*args), oracle(*args)
    torch.testing.assert_close(sums.weights, total_w, rtol=0, atol=1e-10)
    torch.testing.assert_close(sums.biases, total_b, rtol=0, atol=1e-10)


def test_clip_then_average_is_another_algorithm():
    """Negative control: clipping each view and then averaging must not pass for the method."""
    features, targets, weights, biases, clips, view_weights = problem(heads=1)
    ours = clipped_head_sums(features, targets, weights, biases, clips, view_weights)
    per_view = clipped_head_sums(
        features.flatten(0, 1)[:, None], targets.flatten(0, 1)[:, None], weights, biases, clips,
        torch.ones(1, 1, dtype=torch.float64),
    )  # fmt: skip
    assert (ours.weights - per_view.weights / 6).abs().max() > 1e-3


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 6), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(0, 10**6))
def test_laws_for_all_shapes(b, k, heads, cut, seed):
    """Any order of examples, any permutation of a head's equal views, any physical batch: the same sum."""
    args = problem(b=b, k=k, heads=heads, seed=seed)
    features, targets, weights, biases, clips, _ = args
    even = torch.full((heads, k), 1 / k, dtype=torch.float64)
    whole = clipped_head_sums(features, targets, weights, biases, clips, even)
    g = torch.Generator().manual_seed(seed)
    order, turn = torch.randperm(b, generator=g), torch.randperm(k, generator=g)
    turned = clipped_head_sums(features[order][:, turn], targets[order][:, turn], weights, biases, clips, even)
    torch.testing.assert_close(turned.weights, whole.weights, rtol=0, atol=1e-12)
    parts = [
        clipped_head_sums(f, t, weights, biases, clips, even)
        for f, t in zip(features.split(cut), targets.split(cut), strict=True)
    ]
    if b:
        torch.testing.assert_close(sum(p.weights for p in parts), whole.weights, rtol=0, atol=1e-12)
        torch.testing.assert_close(torch.cat([p.norms for p in parts]), whole.norms, rtol=0, atol=1e-12)
    else:
        assert whole.weights.abs().max() == 0


def test_one_head_alone_equals_its_row_in_a_bank():
    features, targets, weights, biases, clips, view_weights = problem()
    bank = clipped_head_sums(features, targets, weights, biases, clips, view_weights)
    for r in range(3):
        own = view_weights[r] > 0
        alone = clipped_head_sums(
            features[:, own], targets[:, own], weights[r : r + 1], biases[r : r + 1], clips[r : r + 1],
            view_weights[r : r + 1, own],
        )  # fmt: skip
        torch.testing.assert_close(alone.weights[0], bank.weights[r], rtol=0, atol=1e-12)


def contribution(features, targets, weights, biases, clip, view_weights):
    """Norm of what one example adds, measured in float64."""
    sums = clipped_head_sums(features, targets, weights, biases, clip, view_weights)
    return (sums.weights.double().square().sum() + sums.biases.double().square().sum()).sqrt().item()


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3, 1e6, 1e12])
@pytest.mark.parametrize("case", ["random", "cancel", "one huge view"])
def test_no_example_adds_more_than_the_clip_norm_in_float32(size, case):
    """Adversarial features: huge, opposing (their average is lost in rounding), or one huge view among small ones."""
    features, targets, weights, biases, clip, view_weights = problem(b=1, k=8, d=33, heads=1, dtype=torch.float32)
    if case == "cancel":
        features[:, 1::2] = -features[:, ::2] * (1 + 1e-7)
        weights, biases = weights * 0, biases * 0
        targets = targets[:, :1].expand(-1, 8, -1).contiguous()
    features = features * size if case != "one huge view" else features.clone()
    if case == "one huge view":
        features[:, 3] *= size
    assert contribution(features, targets, weights, biases, clip, view_weights) <= clip.item() * (1 + 1e-5)


def test_an_unguarded_gram_norm_would_exceed_the_clip_norm():
    """Negative control for the error bound: without it, cancelling views get through with too large a contribution."""
    k, d = 8, 64
    g = torch.Generator().manual_seed(3)
    z = torch.randn(1, k, d, generator=g) * 3e4
    z[:, 1::2] = -z[:, ::2] + torch.randn(1, k // 2, d, generator=g)
    delta = torch.tensor([0.5, -0.5]).expand(1, k, 2) / k
    naive = ((delta @ delta.mT) * (z @ z.mT + 1)).sum().clamp(min=0).sqrt().item()
    true = (delta.double()[0].T @ torch.cat([z.double()[0], torch.ones(k, 1)], dim=1)).norm().item()
    assert abs(naive - true) > 0.1 * true


def test_examples_that_are_not_finite_count_as_zero():
    args = problem(b=4)
    features = args[0].clone()
    features[1, 0, 3], features[3, 0, 0] = torch.nan, torch.inf  # view 0, which all three heads average
    sums = clipped_head_sums(features, *args[1:])
    kept = clipped_head_sums(features[[0, 2]], args[1][[0, 2]], *args[2:])
    torch.testing.assert_close(sums.weights, kept.weights, rtol=0, atol=1e-12)
    assert (~sums.norms.isfinite()).sum(0).tolist() == [2, 2, 2]
    huge = args[0].clone()
    huge[0] = 1e308
    assert clipped_head_sums(huge, *args[1:]).weights.isfinite().all()


def test_bad_input_names_the_argument():
    features, targets, weights, biases, clips, view_weights = problem()
    with pytest.raises(ValueError, match="clip_norms="):
        clipped_head_sums(features, targets, weights, biases, clips * 0, view_weights)


def test_a_view_that_is_not_finite_touches_only_the_heads_that_average_it():
    args = problem(b=4)
    features = args[0].clone()
    features[1, 5] = torch.nan  # only the last head looks at view 5
    sums, clean = clipped_head_sums(features, *args[1:]), clipped_head_sums(*args)
    assert (~sums.norms.isfinite()).sum(0).tolist() == [0, 0, 1]
    torch.testing.assert_close(sums.weights[:2], clean.weights[:2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("clip", [1e-2, 1e-4, 1e-6])
def test_logit_gradients_whose_squares_vanish_are_clipped_too(clip):
    """A confident head and huge features: delta^2 is below the smallest float32, delta * z is not."""
    z = torch.full((1, 1, 4), 1e17)
    targets = torch.tensor([[[1.0, 0.0]]])
    worst = 0.0
    for bias in torch.linspace(20, 60, 81):
        biases = torch.tensor([[float(bias), 0.0]])
        sums = clipped_head_sums(z, targets, torch.zeros(1, 2, 4), biases, torch.tensor([clip]), torch.ones(1, 1))
        worst = max(worst, float(sums.weights.double().norm()))
    assert 0 < worst <= clip * (1 + 1e-5)


@pytest.mark.parametrize("filling", [0.0, float("nan")])
def test_rows_that_fill_up_a_batch_add_exactly_nothing(filling):
    features, targets, *others = problem(b=5)
    want = clipped_head_sums(features[:3], targets[:3], *others)
    filled = features.clone()
    filled[3:] = filling
    got = clipped_head_sums(filled, targets, *others, present=3)
    torch.testing.assert_close(got.weights, want.weights, rtol=0, atol=1e-12)
    torch.testing.assert_close(got.biases, want.biases, rtol=0, atol=1e-12)
    assert torch.equal(got.norms[:3].isfinite(), want.norms.isfinite()) and (got.norms[3:] == 0).all()
    with pytest.raises(ValueError, match=r"present=6: must lie in 0\.\.5"):
        clipped_head_sums(features, targets, *others, present=6)


@pytest.mark.parametrize(
    ("b", "classes", "k", "heads"),
    [(62, 2, 1, 1), (7, 10, 1, 1), (37, 3, 1, 1), (33, 2, 5, 20), (32, 10, 19, 1), (37, 20, 3, 3)],
)
def test_where_an_example_stands_moves_no_bit_of_its_logits(b, classes, k, heads):
    """The first example leaves and all others move up a place: the sum moves by C at most. Features are large and their
    logits cancel, so that another rounding would give another gradient. (Views as the columns of the product: 2.4 C.)"""
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        weights = torch.randn(heads, classes, 64, generator=g)
        seen = weights.flatten(0, 1).double()
        features = torch.randn(b, k, 64, generator=g).double()
        features = (1e5 * (features - features @ (torch.linalg.pinv(seen) @ seen).T)).float()
        targets, averages = torch.full((b, k, classes), 1 / classes), torch.full((heads, k), 1 / k)

        def total(rows, features=features, targets=targets, weights=weights, averages=averages):
            fill = (0, 0) * 2 + (0, b - len(rows))
            given = (torch.nn.functional.pad(t[rows], fill) for t in (features, targets))
            about = torch.zeros(heads, classes), torch.full((heads,), 0.01), averages, len(rows)
            sums = clipped_head_sums(*given, weights, *about)
            return torch.cat([sums.weights.flatten(1), sums.biases.flatten(1)], dim=1).double()

        everybody = torch.arange(b)
        moved = (total(everybody) - total(everybody[1:])).norm(dim=1)
        assert moved.max() <= 0.01 * (1 + 1e-5), f"seed {seed}: {moved.max() / 0.01:.6f} C"
