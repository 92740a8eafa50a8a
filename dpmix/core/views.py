"""Views. Algorithm 1 of the paper, from "Generate S" to "S ∪ S'".

A method is a recipe of views. Each private example is turned into K = k_base + k_diff + k_self views:

* **base**: T(x), k_base times, with the example's label;
* **public**: k_diff synthetic images, drawn from the public set with replacement, with their own labels;
* **mixtures**: k_self times Eq. (3) on two members of the pool S = base + public (two different ones where S has two).

Every view of example i depends on example i and on public images only. That is what keeps the sensitivity at C.

The parts are keyed apart: base views by their transform, mixtures by the pool that they are drawn from. A recipe has the
same views whether it is computed alone or in a union with others, and a smaller k takes the first of a larger one.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64, Num
from torch import Tensor

from dpmix.core import checks, rng, transforms

MIXES = ("mixup", "cutmix")


@runtime_checkable
class Images(Protocol):
    """Images `[n, C, H, W]` that are looked up by row when they are asked for. A tensor is one."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> Tensor: ...


@runtime_checkable
class PublicImages(Protocol):
    """What `make_views` needs of a public set: `data.ImageSet` has it."""

    @property
    def images(self) -> Images: ...

    @property
    def labels(self) -> Int64[Tensor, " m"]: ...


@dataclass(frozen=True)
class Recipe:
    """Which views an example contributes. Frozen, hashable; refuses what Algorithm 1 cannot do.

    `k_base` self-augmentations by `transform`, `k_diff` public images, `k_self` mixtures of the pool by `mix` with
    lambda ~ Beta(alpha, alpha) (Section 3: alpha = 0.2). `k_self=k_diff=0` is the self-augmentation of De et al. 2022.
    """

    k_base: int = 16
    k_self: int = 0
    k_diff: int = 0
    mix: str = "mixup"
    alpha: float = 0.2
    transform: str = "crop-flip"

    def __post_init__(self) -> None:
        for name in ("k_base", "k_self", "k_diff"):
            checks.whole(name, getattr(self, name))
        checks.one_of("mix", self.mix, MIXES)
        checks.positive("alpha", self.alpha)
        checks.floats(self, "alpha")
        checks.one_of("transform", self.transform, transforms.TRANSFORMS)
        pool = self.k_base + self.k_diff
        checks.require(pool > 0, "k_base + k_diff", pool, "the pool is empty; give k_base or k_diff at least 1")

    @property
    def views(self) -> int:
        """K of Eq. (4), the augmentation multiplicity."""
        return self.k_base + self.k_diff + self.k_self

    @property
    def parts(self) -> dict[tuple, int]:
        """How many views there are of each part: base views of a transform, public images, mixtures of one pool."""
        pool = self.transform if self.k_base else "", self.k_base, self.k_diff, self.mix, self.alpha
        return {("base", self.transform): self.k_base, ("public",): self.k_diff, ("mix", *pool): self.k_self}

    def for_data(self, flip: bool) -> "Recipe":
        """The recipe for a data set: without the mirror where `flip` is False."""
        return self if flip else replace(self, transform=transforms.without_flip(self.transform))


class _Methods(dict[str, Recipe]):
    def __missing__(self, name: str) -> Recipe:
        checks.one_of("method", name, self)
        raise KeyError(name)


METHODS: dict[str, Recipe] = _Methods(
    {
        "dp-sgd": Recipe(k_base=1, transform="none"),
        "mixed-ghost": Recipe(k_base=1, transform="none"),
        "self-aug": Recipe(k_base=16),
        "mix-self": Recipe(k_base=16, k_self=18),
        "mix-diff": Recipe(k_base=16, k_self=18, k_diff=2),
        "pure-mix-diff": Recipe(k_base=0, k_self=18, k_diff=2),
    }
)


class Views(NamedTuple):
    """`images` [b, K, C, H, W] floats in 0..1, `targets` [b, K, num_classes] that sum to one; base, public, mixtures."""

    images: Float[Tensor, "b K C H W"]
    targets: Float[Tensor, "b K num_classes"]


