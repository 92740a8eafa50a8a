"""No switch of PyTorch's loosens a clip, on the CPU or on a GPU where there is one; without the guard they do."""

import itertools
import threading
from collections import namedtuple

import pytest
import torch
from flags import DEVICE, FLAGS, KEYS, ROUNDS, flag, state, unguarded
from torch import nn

from dpmix.core import heads, precision, views
from dpmix.core.clipping import clipped_gradient_sum, clipped_head_sums

BOUND = 1 + 1e-5
Lookup = namedtuple("Lookup", "features dim channels name")
Public = namedtuple("Public", "images labels")
NEAR = [10 ** (-1 - i / 8) for i in range(20)]


def views_that_nearly_cancel(near: float, k: int = 16, dim: int = 768, classes: int = 100):
    """One example, two opposed labels, features that differ by little: what few bits of a product cannot hold. C = near."""
    g = torch.Generator().manual_seed(0)
    features = torch.randn(1, dim, generator=g) + near * torch.randn(k, dim, generator=g)
    targets = torch.eye(classes)[torch.tensor([0, 1]).repeat_interleave(k // 2)]
    biases = torch.full((1, classes), -20.0)
    biases[:, :2] = 0
    weights, clip, averaged = torch.zeros(1, classes, dim), torch.full((1,), near), torch.full((1, k), 1 / k)
    return [t.to(DEVICE) for t in (features[None], targets[None], weights, biases, clip, averaged)]


def largest_of_heads() -> float:
    """The largest contribution, in clip norms."""
    worst = 0.0
    for near in NEAR:
        sums = clipped_head_sums(*views_that_nearly_cancel(near))
        squares = sums.weights.double().square().sum() + sums.biases.double().square().sum()
        worst = max(worst, float(squares) ** 0.5 / near)
    return worst


def largest_of_networks(engine: str, **options) -> float:
    torch.random.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3)).to(DEVICE)
    worst = 0.0
    for trial in range(6):
        g = torch.Generator().manual_seed(trial)
        images, targets = torch.rand(1, 4, 2, 8, 8, generator=g), torch.rand(1, 4, 3, generator=g).softmax(-1)
        done = clipped_gradient_sum(model, images.to(DEVICE), targets.to(DEVICE), 1e-3, engine, **options)
        assert float(done.norms[0]) > 1e-3, "must be clipped to mean anything"
        worst = max(worst, sum(float(g.double().square().sum()) for g in done.grads.values()) ** 0.5 / 1e-3)
    return worst


@pytest.mark.parametrize("name", FLAGS)
def test_no_flag_loosens_the_clip_of_heads(name):
    with FLAGS[name]():
        assert 0.9 < largest_of_heads() <= BOUND


def moved_by_training(near: float) -> float:
    """How far one step of `train_heads` without noise goes for one example, in clip norms."""
    features, targets, _, biases, clip, _ = views_that_nearly_cancel(near)
    k, dim, classes = features.shape[1], features.shape[2], targets.shape[2]

    def look_up(images):
        return features[0, torch.arange(len(images)) % k]

    look_up.examined = True  # it goes by places, which an encoder may not
    encoder = Lookup(look_up, dim, (1,), "lookup")
    public = Public(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.ones(4, dtype=torch.int64))
    head = heads.Head(
        recipe=views.Recipe(k_base=k // 2, k_diff=k // 2, transform="none"), learning_rate=1.0, noise_multiplier=0.0,
        clip_norm=float(clip),
    )  # fmt: skip
    bank = heads.train_heads(
        encoder, torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), [head],
        num_classes=classes, expected_batch=1, steps=1, seed=1, sample_rate=1.0, public=public, device=DEVICE,
        initial=(torch.zeros(classes, dim), biases[0]), progress=False,
    )  # fmt: skip
    moved = bank.weights.double().square().sum() + (bank.biases - biases.cpu()).double().square().sum()
    return float(moved) ** 0.5 / float(clip)


@pytest.mark.parametrize("name", ["none", "matmul precision medium", *ROUNDS])
def test_no_flag_loosens_the_clip_of_a_training_of_heads(name):
    with FLAGS[name]():
        assert 0 < max(moved_by_training(near) for near in NEAR) <= BOUND


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("engine", ["loop", "grouped", "vmap"])
def test_no_flag_loosens_the_clip_of_networks(engine, name):
    with FLAGS[name]():
        assert 0.999 < largest_of_networks(engine) <= BOUND
        assert 0.999 < largest_of_networks(engine, autocast=torch.bfloat16) <= BOUND


@pytest.mark.parametrize("name", ROUNDS)
def test_unguarded_products_break_the_bound(name, monkeypatch):
    unguarded(monkeypatch)
    with FLAGS[name]():
        assert largest_of_heads() > BOUND
        assert max(moved_by_training(near) for near in NEAR) > BOUND
        assert largest_of_networks("grouped") > BOUND


def test_a_flag_that_this_machine_obeys_breaks_the_bound_unguarded(monkeypatch):
    """On a CPU with bfloat16 (2 C) or a GPU (TF32: 1.005 C); elsewhere the flag does nothing, as the first lines find out."""
    a = torch.full((64, 64), 1 + 2.0**-12, device=DEVICE)
    exact = float((a @ a)[0, 0])
    with FLAGS["matmul precision medium"]():
        obeyed = float((a @ a)[0, 0]) != exact
        unguarded(monkeypatch)
        assert (largest_of_heads() > 1.001) == obeyed


SWITCHES = {
    name: lambda key=key, value=value: torch._C._set_fp32_precision_setter(*key, value)
    for key in KEYS[:1] + [k for k in KEYS if k[1] == "matmul"]
    for value in ("none", "ieee", "tf32" if key[0] == "cuda" else "bf16")
    for name in [f"{key} {value}"]
} | {v: lambda v=v: torch.set_float32_matmul_precision(v) for v in ("medium", "high", "highest")}


def test_what_was_set_is_put_back_whatever_was_set_before():
    for names in itertools.product(SWITCHES, repeat=2):
        with flag(lambda: None):
            for name in names:
                SWITCHES[name]()
            before = state()
            with precision.full(DEVICE):
                inside = state()
            assert state() == before, names
            assert {inside[key] for key in KEYS if key[1] == "matmul"} <= {"none", "ieee"}, names


def test_two_threads_inside_at_once_do_not_put_back_too_early():
    both, first_left = threading.Barrier(2), threading.Event()
    seen = []

    def first():
        with precision.full(DEVICE):
            both.wait()
        first_left.set()

    def second():
        with precision.full(DEVICE):
            both.wait()
            first_left.wait()
            seen.append(torch.get_float32_matmul_precision())

    with FLAGS["matmul precision medium"]():
        threads = [threading.Thread(target=f) for f in (first, second)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert seen == ["highest"] and torch.get_float32_matmul_precision() == "medium"


def test_products_that_stay_rounded_are_refused():
    with torch.autocast(DEVICE.type, torch.bfloat16), pytest.raises(RuntimeError, match="ONEDNN_DEFAULT_FPMATH_MODE"):
        precision._look_at_products.__wrapped__(DEVICE)


def test_heads_refuse_a_dtype_that_could_not_hold_the_clip():
    given = views_that_nearly_cancel(0.1)
    with pytest.raises(ValueError, match=r"weights\.dtype=torch\.bfloat16: must be float32 or float64"):
        clipped_head_sums(given[0], given[1], given[2].bfloat16(), *given[3:])
