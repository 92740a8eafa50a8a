"""Augmentation multiplicity in an Opacus script: an example's K views are averaged first, then clipped (Eq. (4)).

Three lines differ from a plain script::

    train = ViewSet(train, recipe, num_classes=10)                    # 1. items are [K, C, H, W] and soft targets
    model, optimizer, loader = PrivacyEngine().make_private(module=model, optimizer=optimizer, ...)
    optimizer = average_views(model, optimizer, recipe.views)         # 2. K rows of gradients become one, then the clip
    for images, targets in loader:
        loss = criterion(model(images), targets.flatten(0, 1))        # 3. the model answers for every view: [b * K, ...]

Per-example gradients (`grad_sample_mode` "hooks", "functorch", "ew"), clipping, noise, divisor, Poisson sampling,
`BatchMemoryManager` and accountants stay Opacus' own; nothing of it is copied or patched. For a head on a frozen encoder line
1 is `TensorDataset(*source.batch(torch.arange(source.n), 0))`, with a source of `models.stored` (views drawn once).

Guarantee: one example moves the sum of clipped gradients by at most `max_grad_norm`, whatever K, since its views come
from itself and public images alone and are averaged before the clip. So Opacus' accountant stays right. It is wrong for K
copies of an example as K rows of the batch: these move the sum by up to K times as much."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from opacus import PrivacyEngine, optimizers
from opacus.grad_sample import GradSampleModuleExpandedWeights
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from dpmix.core import checks, rng, views
from dpmix.core.sources import content_ids

_NAMES = ("DP", "DistributedDP", "DPPerLayer", "SimpleDistributedPerLayer", "AdaClipDP")
KINDS = [getattr(optimizers, f"{name}Optimizer") for name in _NAMES]
ELSE = (
    "ghost clipping takes the norm of each row in the backward pass, before views can be averaged: use grad_sample_mode="
    "'hooks', or, where every trained layer takes [b, K, D] as it is (Linear), leave average_views out and give "
    "make_private a criterion that averages each example's K losses"
)


class ViewSet(Dataset):
    """A map-style data set of views: item i is float [K, C, H, W] and soft targets [K, num_classes] of example i.

    It depends on example i of `dataset` and on public images only (`core.views.make_views`), not on workers or on the
    batch. Without `seed` every access draws anew from the operating system. With one, for science (a known seed makes
    views predictable), views follow from seed, epoch and the pixels of example i: call `set_epoch` before each pass, as for
    PyTorch's DistributedSampler. `redraw=False` draws once, as `core.sources` does with the same seed. Pixels are normalised
    after the views, where the model is called: `model(normalise(images))`.

    Args:
        dataset: items (image, label): image uint8 or float in 0..1, [C, H, W]; label below `num_classes`.
        public: synthetic images for k_diff > 0, with `images` [m, C, H, W] and `labels` [m].

    Raises ValueError for images, labels or public images that do not fit."""

    def __init__(
        self,
        dataset: Dataset | Sequence,
        recipe: views.Recipe,
        *,
        num_classes: int,
        public: views.PublicImages | None = None,
        seed: rng.Seed = None,
        redraw: bool = True,
    ) -> None:
        checks.whole("num_classes", num_classes, 1)
        self.dataset, self.num_classes, self.public = dataset, num_classes, public
        self.union, self.redraw = views.make_union([recipe]), redraw
        self.seed = None if seed is None and redraw else rng.as_seed(seed)
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # reaches workers that live on
        checks.require(len(self) > 0, "dataset", len(self), "must hold at least one example")
        image = dataset[0][0]
        good = isinstance(image, Tensor) and image.ndim == 3
        said = "must be a tensor [C, H, W]: add torchvision's ToTensor"
        checks.require(good, "dataset[0][0]", type(image).__name__, said)
        if recipe.k_diff:
            views.check_public(public, tuple(image.shape), num_classes)

    def set_epoch(self, epoch: int) -> None:
        """The pass whose views are made from now on, where they are seeded and drawn again."""
        checks.whole("epoch", epoch)
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, place: int) -> tuple[Float[Tensor, "K C H W"], Float[Tensor, "K num_classes"]]:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """The items of a whole batch, as PyTorch's loader asks for them."""
        if not len(places):
            return []
        pairs = [self.dataset[i] for i in places]
        images, labels = torch.stack([x for x, _ in pairs]), torch.tensor([int(y) for _, y in pairs])
        for worst in (int(labels.min()), int(labels.max())):
            checks.require(0 <= worst < self.num_classes, "label", worst, f"must lie in 0..{self.num_classes - 1}")
        ids = content_ids(images)  # a place would move with every example before it
        step = int(self.epoch) if self.redraw else None
        about: dict[str, Any] = dict(num_classes=self.num_classes, seed=self.seed, step=step, public=self.public)
        return list(zip(*self.union.make(images, labels, ids, **about), strict=True))


