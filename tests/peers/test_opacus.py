"""Opacus with views averaged before the clip: equal to autograd and to our engines, and as private as it says."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import image_set
from opacus import PrivacyEngine
from opacus.data_loader import wrap_collate_with_empty
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from opacus.grad_sample import prepare_module
from opacus.optimizers import AdaClipDPOptimizer, DPOptimizer, DPPerLayerOptimizer
from opacus.utils.batch_memory_manager import BatchMemoryManager
from peers import opacus_script
from peers.opacus_steps import CLASSES, RECIPE, SHAPE, opacus_step
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

from dpmix import audit, models
from dpmix.core import accounting, clipping, sources, views
from dpmix.core.clipping_network import clipped_gradient_sum
from dpmix.peers import opacus as peer

HERE = Path(__file__).parent
pytestmark = pytest.mark.filterwarnings(
    "ignore:(Secure RNG|Full backward hook|Optimal order|PrivacyEngine detected|A worker has been)"
)


class Attention(nn.Module):
    def __init__(self, width=8, heads=2):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Vit(nn.Module):
    """Patches, a class token (a parameter of its own, for which Opacus takes functorch), one block, a head."""

    def __init__(self, token=True, width=8):
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, width)) if token else None
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images):
        x = self.patches(images).flatten(2).mT
        if self.token is not None:
            x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        x = x + self.attention(self.norms[0](x))
        x = x + self.mlp(self.norms[1](x))
        return self.head(x[:, 0] if self.token is not None else x.mean(1))


def conv():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU(), nn.Conv2d(6, 4, 3, stride=2), nn.Flatten(),
        nn.Linear(36, CLASSES),
    )  # fmt: skip


class Twice(nn.Module):
    """A layer that is called twice, and a weight that two layers share."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, CLASSES)
        self.two.weight = self.one.weight

    def forward(self, x):
        x = torch.tanh(self.one(x.flatten(1)))
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))


def network(name, seed=0):
    torch.manual_seed(seed)
    return {"conv": conv, "twice": Twice, "block": partial(Vit, token=False), "vit": Vit}[name]().double()


def batch(b=5, k=4, seed=0):
    draw = np.random.default_rng(seed)
    images, targets = draw.random((b, k, 1, 8, 8)), draw.dirichlet(np.ones(CLASSES), (b, k))
    return torch.from_numpy(images), torch.from_numpy(targets)


def oracle(model, images, targets, clip_norm, per_layer=False):
    """Autograd on the mean loss of one example at a time, clipped as Opacus does it: C / (norm + 1e-6)."""
    parameters = list(model.parameters())
    total, norms = [torch.zeros_like(p) for p in parameters], []
    for x, y in zip(images, targets, strict=True):
        own = torch.autograd.grad(F.cross_entropy(model(x), y), parameters)
        lengths = torch.stack([g.norm() for g in own])
        norms.append(float(lengths.norm()))
        factors = clip_norm / (lengths + 1e-6) if per_layer else (clip_norm / (lengths.norm() + 1e-6)).expand(len(own))
        for t, g, factor in zip(total, own, factors.clamp(max=1.0), strict=True):
            t += factor * g
    return total, norms


def clip_that_bites(model, images, targets):
    """A clip norm that some examples exceed and others do not."""
    return float(np.median(oracle(model, images, targets, 1.0)[1]))


def stepped(
    model,
    images,
    targets,
    clip_norm,
    *,
    mode="hooks",
    average=True,
    kind=DPOptimizer,
    loss="mean",
    before=None,
    **options,
):
    """(sums, optimizer) of one noiseless step, the sum being Opacus' `p.grad` times the divisor."""
    k = targets.shape[1]
    hooked = prepare_module(model, grad_sample_mode=mode, loss_reduction=loss)
    optimizer = kind(
        torch.optim.SGD(model.parameters(), lr=1.0), noise_multiplier=0.0, max_grad_norm=clip_norm,
        expected_batch_size=7, loss_reduction=loss, **options,
    )  # fmt: skip
    held = before(optimizer) if before else None
    optimizer = peer.average_views(hooked, optimizer, k) if average else optimizer
    logits = hooked(images if average else images.flatten(0, 1))
    F.cross_entropy(logits, targets.flatten(0, 1), reduction=loss).backward()
    (held or optimizer).step()
    return [p.grad * (7 if loss == "mean" else 1) for p in model.parameters()], optimizer


