"""Fréchet distances between image sets, under Inception-v3 or any encoder of `models`.

Fit a Gaussian to the features of each set; their squared Fréchet distance is ``|m1 - m2|² + Tr(S1 + S2 - 2 (S1 S2)^½)``. With
the features of Inception-v3 that is the FID (Heusel et al. 2017). The formula and the network are pytorch-fid's; the
statistics are gathered here, batch by batch in float64, so that a set of any size fits.

The distance is biased: two small samples of one distribution are further apart than two large ones. Compare sets of equal
sizes, of many more images than the features have dimensions. Levels under different encoders do not compare at all.

Nothing is downloaded, and nothing here is private: a distance to the private images is a statistic of them without noise."""

import contextlib
import io
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from jaxtyping import Float, Num
from pytorch_fid import fid_score
from pytorch_fid import inception as network
from torch import Tensor, nn

from dpmix import models
from dpmix.core.checks import require
from dpmix.models.weights import WEIGHTS, read

INCEPTION = "inceptionv3"
FILE = "pt_inception-2015-12-05-6726825d.pth"  # the last digits begin the sha256 of the file


class Statistics(NamedTuple):
    """A Gaussian fitted to the features of `n` images: `mean` [D], `covariance` [D, D] (n - 1), float64, on the CPU."""

    n: int
    mean: Tensor
    covariance: Tensor


class Running:
    """Mean and covariance of features that come in batches, any number of them, from their sums in float64, about the mean
    of the first batch, so that no digits cancel."""

    def __init__(self) -> None:
        self.n, self.origin, self.total, self.squares = 0, torch.zeros(()), torch.zeros(()), torch.zeros(())

    def add(self, features: Float[Tensor, "n D"]) -> "Running":
        """Count these rows in. An empty batch changes nothing. ValueError for a number that is not finite."""
        good = int(features.isfinite().all(dim=1).sum())
        require(good == len(features), "rows", f"{len(features) - good} of {len(features)}", "must be finite")
        if len(features):
            features = features.double().cpu()
            self.origin = self.origin if self.n else features.mean(dim=0)
            features = features - self.origin
            self.total, self.squares = self.total + features.sum(dim=0), self.squares + features.T @ features
            self.n += len(features)
        return self

    def statistics(self) -> Statistics:
        """Of all rows so far. ValueError for fewer than two; a warning where they cannot fill a covariance matrix."""
        require(self.n >= 2, "images", self.n, "a distance needs at least 2 images in each set")
        mean = self.total / self.n
        if self.n <= len(mean):
            said = f"n = {self.n}, D = {len(mean)}: the covariance is singular and the distance biased "
            warnings.warn(said + "upwards; use more images, or an encoder with fewer dimensions", stacklevel=2)
        return Statistics(self.n, self.origin + mean, (self.squares - self.n * torch.outer(mean, mean)) / (self.n - 1))


@torch.no_grad()
def statistics(
    images: Num[Tensor, "n C H W"] | Iterable[Tensor], encoder: models.Encoder, *, batch_size: int = 512
) -> Statistics:
    """The statistics of a set of images: uint8, or floats in 0..1, as one tensor or as batches [n, C, H, W] of any sizes."""
    running = Running()
    for batch in [images] if isinstance(images, Tensor) else images:
        for part in batch.split(batch_size):
            running.add(encoder.features(part.float() / 255 if part.dtype == torch.uint8 else part))
    return running.statistics()


def distance(a: Statistics, b: Statistics) -> float:
    """The squared Fréchet distance of two Gaussians, as pytorch-fid computes it; rounding below zero is cut off."""
    require(a.mean.shape == b.mean.shape, "dimensions", (len(a.mean), len(b.mean)), "must be those of one encoder")
    with contextlib.redirect_stdout(io.StringIO()) as said:  # pytorch-fid prints where it had to help itself
        found = fid_score.calculate_frechet_distance(*(t.numpy() for t in (*a[1:], *b[1:])))
    if said.getvalue():
        warnings.warn(f"pytorch-fid: {said.getvalue().strip()}", stacklevel=2)
    return max(float(found), 0.0)


class _Pooled(nn.Module):
    """pytorch-fid's Inception-v3, in its own input size and scaling, to its last pooled features."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "_Pooled":
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "n C H W"]) -> Float[Tensor, "n 2048"]:
        require(images.shape[1] in (1, 3), "channels", images.shape[1], f"encoder {INCEPTION!r} takes 1 or 3")
        weight = next(self.body.parameters())
        found = [self.body(p.to(weight).expand(-1, 3, -1, -1))[0].flatten(1) for p in images.split(64) if len(p)]
        return torch.cat(found).float() if found else images.new_zeros(0, 2048)


def encoder(name: str, image_size: int | None = None, weights: str | Path | None = None) -> models.Encoder:
    """Any encoder of `models` by name, or "inceptionv3", whose distance is the FID proper: 2,048 features; grey images become
    three equal channels. Its weights are read from data/weights/, or from the file `weights`, as tensors only.
    FileNotFoundError says what to fetch and where to put it; ValueError names a file that is damaged or holds something else."""
    if name != INCEPTION:
        return models.encoder(name, weights, image_size=image_size)
    path = WEIGHTS / FILE if weights is None else Path(weights)
    if not path.is_file():
        place = f"{network.FID_WEIGHTS_URL} and save it as data/weights/{FILE}; 'tiny-vit' works now"
        raise FileNotFoundError(f"encoder={INCEPTION!r}: weights not on disk; fetch {place}")
    state = read(path)
    try:
        # pytorch-fid fetches its weights from within its constructor: there, they are handed what was read instead.
        with mock.patch.object(network, "load_state_dict_from_url", lambda *_, **__: state):
            body = network.InceptionV3()
    except RuntimeError as error:
        wrong = "not the weights of pytorch-fid's Inception-v3; fetch it again"
        raise ValueError(f"weights={str(path)!r}: {wrong}") from error
    return models.Encoder(_Pooled(body), 299, 2048, (1, 3), INCEPTION)