@dataclass(frozen=True)
class Union:
    """The views that several recipes need together, each computed once (many heads, one pass)."""

    recipes: tuple[Recipe, ...]

    @cached_property
    def parts(self) -> dict[tuple, int]:
        """As of a recipe, the largest number that one of them needs; in the order base, public, mixtures."""
        keys = dict.fromkeys(
            key for kind in ("base", "public", "mix") for r in self.recipes for key in r.parts if key[0] == kind
        )
        most = {key: max(r.parts.get(key, 0) for r in self.recipes) for key in keys}
        return {key: count for key, count in most.items() if count}

    @property
    def views(self) -> int:
        """How many views an example has in the union."""
        return sum(self.parts.values())

    @cached_property
    def weights(self) -> Float[Tensor, "recipes K"]:
        """Row r averages the views of recipe r: 1/K_r on its own views, 0 on the others'. Rows sum to one."""
        rows = torch.zeros(len(self.recipes), self.views, dtype=torch.float64)
        for row, r in zip(rows, self.recipes, strict=True):
            start = 0
            for key, count in self.parts.items():
                row[start : start + r.parts.get(key, 0)] = 1 / r.views
                start += count
        return rows

    def make(
        self,
        images: Num[Tensor, "b C H W"],
        labels: Int64[Tensor, " b"],
        ids: Int64[Tensor, " b"],
        *,
        num_classes: int,
        seed: rng.Seed,
        step: int | None,
        public: PublicImages | None = None,
    ) -> Views:
        """The union's views of these examples; the arguments are those of `make_views`. Without a step (None) they are keyed
        by the example alone: the same at every step."""
        seed = rng.as_seed(seed)
        if images.dtype != torch.uint8:
            images = transforms.as_float(images)
        eye = torch.eye(num_classes, device=images.device)
        if ("public",) in self.parts:
            check_public(public, tuple(images.shape[1:]), num_classes)
        made: dict[tuple, Views] = {}
        for key, count in self.parts.items():
            draws = _Draws(ids, seed, step, key, count)
            if key[0] == "base":
                made[key] = Views(_transformed(images, key[1], draws), eye[labels][:, None].expand(-1, count, -1))
            elif key[0] == "public":
                assert public is not None
                chosen = (draws.uniform(1)[..., 0] * len(public.labels)).long().to(public.labels.device)
                pixels = transforms.as_float(public.images[chosen]).to(images.device)
                made[key] = Views(pixels, eye[public.labels[chosen].to(images.device)])
            else:
                _, transform, k_base, k_diff, mix, alpha = key
                members = ((("base", transform), k_base), (("public",), k_diff))
                pool = _joined(Views(*(t[:, :k] for t in made[part])) for part, k in members if k)
                made[key] = _mixtures(pool, mix, *draws.mixtures(k_base + k_diff, alpha))
        return _joined(made.values())


def _joined(blocks: Iterable[Views]) -> Views:
    return Views(*(torch.cat(tensors, dim=1) for tensors in zip(*blocks, strict=True)))