@pytest.mark.parametrize("loss", ["mean", "sum"])
@pytest.mark.parametrize(
    "name, mode",
    [
        *((n, m) for n in ("conv", "block", "vit", "twice") for m in ("hooks", "functorch")),
        ("conv", "ew"),
        ("twice", "ew"),
    ],
)  # PyTorch's expanded weights know no parameter outside a layer, and need contiguous gradients of a convolution
def test_the_sum_is_that_of_autograd_and_of_our_engines(name, mode, loss):
    images, targets = batch()
    clip_norm = clip_that_bites(network(name), images, targets)
    want, norms = oracle(network(name), images, targets, clip_norm)
    assert min(norms) < clip_norm < max(norms)
    got, _ = stepped(network(name), images, targets, clip_norm, mode=mode, loss=loss)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)
    for engine in ["loop"] if name in ("vit", "twice") else ["loop", "grouped", "vmap"]:
        ours = clipped_gradient_sum(network(name), images, targets, clip_norm, engine).grads.values()
        for g, o in zip(got, ours, strict=True):  # ours has no 1e-6 in the denominator
            torch.testing.assert_close(g, o, rtol=0, atol=len(images) * 1e-6)
    each, _ = stepped(network(name), images, targets, clip_norm, mode=mode, loss=loss, average=False)
    assert max((e - w).abs().max() for e, w in zip(each, want, strict=True)) > 0.1 * clip_norm  # K rows, K examples


def in_opacus(mode="hooks", *, clip_norm=1.0, batch_size=5):
    """The small network, the same in Opacus' hands, and its optimizer without noise."""
    model = network("conv")
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters()),
        noise_multiplier=0.0,
        max_grad_norm=clip_norm,
        expected_batch_size=batch_size,
    )
    return model, prepare_module(model, grad_sample_mode=mode), optimizer


def test_a_loop_over_the_views_in_one_backward_pass_is_the_same_sum():
    """What the page says of Opacus by itself: calls of one backward pass are added up for each example."""
    images, targets = batch()
    clip_norm = clip_that_bites(network("conv"), images, targets)
    want, _ = oracle(network("conv"), images, targets, clip_norm)
    model, hooked, optimizer = in_opacus(clip_norm=clip_norm, batch_size=1)
    (sum(F.cross_entropy(hooked(images[:, k]), targets[:, k]) for k in range(4)) / 4).backward()
    optimizer.step()
    for p, w in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, w, rtol=1e-9, atol=1e-12)


def test_rows_are_averaged_in_the_backward_pass_and_once():
    images, targets = batch()
    model, hooked, optimizer = in_opacus()
    optimizer = peer.average_views(hooked, optimizer, 4)
    F.cross_entropy(hooked(images), targets.flatten(0, 1)).backward()
    before = [p.grad_sample for p in model.parameters()]
    assert {len(g) for g in before} == {5}  # memory is that of b rows
    optimizer.step()
    assert all(p.grad_sample is g for p, g in zip(model.parameters(), before, strict=True))
    with pytest.raises(ValueError, match="zero_grad"):  # Opacus' own check that no gradient counts twice
        F.cross_entropy(hooked(images), targets.flatten(0, 1)).backward()
        optimizer.step()


@pytest.mark.parametrize("wrap", [True, False])
def test_one_view_is_opacus_itself_bit_for_bit(wrap):
    def trained(averaged):
        model, images = network("conv"), batch(b=20, k=1)[0]
        labels = torch.arange(20) % CLASSES
        torch.manual_seed(1)
        hooked, optimizer, loader = PrivacyEngine().make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9), wrap_model=wrap,
            data_loader=DataLoader(TensorDataset(images, labels), batch_size=5), noise_multiplier=1.0, max_grad_norm=0.1,
        )  # fmt: skip
        called = hooked if wrap else model
        optimizer = peer.average_views(called, optimizer, 1) if averaged else optimizer
        for _ in range(2):
            for x, y in loader:
                optimizer.zero_grad()
                F.cross_entropy(called(x if averaged else x.flatten(0, 1)), y).backward()
                optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    ours, theirs = trained(True), trained(False)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert max((a - b).abs().max() for a, b in zip(ours, network("conv").parameters(), strict=True)) > 0.01


@pytest.mark.parametrize("mode", ["hooks", "ew"])
@pytest.mark.parametrize("before", ["scheduler", "held"])
def test_who_has_the_optimizer_already_averages_too(mode, before):
    """A scheduler puts a bound `step` on the optimizer, and scripts hand optimizers around: no way leads past the average."""
    images, targets = batch()
    clip_norm = clip_that_bites(network("conv"), images, targets)

    def scheduled(optimizer):
        torch.optim.lr_scheduler.StepLR(optimizer, 10)

    first = scheduled if before == "scheduler" else lambda optimizer: optimizer
    want, _ = stepped(network("conv"), images, targets, clip_norm, mode=mode)
    got, _ = stepped(network("conv"), images, targets, clip_norm, mode=mode, before=first)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("mode", ["hooks", "ew"])
