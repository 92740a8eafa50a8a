"""Where the features of the views come from: the training loop asks a `Source` and does not know which one it has.

`FreshViews` makes and encodes the views of a step when they are asked for: Algorithm 1 to the letter, or, with
`redraw=False`, the same views of an example at every step. `models.stored` keeps the latter on disk.

Privacy does not care, as long as the numbers that draw them are secret or the example's own (`content_ids`): in both cases
the views of example i depend on example i and on public images only.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dpmix.core import checks, files, rng, views
from dpmix.core.independence import check_features
from dpmix.core.transforms import as_float

Scaling = tuple[Float[Tensor, " D"], Float[Tensor, " D"]]


@runtime_checkable
class Encoder(Protocol):
    """What training needs of a frozen encoder: `models.Encoder` has it. `features`: images float [n, C, H, W] in 0..1 ->
    float [n, `dim`], row i a function of image i alone."""

    @property
    def features(self) -> Callable[[Tensor], Tensor]: ...

    @property
    def dim(self) -> int: ...

    @property
    def channels(self) -> tuple[int, ...]: ...

    @property
    def name(self) -> str: ...


@runtime_checkable
class Source(Protocol):
    """Encoded views of `n` examples. `name` says what they are, and keeps the noise of runs on other views apart; `seconds`
    counts what they cost, by kind of work; features and targets are on `device`. `batch(places [b], step)`: features float32
    [b, K, D] and targets [b, K, num_classes] of the union's views, row i a function of example places[i], of public images
    and of (seed, step) alone."""

    n: int
    dim: int
    num_classes: int
    union: views.Union
    name: str
    device: torch.device
    seconds: dict[str, float]

    def batch(self, places: Int64[Tensor, " b"], step: int) -> tuple[Tensor, Tensor]: ...


class FreshViews:
    """Views made and encoded anew whenever they are asked for. `ids` name the examples for the keyed randomness.
    `redraw=False` keys the views without the step: an example has the same ones at every step. By default ids are places,
    which asks for a secret seed; of views that are drawn once, which many runs may share, they are `content_ids`.
    `scaling`, a mean and a scale of public images [D], is taken off the features and divided by. Raises ValueError on bad
    input, before any work."""

    def __init__(
        self,
        encoder: Encoder,
        images: views.Images,
        labels: Int64[Tensor, " n"],
        recipes: Sequence[views.Recipe],
        *,
        num_classes: int,
        seed: rng.Seed,
        public: views.PublicImages | None = None,
        ids: Int64[Tensor, " n"] | None = None,
        redraw: bool = True,
        scaling: Scaling | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        n = len(labels)
        allowed = f"must have as many examples as labels ({n}), and at least 1"
        checks.require(len(images) == n > 0, "images", len(images), allowed)
        as_float(images[:0])  # refuses what is neither bytes nor floats
        takes = f"{encoder.name} takes images of {' or '.join(map(str, encoder.channels))} channels"
        checks.require(images.shape[1] in encoder.channels, "images.shape[1]", images.shape[1], takes)
        if not getattr(encoder.features, "examined", False):
            check_features(encoder.features, tuple(images.shape[1:]), torch.device(device), f"encoder {encoder.name!r}")
        allowed = f"must lie in 0..{num_classes - 1}, by num_classes"
        for worst in (int(labels.min()), int(labels.max())):
            checks.require(0 <= worst < num_classes, "labels", worst, allowed)
        if any(r.k_diff for r in recipes):
            views.check_public(public, tuple(images.shape[1:]), num_classes)
        self.n, self.dim, self.num_classes, self.device = n, encoder.dim, num_classes, torch.device(device)
        self.union = views.make_union(list(dict.fromkeys(recipes)))
        self.encoder, self.images, self.labels, self.public = encoder, images, labels, public
        self.seed = rng.as_seed(seed)  # a fresh one is drawn once, so that views that are not redrawn stay
        self.ids = ids if ids is not None else torch.arange(n) if redraw else content_ids(images)
        self.redraw, self.scaling, self.seconds = redraw, scaling, {"views": 0.0, "encoder": 0.0}
        self.name = named(encoder.name, None if redraw else (self.seed, "image" if ids is None else "id"), scaling)

    def made(self, places: Int64[Tensor, " b"], step: int) -> views.Views:
        """The union's views of these examples, not yet encoded."""
        images, labels = self.images[places].to(self.device), self.labels[places].to(self.device)
        about: dict[str, Any] = dict(num_classes=self.num_classes, seed=self.seed, public=self.public)
        return self.union.make(images, labels, self.ids[places], step=step if self.redraw else None, **about)

    @torch.no_grad()
    def batch(self, places: Int64[Tensor, " b"], step: int) -> tuple[Tensor, Tensor]:
        tick = time.perf_counter()
        made = self.made(places, step)
        tick = lap(self.seconds, "views", tick)
        flat = self.encoder.features(made.images.flatten(0, 1)).float()
        features = scaled(flat.reshape(len(places), self.union.views, self.dim), self.scaling)
        lap(self.seconds, "encoder", tick)
        return features, made.targets


