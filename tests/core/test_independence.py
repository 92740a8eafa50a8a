"""What lets one example's output depend on another's is refused, however little and wherever; what does not is let through."""

import dataclasses

import pytest
import timm
import torch
from conftest import CLASSES
from torch import nn

from dpmix import models
from dpmix.core import heads, independence, network, sources, views
from dpmix.core.clipping import clipped_gradient_sum
from dpmix.core.independence import check_layers, check_network, check_no_mixing
from dpmix.models.wide_resnet import wide_resnet

SHAPE = (2, 8, 8)


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.SyncBatchNorm, nn.LazyBatchNorm2d])
def test_batch_norm_is_refused_by_name(kind):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sequential(kind(*[] if "Lazy" in kind.__name__ else [4])))
    with pytest.raises(ValueError, match=rf"'1\.0' is {kind.__name__}.*replace it with nn\.GroupNorm"):
        check_layers(model)


def test_running_statistics_are_refused_and_instance_norm_is_not():
    with pytest.raises(ValueError, match="InstanceNorm2d"):
        check_layers(nn.Sequential(nn.InstanceNorm2d(4, track_running_stats=True)))
    check_layers(nn.Sequential(nn.InstanceNorm2d(4), nn.GroupNorm(2, 4)))


class Mix(nn.Module):
    def __init__(self, how, weight=None):
        super().__init__()
        self.how, self.weight = how, weight

    def forward(self, x):
        return self.how(x) if self.weight is None else x + self.weight * self.how(x)


def body(mix: nn.Module, head: float = 1.0) -> nn.Module:
    torch.random.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), mix, nn.Linear(144, 3))
    with torch.no_grad():
        model[4].weight.mul_(head)
    return model


def before(x):
    return torch.cat([x[:1], x[1:] + 1e-3 * x[:-1]])


def partner(x):
    return x + 1e-3 * x.roll(len(x) // 2, 0)


MIXTURES = {
    "the mean": lambda x: x - x.mean(0),
    "one per mille of the sum": lambda x: x + 1e-3 * x.sum(0),
    "a millionth of the sum": lambda x: x + 1e-6 * x.sum(0),
    "the largest": lambda x: x / x.abs().amax(),
    "the image in front alone": before,
    "one image half a batch away": partner,
    "how many there are": lambda x: x * (1 + 1e-6 * len(x)),
    "the place": lambda x: x + 1e-6 * torch.arange(len(x))[:, None],
}


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("head", [1.0, 0.0])
def test_every_mixture_is_refused_with_its_layer_also_under_a_head_of_zeros(name, head):
    with pytest.raises(ValueError, match=r"model: the output .* other images are left out.*, so clipping"):
        check_no_mixing(body(Mix(MIXTURES[name]), head), SHAPE)
    if name == "the mean":
        with pytest.raises(ValueError, match=r"by layer '3' \(Mix\)"):
            check_no_mixing(body(Mix(MIXTURES[name])), SHAPE)


def test_a_gate_that_starts_at_zero_hides_nothing():
    gate = Mix(lambda x: x.mean(0), nn.Parameter(torch.zeros(())))
    with pytest.raises(ValueError, match="left out of the batch"):
        check_no_mixing(body(gate), SHAPE)
    gate.weight.requires_grad_(False)  # never trained: it stays zero
    check_no_mixing(body(gate), SHAPE)


class Insists(nn.Module):
    """A model that computes in a type of its own, whatever its weights are turned into."""

    def __init__(self, how, dtype):
        super().__init__()
        self.how, self.dtype = how, dtype
        self.weight = nn.Parameter(torch.eye(128, 3))

    def forward(self, x):
        if self.weight.dtype == torch.float64:
            raise RuntimeError("expected another dtype")
        return (self.how(x.flatten(1).to(self.dtype)) @ self.weight.to(self.dtype)).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_cannot_be_turned_into_float64_is_asked_as_it_is(dtype):
    check_no_mixing(Insists(lambda x: x, dtype), SHAPE)
    for hidden in (False, True):
        mixes = Insists(lambda x: x + 0.02 * x.sum(0), dtype)
        if hidden:
            nn.init.zeros_(mixes.weight)
        with pytest.raises(ValueError, match="left out of the batch"):
            check_no_mixing(mixes, SHAPE)


def test_in_float32_the_tolerance_of_old_would_let_a_mixture_pass():
    """Negative control: one per cent of the output, three images, was what was allowed."""
    model, x = body(Mix(MIXTURES["one per mille of the sum"])), torch.rand(3, *SHAPE)
    with torch.no_grad():
        together, alone = model(x)[:1], model(x[:1])
    assert float((together - alone).abs().max()) < 1e-2 * float(alone.abs().max())


HONEST = {
    "wide resnet": lambda: (wide_resnet(10, 1, 3, channels=2), SHAPE),
    "group norm": lambda: (
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(144, 3)),
        SHAPE,
    ),
    "instance norm": lambda: (nn.Sequential(nn.InstanceNorm2d(2), nn.Flatten(), nn.Linear(128, 3)), SHAPE),
    "vit": lambda: (timm.create_model("test_vit", num_classes=3), (3, 160, 160)),
    "convnext": lambda: (timm.create_model("test_convnext", num_classes=3), (3, 64, 64)),
    "bfloat16": lambda: (wide_resnet(10, 1, 3, channels=2).bfloat16(), SHAPE),
    "bfloat16 vit": lambda: (timm.create_model("test_vit", num_classes=3).bfloat16(), (3, 160, 160)),
    "float64": lambda: (wide_resnet(10, 1, 3, channels=2).double(), SHAPE),
    "no weights": lambda: (nn.Flatten(), SHAPE),
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_models_pass_and_are_left_as_they_were(name):
    model, shape = HONEST[name]()
    weights, draws = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    check_no_mixing(model, shape)
    assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())
    assert torch.equal(draws, torch.get_rng_state())