def test_made_private_again_it_averages_or_is_refused(mode):
    """Opacus wraps the inner optimizer anew, in one that knows nothing of views: with "ew" K rows an example, K times C."""
    model, inner = nn.Sequential(nn.Flatten(), nn.Linear(6, 3)), None
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    loader = DataLoader(TensorDataset(torch.rand(12, 4, 6), torch.zeros(12, 4, dtype=torch.long)), batch_size=6)
    about = dict(data_loader=loader, noise_multiplier=0.0, max_grad_norm=1.0, poisson_sampling=False)
    hooked, optimizer, _ = PrivacyEngine().make_private(module=model, optimizer=inner, grad_sample_mode=mode, **about)
    peer.average_views(hooked, optimizer, 4)
    hooked, again, _ = PrivacyEngine().make_private(module=hooked, optimizer=optimizer, grad_sample_mode=mode, **about)
    hooked.train()
    again.zero_grad()
    F.cross_entropy(hooked(torch.rand(6, 4, 6)), torch.zeros(24, dtype=torch.long)).backward()
    if mode == "hooks":
        assert all(len(p.grad_sample) == 6 for p in model.parameters())
        again.step()
    else:
        with pytest.raises(ValueError, match="make_private came after average_views"):
            again.step()


def test_per_layer_and_adaptive_clipping_see_examples_too():
    images, targets = batch()
    want, norms = oracle(network("conv"), images, targets, 0.05, per_layer=True)
    got, _ = stepped(network("conv"), images, targets, [0.05] * len(want), kind=DPPerLayerOptimizer)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)
    adaptive = dict(target_unclipped_quantile=0.5, clipbound_learning_rate=0.2, max_clipbound=1e9, min_clipbound=1e-9,
                    unclipped_num_std=1e-9)  # fmt: skip
    clip_norm = float(np.median(norms)) * 1.001
    _, optimizer = stepped(network("conv"), images, targets, clip_norm, kind=AdaClipDPOptimizer, **adaptive)
    assert optimizer.sample_size == 5 and round(float(optimizer.unclipped_num)) == sum(n <= clip_norm for n in norms)


def test_a_logical_batch_in_pieces_takes_the_step_of_the_whole():
    images, targets = batch(b=24)

    def trained(pieces):
        model, engine = network("conv"), PrivacyEngine(accountant="rdp")
        hooked, optimizer, loader = engine.make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.5), noise_multiplier=0.3, max_grad_norm=0.05,
            data_loader=DataLoader(TensorDataset(images, targets), batch_size=12), poisson_sampling=False,
            noise_generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        optimizer = peer.average_views(hooked, optimizer, 4)
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=pieces, optimizer=optimizer) as physical:
            sizes = []
            for x, y in physical:
                optimizer.zero_grad()
                F.cross_entropy(hooked(x), y.flatten(0, 1)).backward()
                optimizer.step()
                sizes.append(len(x))
        assert engine.accountant.history == [(0.3, 0.5, 2)]
        return sizes, [p.detach().clone() for p in model.parameters()]

    (whole, want), (pieces, got) = trained(12), trained(5)
    assert whole == [12, 12] and pieces == [4] * 6
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-12)


def test_a_logical_batch_of_4096_in_pieces_of_500_takes_the_step_of_the_whole():
    draw = torch.Generator().manual_seed(0)
    images, labels = torch.randint(0, 256, (4096, 1, 2, 2), generator=draw, dtype=torch.uint8), torch.arange(4096) % 2
    data = peer.ViewSet(TensorDataset(images, labels), views.Recipe(k_base=2, k_self=1), num_classes=2, seed=0)

    def stepped_in(pieces):
        torch.manual_seed(0)
        model, engine = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double(), PrivacyEngine(accountant="rdp")
        hooked, optimizer, loader = engine.make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=1000.0), poisson_sampling=False,
            data_loader=DataLoader(data, batch_size=4096), noise_multiplier=0.3, max_grad_norm=0.3,
            noise_generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        optimizer, before = peer.average_views(hooked, optimizer, 3), [p.detach().clone() for p in model.parameters()]
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=pieces, optimizer=optimizer) as physical:
            sizes = []
            for x, y in physical:
                optimizer.zero_grad()
                F.cross_entropy(hooked(x.double()), y.double().flatten(0, 1)).backward()
                optimizer.step()
                sizes.append(len(x))
        assert len(engine.accountant.history) == 1 and engine.accountant.history[0][2] == 1
        return sizes, [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]

    (whole, want), (pieces, got) = stepped_in(4096), stepped_in(500)
    assert whole == [4096] and sum(pieces) == 4096 and len(pieces) == 9 and max(pieces) <= 500
    for g, w in zip(got, want, strict=True):
        assert w.abs().max() > 0.01
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-12)


