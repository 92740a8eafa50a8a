"""What `audit` audits. Steps and releases of a linear head and of a network, and whole runs with canaries.

A *step* is a callable `step(records, seed, number)`: the clipped sum over `records` as one flat tensor [p]. Its
randomness is keyed by `(seed, number)` and the records' ids, so the same call on a neighbouring data set is the coupling
of the proof. A *release* is `release(records, seed, number)`: m >= 1 independent noisy sums [m, p]. Both see the examples
that joined a step, q = 1: the strongest setting for an adversary."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, Num
from torch import Tensor, nn

from dpmix import models
from dpmix.core import checks, clipping, heads, rng, views
from dpmix.images import data


@dataclass(frozen=True)
class Records:
    """Examples with the ids that key their randomness. Images are uint8, or floats that may leave 0..1 (an attack)."""

    images: Num[Tensor, "n C H W"]
    labels: Int64[Tensor, " n"]
    ids: Int64[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, places: Any) -> "Records":
        """The records at `places` (an index, mask or slice), in that order."""
        return Records(self.images[places], self.labels[places], self.ids[places])

    def insert(self, place: int, other: "Records") -> "Records":
        """With `other` put in before `place`; the ids must differ."""
        first, rest = self.take(slice(place)), self.take(slice(place, None))
        parts = (first, other, rest)
        return Records(*(torch.cat([getattr(p, f) for p in parts]) for f in ("images", "labels", "ids")))

    def views(self, recipe: views.Recipe, **how: Any) -> views.Views:
        """`make_views` of the records."""
        return views.make_views(self.images, self.labels, self.ids, recipe, **how)


Step = Callable[[Records, int, int], Tensor]
Release = Callable[[Records, int, int], Tensor]


def head_step(
    recipe: views.Recipe,
    *,
    num_classes: int,
    clip_norm: float = 1.0,
    encoder: models.Encoder | None = None,
    public: views.PublicImages | None = None,
    weights: tuple[Tensor, Tensor] | None = None,
) -> Step:
    """The clipped sum of a linear head: `make_views`, an encoder (default: the pixels themselves), `clipped_head_sums`.

    `weights` [num_classes, D], [num_classes] default to `duel`. The sum is that of `heads.train_heads`, weight then bias."""

    def step(records: Records, seed: int, number: int) -> Tensor:
        made = records.views(recipe, num_classes=num_classes, seed=seed, step=number, public=public)
        features = made.images.flatten(2)
        if encoder is not None:
            features = encoder.features(made.images.flatten(0, 1)).reshape(*made.targets.shape[:2], encoder.dim)
        w, b = weights or duel(num_classes, features.shape[2])
        row = torch.full((1, recipe.views), 1 / recipe.views, dtype=torch.float64)
        sums = clipping.clipped_head_sums(features, made.targets, w[None], b[None], torch.tensor([clip_norm]), row)
        return torch.cat([sums.weights.flatten(), sums.biases.flatten()])

    return step


def duel(num_classes: int, dim: int) -> tuple[Tensor, Tensor]:
    """Weights under which only classes 0 and 1 are probable: the gradients of their examples point opposite ways."""
    biases = torch.full((num_classes,), -20.0)
    biases[:2] = 0
    return torch.zeros(num_classes, dim), biases


def head_oracle(
    recipe: views.Recipe, *, num_classes: int, clip_norm: float = 1.0, public: views.PublicImages | None = None
) -> Step:
    """The same sum on pixels, slow and obvious: float64, autograd on the mean loss of one example, clip, add up."""

    def step(records: Records, seed: int, number: int) -> Tensor:
        made = records.views(recipe, num_classes=num_classes, seed=seed, step=number, public=public)
        w, b = (t.double().requires_grad_() for t in duel(num_classes, made.images[0, 0].numel()))
        total = torch.zeros(w.numel() + b.numel(), dtype=torch.float64)
        for x, y in zip(made.images.double().flatten(2), made.targets.double(), strict=True):
            loss = -(y * torch.log_softmax(x @ w.T + b, dim=1)).sum(1).mean()
            gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, (w, b))])
            total += gradient * min(1.0, clip_norm / float(gradient.norm()))
        return total

    return step


def network_step(
    model: nn.Module,
    recipe: views.Recipe,
    *,
    num_classes: int,
    clip_norm: float = 1.0,
    public: views.PublicImages | None = None,
    engine: str = "auto",
    physical_batch: int | None = None,
    autocast: torch.dtype | None = None,
) -> Step:
    """The clipped sum over all weights of a network, by `clipped_gradient_sum`."""

    def step(records: Records, seed: int, number: int) -> Tensor:
        made = records.views(recipe, num_classes=num_classes, seed=seed, step=number, public=public)
        how: dict[str, Any] = {"physical_batch": physical_batch, "autocast": autocast}
        done = clipping.clipped_gradient_sum(model, *made, clip_norm, engine, **how)
        return torch.cat([g.flatten() for g in done.grads.values()])

    return step


def noisy(step: Step, deviation: float, copies: int = 20) -> Release:
    """Releases that share a sum: that of `step`, and `copies` times N(0, deviation^2) on every coordinate."""

    def release(records: Records, seed: int, number: int) -> Tensor:
        total = step(records, seed, number).double()
        noise = rng.generator(seed, "audit noise", number).standard_normal((copies, len(total)))
        return total + deviation * torch.from_numpy(noise)

    return release


def bank_release(
    recipe: views.Recipe,
    *,
    num_classes: int,
    noise_multiplier: float,
    clip_norm: float = 1.0,
    encoder: models.Encoder,
    public: views.PublicImages | None = None,
    copies: int = 250,
) -> Release:
    """One real step of `heads.train_heads`, noise included, read off the weights: a bank of `copies` heads, so as many
    releases with independent noise and the same views. They start at `duel`, like `head_step`; `number` must be 0."""
    initial = duel(num_classes, encoder.dim)
    rates = [1.0 + i / copies for i in range(copies)]  # heads must differ; the sum does not depend on the rate

    def release(records: Records, seed: int, number: int) -> Tensor:
        checks.require(number == 0, "number", number, "must be 0: a bank of one step; vary the seed")
        about: dict[str, Any] = {"clip_norm": clip_norm, "noise_multiplier": noise_multiplier, "recipe": recipe}
        bank = [heads.Head(learning_rate=rate, **about) for rate in rates]
        how: dict[str, Any] = {"sample_rate": 1.0, "steps": 1, "expected_batch": 1, "num_classes": num_classes}
        how |= {"ids": records.ids, "seed": seed, "public": public, "progress": False, "initial": initial}
        trained = heads.train_heads(encoder, records.images, records.labels, bank, **how)
        weights, biases = (initial[0] - trained.weights).flatten(1), initial[1] - trained.biases
        return torch.cat([weights, biases], dim=1).double() / torch.tensor(rates, dtype=torch.float64)[:, None]

    return release


def marked(encoder: models.Encoder, count: int, gain: float = 10.0) -> models.Encoder:
    """An encoder with `count` further features. Two more channels hold a constant number, 0 for ordinary images; number
    i > 0 turns feature i on, alone, with value `gain`. Crops, mirrors and mixtures of an image with itself keep it."""

    def features(images: Tensor) -> Tensor:
        digits = (images[:, -2:].mean(dim=(2, 3)) * 255).round().long()
        number = (digits[:, 0] * 256 + digits[:, 1]).clamp(0, count)
        marks = F.one_hot(number, count + 1)[:, 1:].float() * gain
        return torch.cat([encoder.features(images[:, :-2]) * (number == 0)[:, None], marks], dim=1)

    channels, name = tuple(c + 2 for c in encoder.channels), f"marked {encoder.name}"
    return replace(encoder, features=features, dim=encoder.dim + count, channels=channels, name=name)


def bank_run(
    train: data.ImageSet, encoder: models.Encoder, bank: Sequence[heads.Head], *, count: int, seed: int = 0, **how: Any
) -> Callable[[Bool[Tensor, " count"]], Float[Tensor, "R count"]]:
    """For `one_run`: train heads by `heads.train_heads`, told `how`, on a data set and on the canaries that are in.

    Canary i is an image that turns on feature i of `marked` and nothing else, so the gradients of two canaries are
    orthogonal but for the bias. Its score is the weight of its feature in the direction of its label: with public
    constants alone, the sum of all noisy gradients there. Recipes need k_diff = 0 (a mixture would be another number)."""
    checks.require(all(h.recipe.k_diff == 0 for h in bank), "bank", "k_diff > 0", "marks need recipes with k_diff=0")
    checks.require(10 <= count < 2**16, "count", count, "must lie in 10..65535")
    number = torch.arange(1, count + 1)
    channels, height, width = train.images.shape[1:]
    canaries = torch.zeros(count, channels + 2, height, width, dtype=torch.uint8)
    canaries[:, -2], canaries[:, -1] = (part.to(torch.uint8)[:, None, None] for part in (number // 256, number % 256))
    labels = number % train.num_classes
    private = F.pad(train.images, (0, 0, 0, 0, 0, 2))

    def run(included: Tensor) -> Tensor:
        images, of = torch.cat([private, canaries[included]]), torch.cat([train.labels, labels[included]])
        ids = torch.cat([torch.arange(len(train)), len(train) + number[included]])
        about: dict[str, Any] = {"num_classes": train.num_classes, "ids": ids, "seed": seed, "progress": False} | how
        trained = heads.train_heads(marked(encoder, count), images, of, bank, **about)
        marks = trained.weights[:, :, encoder.dim :]
        return marks[:, labels, torch.arange(count)] - marks.mean(dim=1)

    return run