def test_a_large_model_is_asked_with_fewer_images_and_without_a_copy_in_float64(monkeypatch):
    monkeypatch.setattr(independence, "_LARGE", 4)
    monkeypatch.setattr(independence, "HUGE", 20)
    check_no_mixing(wide_resnet(10, 1, 3, channels=2), SHAPE)
    with pytest.raises(ValueError, match="left out of the batch"):
        check_no_mixing(body(Mix(MIXTURES["one per mille of the sum"])), SHAPE)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_an_output_that_is_not_finite_is_refused(broken):
    model = body(nn.Identity())
    with torch.no_grad():
        model[0].weight[0] = broken
    with pytest.raises(ValueError, match="model: answers public noise with numbers that are not finite"):
        check_no_mixing(model, SHAPE)


def test_the_clipped_sum_alone_looks_at_the_model_once():
    model, images, targets = body(nn.Identity()), torch.rand(2, 2, *SHAPE), torch.rand(2, 2, 3).softmax(-1)
    calls = []
    model[3].register_forward_hook(lambda *_: calls.append(1))
    looks = []
    for _ in range(3):
        calls.clear()
        clipped_gradient_sum(model, images, targets, 1.0)
        looks.append(len(calls))
    assert looks == [looks[0], 2, 2] and looks[0] > 10, "once, then two examples a time"
    model[3] = Mix(MIXTURES["a millionth of the sum"])
    with pytest.raises(ValueError, match="left out of the batch"):
        clipped_gradient_sum(model, images, targets, 1.0)


def test_a_setting_that_changes_is_looked_at_again():
    class Sometimes(nn.Module):
        share = 0.0

        def forward(self, x):
            return x + self.share * x.sum(0)

    model = body(Sometimes())
    check_network(model, SHAPE)
    model[3].share = 1e-3
    with pytest.raises(ValueError, match="left out of the batch"):
        check_network(model, SHAPE)


def test_training_refuses_it_before_any_work(monkeypatch):
    monkeypatch.setattr(views, "make_views", lambda *a, **k: pytest.fail("work began"))
    with pytest.raises(ValueError, match="left out of the batch"):
        network.train(
            body(Mix(MIXTURES["one per mille of the sum"])), torch.zeros(4, *SHAPE), torch.arange(4) % 3,
            recipe=views.Recipe(k_base=1), num_classes=3, clip_norm=1.0, noise_multiplier=1.0, learning_rate=1.0,
            expected_batch=2, sample_rate=0.5, steps=1, seed=0, progress=False,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (nn.BatchNorm2d(1, affine=False, track_running_stats=False), r"encoder .*left out of the batch.*BatchNorm2d"),
        (Mix(MIXTURES["the mean"]), r"encoder .*left out of the batch.*Mix"),
        (Mix(lambda x: x * torch.nan), r"encoder.*not finite"),
    ],
)
def test_encoders_are_looked_at_when_they_are_made(layer, said):
    with pytest.raises(ValueError, match=said):
        models.encoder(nn.Sequential(layer, nn.Flatten()), image_size=8, channels=1)
    models.encoder(
        nn.Sequential(nn.BatchNorm2d(1), nn.Flatten()), image_size=8, channels=1
    )  # public, frozen statistics