def test_an_example_may_be_a_single_number():
    """Tokens: views [b, K], of a network that takes [b]."""

    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, CLASSES)).double()

    tokens, targets = torch.arange(20).reshape(5, 4) % 7, batch()[1]
    clip_norm = clip_that_bites(network(), tokens, targets)
    want, _ = oracle(network(), tokens, targets, clip_norm)
    got, _ = stepped(network(), tokens, targets, clip_norm)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)


def test_accumulated_batches_average_their_own_views():
    images, targets = batch(b=6)
    want, _ = oracle(network("conv"), images, targets, 0.05)
    model, hooked, optimizer = in_opacus(clip_norm=0.05, batch_size=3)
    optimizer = peer.average_views(hooked, optimizer, 4)
    for part in (slice(2), slice(2, 6)):
        F.cross_entropy(hooked(images[part]), targets[part].flatten(0, 1)).backward()
    assert optimizer.accumulated_iterations == 2
    optimizer.step()
    for p, w in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad * 6, w, rtol=1e-9, atol=1e-12)


def test_expanded_weights_would_mix_the_examples_of_accumulated_batches_and_are_refused():
    images, targets = batch()
    _, hooked, optimizer = in_opacus("ew")
    optimizer = peer.average_views(hooked, optimizer, 4)
    F.cross_entropy(hooked(images), targets.flatten(0, 1)).backward()
    with pytest.raises(ValueError, match=r"grad_sample_mode='ew': adds rows .*call optimizer\.zero_grad"):
        hooked(images)
    optimizer.zero_grad()
    assert len(hooked(images)) == 20


def test_an_empty_poisson_batch_is_a_step_of_noise_alone():
    model, engine = network("conv"), PrivacyEngine(accountant="rdp")
    data = peer.ViewSet(TensorDataset(torch.rand(50, 1, 8, 8).double(), torch.zeros(50).long()), views.Recipe(k_base=4),
                        num_classes=CLASSES)  # fmt: skip
    hooked, optimizer, loader = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), data_loader=DataLoader(data, batch_size=1),
        noise_multiplier=2.0, max_grad_norm=0.5,
    )  # fmt: skip
    optimizer = peer.average_views(hooked, optimizer, 4)
    torch.manual_seed(0)
    empty = 0
    for x, y in loader:
        assert x.shape[1:] == (4, 1, 8, 8) and y.shape[1:] == (4, CLASSES)
        optimizer.zero_grad()
        before = [p.detach().clone() for p in model.parameters()]
        F.cross_entropy(hooked(x), y.flatten(0, 1).double(), reduction="mean" if len(x) else "sum").backward()
        optimizer.step()
        if not len(x):
            empty += 1
            moved = torch.cat([(p - b).flatten() for p, b in zip(model.parameters(), before, strict=True)])
            assert 0.8 < float(moved.std()) / (2.0 * 0.5) < 1.2  # sigma C over a divisor of one
    assert empty > 3 and engine.accountant.history == [(2.0, 1 / 50, 50)]


def test_a_random_row_in_the_place_of_an_empty_batch_can_be_replaced_by_two_clip_norms():
    """Why the page says to leave out `rand_on_empty`: the row counts as an example, and a newcomer takes its place."""
    collate = wrap_collate_with_empty(collate_fn=default_collate, rand_on_empty=True)
    one = batch(b=1)[0][0].float(), F.one_hot(torch.zeros(4).long(), CLASSES)
    collate([one])
    torch.manual_seed(0)
    images, targets = (t.double() for t in collate([]))
    assert images.shape == (1, 4, 1, 8, 8)
    targets = F.one_hot(torch.ones(1, 4).long(), CLASSES).double()  # a row that it may draw
    sums = [torch.cat([g.flatten() for g in stepped(network("conv"), x, y, 0.01)[0]]) for x, y in
            ((images, targets), (one[0][None].double(), one[1][None].double()))]  # fmt: skip
    assert float((sums[0] - sums[1]).norm()) > 1.2 * 0.01


class MeanOverViews(nn.CrossEntropyLoss):
    """What ghost clipping asks for: one loss an example."""

    def forward(self, outputs, targets):
        each = F.cross_entropy(outputs.mT, targets.mT, reduction="none").mean(1)
        return each if self.reduction == "none" else each.mean()


