"""Every engine equals a slow float64 oracle, nobody contributes more than C, and wrong algorithms are seen to fail."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from dpmix.core.clipping_network import Clipper, clipped_gradient_sum
from dpmix.core.microbatch import (
    microbatch_partition,
    microbatch_sum,
    microbatch_views,
    mixing_weights,
    sensitivity,
)
from dpmix.models.wide_resnet import wide_resnet

WAYS = {
    "loop": dict(engine="loop"),
    "grouped": dict(engine="grouped"),
    "vmap": dict(engine="vmap"),
}


class Zoo(nn.Module):
    """Every layer that the grouped engine has a rule for, in awkward shapes; one used twice, one frozen."""

    def __init__(self):
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(2, 6, 3, stride=2, padding=(2, 1), dilation=(1, 2)),
            nn.GroupNorm(3, 6),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 6, 3, padding="same", bias=False),
            nn.Conv2d(6, 4, (1, 2), padding=(0, 1), padding_mode="reflect"),
        )
        self.tokens = nn.Linear(4, 5)
        self.norm = nn.LayerNorm(5)
        self.twice = nn.Linear(5, 5)
        self.frozen = nn.Linear(5, 5)
        self.frozen.requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = self.convs(x).flatten(2).mT  # [n, positions, channels]
        x = self.norm(self.tokens(x))
        x = self.frozen(self.twice(torch.tanh(self.twice(x))))
        return self.head(x.mean(1))


def networks():
    torch.random.manual_seed(0)
    yield "wide", wide_resnet(10, 1, 3, channels=2, seed=1).double()
    yield "wide, plain", wide_resnet(10, 1, 3, channels=2, weight_standardisation=False, seed=1).double()
    yield "zoo", Zoo().double()


NETWORKS = dict(networks())


def batch(b=5, k=3, side=8, classes=3, dtype=torch.float64, seed=0):
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.random((b, k, 2, side, side))).to(dtype)
    return images, torch.from_numpy(rng.dirichlet(np.ones(classes), (b, k))).to(dtype)


def oracle(model, images, targets, clip_norm, view_weights=None):
    """One backward a view, averaged, clipped, summed: nothing else."""
    names = {n: p for n, p in model.named_parameters() if p.requires_grad}
    total, norms = {n: torch.zeros_like(p) for n, p in names.items()}, []
    for i in range(len(images)):
        average = {n: torch.zeros_like(p) for n, p in names.items()}
        for j in range(images.shape[1]):
            loss = F.cross_entropy(model(images[i, j][None]), targets[i, j][None])
            grads = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
            weight = 1 / images.shape[1] if view_weights is None else view_weights[i, j]
            for n, g in zip(names, grads, strict=True):
                average[n] += 0 if g is None else g * weight
        norm = torch.sqrt(sum((g**2).sum() for g in average.values()))
        norms.append(norm)
        for n in names:
            total[n] += average[n] * min(1.0, clip_norm / float(norm))
    return total, torch.stack(norms) if norms else torch.zeros(0)


def norm_of(grads):
    return math.sqrt(sum(float((g.double() ** 2).sum()) for g in grads.values()))


def run(model, images, targets, clip_norm, way, **options):
    clipper = Clipper(model, clip_norm, **WAYS[way])
    norms = clipper.add(images, targets, **options)
    return clipper, norms


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NETWORKS)
def test_engines_equal_the_oracle_with_clipping_biting(name, way):
    model, (images, targets) = NETWORKS[name], batch()
    _, norms = oracle(model, images, targets, 1.0)
    clip = float(norms.median())  # bites on some, not on others
    want, _ = oracle(model, images, targets, clip)
    clipper, got = run(model, images, targets, clip, way)
    torch.testing.assert_close(got, norms)
    for n, g in clipper.grads().items():
        torch.testing.assert_close(g, want[n], rtol=1e-8, atol=1e-10)
    assert all(p.requires_grad != n.startswith("frozen") for n, p in model.named_parameters())  # put back
    assert not any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("way", WAYS)
def test_view_weights(way):
    model, (images, targets) = NETWORKS["wide"], batch()
    weights = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5], [0, 0, 0], [1 / 3] * 3], dtype=torch.float64)
    want, _ = oracle(model, images[[0, 1, 2, 4]], targets[[0, 1, 2, 4]], 0.7, weights[[0, 1, 2, 4]])
    clipper, norms = run(model, images, targets, 0.7, way, view_weights=weights)
    assert norms[3] == 0
    for n, g in clipper.grads().items():
        torch.testing.assert_close(g, want[n], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("way", WAYS)
def test_float32_is_close_and_the_bound_holds(way):
    """Also where a plain float32 norm would be too small by far: see the last assertion."""
    model, (images, targets) = wide_resnet(10, 2, 3, channels=2, seed=1), batch(1, 2, dtype=torch.float32)
    want, _ = oracle(NETWORKS_WIDE2, images.double(), targets.double(), 1e-3)
    clipper, _ = run(model, images, targets, 1e-3, way)
    got = torch.cat([g.flatten() for g in clipper.grads().values()]).double()
    expected = torch.cat([g.flatten() for g in want.values()])
    assert float((got - expected).norm()) < 1e-4 * 1e-3
    assert norm_of(clipper.grads()) <= 1e-3 * (1 + 1e-6)


NETWORKS_WIDE2 = wide_resnet(10, 2, 3, channels=2, seed=1).double()


@pytest.mark.parametrize("way", ["loop", "grouped", "vmap"])
def test_the_bound_holds_for_three_million_equal_components(way):
    """The gradient of a linear layer on a constant image: equal terms, whose rounding errors all point one way."""
    model = nn.Linear(1_500_000, 2, bias=False)
    nn.init.zeros_(model.weight)
    images = torch.full((1, 1, 1_500_000, 1, 1), 0.7)
    clipper = Clipper(nn.Sequential(nn.Flatten(), model), 1.0, **WAYS[way])
    clipper.add(images, torch.tensor([[[1.0, 0.0]]]))
    assert abs(norm_of(clipper.grads()) - 1) < 1e-6
    naive = torch.full((3_000_000,), 0.35)
    assert float((naive / naive.norm()).double().norm()) > 1 + 1e-6  # why the norm is added up in float64


@pytest.mark.parametrize("way", WAYS)
def test_a_gradient_that_is_not_finite_contributes_nothing(way):
    model, (images, targets) = NETWORKS["wide"], batch()
    want, _ = run(model, images[[0, 2, 4]], targets[[0, 2, 4]], 0.5, way)
    images, targets = images.clone(), targets.clone()
    images[1, 2, 0, 3, 3] = float("nan")
    targets[3, 0, 0] = float("inf")
    clipper, norms = run(model, images, targets, 0.5, way)
    assert norms.isfinite().tolist() == [True, False, True, False, True]
    assert int(clipper.non_finite) == 2
    assert clipper.total.isfinite().all()
    torch.testing.assert_close(clipper.total, want.total)


@pytest.mark.parametrize("way", WAYS)
def test_empty_batch_infinite_clip_norm_and_no_gradient(way):
    model, (images, targets) = NETWORKS["wide"], batch()
    clipper, norms = run(model, images[:0], targets[:0], 0.5, way)
    assert norms.shape == (0,) and not clipper.total.any()
    want, _ = oracle(model, images, targets, float("inf"))
    clipper, _ = run(model, images, targets, float("inf"), way)
    for n, g in clipper.grads().items():
        torch.testing.assert_close(g, want[n], rtol=1e-8, atol=1e-10)
    clipper, norms = run(model, images, torch.zeros_like(targets), 0.5, way)  # a loss that is zero everywhere
    assert not norms.any() and not clipper.total.any() and not clipper.non_finite


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), way=st.sampled_from(list(WAYS)), physical=st.integers(1, 6), clip=st.floats(0.05, 20))
def test_order_of_examples_and_views_and_physical_batch_do_not_matter(data, way, physical, clip):
    model, (images, targets) = NETWORKS["wide"], batch(4, 3)
    want, norms = run(model, images, targets, clip, way)
    examples = data.draw(st.permutations(range(4)))
    views = data.draw(st.permutations(range(3)))
    clipper, got = Clipper(model, clip, **WAYS[way]), []
    x, y = images[examples][:, views], targets[examples][:, views]
    for start in range(0, 4, physical):
        got.append(clipper.add(x[start : start + physical], y[start : start + physical]))
    torch.testing.assert_close(clipper.total, want.total)
    torch.testing.assert_close(torch.cat(got), norms[examples])


def test_the_loop_engine_is_the_same_to_the_last_bit_for_any_physical_batch():
    model, (images, targets) = wide_resnet(10, 1, 3, channels=2), batch(6, 2, dtype=torch.float32)
    sums = [clipped_gradient_sum(model, images, targets, 0.5, "loop", physical_batch=p) for p in (1, 4, 6)]
    for other in sums[1:]:
        assert all(torch.equal(g, other.grads[n]) for n, g in sums[0].grads.items())


@pytest.mark.parametrize("way", WAYS)
def test_leaving_one_example_out_moves_the_sum_by_at_most_c(way):
    model, (images, targets) = NETWORKS["wide"], batch(4, 3)
    whole, norms = run(model, images, targets, 0.3, way)
    assert (norms > 0.3).all()
    for i in range(4):
        rest = [j for j in range(4) if j != i]
        without, _ = run(model, images[rest], targets[rest], 0.3, way)
        moved = float((whole.total - without.total).norm())
        assert 0.3 * 0.999 < moved <= 0.3 * (1 + 1e-6)


def test_wrong_algorithms_move_the_sum_by_more():
    """Negative controls: views clipped one by one, and mixup across the batch, do not keep the bound."""
    model, (images, targets) = NETWORKS["wide"], batch(4, 3)
    views_as_examples = [
        clipped_gradient_sum(model, images[rest].flatten(0, 1)[:, None], targets[rest].flatten(0, 1)[:, None], 0.3)
        for rest in ([0, 1, 2, 3], [0, 1, 2])
    ]
    moved = norm_of({n: g - views_as_examples[1].grads[n] for n, g in views_as_examples[0].grads.items()})
    assert moved > 0.3 * 1.5

    def mixed_across(x, y):
        partner = torch.arange(len(x)).roll(1)
        return clipped_gradient_sum(model, 0.5 * (x + x[partner]), 0.5 * (y + y[partner]), 0.3)

    with_last, without = mixed_across(images, targets), mixed_across(images[:3], targets[:3])
    assert norm_of({n: g - without.grads[n] for n, g in with_last.grads.items()}) > 0.3 * (1 + 1e-6)


def test_bfloat16_is_near_and_bounded():
    model, (images, targets) = wide_resnet(10, 1, 3, channels=2, seed=1), batch(4, 3, dtype=torch.float32)
    exact = clipped_gradient_sum(model, images, targets, 0.5)
    for engine in ("loop", "grouped", "vmap"):
        rough = clipped_gradient_sum(model, images, targets, 0.5, engine, autocast=torch.bfloat16, channels_last=True)
        difference = norm_of({n: g - exact.grads[n] for n, g in rough.grads.items()})
        assert 1e-6 < difference < 0.3 * norm_of(exact.grads)  # rounded (8 bits, groups of 4 numbers), but not wrong
        assert all(g.dtype == torch.float32 for g in rough.grads.values())
        alone = clipped_gradient_sum(model, images[:1], targets[:1], 0.05, engine, autocast=torch.bfloat16)
        assert norm_of(alone.grads) <= 0.05 * (1 + 1e-6)


def test_in_bfloat16_the_rounded_gradient_is_what_is_measured_clipped_and_added():
    """The oracle in that mode: gradients by autocast, everything after them in float64."""
    model, (images, targets) = wide_resnet(10, 1, 3, channels=2, seed=1), batch(4, 3, dtype=torch.float32)
    rows = []
    for x, y in zip(images, targets, strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x)
        loss = F.cross_entropy(logits.float(), y.float())
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).double())
    norms = torch.stack([row.norm() for row in rows])
    clip = float(norms.median())
    want = sum(row * min(1.0, clip / float(row.norm())) for row in rows)
    clipper = Clipper(model, clip, "loop", autocast=torch.bfloat16)
    torch.testing.assert_close(clipper.add(images, targets).double(), norms, rtol=1e-6, atol=0)
    assert clipper.total.dtype == torch.float32
    torch.testing.assert_close(clipper.total.double(), want, rtol=1e-5, atol=1e-7)
    exact = clipped_gradient_sum(model, images, targets, clip, "loop").norms.double()
    assert float((exact / norms - 1).abs().max()) > 1e-4, "the mode is another one"


@pytest.mark.parametrize("device", ["cpu"] + ["cuda"] * torch.cuda.is_available())
@pytest.mark.parametrize("way", WAYS)
def test_every_device_at_hand(device, way):
    """A GPU, where there is one, gives the CPU's sums, keeps the bound in bfloat16 and drops what is not finite."""
    model, (images, targets) = wide_resnet(10, 1, 3, channels=2, seed=1).double(), batch()
    want, _ = run(model, images, targets, 0.5, "loop")
    got, _ = run(model.to(device), images, targets, 0.5, way)
    torch.testing.assert_close(got.total.cpu(), want.total, rtol=1e-6, atol=1e-9)
    model, images, targets = model.float(), images[:2].float(), targets[:2].float()
    images[1] = float("nan")
    clipper = Clipper(model, 0.05, autocast=torch.bfloat16, channels_last=True, **WAYS[way])
    norms = clipper.add(images, targets).cpu()
    assert norms.isfinite().tolist() == [True, False] and float(norms[0]) > 0.05
    assert abs(float(clipper.total.double().norm()) / 0.05 - 1) <= 1e-6


