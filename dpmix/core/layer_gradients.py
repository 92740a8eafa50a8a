"""Per-example gradients layer by layer, for the `grouped` engine of `clipping_network`.

One rule a layer leads from its input and its output's gradient to each example's gradient, summed over the example's
views before it is stored.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ELSE = "use engine='vmap' or engine='loop'"
_UNFOLDED = 2**28  # elements of an unfolded input that may exist at a time
Gradients = dict[str, Tensor]


def _linear(layer: nn.Linear, x: Tensor, g: Tensor, b: int) -> Gradients:
    x, g = x.reshape(b, -1, x.shape[-1]).to(g.dtype), g.reshape(b, -1, g.shape[-1])
    return {"weight": g.mT @ x, "bias": _total(g, [1])}


def _conv(layer: nn.Conv2d, x: Tensor, g: Tensor, b: int) -> Gradients:
    """Unfolded input times output gradient, one matrix product an example."""
    x, padding = x.to(g.dtype), layer.padding
    if isinstance(padding, str) or layer.padding_mode != "zeros":
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode), (0, 0)
    bias = _total(g.unflatten(0, (b, -1)), [1, 3, 4])
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0])).permute(0, 2, 3, 1).contiguous()  # NHWC
    g = g.permute(0, 2, 3, 1)
    (n, height, width, _), (kh, kw) = g.shape, layer.kernel_size
    (s0, s1, s2, s3), (d0, d1), (t0, t1) = x.stride(), layer.dilation, layer.stride
    windows = x.as_strided((n, height, width, kh, kw, x.shape[3]), (s0, s1 * t0, s2 * t1, s1 * d0, s2 * d1, s3))
    step = max(1, _UNFOLDED * b // windows.numel())
    g, windows = g.reshape(b, -1, g.shape[3]), windows.unflatten(0, (b, -1))
    parts = [dy.mT @ dx.reshape(*dy.shape[:2], -1) for dy, dx in zip(g.split(step), windows.split(step), strict=True)]
    weight = torch.cat(parts).unflatten(2, (kh, kw, -1)).permute(0, 1, 4, 2, 3)
    return {"weight": weight.flatten(1), "bias": bias}


def _group_norm(layer: nn.GroupNorm, x: Tensor, g: Tensor, b: int) -> Gradients:
    return _norm(F.group_norm(x, layer.num_groups, eps=layer.eps), g, b, [d + 1 for d in range(g.ndim) if d != 1])


def _layer_norm(layer: nn.LayerNorm, x: Tensor, g: Tensor, b: int) -> Gradients:
    normal = F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
    return _norm(normal, g, b, list(range(1, 1 + x.ndim - len(layer.normalized_shape))))


def _norm(normal: Tensor, g: Tensor, b: int, others: list[int]) -> Gradients:
    normal, g = normal.unflatten(0, (b, -1)), g.unflatten(0, (b, -1))
    return {"weight": _total(normal * g, others), "bias": _total(g, others)}


_RULES: dict[type[nn.Module], Callable[..., Gradients]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
}


def _rule(layer: nn.Module) -> Callable[..., Gradients] | None:
    """The rule of a layer's very class; a class of one's own names the one that it takes as `gradient_rule`, and may lead on
    from there with a method `pull_back`. Grouped convolutions have none."""
    kind = type(layer)
    rule = None if getattr(layer, "groups", 1) != 1 else _RULES.get(kind.__dict__.get("gradient_rule", kind))
    lead_on: Any = getattr(layer, "pull_back", None)
    return rule if rule is None or lead_on is None else lambda *given: lead_on(rule(*given))


def _total(g: Tensor, dim: list[int]) -> Tensor:
    return g.sum(dim, dtype=torch.promote_types(g.dtype, torch.float32))


def without_rule(model: nn.Module) -> str:
    """The first layer with trainable parameters that the grouped engine has no rule for; empty if there is none."""
    for name, layer in model.named_modules():
        if _rule(layer) is None and any(p.requires_grad for p in layer.parameters(recurse=False)):
            return f"layer {name or 'model'!r} ({type(layer).__name__})"
    return ""


@contextmanager
def recording(model: nn.Module, b: int, each: dict[int, Tensor]) -> Iterator[None]:
    """Inside, a backward through `model` fills `each` with per-example gradients [b, numel], keyed by id(parameter). The
    parameters ask for no gradient meanwhile, so that the batch's own weight gradients are not computed as well."""
    owners = [p for p in model.parameters() if p.requires_grad]
    trained = {id(p) for p in owners}

    def record(name: str, layer: nn.Module, x: Tensor, version: int, g: Tensor) -> None:
        if len(g) % b or len(x) != len(g) or x._version != version:
            raise ValueError(f"model: layer {name!r} changes its input or the batch dimension; {ELSE}")
        rule = _rule(layer)
        assert rule is not None, name
        with torch.no_grad(), torch.autocast(g.device.type, enabled=False):
            for key, grads in rule(layer, x, g, b).items():
                parameter = getattr(layer, key)
                if parameter is not None and id(parameter) in trained:
                    grads, before = grads.flatten(1), each.get(id(parameter))
                    each[id(parameter)] = grads if before is None else before + grads

    def remember(name: str, layer: nn.Module, args: tuple, output: Tensor) -> None:
        if not output.requires_grad:
            raise ValueError(f"model: layer {name!r} does not see the images; {ELSE}")
        output.register_hook(partial(record, name, layer, args[0].detach(), args[0]._version))

    layers = [(n, m) for n, m in model.named_modules() if any(id(p) in trained for p in m.parameters(recurse=False))]
    hooks = [layer.register_forward_hook(partial(remember, name)) for name, layer in layers]
    try:
        for p in owners:
            p.requires_grad_(False)
        yield
    finally:
        for p in owners:
            p.requires_grad_(True)
        for hook in hooks:
            hook.remove()
