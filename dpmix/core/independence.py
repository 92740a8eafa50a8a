"""The refusal of networks and encoders that let one example's output depend on another's: no clipping would bound that."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from dpmix.core import rng

# Relative. Ten thousand neighbours that each mix in so much move a gradient by less than its float32 rounding.
TIGHT = 1e-9
MIXES = (
    "the output for an image changes when other images are left out of the batch{}, so clipping bounds nobody's influence; "
    "remove what mixes the batch (and any dropout)"
)
_LARGE, HUGE = 64, 2 * 10**8  # side and parameters: fewer images, no copy in float64
_passed: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def check_layers(model: nn.Module) -> None:
    """Refuse by name what mixes a batch in training: BatchNorm of every kind (also frozen: its statistics came from
    somewhere) and normalisation that keeps running statistics. Raises ValueError naming the layer and the remedy."""
    for name, layer in model.named_modules():
        if isinstance(layer, _NormBase) and (layer.track_running_stats or "BatchNorm" in type(layer).__name__):
            raise ValueError(
                f"model: layer {name or 'model'!r} is {type(layer).__name__}, which mixes the examples of a batch, so "
                "clipping bounds nobody's influence; replace it with nn.GroupNorm (as wide_resnet does) or nn.LayerNorm"
            )


def check_network(model: nn.Module, shape: tuple[int, ...]) -> None:
    """`check_layers` and `check_no_mixing` for images of `shape` [C, H, W]; nothing is done twice for a model that is
    still built as it was when it passed."""
    plain = (bool, int, float, str, tuple)
    settings = [
        (name, type(layer), [(k, v) for k, v in vars(layer).items() if isinstance(v, plain) or callable(v)])
        for name, layer in model.named_modules()
    ]
    built = repr((tuple(shape), settings))
    if _passed.get(model) != built:
        check_layers(model)
        check_no_mixing(model, shape)
        _passed[model] = built


def check_no_mixing(model: nn.Module, shape: tuple[int, ...], name: str = "model") -> None:
    """Refuse a network or encoder whose output for an image depends on the images beside it, or is not finite.

    Behaviour on public noise: each image alone, among all, and in a pair at another place, in a float64 copy,
    where rounding cannot hide a mixture. Trainable weights of the copy are moved a little: a head or a gate that starts
    at zero would hide what lies below it. Where the copy cannot run (a model that insists on its own dtype, or is huge)
    the model itself is asked whether an output changes when the neighbours do, in batches of one size.
    Raises ValueError naming `name` and, where it can be found, the layer.
    """
    size = sum(p.numel() for p in model.parameters())
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    noise = _probe(shape).to(like)
    for gradients in (False, True):  # a layer can ask which it is
        with _quietly(noise.device), torch.set_grad_enabled(gradients):
            trial = copy.deepcopy(model)
            _check_finite(trial(noise[:2]), name)
            try:
                if size > HUGE:
                    raise RuntimeError("no room for a copy in float64")
                trial, wide = _moved(trial.double()), noise.double()
                alone = torch.cat([trial(x[None]).detach() for x in wide])
                good = all(_close(trial(wide[s]).detach(), alone[s], TIGHT) for s in (slice(None), slice(1, 3)))
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, TypeError):
                trial, wide = _moved(copy.deepcopy(model)), noise
                good = _same_among_others(trial, noise)
            if not good:
                raise ValueError(f"{name}: {MIXES.format(_where(trial, wide))}")


def check_features(features: Callable, shape: tuple[int, ...], device: torch.device, name: str) -> None:
    """`check_no_mixing` of what made its way past `models.encoder`: any function from images [n, C, H, W] to features; `shape`
    is (C, H, W)."""
    noise = _probe(shape).to(device, torch.float32)
    with _quietly(device), torch.no_grad():  # as features are made
        _check_finite(features(noise[:2]), name)
        if not _same_among_others(features, noise):
            raise ValueError(f"{name}: {MIXES.format('')}")


def _probe(shape: tuple[int, ...]) -> Tensor:
    """Public noise: a few images."""
    return torch.from_numpy(rng.generator(0, "mixing probe").random((4 if max(shape) > _LARGE else 8, *shape)))


def _check_finite(answers: Tensor, name: str) -> None:
    if not bool(answers.isfinite().all()):
        raise ValueError(f"{name}: answers public noise with numbers that are not finite; look at its weights")


@contextmanager
def _quietly(device: torch.device) -> Iterator[None]:
    """Without autocast or a trace in the global random state."""
    devices = [device] if device.type == "cuda" else []
    with torch.autocast(device.type, enabled=False), torch.random.fork_rng(devices):
        yield


@torch.no_grad()
def _moved(model: nn.Module) -> nn.Module:
    draw = rng.generator(0, "moved weights")
    for p in model.parameters():
        if p.requires_grad:
            p.add_(torch.from_numpy(draw.standard_normal(p.shape)).to(p), alpha=0.02)
    return model


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    a, b = a.detach().double(), b.detach().double()
    return a.shape == b.shape and float((a - b).abs().max()) <= tolerance * (float(b.abs().max()) + 1e-30)


def _same_among_others(model: Callable[[Tensor], Tensor], noise: Float[Tensor, "n ..."]) -> bool:
    """Whether each half of the outputs stays when the other half's images become others (batches of one size round
    alike), and whether an image alone comes out nearly the same (they do not). The others are darker: mirrored at 0.5 they
    would have the mean square and the largest magnitude that the first ones have."""
    together, others = model(noise).detach(), 0.5 * noise.roll(1, 0)
    odd = torch.arange(len(noise), device=noise.device) % 2 == 1
    for keep in (odd, ~odd):
        if not _close(model(torch.where(keep.view(-1, 1, 1, 1), noise, others)).detach()[keep], together[keep], 1e-6):
            return False
    return all(_close(model(x[None]).detach()[0], y, 2**-6) for x, y in zip(noise, together, strict=True))


def _where(model: nn.Module, noise: Float[Tensor, "n ..."]) -> str:
    """The first layer at which the first image's numbers differ between all images and itself alone."""
    runs: list[list] = []
    for images in (noise, noise[:1]):
        runs.append([])
        note: Callable = partial(_note, runs[-1])
        leaves = [(name, m) for name, m in model.named_modules() if not [*m.children()]]
        hooks = [m.register_forward_hook(partial(note, name)) for name, m in leaves]
        model(images)
        for hook in hooks:
            hook.remove()
    for (name, kind, *among), (_, _, *alone) in zip(*runs, strict=False):
        for side, a, b in zip((" before", " by"), among, alone, strict=True):
            if not _close(a, b, 1e-6):
                return f",{side} layer {name!r} ({kind})"
    return ""


def _note(run: list, name: str, layer: nn.Module, args: tuple, output: Tensor) -> None:
    if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
        run.append((name or "model", type(layer).__name__, args[0][:1].clone(), output[:1].detach().clone()))