def test_ghost_clipping_is_refused_by_name_and_works_without_us_on_a_head():
    torch.manual_seed(0)
    head, images, targets = nn.Linear(6, CLASSES).double(), torch.randn(5, 4, 6).double(), batch()[1]
    data = DataLoader(TensorDataset(images, targets), batch_size=5)
    made = dict(optimizer=torch.optim.SGD(head.parameters(), lr=1.0), data_loader=data, noise_multiplier=0.0,
                max_grad_norm=0.4, poisson_sampling=False, grad_sample_mode="ghost")  # fmt: skip
    ghost, optimizer, criterion, _ = PrivacyEngine().make_private(module=head, criterion=MeanOverViews(), **made)
    with pytest.raises(ValueError, match=r"optimizer='DPOptimizerFastGradientClipping': is none of .*ghost clipping"):
        peer.average_views(ghost, optimizer, 4)
    row = torch.full((1, 4), 0.25, dtype=torch.float64)
    w, b = head.weight.detach().clone(), head.bias.detach().clone()
    ours = clipping.clipped_head_sums(images, targets, w[None], b[None], torch.tensor([0.4]), row)
    assert (ours.norms > 0.4).any() and (ours.norms < 0.4).any()
    criterion(ghost(images), targets).backward()
    optimizer.step()
    torch.testing.assert_close(head.weight.grad * 5, ours.weights[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(head.bias.grad * 5, ours.biases[0], rtol=0, atol=1e-5)


def test_what_does_not_fit_is_refused_in_one_line():
    images, _ = batch()
    model, hooked, plain = in_opacus()
    with pytest.raises(ValueError, match="views=0: must be a whole number of at least 1"):
        peer.average_views(hooked, plain, 0)
    with pytest.raises(ValueError, match="optimizer='SGD': is none of DPOptimizer"):
        peer.average_views(hooked, torch.optim.SGD(model.parameters()), 4)
    with pytest.raises(ValueError, match=r"batch_first=False: .*use batch_first=True"):
        peer.average_views(prepare_module(network("conv"), grad_sample_mode="hooks", batch_first=False), plain, 4)
    for mode in ("hooks", "functorch"):  # the network has no word of it: rows of other examples would be averaged
        bare = network("conv")
        prepare_module(bare, grad_sample_mode=mode, batch_first=False, wrap_model=False)
        with pytest.raises(ValueError, match=r"batch_first=False: .*use batch_first=True"):
            peer.average_views(bare, plain, 4)
    optimizer = peer.average_views(hooked, plain, 4)
    with pytest.raises(ValueError, match="optimizer='ViewAveraging'"):
        peer.average_views(hooked, optimizer, 4)
    for wrong in (images[:, 0], images[:, :3]):  # no views, another number of them
        with pytest.raises(ValueError, match=r"input=.*: in training must be one tensor \[b, K=4, \.\.\.\]"):
            hooked(wrong)
    assert hooked.eval()(images[:, 0]).shape == (5, CLASSES)  # evaluation is as it was
    for p in model.parameters():
        p.grad_sample = torch.zeros(6, *p.shape).double()
    with pytest.raises(ValueError, match="grad_sample=6: rows of gradients are not those of whole examples with K = 4"):
        optimizer.step()


def test_a_gradient_that_is_not_a_number_counts_as_zero_where_opacus_is_voided():
    images, targets = batch()
    want, _ = oracle(network("conv"), images[1:], targets[1:], 0.05)
    images[0, 1] = torch.nan
    got, _ = stepped(network("conv"), images, targets, 0.05)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)
    plain, _ = stepped(network("conv"), images, targets, 0.05, average=False)
    assert any(g.isnan().any() for g in plain)


# Privacy


def test_one_example_moves_the_sum_by_at_most_the_clip_norm():
    found = audit.sensitivity(opacus_step(), shape=SHAPE, num_classes=CLASSES, trials=1, size=4)
    assert found.holds and found.largest("add") > 0.999  # the bound is reached, so the worlds hurt


def test_k_rows_an_example_are_not_private_at_the_stated_epsilon():
    """The negative control, and the trap of Opacus' issues: K copies in the batch, Opacus as it is."""
    repeated = opacus_step(average=False)
    found = audit.sensitivity(repeated, shape=SHAPE, num_classes=CLASSES, trials=1, size=4)
    worst = max(moved for (world, _), moved in found.movements.items() if world != "not a number")
    assert not found.holds and worst > 0.9 * RECIPE.views
    records, new = next(w[1:] for w in audit.worlds(SHAPE, CLASSES, 4, seed=0) if w[0] == "opponents")
    about = dict(records=records, canary=new.take([0]), noise_multiplier=1.0, releases=600)
    private = audit.step_canary(opacus_step(), release=opacus_step(noise=1.0, copies=40), **about)
    copies = audit.step_canary(repeated, release=opacus_step(average=False, noise=1.0, copies=40), **about)
    assert not private.flagged and private.gdp > 0.5  # the attack sees the canary, and no more than it may
    assert copies.flagged and copies.gdp > 2 * copies.claimed


def test_the_noise_is_sigma_times_the_clip_norm():
    records, _ = next(w[1:] for w in audit.worlds(SHAPE, CLASSES, 4, seed=0))
    releases = opacus_step(noise=1.5, copies=60)(records, 3, 0)
    ratio, low, high = audit.noise_level(releases, 1.5)
    assert low < ratio < high
    assert not low < 1.5 * ratio < high and not low < ratio / 1.5 < high


def test_opacus_rounds_the_rate_and_the_divisor_and_the_switch_does_not():
    model, engine = nn.Linear(1, 1), PrivacyEngine(accountant="rdp")
    data = TensorDataset(torch.zeros(50_000, 1, 1), torch.zeros(50_000, 1))
    hooked, optimizer, loader = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=DataLoader(data, batch_size=4096),
        noise_multiplier=1.0, max_grad_norm=1.0,
    )  # fmt: skip
    assert (len(loader), loader.sample_rate, optimizer.expected_batch_size) == (13, 1 / 13, 3846)
    optimizer = peer.average_views(hooked, optimizer, 1)
    peer.exact_sampling(engine, optimizer, loader, batch_size=4096, noise_multiplier=1.25)
    assert optimizer.noise_multiplier == 1.25  # not what was found for the smaller rate
    assert optimizer.expected_batch_size == 4096 and loader.sample_rate == 4096 / 50_000
    torch.manual_seed(0)
    sizes = [len(ids) for ids in loader.batch_sampler]
    assert len(sizes) == 13 and abs(np.mean(sizes) - 4096) < 5 * (4096 * 0.92 / 13) ** 0.5
    assert abs(np.mean(sizes) - 3846) > 5 * (3846 * 0.92 / 13) ** 0.5
    x, y = next(iter(loader))
    hooked(x).sub(y).square().mean().backward()
    optimizer.step()
    assert engine.accountant.history == [(1.25, 4096 / 50_000, 1)]
    with pytest.raises(ValueError, match=r"noise_multiplier=0\.0: must be a positive finite number"):
        peer.exact_sampling(engine, optimizer, loader, batch_size=5, noise_multiplier=0.0)
    assert loader.sample_rate == 4096 / 50_000, "nothing was changed"
    with pytest.raises(ValueError, match="engine=1: has made steps at another rate already"):
        peer.exact_sampling(engine, optimizer, loader, batch_size=4096, noise_multiplier=1.0)
    with pytest.raises(ValueError, match="batch_size=60000: must be a whole number from 1 to n = 50000"):
        peer.exact_sampling(engine, optimizer, loader, batch_size=60_000, noise_multiplier=1.0)
    with pytest.raises(ValueError, match="loader='DataLoader': does no Poisson sampling"):
        peer.exact_sampling(
            PrivacyEngine(), optimizer, DataLoader(data, batch_size=5), batch_size=4096, noise_multiplier=1.0
        )


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_epsilon_is_that_of_core(accountant):
    engine, about = PrivacyEngine(accountant=accountant), dict(noise_multiplier=1.1, sample_rate=4096 / 50_000)
    for _ in range(120):
        engine.accountant.step(**about)
    ours = accounting.epsilon_spent(**about, delta=1e-5, steps=120, accountant=accountant)
    assert engine.get_epsilon(1e-5) == pytest.approx(ours, abs=1e-6) and 1 < ours < 8


