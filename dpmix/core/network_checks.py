"""What `network` refuses before it trains: arguments, and models that would break the guarantee."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpmix.core import accounting, rng, views
from dpmix.core import microbatch as micro
from dpmix.core.checks import clip_norm, positive, require, whole
from dpmix.core.independence import check_layers, check_network


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """All that decides what training a network does to private images, and so what its guarantee is.

    Each example joins a step with probability `sample_rate`; noise of standard deviation noise_multiplier * clip_norm; the
    noisy sum is divided by `expected_batch` (never the realised batch; a step with nobody in it still adds noise and
    counts). SGD at a constant rate, v = momentum v + g, w -= lr v; then w *= 1 - lr weight_decay (decoupled, of noisy
    weights only); EMA of the weights with De et al.'s warm-up, min(ema_decay, (1 + t) / (10 + t)).
    `microbatch` b > 1 is Eq. (2): a fixed keyed partition, Poisson sampling and `expected_batch` count *microbatches*, and
    the noise is scaled for 2 C (`microbatch`); `microbatch_mix`: "none", "add" or "replace". The partition has `places`, a
    public number (by default, as many as there are examples); one that is not among the ids is vacant.
    `identity` tells runs of one seed apart that the arguments do not, such as runs on other data: they must not share noise.
    """

    recipe: views.Recipe
    num_classes: int
    clip_norm: int | float
    noise_multiplier: int | float
    learning_rate: int | float
    expected_batch: int | float
    sample_rate: int | float
    steps: int
    momentum: int | float = 0.0
    weight_decay: int | float = 0.0
    ema_decay: int | float | None = None
    microbatch: int = 1
    microbatch_mix: str = "none"
    places: int | None = None
    identity: str = ""

    def __post_init__(self) -> None:
        for name, least in (("num_classes", 1), ("microbatch", 1), ("steps", 0)):
            whole(name, getattr(self, name), least)
        for name in ("learning_rate", "expected_batch"):
            positive(name, float(getattr(self, name)))
        clip_norm(self.clip_norm)
        for name in ("noise_multiplier", "weight_decay"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        require(0 < self.sample_rate <= 1, "sample_rate", self.sample_rate, "must lie in (0, 1]")
        for name in ("momentum", "ema_decay"):
            value = getattr(self, name)
            require(value is None or 0 <= value < 1, name, value, "must lie in [0, 1)")
        micro.check_mix(self.microbatch, self.microbatch_mix)

    def epsilon_spent(self, delta: float, steps: int) -> float:
        """Epsilon after so many of the steps."""
        noise, q = self.noise_multiplier, self.sample_rate
        return accounting.epsilon_spent(noise_multiplier=noise, delta=delta, sample_rate=q, steps=steps)


def check_arguments(
    model: nn.Module, images: views.Images, labels: Tensor, num_classes: int, physical_batch: int, every: int
) -> None:
    """Refuse data that do not fit, counts that are none, and dropout, before any work."""
    allowed = f"must be as many as the images, {len(images)}, and some"
    require(len(images) == len(labels) > 0, "labels", len(labels), allowed)
    views.transforms.as_float(images[:0])  # refuses what is neither bytes nor floats
    whole("physical_batch", physical_batch, 1)
    whole("checkpoint_every", every, 1)
    low, high = int(labels.min()), int(labels.max())
    require(low >= 0 and high < num_classes, "num_classes", num_classes, f"the labels go from {low} to {high}")
    for name, kept in model.state_dict().items():
        said = "is no tensor, and would be released without noise; remove that layer's get_extra_state"
        require(isinstance(kept, Tensor), "model", name, said)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0:
            kind = type(layer).__name__
            raise ValueError(f"model: layer {name!r} is {kind}(p={layer.p}), whose draws are not keyed; set p=0")


def check_model(model: nn.Module, images: views.Images, num_classes: int) -> None:
    """Run the model on three images of pure noise: it must take them, answer with finite logits and not mix them."""
    like = next((p for p in model.parameters() if p.requires_grad), torch.zeros(()))
    probe = torch.from_numpy(rng.generator(0, "probe").random((3, *images.shape[1:]))).to(like)
    check_layers(model)
    try:
        with torch.no_grad():
            answer = tuple(model(probe).shape)
    except RuntimeError as error:
        shape, why = tuple(images.shape[1:]), str(error).splitlines()[0]
        raise ValueError(f"images: the model does not take images of shape {shape} ({why})") from None
    said = f"the model answers three images with shape {answer}"
    require(answer == (3, num_classes), "num_classes", num_classes, said)
    check_network(model, tuple(images.shape[1:]))


def trained_names(model: nn.Module) -> dict[str, str]:
    """Every name of a trained parameter, with the first of its names: a tied weight has several."""
    first = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(p)] for name, p in every if id(p) in first}


def untrained(model: nn.Module) -> dict[str, Tensor]:
    """All that a model keeps beside its trained parameters: frozen ones and buffers, also those that are not saved."""
    names = trained_names(model)
    kept = model.state_dict() | dict(model.named_buffers(remove_duplicate=False))
    return {name: t.clone() for name, t in kept.items() if name not in names}


def check_untrained(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Refuse a model that has written to a buffer: what it keeps there is neither clipped nor noised."""
    now, saved = untrained(model), model.state_dict()
    for name in sorted(before.keys() | now.keys()):
        a, b = before.get(name), now.get(name)
        if name in saved:
            released = "would be released without noise; use a layer without such a buffer"
            same = a is not None and b is not None and _equal(a, b)
        else:  # may be sized by the batch, and is not released
            released = "carries something of them from step to step; use a layer without such a buffer"
            same = a is None or b is None or a.shape != b.shape or _equal(a, b)
        if not same:
            raise ValueError(f"model: {name!r} changes while private images pass, and {released}")


def _equal(a: Tensor, b: Tensor) -> bool:
    """Also where both are no numbers."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def layout(model: nn.Module) -> str:
    """Names, shapes and dtypes of all tensors, and the values of those that are not trained."""
    digest, trained = hashlib.sha256(), trained_names(model)
    for name, t in model.state_dict().items():
        digest.update(repr((name, tuple(t.shape), str(t.dtype), name in trained)).encode())
        if name not in trained:
            digest.update(t.detach().cpu().double().numpy().tobytes())
    return f"{type(model).__name__} {digest.hexdigest()[:16]}"
