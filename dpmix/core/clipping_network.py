"""Clipped per-example gradient sums of a whole network (Eq. (4); Algorithm 1, "for each (x*, y*)" to the sum).

An example's K views are averaged **first**: the gradient of the (weighted) mean loss over its views *is* the averaged
gradient. It is clipped to C and added up. Example i contributes a vector of norm at most C (1 + 1e-6) that depends on
its own views and on the weights only; adding or removing an example moves the sum by no more. No noise is added here.

Engines, all equal to the slow oracle:

* `loop`: one backward per private example over its K views, which amortise the clipping. `auto` takes it on a CPU.
* `grouped`: one backward for the batch; the layers form each example's gradient, summed over its views before it is
  stored (Conv2d, standardised convolution, Linear, GroupNorm, LayerNorm). `auto` takes it on a GPU where it can. Before
  the first batch it is compared with autograd on public noise, and refused for a model that it does not fit.
* `vmap`: vmap of grad (`torch.func`), for every layer that torch.func can map. `auto` takes it on a GPU otherwise.

Precision: norms, clipping and sums are float32 (float64 for a float64 model), blocks of a norm add up in float64, and the
products that apply the clip keep all their bits (`precision`). Forward and backward run in float32, or in bfloat16 with
`autocast=torch.bfloat16`, whatever autocast is around them; PyTorch's flags may let float32 products of theirs run in
TF32 or bfloat16. That rounds the gradients, but the rounded gradient is what is measured, clipped and added.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dpmix.core import checks, precision, rng
from dpmix.core.checks import one_of, require, whole
from dpmix.core.independence import HUGE, check_layers, check_network
from dpmix.core.layer_gradients import ELSE, recording, without_rule

ENGINES = ("auto", "loop", "grouped", "vmap")
_BLOCK = 256  # float32 squares added up before float64 takes over


@dataclass(frozen=True)
class ClippedSum:
    """`grads`: parameter name -> sum shaped as the parameter; `norms` [b] before clipping, not finite where an example
    was dropped; `engine` that ran; `non_finite`: how many were dropped. Norms and counts come from private data without
    noise: diagnostics, not for release."""

    grads: dict[str, Tensor]
    norms: Float[Tensor, " b"]
    engine: str
    non_finite: int


def clipped_gradient_sum(
    model: nn.Module,
    images: Float[Tensor, "b K C H W"],
    targets: Float[Tensor, "b K num_classes"],
    clip_norm: int | float,
    engine: str = "auto",
    *,
    view_weights: Float[Tensor, "b K"] | None = None,
    physical_batch: int | None = None,
    autocast: torch.dtype | None = None,
    channels_last: bool = False,
) -> ClippedSum:
    """Sum over b examples of clip_C{(1/K) sum_k grad CE(model(image_k), target_k)}, for parameters with requires_grad.

    targets are distributions (soft labels); the loss is cross entropy. view_weights replace the weights 1/K.
    engine: see the module; physical_batch: examples at a time (memory, not the result); channels_last: the memory
    format of the views; autocast: None or torch.bfloat16.
    An example whose gradient is not finite (or too large for its norm to be) contributes exactly zero and is counted;
    no exception depends on the data. b = 0 gives zeros; K = 1 is plain DP-SGD; an infinite clip norm the plain sum.
    Raises ValueError for a model that mixes examples (`independence`), an unknown engine, shapes that do not fit or K = 0.
    """
    clipper = Clipper(model, clip_norm, engine, autocast=autocast, channels_last=channels_last)
    check_network(model, images.shape[2:])
    if physical_batch is not None:
        whole("physical_batch", physical_batch, 1)
    step = physical_batch or max(len(images), 1)
    norms = [images.new_zeros(0)]
    for start in range(0, len(images), step):
        part = slice(start, start + step)
        weights = None if view_weights is None else view_weights[part]
        norms.append(clipper.add(images[part], targets[part], weights, pad_to=step))
    return ClippedSum(clipper.grads(), torch.cat(norms), clipper.engine, int(clipper.non_finite))


class Clipper:
    """Adds clipped gradients of many physical batches into `total`, one flat buffer; see `clipped_gradient_sum`. The sum over
    physical batches of the `loop` engine is the same to the last bit however the examples are split."""

    def __init__(
        self,
        model: nn.Module,
        clip_norm: int | float,
        engine: str = "auto",
        *,
        autocast: torch.dtype | None = None,
        channels_last: bool = False,
    ) -> None:
        one_of("engine", engine, ENGINES)
        require(clip_norm > 0, "clip_norm", clip_norm, "must be a positive number")
        if clip_norm != float("inf"):
            checks.clip_norm(clip_norm)
        require(autocast in (None, torch.bfloat16), "autocast", autocast, "must be None or torch.bfloat16")
        check_layers(model)
        self.model, self.clip_norm, self.autocast, self.channels_last = model, clip_norm, autocast, channels_last
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        require(len(self.parameters) > 0, "model", type(model).__name__, "has no parameter with requires_grad")
        first = next(iter(self.parameters.values()))
        self.device, self.dtype = first.device, first.dtype
        wide = torch.float64 if any(p.dtype == torch.float64 for p in self.parameters.values()) else torch.float32
        self.total = torch.zeros(sum(p.numel() for p in self.parameters.values()), dtype=wide, device=self.device)
        self.non_finite = torch.zeros((), dtype=torch.int64, device=self.device)
        left_over = without_rule(model)
        if engine == "auto":
            engine = "loop" if self.device.type != "cuda" else "vmap" if left_over else "grouped"
        require(engine != "grouped" or not left_over, "engine", engine, f"has no rule for {left_over}; {ELSE}")
        self.engine, self.fits = engine, engine != "grouped"

    def reset(self) -> None:
        """Start a new sum."""
        self.total.zero_()
        self.non_finite.zero_()

    def grads(self) -> dict[str, Tensor]:
        """The sum so far, as views of `total` shaped as the parameters."""
        return unflatten(self.total, self.parameters)

    def add(
        self,
        images: Float[Tensor, "b K C H W"],
        targets: Float[Tensor, "b K num_classes"],
        view_weights: Float[Tensor, "b K"] | None = None,
        *,
        pad_to: int = 0,
    ) -> Float[Tensor, " b"]:
        """Add the clipped gradients of these examples; their norms before clipping. Does not wait for the device. `pad_to`:
        batches of fewer examples are filled up with blank ones of weight zero, so that a kernel that is chosen by the size of
        the batch does not round the others differently when somebody joins. `loop` takes each alone."""
        b, k = images.shape[:2]
        require(k > 0, "K", k, "an example needs at least one view")
        require(targets.shape[:2] == (b, k), "targets.shape", tuple(targets.shape), f"must begin with {(b, k)}")
        weights = torch.full((b, k), 1.0 / k, dtype=torch.float64) if view_weights is None else view_weights
        images, targets, weights = images.to(self.device, self.dtype), targets.to(self.device), weights.to(self.device)
        if not b:
            return self.total.new_zeros(0)
        with torch.autocast(self.device.type, enabled=False):  # for the backward too
            if self.engine == "loop":
                squares = self._loop(images, targets, weights)
            else:
                images, targets, weights = (_padded(t, pad_to) for t in (images, targets, weights))
                each = self._vmap if self.engine == "vmap" else self._grouped
                squares = self._clip_and_add(each(images, targets, weights), b, len(images))
        norms = squares.sqrt()
        self.non_finite += (~norms.isfinite()).sum()
        return norms.to(self.total.dtype)

    def _logits(self, images: Float[Tensor, "n C H W"]) -> Float[Tensor, "n num_classes"]:
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            return self.model(images.contiguous(memory_format=torch.channels_last) if self.channels_last else images)

    def _scale(self, squares: Tensor) -> Tensor:
        """min(1, C / norm), and 0 where the norm is not finite."""
        scale = (self.clip_norm / squares.sqrt()).clamp(max=1.0)
        return torch.where(squares.isfinite(), scale, torch.zeros_like(scale)).to(self.total.dtype)

    def _loop(self, images: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Squared norms [b]; adds the clipped gradients itself, one example at a time."""
        parameters, squares = list(self.parameters.values()), []
        gradient = torch.empty_like(self.total)
        places = list(unflatten(gradient, self.parameters).values())
        for x, target, weight in zip(images, targets, weights, strict=True):
            grads = torch.autograd.grad(_loss(self._logits(x), target, weight), parameters, allow_unused=True)
            for place, g in zip(places, grads, strict=True):
                place.zero_() if g is None else place.copy_(g)
            squares.append(_squared_norms(gradient[None])[0])
            scale = self._scale(squares[-1])
            if self.device.type == "cpu":  # no device to wait for: one pass instead of two
                if float(scale) > 0:
                    self.total.add_(gradient, alpha=float(scale))
            else:
                self.total.add_(gradient.nan_to_num_(0.0, 0.0, 0.0).mul_(scale))
        return torch.stack(squares)

    def _vmap(self, images: Tensor, targets: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Per-example gradients [b, numel] by parameter."""
        tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        fixed = {name: t for name, t in tensors if name not in self.parameters}

        def loss(parameters: dict[str, Tensor], x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
            with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                logits = torch.func.functional_call(self.model, parameters | fixed, (x,))
            return _loss(logits, target, weight)

        values = {name: p.detach() for name, p in self.parameters.items()}
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(values, images, targets, weights)
        return {name: g.flatten(1) for name, g in each.items()}

    def _grouped(self, images: Tensor, targets: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Per-example gradients [b, numel] by parameter, by the rules of the layers; none for a parameter not called."""
        if not self.fits:
            self._compare_with_autograd(images.shape[2:], targets.shape[-1])
            self.fits = True
        each: dict[int, Tensor] = {}
        with recording(self.model, len(images), each):
            x = images.flatten(0, 1).detach().requires_grad_()
            # the hooks do the work; the gradient of the pixels is asked for so that every layer is passed through
            torch.autograd.grad(_loss(self._logits(x), targets.flatten(0, 1), weights.flatten()), x)
        return {name: each[id(p)] for name, p in self.parameters.items() if id(p) in each}

    def _compare_with_autograd(self, shape: torch.Size, num_classes: int) -> None:
        """Refuse a model whose gradients the rules of the layers do not see as autograd does, on three examples of noise. One
        that calls a layer with another axis in front of the examples' (sequence first, say) would clip slices of all examples
        instead of examples; one that uses a parameter without calling its layer would leave a part unclipped. The weights of
        the copy are moved a little: zeros, as heads often start from, would hide what lies below them. It computes
        in float64, so that a parameter whose gradient is small today is compared as strictly as the others; as it is where it
        cannot (a model that insists on its own dtype, or is huge), and then less strictly."""
        try:
            if self.total.numel() > HUGE:
                raise RuntimeError("no room for a copy in float64")
            trial = copy.deepcopy(self)
            trial.autocast, trial.dtype, trial.total = None, torch.float64, trial.total.double()
            trial.model.double()
            trial._compare(shape, num_classes, 1e-6, 1e-12)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            exact = self.autocast is None and self.dtype == torch.float32
            # bfloat16 rounds to a 256th
            copy.deepcopy(self)._compare(shape, num_classes, *((1e-2, 1e-5) if exact else (0.1, 0.01)))

    def _compare(self, shape: torch.Size, num_classes: int, of_itself: float, of_all: float) -> None:
        """`_compare_with_autograd`, of this copy: shares of a parameter's own gradient and of the whole are allowed."""
        draw, self.clip_norm, self.fits = rng.generator(0, "probe of the layers"), float("inf"), True

        def noise(*size: int) -> Tensor:
            return torch.from_numpy(draw.standard_normal(size)).to(self.device, self.dtype)

        images, targets, weights = noise(3, 2, *shape), noise(3, 2, num_classes).softmax(-1), noise(3, 2).softmax(-1)
        with torch.no_grad():
            for p in self.parameters.values():
                p.add_(noise(*p.shape), alpha=0.02)
        each = self._grouped(images, targets, weights)
        for i in range(3):
            self.reset()
            self._loop(images[i : i + 1], targets[i : i + 1], weights[i : i + 1])
            for name, g in self.grads().items():
                found = each[name][i] if name in each else torch.zeros_like(g).flatten()
                most = of_itself * g.norm() + of_all * self.total.norm() * (name in each)
                if not (found - g.flatten()).norm() <= most:
                    why = "gets its input in another order than examples and their views in front"
                    if name not in each:
                        why = "is used without calling its layer, so engine='grouped' does not see its gradient"
                    raise ValueError(f"model: the layer of {name!r} {why}; {ELSE}")

    def _clip_and_add(self, each: dict[str, Tensor], b: int, rows: int) -> Tensor:
        """Squared norms [b] of per-example gradients [rows, numel], padding last; emptied here, a layer at a time."""
        squares = torch.zeros(rows, dtype=torch.float64, device=self.device)
        for name, g in each.items():
            each[name] = g = g.to(self.total.dtype)
            squares += _squared_norms(g)
        scale = self._scale(squares)
        scale[b:] = 0.0
        with precision.full(self.device):
            for name, total in self.grads().items():
                if name in each:
                    g = each.pop(name).masked_fill((scale == 0)[:, None], 0.0)
                    total += (scale @ g).view_as(total)
        return squares[:b]


def _padded(t: Tensor, rows: int) -> Tensor:
    return t if len(t) >= rows else torch.cat([t, t.new_zeros(rows - len(t), *t.shape[1:])])


def unflatten(flat: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Views of a flat buffer, shaped and named as the parameters, in their order."""
    parts = flat.split([p.numel() for p in parameters.values()])
    return {name: part.view(p.shape) for (name, p), part in zip(parameters.items(), parts, strict=True)}


def _loss(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted sum of the soft-target cross entropies of all rows, at least in float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -((target.to(logits.dtype) * F.log_softmax(logits, dim=-1)).sum(-1) * weight.to(logits.dtype)).sum()


def _squared_norms(rows: Tensor) -> Tensor:
    """Squared norm of each row, float64. A plain float32 norm of three million terms may be 1e-4 too small."""
    whole_blocks = rows.shape[1] // _BLOCK * _BLOCK
    blocks = torch.linalg.vector_norm(rows[:, :whole_blocks].unflatten(1, (-1, _BLOCK)), dim=-1)
    rest = torch.linalg.vector_norm(rows[:, whole_blocks:], dim=1)
    return blocks.double().square().sum(1) + rest.double().square()
