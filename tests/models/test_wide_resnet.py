"""The network of De et al.: its size, its order of layers, its initial weights; and what is refused."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dpmix.models.wide_resnet import (
    Norm,
    StandardisedConv2d,
    initialise,
    standardise,
    standardise_pullback,
    wide_resnet,
)


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_size():
    assert size(wide_resnet(16, 4, 10)) == 2_753_818  # "2.75 M"
    gains = sum(m.out_channels for m in wide_resnet(16, 4, 10).modules() if isinstance(m, StandardisedConv2d))
    assert size(wide_resnet(16, 4, 10, weight_standardisation=False)) == 2_753_818 - gains
    assert size(wide_resnet(40, 4, 100)) > size(wide_resnet(16, 4, 100))


def test_against_a_plain_transcription_of_the_haiku_code():
    """The forward pass of De et al.'s `cifar.py`, written out with functions on NCHW; SAME padding computed apart."""
    model = wide_resnet(16, 1, 7, groups=8, channels=1, seed=3).double()
    with torch.no_grad():
        for p in model.parameters():  # biases and gains that are not 0 and 1
            p.add_(0.1 * torch.from_numpy(np.random.default_rng(p.numel()).standard_normal(p.shape)))

    def conv(layer, x, stride):
        w = layer.weight
        flat = w.reshape(len(w), -1)
        variance = ((flat - flat.mean(1, keepdim=True)) ** 2).mean(1)
        w = (w - flat.mean(1)[:, None, None, None]) * (
            layer.gain / torch.sqrt(torch.clamp(variance * flat.shape[1], min=1e-4))
        )[:, None, None, None]
        kernel, side = w.shape[-1], x.shape[-1]
        total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
        low = total // 2
        return F.conv2d(F.pad(x, (low, total - low) * 2), w, layer.bias, stride)

    def norm(layer, x):
        return F.group_norm(x, 8, layer.weight, layer.bias, 1e-5)

    def forward(x):
        x = conv(model.stem, x, 1)
        blocks = iter(model.blocks)
        for stage in range(3):
            for i in range(2):
                block, skip = next(blocks), x
                stride = 2 if stage and not i else 1
                if i == 0:
                    skip = conv(block.skip.conv, norm(block.skip.norm, torch.relu(skip)), stride)
                for j in range(2):
                    x = conv(block.layers[j].conv, norm(block.layers[j].norm, torch.relu(x)), stride if j == 0 else 1)
                x = x + skip
        x = norm(model.norm, torch.relu(x)).mean((2, 3))
        return x @ model.head.weight.T + model.head.bias

    for side in (8, 9, 12):
        images = torch.rand(2, 1, side, side, dtype=torch.float64)
        torch.testing.assert_close(model(images), forward(images), rtol=1e-9, atol=1e-9)


def test_initial_weights_are_keyed_and_leave_the_global_state_alone():
    before = torch.get_rng_state()
    a, b, other = (wide_resnet(10, 1, 10, channels=1, seed=s) for s in (5, 5, 6))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.stem.weight, other.stem.weight)
    assert not a.stem.bias.any() and (a.stem.gain == 1).all() and (a.norm.weight == 1).all()


@pytest.mark.parametrize(("standardised", "deviation"), [(True, 1.0), (False, 0.8796)])
def test_initial_weights_have_the_deviation_of_haiku(standardised, deviation):
    model = wide_resnet(10, 4, 10, weight_standardisation=standardised)
    weight = model.blocks[2].layers[1].conv.weight
    fan_in = weight[0].numel()
    scaled = weight.detach().double() * fan_in**0.5
    assert abs(float(scaled.std()) - deviation) < 0.01  # 590k draws: 0.01 is some ten standard errors
    assert float(scaled.abs().max()) <= 2 * deviation / 0.8796 + 1e-3  # cut at two standard deviations
    head = model.head.weight.detach().double() * 256**0.5
    assert abs(float(head.std()) - 1.0) < 0.06


def test_pullback_equals_autograd_also_below_the_floor():
    weight = torch.randn(5, 3, 3, 3, dtype=torch.float64)
    weight[0] = 1.0 + 1e-4 * weight[0]  # variance below the floor
    gain = torch.rand(5, dtype=torch.float64) + 0.5
    grads = torch.randn(4, 5, 27, dtype=torch.float64)
    _, pull = torch.func.vjp(standardise, weight, gain)
    got_weight, got_gain = standardise_pullback(weight, gain, grads)
    for i in range(4):
        want_weight, want_gain = pull(grads[i].view(5, 3, 3, 3))
        torch.testing.assert_close(got_weight[i].view_as(weight), want_weight)
        torch.testing.assert_close(got_gain[i], want_gain)


def test_standardised_filters_have_mean_zero_and_norm_gain():
    layer = wide_resnet(10, 1, 10, channels=1).blocks[0].layers[0].conv
    rows = standardise(layer.weight, 3 * layer.gain).flatten(1)
    torch.testing.assert_close(rows.norm(dim=1), torch.full((16,), 3.0))
    assert rows.mean(1).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_norm_keeps_the_precision_of_its_input_under_autocast(dtype):
    layer = Norm(4, 8)
    x = torch.randn(2, 8, 4, 4).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == dtype


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (dict(depth=17), r"depth=17: must be 6 k \+ 4; near are 16 and 22"),
        (dict(depth=4), "depth=4"),
        (dict(width=0), "width=0"),
        (dict(groups=3), "groups=3: must divide 16"),
        (dict(num_classes=0), "num_classes=0"),
        (dict(channels=0), "channels=0"),
    ],
)
def test_bad_arguments(bad, said):
    with pytest.raises(ValueError, match=said):
        wide_resnet(**(dict(depth=16, width=1, num_classes=10) | bad))


def test_initialise_takes_any_network():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    initialise(model, 0)
    assert model[0].weight.any() and not model[0].bias.any() and (model[1].weight == 1).all()