def test_auto_says_what_it_took():
    images, targets = batch(1, 1)
    assert clipped_gradient_sum(NETWORKS["wide"], images, targets, 1.0).engine == "loop"


class TokenScale(nn.Module):
    """A parameter that no rule knows."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.head = nn.Linear(2, 3).double()

    def forward(self, x):
        return self.head(x.mean((2, 3)) * self.scale)


def test_layers_without_a_rule_are_named_and_vmap_takes_them():
    model, (images, targets) = TokenScale(), batch()
    with pytest.raises(ValueError, match=r"engine='grouped': has no rule for layer 'model' \(TokenScale\).*vmap"):
        clipped_gradient_sum(model, images, targets, 1.0, "grouped")
    want, _ = oracle(model, images, targets, 0.1)
    for engine in ("vmap", "loop"):
        got = clipped_gradient_sum(model, images, targets, 0.1, engine)
        assert all(torch.allclose(g, want[n]) for n, g in got.grads.items())


def test_a_convolution_in_groups_has_no_rule_and_vmap_takes_it():
    model = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(144, 3)).double()
    images, targets = batch()
    with pytest.raises(ValueError, match=r"has no rule for layer '0' \(Conv2d\)"):
        clipped_gradient_sum(model, images, targets, 1.0, "grouped")
    want, _ = oracle(model, images, targets, 0.1)
    got = clipped_gradient_sum(model, images, targets, 0.1, "vmap")
    assert all(torch.allclose(g, want[n]) for n, g in got.grads.items())


def test_the_grouped_engine_refuses_what_it_would_get_wrong():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(2, 2), nn.Linear(2, 3)

        def forward(self, x):
            h = torch.tanh(self.first(x.mean((2, 3))))
            out = self.head(h)
            h.data.zero_()
            h.add_(1)
            return out

    images, targets = batch(dtype=torch.float32)
    with pytest.raises(ValueError, match="changes its input"):
        clipped_gradient_sum(InPlace(), images, targets, 1.0, "grouped")


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (dict(engine="groupd"), "engine='groupd': unknown; did you mean 'grouped'"),
        (dict(clip_norm=0.0), r"clip_norm=0\.0: must be a positive"),
        (dict(clip_norm=float("nan")), "clip_norm=nan"),
        (dict(physical_batch=0), "physical_batch=0"),
        (dict(autocast=torch.float16), "autocast=torch.float16"),
        (dict(model=nn.Sequential(nn.Conv2d(2, 2, 8), nn.BatchNorm2d(2), nn.Flatten())), "BatchNorm2d"),
        (dict(model=Zoo().requires_grad_(False)), "has no parameter with requires_grad"),
    ],
)
def test_bad_arguments(bad, said):
    images, targets = batch(dtype=torch.float32)
    given = dict(model=wide_resnet(10, 1, 3, channels=2), images=images, targets=targets, clip_norm=1.0) | bad
    with pytest.raises(ValueError, match=said):
        clipped_gradient_sum(**given)
    with pytest.raises(ValueError, match="K=0"):
        clipped_gradient_sum(NETWORKS["wide"], images[:, :0], targets[:, :0], 1.0)


# Microbatches (Eq. (2)).


@given(n=st.integers(1, 60), size=st.integers(1, 7), seed=st.integers(0, 3))
def test_the_partition_holds_everyone_once(n, size, seed):
    table = microbatch_partition(n, size, seed=seed)
    assert table.shape == (-(-n // size), size)
    assert sorted(table[table >= 0].tolist()) == list(range(n))
    assert (table[:-1] >= 0).all()  # vacant places only in the last row
    assert torch.equal(table, microbatch_partition(n, size, seed=seed))


def line(*gradients):
    """A network of one weight w and views whose gradients at w = 0 are the numbers given (times one half)."""

    class Line(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def forward(self, x):
            return torch.cat([x.flatten(1) * self.w, torch.zeros(len(x), 1, dtype=x.dtype)], dim=1)

    images = -2 * torch.tensor(gradients, dtype=torch.float64).view(1, -1, 1, 1, 1, 1)
    targets = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(1, len(gradients), 1, 2)
    return Line(), images, targets


def test_worked_example_the_sum_moves_from_minus_c_to_c():
    model, images, targets = line(1.0, -3.0)
    both, first = torch.tensor([[True, True]]), torch.tensor([[True, False]])
    with_second = microbatch_sum(model, images, targets, both, 1.0).grads["w"]
    without = microbatch_sum(model, images, targets, first, 1.0).grads["w"]
    torch.testing.assert_close(with_second, torch.tensor([-1.0], dtype=torch.float64))
    torch.testing.assert_close(without, torch.tensor([1.0], dtype=torch.float64))
    assert sensitivity(2) == 2.0 and sensitivity(1) == 1.0


@pytest.mark.parametrize("mix", ["none", "add", "replace"])
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 1000), removed=st.integers(0, 6))
def test_one_example_changes_one_microbatch_by_at_most_2c(mix, seed, removed):
    model, (images, targets) = NETWORKS["wide"], batch(7, 2, seed=seed)
    table = microbatch_partition(7, 2, seed=seed)
    lam = mixing_weights(torch.arange(4), 2, alpha=0.2, seed=seed, step=0)

    def sums(table):
        present = table >= 0
        x, y = images[table.clamp(min=0)], targets[table.clamp(min=0)]
        x = torch.where(present[..., None, None, None, None], x, torch.zeros_like(x))
        each = [
            microbatch_sum(model, x[r : r + 1], y[r : r + 1], present[r : r + 1], 0.2, mix=mix, lam=lam[r : r + 1])
            for r in range(len(table))
        ]
        return [torch.cat([g.flatten() for g in s.grads.values()]) for s in each]

    before, after = sums(table), sums(torch.where(table == removed, -1, table))
    moved = [float((a - b).norm()) for a, b in zip(before, after, strict=True)]
    assert sum(m > 0 for m in moved) == 1
    assert max(moved) <= 2 * 0.2 * (1 + 1e-6)


def test_pairs_drawn_anew_from_each_batch_move_many_microbatches():
    """Negative control: consecutive pairs of the sampled batch, as an ordinary data loader would make them."""
    model, (images, targets) = NETWORKS["wide"], batch(8, 1)

    def sums(ids):
        pairs, present = images[ids].unflatten(0, (-1, 2)), torch.ones(len(ids) // 2, 2, dtype=torch.bool)
        labels = targets[ids].unflatten(0, (-1, 2))
        each = [microbatch_sum(model, pairs[r:][:1], labels[r:][:1], present[r:][:1], 0.2) for r in range(len(pairs))]
        return [torch.cat([g.flatten() for g in s.grads.values()]) for s in each]

    before, after = sums([0, 1, 2, 3, 4, 5]), sums([1, 2, 3, 4, 5, 6])  # example 0 is gone, everyone moves up
    assert all(float((a - b).norm()) > 1e-6 for a, b in zip(before, after, strict=True))


def test_views_of_a_microbatch():
    images = torch.arange(2 * 2 * 1, dtype=torch.float64).view(2, 2, 1, 1, 1, 1)
    targets = torch.eye(2, dtype=torch.float64).view(1, 2, 1, 2).expand(2, 2, 1, 2)
    present = torch.tensor([[True, True], [True, False]])
    lam = torch.tensor([[0.25], [0.25]], dtype=torch.float64)
    x, y, w = microbatch_views(images, targets, present, "add", lam)
    assert x.flatten(1).tolist() == [[0, 1, 0.75], [2, 3, 2.75]]
    assert y[0, 2].tolist() == [0.25, 0.75]
    torch.testing.assert_close(w, torch.tensor([[1 / 3] * 3, [1.0, 0, 0]], dtype=torch.float64))
    _, _, w = microbatch_views(images, targets, present, "replace", lam)
    assert w.tolist() == [[0, 0, 1], [1, 0, 0]]  # a pair with a vacant place stands alone
    _, _, w = microbatch_views(images, targets, torch.tensor([[False, False], [True, True]]))
    assert w.tolist() == [[0, 0], [0.5, 0.5]]
    with pytest.raises(ValueError, match="microbatches have size 3, not 2"):
        microbatch_views(
            images.expand(2, 2, 1, 1, 1, 1)[:, [0, 1, 1]], targets[:, [0, 1, 1]], present[:, [0, 1, 1]], "add", lam
        )


def test_a_microbatch_of_one_is_per_example_clipping():
    model, (images, targets) = NETWORKS["wide"], batch()
    got = microbatch_sum(model, images[:, None], targets[:, None], torch.ones(5, 1, dtype=torch.bool), 0.4)
    want = clipped_gradient_sum(model, images, targets, 0.4)
    assert all(torch.allclose(g, want.grads[n]) for n, g in got.grads.items())


def test_a_weight_used_past_its_layer_is_refused_where_its_gradient_would_be_lost():
    class Past(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(2, 2), nn.Linear(2, 3)

        def forward(self, x):
            return self.head(torch.tanh(nn.functional.linear(x.mean((2, 3)), self.first.weight)))

    images, targets = batch(dtype=torch.float32)
    model = Past()
    assert clipped_gradient_sum(model, images, targets, 1.0, "loop").grads["first.weight"].abs().sum() > 0
    with pytest.raises(ValueError, match=r"'first\.weight' is used without calling its layer"):
        clipped_gradient_sum(model, images, targets, 1.0, "grouped")
    model.first.requires_grad_(False)
    clipped_gradient_sum(model, images, targets, 1.0, "grouped")


class Sequence(nn.Module):
    """A linear layer over positions, with the axis of the positions in front of the examples' or behind it."""

    def __init__(self, positions_first: bool):
        super().__init__()
        self.positions_first, self.tokens, self.head = positions_first, nn.Linear(2, 6), nn.Linear(6, 3)
        nn.init.zeros_(self.head.weight)  # hides the layer below from a look at the gradients as they are

    def forward(self, x):
        tokens = x.flatten(2).permute(2, 0, 1) if self.positions_first else x.flatten(2).mT.reshape(-1, 2)
        tokens = torch.tanh(self.tokens(tokens))
        return self.head(tokens.mean(0) if self.positions_first else tokens.view(len(x), -1, 6).mean(1))


