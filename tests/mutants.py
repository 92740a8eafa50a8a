"""Algorithms that look like the method and are not. Never use them; the audits must catch each one.

Each is a step of `dpmix.audit.attacks` (`step(records, seed, number)` -> the sum to which noise for one clip norm is added) for a
linear head on raw pixels, written out in plain torch. `correct` is the method in the same words, for comparison: what a
mutant changes is one line. `EXPECTED` is the public expected batch size.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dpmix import audit
from dpmix.core import rng, views

EXPECTED = 6


def gradients(features: Tensor, targets: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy gradients of a linear head, one row for each of the leading indices: [..., num_classes (D + 1)]."""
    w, b = weights
    delta = (features @ w.T + b).softmax(dim=-1) - targets
    return torch.cat([(delta[..., :, None] * features[..., None, :]).flatten(-2), delta], dim=-1)


def clip(rows: Tensor, clip_norm: float) -> Tensor:
    """Each row, shortened to `clip_norm` where it is longer; zero where it is not finite."""
    rows = rows.masked_fill(~rows.isfinite().all(dim=-1, keepdim=True), 0.0)
    return rows * (clip_norm / rows.norm(dim=-1, keepdim=True)).clamp(max=1.0)


class Mutants:
    """The algorithms for one recipe. `MUTANTS` names the wrong ones."""

    def __init__(self, recipe: views.Recipe, *, num_classes: int, clip_norm: float = 1.0, public=None) -> None:
        self.recipe, self.num_classes, self.clip_norm, self.public = recipe, num_classes, clip_norm, public

    def per_view(self, records: audit.Records, seed: int, number: int) -> Tensor:
        """Gradients [b, K, p] of all views."""
        made = self.views(records, seed, number)
        features = made.images.flatten(2)
        return gradients(features, made.targets, audit.duel(self.num_classes, features.shape[2]))

    def views(self, records: audit.Records, seed: int, number: int) -> views.Views:
        return views.make_views(
            records.images, records.labels, records.ids, self.recipe,
            num_classes=self.num_classes, seed=seed, step=number, public=self.public,
        )  # fmt: skip

    def correct(self, records: audit.Records, seed: int, number: int) -> Tensor:
        """Average the views of an example, clip, add up."""
        return clip(self.per_view(records, seed, number).mean(1), self.clip_norm).sum(0)

    def mixup_across_examples(self, records: audit.Records, seed: int, number: int) -> Tensor:
        """Ordinary mixup: every example is blended with a random other one of the batch. Partners see each other."""
        if not len(records):
            return self.correct(records, seed, number)
        draws = [rng.generator(seed, "partner", number, int(i)).random(2) for i in records.ids]
        partner = torch.tensor([int(u * len(records)) for u, _ in draws])
        lam = torch.tensor([0.5 * u for _, u in draws], dtype=torch.float32)
        images, targets = self.views(records, seed, number)
        w = lam[:, None, None, None, None]
        blend = (
            w * images + (1 - w) * images[partner],
            lam[:, None, None] * targets + (1 - lam)[:, None, None] * targets[partner],
        )
        features = blend[0].flatten(2)
        rows = gradients(features, blend[1], audit.duel(self.num_classes, features.shape[2]))
        return clip(rows.mean(1), self.clip_norm).sum(0)

    def views_as_examples(self, records: audit.Records, seed: int, number: int) -> Tensor:
        """Every view is clipped and counted as an example of its own."""
        return clip(self.per_view(records, seed, number).flatten(0, 1), self.clip_norm).sum(0)

    def microbatch_pairs(self, records: audit.Records, seed: int, number: int) -> Tensor:
        """Examples 2i and 2i + 1 are averaged before clipping. `dpmix.core.microbatch` doubles the noise for that."""
        own = self.per_view(records, seed, number).mean(1)
        pairs = (records.ids // 2).unique()
        rows = [own[records.ids // 2 == pair].mean(0) for pair in pairs]
        return clip(torch.stack(rows), self.clip_norm).sum(0) if rows else own.sum(0)

    def batch_norm(self, records: audit.Records, seed: int, number: int) -> Tensor:
        """A batch-normalised layer in front of the head, in training mode; gradients of the head, clipped per example."""
        images, targets = self.views(records, seed, number)
        features = images.flatten(2)
        weights = audit.duel(self.num_classes, features.shape[2])
        if features.shape[0] * features.shape[1] > 1:
            layer = nn.BatchNorm1d(features.shape[2], affine=False).train()
            features = layer(features.flatten(0, 1)).view_as(features)
        return clip(gradients(features, targets, weights).mean(1), self.clip_norm).sum(0)

    def private_statistics(self, records: audit.Records, seed: int, number: int) -> Tensor:
        """Pixels are standardised by mean and deviation "of the data set", computed on the private images."""
        images, targets = self.views(records, seed, number)
        if len(records):
            std, mean = torch.std_mean(records.images.float().nan_to_num(), correction=0)
            images = (images - mean) / (std + 1e-3)
        features = images.flatten(2)
        rows = gradients(features, targets, audit.duel(self.num_classes, features.shape[2]))
        return clip(rows.mean(1), self.clip_norm).sum(0)

    def realised_divisor(self, records: audit.Records, seed: int, number: int) -> Tensor:
        """The mean over the examples that came, in the units of a sum with noise for the expected number."""
        return self.correct(records, seed, number) * (EXPECTED / max(1, len(records)))

    def clip_then_average(self, records: audit.Records, seed: int, number: int) -> Tensor:
        """Each view is clipped, then they are averaged. Private, and not the method."""
        return clip(self.per_view(records, seed, number), self.clip_norm).mean(1).sum(0)


def noise_per_chunk(step: audit.Step, deviation: float, physical_batch: int = 4, copies: int = 20) -> audit.Release:
    """Releases with noise on every physical batch instead of once: how many there are shows in the noise."""

    def release(records: audit.Records, seed: int, number: int) -> Tensor:
        total = step(records, seed, number).double().expand(copies, -1)
        for chunk in range(0, len(records), physical_batch):
            noise = rng.generator(seed, "chunk", number, chunk).standard_normal(total.shape)
            total = total + deviation * torch.from_numpy(noise)
        return total

    return release


# How many clip norms one more example moves the sum, at least, where the audit looks for it. The noise is for 1.
MUTANTS: dict[str, float] = {
    "mixup_across_examples": 1.5,
    "views_as_examples": 3.9,  # K = 4 in the tests
    "microbatch_pairs": 1.8,
    "batch_norm": 1.5,
    "private_statistics": 1.5,
    "realised_divisor": 1.5,
}
SAFE_BUT_DIFFERENT = ("clip_then_average",)
Named = Callable[[audit.Records, int, int], Tensor]