# Views


def view_set(n=12, **options):
    images = image_set(n)
    options = dict(num_classes=CLASSES, seed=5) | options
    return images, peer.ViewSet(TensorDataset(images.images, images.labels), RECIPE, **options)


def test_items_are_the_views_of_core_whatever_the_workers():
    images, data = view_set()
    data.set_epoch(2)
    ids = sources.content_ids(images.images)
    want = views.make_views(images.images, images.labels, ids, RECIPE, num_classes=CLASSES, seed=5, step=2)
    for workers in (0, 2):
        loader = DataLoader(data, batch_size=5, num_workers=workers)
        got = [torch.cat(parts) for parts in zip(*loader, strict=True)]
        assert torch.equal(got[0], want.images) and torch.equal(got[1], want.targets)
    assert torch.equal(data[3][0], want.images[3]) and torch.equal(data[-1][0], want.images[11])


def test_when_views_are_drawn_again():
    _, data = view_set()
    loader = DataLoader(data, batch_size=12, num_workers=1, persistent_workers=True)
    passes = []
    for epoch in (0, 0, 1):
        data.set_epoch(epoch)  # reaches a worker that lives on
        passes.append(next(iter(loader))[0])
    assert torch.equal(passes[0], passes[1]) and not torch.equal(passes[1], passes[2])
    images, fixed = view_set(redraw=False)
    first = fixed[0][0]
    fixed.set_epoch(1)
    assert torch.equal(fixed[0][0], first)
    pixels = models.Encoder(lambda x: x.flatten(1), SHAPE[1], images.images[0].numel(), (SHAPE[0],), "pixels")
    about = dict(num_classes=CLASSES, seed=5, redraw=False)
    source = sources.FreshViews(pixels, images.images, images.labels, [RECIPE], **about)
    assert torch.equal(first, source.made(torch.tensor([0]), 0).images[0]), "those of core.sources and of stored views"
    fresh = view_set(seed=None)[1]
    assert not torch.equal(fresh[0][0], fresh[0][0])
    once = [view_set(seed=None, redraw=False)[1] for _ in range(2)]
    assert torch.equal(once[0][0][0], once[0][0][0]) and not torch.equal(once[0][0][0], once[1][0][0])