@pytest.mark.parametrize("shape", [(8, 8), (6, 10), (4, 6), (3, 3)])
def test_the_grouped_engine_refuses_a_layer_that_does_not_see_the_examples_first(shape):
    """It would clip slices of the batch instead of examples: removing one of six moved the sum by 5.9 C, in silence."""
    draw = np.random.default_rng(0)
    images = torch.from_numpy(draw.random((6, 2, 2, *shape))).float()
    targets = torch.from_numpy(draw.dirichlet(np.ones(3), (6, 2))).float()
    wrong, right = Sequence(positions_first=True), Sequence(positions_first=False)
    with pytest.raises(
        ValueError, match=r"tokens\.?\w*' (gets its input in another order|changes .* the batch dimension)"
    ):
        clipped_gradient_sum(wrong, images, targets, 0.1, "grouped")
    before = [p.clone() for p in right.parameters()]
    grouped = clipped_gradient_sum(right, images, targets, 0.1, "grouped")
    assert all(torch.equal(p, b) for p, b in zip(right.parameters(), before, strict=True)), "the look leaves no trace"
    for model in (wrong, right):
        model.load_state_dict(right.state_dict())
        loop = clipped_gradient_sum(model, images, targets, 0.1, "loop")
        assert all(torch.allclose(loop.grads[n], g, atol=1e-6) for n, g in grouped.grads.items())