class ViewAveraging(DPOptimizer):
    """Opacus' optimizer, except that `p.grad_sample` of K rows an example becomes one row before anything is done with it.

    Made by `average_views`. What is not finite counts as zero (Opacus passes it on: one example could void the sum).
    Finite rows stay as they are, so K = 1 is Opacus bit for bit."""

    views = 1

    def average(self, p: nn.Parameter) -> None:
        """p.grad_sample: [b * K, ...] -> [b, ...], once; accumulated batches each by itself."""
        found = getattr(p, "grad_sample", None)
        if found is not None:
            mean = [self._mean(g) for g in found] if isinstance(found, list) else self._mean(found)
            p.grad_sample = mean  # type: ignore[attr-defined]

    def _mean(self, rows: Tensor) -> Tensor:
        if hasattr(rows, "_mean_of_views"):
            return rows
        said = f"rows of gradients are not those of whole examples with K = {self.views}; call the model itself"
        checks.require(len(rows) % self.views == 0, "grad_sample", len(rows), said)
        mean = rows.unflatten(0, (len(rows) // self.views, self.views)).mean(1).nan_to_num_(0.0, 0.0, 0.0)
        mean._mean_of_views = True  # type: ignore[attr-defined]
        return mean

    def _get_flat_grad_sample(self, p: nn.Parameter) -> Tensor:
        self.average(p)
        return super()._get_flat_grad_sample(p)


def average_views(model: Any, optimizer: Optimizer, views: int) -> ViewAveraging:
    """Opacus' `optimizer`, averaging `views` gradients an example before it clips. It is the same object, of another class.

    In training mode `model` then takes one input [b, K, ...] and answers for b * K rows; in evaluation mode nothing
    changes. The loss is a mean over all rows (with loss_reduction="sum" a sum; the mean over K is taken here). A layer's
    rows are averaged as soon as Opacus has made them, so that gradients take the memory of b rows; with "ew" at the step.

    Args:
        model: what `make_private` returned; with wrap_model=False your own network.
        optimizer: what `make_private` returned: flat, per-layer or adaptive clipping, alone or distributed.
        views: K, the augmentation multiplicity.

    Raises ValueError, in training too, for inputs that are not [b, K, ...], and by name for what cannot work: ghost
    clipping, a batch in the second dimension, accumulated batches with "ew"."""
    checks.whole("views", views, 1)
    kind = type(optimizer)
    said = f"is none of {', '.join(k.__name__ for k in KINDS)}; {ELSE}"
    checks.require(kind in KINDS, "optimizer", kind.__name__, said)
    checks.require(isinstance(model, nn.Module), "model", type(model).__name__, "must be the network that is called")
    # with wrap_model=False Opacus' hooks alone know
    hooks = [hook for m in model.modules() for hook in m._backward_hooks.values() if isinstance(hook, partial)]
    first = getattr(model, "batch_first", True) and all(hook.keywords.get("batch_first", True) for hook in hooks)
    checks.require(first, "batch_first", first, "views are averaged along the first dimension; use batch_first=True")
    name = f"ViewAveraging{kind.__name__}"
    # The same object: a scheduler or a memory manager that holds it must not go on with one that does not average.
    optimizer.__class__ = ViewAveraging if kind is DPOptimizer else type(name, (ViewAveraging, kind), {})
    averaged: ViewAveraging = optimizer  # type: ignore[assignment]
    averaged.views = views

    # A second make_private wraps the inner optimizer in one that knows nothing of views.
    averaged.original_optimizer.register_step_pre_hook(partial(_check_averaged, averaged.params))

    # "ew" adds up the calls of a layer itself: its rows stay whole until the optimizer reads them.
    adds = isinstance(model, GradSampleModuleExpandedWeights)

    def to_rows(module: nn.Module, inputs: tuple) -> tuple | None:
        if not module.training:
            return None
        old = adds and any(getattr(p, "grad_sample", None) is not None for p in module.parameters())
        said = "adds rows of an earlier batch to those of this one: call optimizer.zero_grad() before the model"
        checks.require(not old, "grad_sample_mode", "ew", said)
        shapes = [tuple(x.shape) for x in inputs]
        good = len(shapes) == 1 and len(shapes[0]) > 1 and shapes[0][1] == views
        checks.require(good, "input", shapes, f"in training must be one tensor [b, K={views}, ...], by position")
        return (inputs[0].flatten(0, 1),)

    def to_means(module: nn.Module, *_: object) -> None:
        for p in module.parameters():
            averaged.average(p)

    model.register_forward_pre_hook(to_rows)
    for module in model.modules():
        own = any(p.requires_grad for p in module.parameters(recurse=False))
        if own and not adds:  # as Opacus chooses; hooks run in order, so its own come first
            module.register_full_backward_hook(to_means)
    return averaged


def _check_averaged(parameters: Sequence[nn.Parameter], *_: object) -> None:
    """Before the inner optimizer's step: no rows of single views are left."""
    for p in parameters:
        found = getattr(p, "grad_sample", None)
        rows = found if isinstance(found, list) else [] if found is None else [found]
        said = "does not average views: make_private came after average_views; make model and optimizer anew"
        checks.require(all(hasattr(g, "_mean_of_views") for g in rows), "optimizer", "the last one", said)


def exact_sampling(
    engine: PrivacyEngine, optimizer: DPOptimizer, loader: DataLoader, *, batch_size: int, noise_multiplier: float
) -> None:
    """Opacus' own sampler, divisor and accountant at q = batch_size / n exactly, n being the length of the data set.

    `make_private` takes q = 1 / ceil(n / B) and the divisor floor(n q): B = 4,096 of n = 50,000 become q = 1 / 13 and 3,846.
    They fit each other, so the guarantee holds, for another batch size than was asked for. Call this before the first
    step; a pass of the loader keeps its ceil(n / B) steps. `noise_multiplier` is that for (q, T), and becomes the
    optimizer's: what `make_private_with_epsilon` found is for the smaller q, and would spend more than its target.

    Raises ValueError where B exceeds n, the loader does not sample, or steps were made."""
    checks.positive("noise_multiplier", noise_multiplier)
    n, sampler = len(loader.dataset), loader.batch_sampler  # type: ignore[arg-type]
    good = isinstance(batch_size, int) and 1 <= batch_size <= n
    checks.require(good, "batch_size", batch_size, f"must be a whole number from 1 to n = {n}")
    checks.require(hasattr(sampler, "sample_rate"), "loader", type(loader).__name__, "does no Poisson sampling")
    steps = len(engine.accountant)
    checks.require(steps == 0, "engine", steps, "has made steps at another rate already")
    loader.sample_rate = sampler.sample_rate = batch_size / n  # type: ignore[union-attr, attr-defined]
    optimizer.noise_multiplier = noise_multiplier
    optimizer.expected_batch_size = batch_size / getattr(optimizer, "world_size", 1)
    optimizer.attach_step_hook(engine.accountant.get_optimizer_hook_fn(sample_rate=batch_size / n))