def test_public_images_stand_among_the_views(public):
    recipe, images = views.Recipe(k_base=1, k_diff=2, k_self=1), image_set(4)
    pairs = TensorDataset(images.images, images.labels)
    with pytest.raises(ValueError, match="public=None: k_diff > 0 needs synthetic images"):
        peer.ViewSet(pairs, recipe, num_classes=CLASSES)
    data = peer.ViewSet(pairs, recipe, num_classes=CLASSES, public=public, seed=0)
    shown = public.images.float() / 255
    assert all((shown == view).flatten(1).all(1).any() for view in data[1][0][1:3])
    assert data[1][0].shape == (4, 1, 4, 4) and torch.allclose(data[1][1].sum(1), torch.ones(4))


def test_data_that_do_not_fit_are_refused():
    labels = torch.tensor([0, 3])
    with pytest.raises(ValueError, match=r"dataset\[0\]\[0\]='str': must be a tensor \[C, H, W\]"):
        peer.ViewSet([("image", 0)], RECIPE, num_classes=CLASSES)
    with pytest.raises(ValueError, match="dataset=0: must hold at least one example"):
        peer.ViewSet([], RECIPE, num_classes=CLASSES)
    with pytest.raises(ValueError, match=r"seed=1\.5: must be a whole number of at least 0"):
        view_set(seed=1.5)
    data = peer.ViewSet(TensorDataset(torch.zeros(2, 1, 4, 4), labels), RECIPE, num_classes=CLASSES)
    with pytest.raises(ValueError, match=r"label=3: must lie in 0\.\.2"):
        data[1]


def test_a_head_on_features_that_were_drawn_once_takes_the_same_lines(projection):
    images = image_set(9)
    source = sources.FreshViews(
        projection, images.images, images.labels, [RECIPE], num_classes=CLASSES, seed=5, redraw=False
    )
    features, targets = source.batch(torch.arange(9), 0)
    torch.manual_seed(0)
    head = nn.Linear(projection.dim, CLASSES)
    w, b = head.weight.detach().clone(), head.bias.detach().clone()
    norms = torch.tensor([4.0])
    ours = clipping.clipped_head_sums(features, targets, w[None], b[None], norms, torch.full((1, 6), 1 / 6))
    assert (ours.norms > 4.0).any() and (ours.norms < 4.0).any()
    got, _ = stepped(head, features, targets, 4.0)
    torch.testing.assert_close(got[0], ours.weights[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1], ours.biases[0], rtol=1e-4, atol=1e-5)


# Whole scripts


