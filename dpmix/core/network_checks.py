"""What `network` refuses before it trains: arguments, and models that would break the guarantee."""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from dpmix.core import microbatch as micro
from dpmix.core import rng, views
from dpmix.core.checks import positive, require, whole
from dpmix.core.independence import check_layers, check_network


def check_arguments(given: dict[str, Any]) -> None:
    model, images, labels = given["model"], given["images"], given["labels"]
    said = f"must be as many as the images, {len(images)}, and some"
    require(len(images) == len(labels) > 0, "labels", len(labels), said)
    views.transforms.as_float(images[:0])  # refuses what is neither bytes nor floats
    for name in ("physical_batch", "num_classes", "checkpoint_every", "microbatch"):
        whole(name, given[name], 1)
    for name in ("steps", "evaluate_every"):
        whole(name, given[name])
    for name in ("clip_norm", "learning_rate", "expected_batch"):
        positive(name, float(given[name]))
    for name in ("noise_multiplier", "weight_decay"):
        require(given[name] >= 0, name, given[name], "must not be negative")
    require(0 < given["sample_rate"] <= 1, "sample_rate", given["sample_rate"], "must lie in (0, 1]")
    for name in ("momentum", "ema_decay"):
        require(given[name] is None or 0 <= given[name] < 1, name, given[name], "must lie in [0, 1)")
    low, high = int(labels.min()), int(labels.max())
    allowed = low >= 0 and high < given["num_classes"]
    require(allowed, "num_classes", given["num_classes"], f"the labels go from {low} to {high}")
    micro.check_mix(given["microbatch"], given["microbatch_mix"])
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0:
            kind = type(layer).__name__
            raise ValueError(f"model: layer {name!r} is {kind}(p={layer.p}), whose draws are not keyed; set p=0")


def check_model(model: nn.Module, images: Tensor, num_classes: int) -> None:
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
    require(
        answer == (3, num_classes), "num_classes", num_classes, f"the model answers three images with shape {answer}"
    )
    check_network(model, images.shape[1:])


def check_untrained(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Refuse a model that has written to a buffer: what it keeps there is neither clipped nor noised."""
    now = model.state_dict()
    for name, t in before.items():
        if not torch.equal(now[name], t):
            said = "changes while private images pass, and would be released without noise; use a layer without such a buffer"
            raise ValueError(f"model: {name!r} {said}")


def layout(model: nn.Module) -> str:
    """Names, shapes and dtypes of all tensors, and the values of those that are not trained."""
    digest, trained = hashlib.sha256(), {n for n, p in model.named_parameters() if p.requires_grad}
    for name, t in model.state_dict().items():
        digest.update(repr((name, tuple(t.shape), str(t.dtype), name in trained)).encode())
        if name not in trained:
            digest.update(t.detach().cpu().double().numpy().tobytes())
    return f"{type(model).__name__} {digest.hexdigest()[:16]}"