def test_the_look_at_a_model_allows_for_bfloat16():
    model = wide_resnet(10, 1, 3, channels=2, seed=1)
    images, targets = batch(dtype=torch.float32)
    got = clipped_gradient_sum(model, images, targets, 0.1, "grouped", autocast=torch.bfloat16)
    assert got.engine == "grouped" and all(g.isfinite().all() for g in got.grads.values())


class Watched(nn.Module):
    """Says how many images it was shown at a time; answers a blank image with what is not a number."""

    def __init__(self):
        super().__init__()
        self.inner, self.sizes = wide_resnet(10, 1, 3, channels=2, seed=1).double(), []

    def forward(self, x):
        self.sizes.append(len(x))
        return self.inner(x) / (x.amax((1, 2, 3)) > 0)[:, None]


@pytest.mark.parametrize("engine", ["grouped", "vmap"])
def test_the_last_physical_batch_is_filled_up_and_the_filling_adds_nothing(engine):
    """So the size of a batch, by which a GPU picks its kernels, does not tell the others whether somebody joined."""
    model, (images, targets) = Watched(), batch(7, 2)
    want = clipped_gradient_sum(model, images, targets, 0.5, "loop")
    for n in (7, 6, 5, 4):
        model.sizes.clear()
        got = clipped_gradient_sum(model, images[:n], targets[:n], 0.5, engine, physical_batch=4)
        if engine == "grouped":  # vmap hides its own axis: every call sees the two views of an example
            assert model.sizes[-2:] == [8, 8][: -(-n // 4)], model.sizes
        assert got.non_finite == 0 and got.norms.shape == (n,) and got.norms.isfinite().all()
        torch.testing.assert_close(got.norms, want.norms[:n])
    got = clipped_gradient_sum(model, images, targets, 0.5, engine, physical_batch=4)
    assert all(torch.allclose(g, want.grads[name]) for name, g in got.grads.items())


def test_without_the_filling_the_size_of_the_last_batch_tells_how_many_there_are():
    """Negative control."""
    model, (images, targets) = Watched(), batch(7, 2)
    clipper = Clipper(model, 0.5, "grouped")
    clipper.add(images[4:], targets[4:])
    assert model.sizes[-1] == 6


class ZeroBranch(nn.Module):
    """A residual branch that starts at zero beside large features: its inner gradient is a millionth of the whole. `first`: the
    inner layer gets the positions in front of the examples."""

    def __init__(self, first: bool):
        super().__init__()
        self.first, self.embed, self.inner = first, nn.Linear(2, 6), nn.Linear(6, 6)
        self.out, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        for layer in (self.out, self.head):
            nn.init.zeros_(layer.weight)
        with torch.no_grad():
            self.embed.weight.mul_(200)

    def forward(self, x):
        tokens = self.embed(x.flatten(2).mT)
        inner = self.inner(nn.functional.layer_norm(tokens, (6,)).transpose(0, 1) if self.first else tokens / 200)
        branch = self.out(torch.relu(inner.transpose(0, 1) if self.first else inner))
        return self.head((tokens + branch).mean(1))


def test_a_parameter_with_a_small_gradient_is_compared_as_strictly_as_the_others():
    images, targets = torch.rand(4, 1, 2, 4, 6), torch.full((4, 1, 3), 1 / 3)
    with pytest.raises(ValueError, match=r"'inner\.weight' gets its input in another order"):
        clipped_gradient_sum(ZeroBranch(first=True), images, targets, 0.1, "grouped")


def test_a_clip_norm_whose_squares_are_nothing_is_refused():
    with pytest.raises(ValueError, match="clip_norm=1e-25: must be at least 1e-12"):
        Clipper(nn.Linear(4, 2), 1e-25)


class InFloat32(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x.float())


def test_a_model_that_insists_on_its_own_dtype_is_compared_as_it_is():
    images, targets = torch.rand(4, 1, 2, 4, 6), torch.full((4, 1, 3), 1 / 3)
    right, wrong = InFloat32(Sequence(positions_first=False)), InFloat32(Sequence(positions_first=True))
    assert clipped_gradient_sum(right, images, targets, 0.1, "grouped").engine == "grouped"
    with pytest.raises(
        ValueError, match=r"tokens\.?\w*' (gets its input in another order|changes .* the batch dimension)"
    ):
        clipped_gradient_sum(wrong, images, targets, 0.1, "grouped")