def gloo(rank, folder, images, targets, clip_norm):
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model = network("conv", seed=rank)  # rank 1 must take the weights of rank 0
    engine = PrivacyEngine(accountant="rdp")
    own = TensorDataset(images[rank::2], targets[rank::2])
    hooked, optimizer, _ = engine.make_private(
        module=DifferentiallyPrivateDistributedDataParallel(model), optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=DataLoader(own, batch_size=3), noise_multiplier=0.0, max_grad_norm=clip_norm, poisson_sampling=False,
    )  # fmt: skip
    optimizer = peer.average_views(hooked, optimizer, 4)
    optimizer.expected_batch_size = 3  # of a process; a loader of one process' own would say 1.5
    F.cross_entropy(hooked(own.tensors[0]), own.tensors[1].flatten(0, 1)).backward()
    optimizer.step()
    grads = [p.grad.clone() for p in model.parameters()]
    optimizer.zero_grad()
    optimizer.noise_multiplier = 1.0  # noise comes from the first process alone; the weights stay the same
    F.cross_entropy(hooked(own.tensors[0]), own.tensors[1].flatten(0, 1)).backward()
    optimizer.step()
    torch.save((type(optimizer).__name__, grads, [p.detach() for p in model.parameters()]), f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


def test_two_processes_take_one_step_together(tmp_path):
    images, targets = batch(b=6)
    clip_norm = clip_that_bites(network("conv"), images, targets)
    want, _ = oracle(network("conv"), images, targets, clip_norm)
    torch.multiprocessing.spawn(gloo, (str(tmp_path), images, targets, clip_norm), nprocs=2)
    found = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    assert {f[0] for f in found} == {"ViewAveragingDistributedDPOptimizer"}
    for rank in range(2):
        for g, w in zip(found[rank][1], want, strict=True):
            torch.testing.assert_close(g * 6, w, rtol=1e-9, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(found[0][2], found[1][2], strict=True))
    assert max((p - q).abs().max() for p, q in zip(found[0][2], network("conv").parameters(), strict=True)) > 0.01


def script(*words, check=True):
    about = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, HERE / "opacus_script.py", *map(str, words)], capture_output=True, text=True,
                          timeout=600, env=about, check=False)  # fmt: skip
    assert not check or done.returncode == 0, done.stderr
    return json.loads(done.stdout) if check else done.returncode


def test_a_script_that_was_killed_goes_on_with_its_accountant(tmp_path):
    whole = script(tmp_path / "whole", "mix-self", "--epochs", 2)
    assert script(tmp_path / "killed", "mix-self", "--epochs", 2, "--die-at", 50, check=False) == -9
    rest = script(tmp_path / "killed", "mix-self", "--epochs", 2)
    assert (whole["first"], rest["first"]) == (0, 1)
    assert rest["weights"] == whole["weights"] and rest["history"] == whole["history"]
    ((sigma, q, steps),) = rest["history"]
    assert q == 256 / rest["n"] and steps == 2 * 6
    ours = accounting.epsilon_spent(noise_multiplier=sigma, sample_rate=q, steps=steps, delta=1e-5)
    assert rest["epsilon"] == pytest.approx(ours, abs=1e-6)


def test_the_script_trains_with_self_aug_too(tmp_path):
    done = opacus_script.train(tmp_path / "self-aug", "self-aug", epochs=4)
    assert 0.6 < done["accuracy"] < 0.97 and done["history"][0][2] == 4 * 6


def test_the_tests_that_opacus_ships_hold_with_views(tmp_path):
    """Its tests of accumulation, loaders, sampling, noise and pieces of batches, with three views an example: 63 of 68, as
    for Opacus alone, which skips five."""
    tests = ("gradient_accumulation", "dpdataloader", "poisson", "randomness", "batch_memory_manager")
    words = ["-q", "-p", "peers.opacus_suite", "-p", "no:cacheprovider", "-W", "ignore", "--pyargs"]
    path = os.pathsep.join(map(str, (HERE.parents[1], HERE.parent)))
    few = {"DPMIX_VIEWS": "3", "DPMIX_EXAMPLES": "3"}
    about = os.environ | few | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-m", "pytest", *words, *(f"opacus.tests.{t}_test" for t in tests)], cwd=tmp_path,
                          capture_output=True, text=True, timeout=600, env=about, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"view averaging: \d\d of \['ViewAveraging'\]", done.stdout)
    assert "63 passed, 5 skipped" in done.stdout


@pytest.mark.parametrize("redraw", [True, False])
def test_an_example_less_leaves_the_views_of_the_others(redraw):
    """Under a seed that somebody knows, views that are keyed by places would all change with it."""
    draw = torch.Generator().manual_seed(0)
    images, labels = torch.randint(256, (12, 1, 8, 8), generator=draw, dtype=torch.uint8), torch.arange(12) % 3
    recipe, about = views.Recipe(k_base=2, k_self=2), dict(num_classes=3, seed=0, redraw=redraw)
    all_, fewer = (peer.ViewSet(TensorDataset(images[n:], labels[n:]), recipe, **about) for n in (0, 1))
    assert all(torch.equal(a, b) for i in range(11) for a, b in zip(all_[i + 1], fewer[i], strict=True))
    assert not torch.equal(all_[1][0], all_[2][0]), "they are not all alike"