def flat(x):
    return x.flatten(1).float()


@pytest.mark.parametrize(("features", "said"), [
    (lambda x: flat(x) - flat(x).mean(0), "left out of the batch"),
    (lambda x: flat(x) + 2e-3 * flat(x).sum(0), "left out of the batch"),
    (lambda x: flat(x) + 1e-3 * flat(x).roll(1, 0), "left out of the batch"),
    (lambda x: nn.functional.dropout(flat(x), 0.1), "left out of the batch"), (lambda x: flat(x) / 0, "not finite"),
])  # fmt: skip
def test_an_encoder_made_by_hand_is_looked_at_where_training_begins(features, said, private):
    """Past `models.encoder`: of one's own class, or a named one with other features. Negative control: the plain function."""
    named = models.encoder("tiny-convnext")
    about = dict(num_classes=CLASSES, expected_batch=8, steps=1, seed=1, progress=False)
    heads_of = [heads.Head(recipe=views.Recipe(k_base=1, transform="none"), learning_rate=1.0, noise_multiplier=1.0)]
    dim = private.images[0].numel()
    for made in (
        models.Encoder(features, 4, dim, (1,), "mine"),
        dataclasses.replace(named, features=features, dim=dim, name="mine"),
    ):
        with pytest.raises(ValueError, match=f"encoder 'mine': .*{said}"):
            heads.train_heads(made, private.images, private.labels, heads_of, **about)
        heads.train_heads(dataclasses.replace(made, features=flat), private.images, private.labels, heads_of, **about)


def test_a_named_encoder_is_not_asked_twice(private, monkeypatch):
    asked = []
    monkeypatch.setattr(sources, "check_features", lambda *about: asked.append(about))
    for engine in ("torch", "openvino"):
        made = models.encoder("tiny-convnext").to("cpu", torch.float32, engine=engine)
        sources.FreshViews(made, private.images, private.labels, [views.Recipe(k_base=1)], num_classes=CLASSES, seed=1)
    assert not asked
    mine = dataclasses.replace(made, features=lambda x: flat(x))
    sources.FreshViews(mine, private.images, private.labels, [views.Recipe(k_base=1)], num_classes=CLASSES, seed=1)
    assert len(asked) == 1


def root_mean_square(x):
    """Of the batch, after the constants of many an encoder: the same for an image and its negative."""
    x = (x.flatten(1) - 0.5) / 0.5
    return x / x.square().mean().sqrt()


def test_a_statistic_that_mirrored_neighbours_share_is_seen():
    with pytest.raises(ValueError, match="the output for an image changes"):
        independence.check_features(root_mean_square, SHAPE, torch.device("cpu"), "encoder")
    model = Mix(lambda x: root_mean_square(x.float()))  # in float32 whatever it is given
    with pytest.raises(ValueError, match="the output for an image changes"):
        check_no_mixing(nn.Sequential(model, nn.Linear(128, 3)), SHAPE)


class Centre(nn.Module):
    """Centres by a mean that it learns in training alone, kept where a state_dict does not look."""

    def __init__(self, kept: str):
        super().__init__()
        self.inner = nn.Linear(128, 3)
        if kept == "buffer":
            self.register_buffer("mean", torch.zeros(1), persistent=False)
        else:
            self.mean = torch.zeros(1)

    def forward(self, x):
        x = x.flatten(1)
        out = self.inner(x - self.mean)
        if self.training and torch.is_grad_enabled():
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        return out


@pytest.mark.parametrize("kept", ["buffer", "attribute"])
def test_what_learns_in_training_alone_is_seen(kept):
    with pytest.raises(ValueError, match="the output for an image changes"):
        check_no_mixing(Centre(kept).train(), SHAPE)
    check_no_mixing(Centre(kept).eval(), SHAPE)


@pytest.mark.parametrize("around", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("when", [False, True])
def test_what_mixes_with_gradients_alone_or_without_them_alone_is_seen(when, around):
    """Encoders run without, networks train with; and whoever asks may stand in either."""
    model = nn.Sequential(
        Mix(lambda x: x - x.mean(0) if torch.is_grad_enabled() == when else x), nn.Flatten(), nn.Linear(128, 3)
    )
    with around(), pytest.raises(ValueError, match="the output for an image changes"):
        check_network(model, SHAPE)
