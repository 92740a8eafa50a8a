"""What the runs of a pass share: images, looked up row by row where they lie, and the encoder."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from dpmix import models
from dpmix.core import checks, rng
from dpmix.images import data
from dpmix.images.image_cache import forget
from dpmix.images.overlap import refuse_overlap
from dpmix.runs.identity import Identity
from dpmix.runs.spec import ComputeFlags, RunSpec

SCALED = ("caltech101", "caltech256", "sun397", "pets")  # files of many sizes: decoded at the encoder's size


@dataclass(frozen=True)
class Rows:
    """Some rows of images `[n, C, H, W]`, as if they were a tensor: looked up when asked for, never copied before, and the
    memory that a map took for it given back."""

    images: Tensor
    rows: Int64[Tensor, " n"]

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.rows), *self.images.shape[1:]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, which: Any) -> Tensor:
        found = self.images[self.rows[which]]
        forget(self.images)
        return found


@dataclass(frozen=True)
class Part:
    """Some of the images of a set, with their labels. `rows` are their places in it, and their ids for keyed randomness."""

    whole: data.ImageSet
    rows: Int64[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, places: Int64[Tensor, " m"]) -> "Part":
        return Part(self.whole, self.rows[places])

    @property
    def images(self) -> Rows:
        return Rows(self.whole.images, self.rows)

    @property
    def labels(self) -> Int64[Tensor, " n"]:
        return self.whole.labels[self.rows]


@dataclass(frozen=True, kw_only=True)
class Material:
    """What the runs of a pass share. `pool` holds the private examples, validation included; `kept` and `held_out` are the
    places in it of those that are trained on, which are `train`, and of the others. `digest` is that of the splits."""

    pool: Part
    kept: Int64[Tensor, " n"]
    held_out: Int64[Tensor, " v"]
    train: Part
    test: Part
    public: data.ImageSet | Part | None
    synthetic: data.ImageSet | None
    encoder: models.Encoder | None
    digest: str


def validation_split(n: int, share: float, seed: int) -> tuple[Int64[Tensor, " t"], Int64[Tensor, " v"]]:
    """Places of training and validation examples: each is held out by a keyed coin of its own, with probability `share`. Coins
    do not look at each other, so removing an example moves nobody else: the training parts of neighbours are neighbours."""
    held_out = rng.generator(seed, "validation").random(n) < share
    return torch.from_numpy(np.flatnonzero(~held_out)), torch.from_numpy(np.flatnonzero(held_out))


# The passes of a table differ in seed and encoder: they share the data, which are never written to. The last arguments are
# digests of what lies behind the names, and tell images and weights before a change from those after it.


@lru_cache(maxsize=2)
def _load(dataset: str, root: str, image_size: int | None, cached: str, private: str) -> data.Splits:
    return data.load(dataset, root, image_size=image_size, cache=cached)


@lru_cache(maxsize=2)
def _load_public(dataset: str, root: str, size: int | None, cached: str, private: str, public: str) -> data.ImageSet:
    """The synthetic images, once it is known that none is a copy of a private one."""
    splits = _load(dataset, root, size, cached, private)
    images = data.public_images(dataset, root, like=splits.train, cache=cached)
    refuse_overlap(splits, images)
    for some in (splits.train, splits.test, images):
        forget(some.images)
    return images


@lru_cache(maxsize=1)
def _load_encoder(
    where: tuple[torch.device, torch.dtype, str], model: str, weights: str | None, image_size: int | None, content: str
) -> models.Encoder:
    device, dtype, engine = where
    return models.encoder(model, weights, image_size=image_size).to(device, dtype, engine=engine)


def prepare(group: Sequence[Identity], compute: ComputeFlags) -> Material:
    """Open and check everything that the runs of one pass need. Errors name what is missing and the remedy. Images stay where
    they lie: a memory map for those that were files."""
    spec, private = group[0].spec, group[0].private
    encoder, image_size = None, spec.image_size
    if not spec.from_scratch:
        where = compute.where(), compute.precision(), compute.encoder_engine
        encoder = _load_encoder(where, spec.model, spec.weights, spec.image_size, group[0].encoder)
        # Of a folder too: a size that one image can change would be a constant taken from private data.
        scaled = spec.dataset in SCALED or spec.dataset.startswith("folder:")
        image_size = encoder.image_size if scaled else None
    source = spec.dataset, compute.root, image_size, compute.cache, private
    splits = _load(*source)
    if encoder is not None:
        check_channels(spec, encoder, splits.train.images)
    users = [i.public for i in group if i.spec.uses_synthetic]
    synthetic = _load_public(*source, users[0]) if users else None
    order = rng.generator(spec.seed or 0, "halves").permutation(len(splits.train))
    half = {"half-1": _sorted(order[0::2]), "half-2": _sorted(order[1::2])}
    pool: data.ImageSet | None = synthetic if spec.train_on == "synthetic" else splits.train
    assert pool is not None
    everyone = Part(pool, half.get(spec.train_on, torch.arange(len(pool))))
    kept, held_out = validation_split(len(everyone), spec.validation, spec.seed or 0)
    checks.require(len(kept) > 0, "dataset", spec.dataset, "has no training examples after the validation split")
    public: data.ImageSet | Part | None = synthetic
    if spec.public == "half-2":
        public = Part(splits.train, half["half-2"])
    elif spec.public == "synthetic-half" and synthetic is not None:  # Table 10: D as large as S1
        order = rng.generator(spec.seed or 0, "public").permutation(len(synthetic))
        public = Part(synthetic, _sorted(order[: len(half["half-1"])]))
    test = Part(splits.test, torch.arange(len(splits.test)))
    about: dict[str, Any] = dict(public=public, synthetic=synthetic, encoder=encoder, digest=splits.digest)
    return Material(pool=everyone, kept=kept, held_out=held_out, train=everyone.at(kept), test=test, **about)


def check_channels(spec: RunSpec, encoder: models.Encoder, images: Tensor) -> None:
    """Refuse images of more or fewer channels than the encoder takes."""
    channels, takes = images.shape[1], " or ".join(map(str, encoder.channels))
    said = f"{spec.model} takes images of {takes} channel(s) and {spec.dataset} has {channels}; choose another model"
    checks.require(channels in encoder.channels, "model", spec.model, said)


def _sorted(places: np.ndarray) -> Int64[Tensor, " n"]:
    return torch.from_numpy(np.sort(places))