def content_ids(images: views.Images) -> Int64[Tensor, " n"]:
    """Ids that are the examples' own, by a digest of each one's pixels. A place in a list moves with every example before it;
    views that are keyed by places under a seed that somebody knows would change with it, for all."""
    parts = (images[rows].detach().flatten(1).contiguous() for rows in torch.arange(len(images)).split(1024))
    rows = (row for part in parts for row in part.view(torch.uint8).cpu().numpy())
    digests = (hashlib.sha256(row.data).digest()[:8] for row in rows)
    return torch.tensor([int.from_bytes(d, "little") >> 1 for d in digests], dtype=torch.int64)


def named(encoder: str, once: tuple[int, str] | None, scaling: Scaling | None) -> str:
    """The name of a source: that of its encoder, and what else decides its features (`once`: of views that are drawn once, the
    seed and what they are keyed by)."""
    constants = "" if scaling is None else f", scaled ({files.digest(*(v.numpy().tobytes() for v in scaling))[:16]})"
    drawn = "" if once is None else f", views drawn once ({files.digest(repr(('stored views', once)))[:16]})"
    return encoder + drawn + constants


def scaled(features: Float[Tensor, "*b D"], scaling: Scaling | None) -> Float[Tensor, "*b D"]:
    """(features - mean) / scale; as they are without a scaling."""
    if scaling is None:
        return features
    mean, scale = (v.to(features) for v in scaling)
    return (features - mean) / scale


def public_scaling(features: Float[Tensor, "m D"]) -> Scaling:
    """Constants that centre features and bring them to a mean square norm of 1, each dimension to the same deviation,
    from the features of public images. A dimension that hardly varies there is scaled as if it varied a hundredth of the
    average. Raises ValueError for fewer than two images."""
    checks.require(len(features) > 1, "public", len(features), "feature scaling needs at least two public images")
    mean, deviation = features.double().mean(0), features.double().std(0)
    least = (deviation.mean() / 100).clamp(min=torch.finfo(torch.float32).tiny)
    return mean.float(), (deviation.clamp(min=least) * features.shape[1] ** 0.5).float()


def lap(seconds: dict[str, float], name: str, since: float) -> float:
    """Add the time since `since` to a clock; the time now."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    now = time.perf_counter()
    seconds[name] = seconds.get(name, 0.0) + now - since
    return now


@torch.no_grad()
def encode(
    encoder: Encoder, images: views.Images, device: str | torch.device = "cpu", batch: int = 512
) -> Float[Tensor, "n D"]:
    """Features of images as they are, no augmentation: for evaluation."""
    rows = torch.arange(len(images)).split(batch)
    parts = [encoder.features(as_float(images[some].to(device))).float().cpu() for some in rows]
    return torch.cat(parts) if parts else torch.zeros(0, encoder.dim)