class _Draws:
    """The keyed randomness of one part: one stream an example, so nothing depends on the batch around it."""

    def __init__(self, ids: Tensor, seed: int, step: int | None, part: tuple, count: int) -> None:
        self.ids, self.seed, self.step, self.part, self.count = ids, seed, step, part, count

    def _each(self, shape: tuple, draw: Callable[[np.random.Generator], np.ndarray], *more: str) -> Tensor:
        streams = (rng.generator(self.seed, "views", self.step, int(i), *self.part, *more) for i in self.ids)
        return torch.from_numpy(np.stack([draw(stream) for stream in streams] or [np.zeros(shape)])[: len(self.ids)])

    def uniform(self, each: int) -> Float[Tensor, "b k each"]:
        return self._each((self.count, each), lambda stream: stream.random((self.count, each)))

    def mixtures(self, pool: int, alpha: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """First and second member [b, k], lambda ~ Beta(alpha, alpha) [b, k], and the centre of a box [b, k, 2]."""
        uniforms = self.uniform(4)
        first = (uniforms[..., 0] * pool).long()
        second = (uniforms[..., 1] * (pool - 1)).long()
        second = second + (second >= first) if pool > 1 else first
        lam = self._each((self.count,), lambda stream: stream.beta(alpha, alpha, self.count), "lambda")
        return first, second, lam, uniforms[..., 2:]


def _transformed(images: Num[Tensor, "b C H W"], name: str, draws: _Draws) -> Float[Tensor, "b k C H W"]:
    """T(x). What is added to a crop draws from a stream of its own: with it or without, the crop is the same."""
    crop = name.partition("+")[0]
    of_crop, of_all = (transforms.draws(part, tuple(images.shape[1:])) for part in (crop, name))
    uniforms = [_Draws(draws.ids, draws.seed, draws.step, ("base", crop), draws.count).uniform(of_crop)]
    uniforms += [draws.uniform(of_all - of_crop)] if of_all > of_crop else []
    return transforms.apply(name, images, torch.cat(uniforms, dim=-1).to(images.device))


def _mixtures(pool: Views, mix: str, first: Tensor, second: Tensor, lam: Tensor, centre: Tensor) -> Views:
    """Eq. (3) on two members of each example's own pool; cutmix pastes a box of area 1 - lambda instead."""
    device, dtype = pool.images.device, pool.images.dtype
    example = torch.arange(len(first), device=device)[:, None]
    first, second, lam, centre = first.to(device), second.to(device), lam.to(device, dtype), centre.to(device, dtype)
    share = lam[..., None, None, None]
    if mix == "cutmix":
        places = [(torch.arange(side, device=device) + 0.5) / side for side in pool.images.shape[-2:]]
        half = (1 - lam[..., None]).sqrt() / 2
        rows, cols = ((at - centre[..., axis, None]).abs() < half for axis, at in enumerate(places))
        # Where the first image stays, [b, k, 1, H, W].
        share = 1 - (rows[..., :, None] & cols[..., None, :])[:, :, None].to(dtype)
        lam = share.mean(dim=(2, 3, 4))
    images = share * pool.images[example, first] + (1 - share) * pool.images[example, second]
    lam = lam[..., None].to(pool.targets.dtype)
    return Views(images, lam * pool.targets[example, first] + (1 - lam) * pool.targets[example, second])


def check_public(public: PublicImages | None, shape: tuple, num_classes: int) -> None:
    """Refuse a missing, empty or ill-fitting public set, before any training."""
    remedy = "k_diff > 0 needs synthetic images; pass public=, or set k_diff=0"
    checks.require(public is not None, "public", public, remedy)
    assert public is not None
    checks.require(len(public.labels) > 0, "public", len(public.labels), f"is empty; {remedy}")
    got = tuple(public.images.shape[1:])
    checks.require(
        got == shape, "public.images.shape", got, f"must be that of the private images, {shape}; resize them"
    )
    worst = int(public.labels.max())
    checks.require(worst < num_classes, "public.labels", worst, f"must be below num_classes={num_classes}")


def make_views(
    images: Num[Tensor, "b C H W"],
    labels: Int64[Tensor, " b"],
    ids: Int64[Tensor, " b"],
    recipe: Recipe,
    *,
    num_classes: int,
    seed: rng.Seed,
    step: int,
    public: PublicImages | None = None,
) -> Views:
    """The K views of each example: Algorithm 1, lines "Generate S" to "S ∪ S'".

    `images` are uint8, or floats in 0..1; `ids` are the examples' places in the training set and key their randomness.
    Returns floats in 0..1, order base, public, mixtures; targets sum to one.

    View k of example i depends on example i, on public images and on (seed, step, i) only: not on the other examples,
    their number or their order. A part with k = 0 is absent. lambda = 1 gives the first member, lambda = 0 the second.
    A pool of one member mixes it with itself. An empty batch gives tensors with b = 0. `seed=None` takes fresh entropy.
    Raises ValueError where k_diff > 0 and `public` is missing or does not fit.
    """
    union = Union((recipe,))
    return union.make(images, labels, ids, num_classes=num_classes, seed=seed, step=step, public=public)


def make_union(recipes: Sequence[Recipe]) -> Union:
    """The union of the views of several recipes, in a fixed order; each recipe's views equal those it has alone."""
    return Union(tuple(recipes))


def mixing_draws(
    recipe: Recipe, ids: Int64[Tensor, " b"], *, seed: int, step: int | None
) -> tuple[Int64[Tensor, "b k"], Int64[Tensor, "b k"], Float[Tensor, "b k"]]:
    """Which two members of the pool the mixtures of `make_views` take, and their lambda (mixup): what a picture of them needs."""
    key, count = next((key, count) for key, count in recipe.parts.items() if key[0] == "mix")
    return _Draws(ids, rng.as_seed(seed), step, key, count).mixtures(recipe.k_base + recipe.k_diff, recipe.alpha)[:3]
