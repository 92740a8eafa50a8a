"""What a run is (`RunSpec`), what it is computed with (`ComputeFlags`), what came of it (`Result`)."""

import functools
import hashlib
import json
import re
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dpmix.core import accounting, checks, files, microbatch, views
from dpmix.core.clipping_network import ENGINES
from dpmix.core.processes import device_of
from dpmix.images import data
from dpmix.models import encoders

TRAIN_ON = ("all", "half-1", "half-2", "synthetic")
PUBLIC = ("synthetic", "synthetic-half", "half-2")
FEATURE_SCALING = ("none",)


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """All that may change the result of one private training run. Refuses bad values by name, before any work.

    Data and model: `dataset` and `model` as in `data.load` and `models.encoder` ("wrn-DEPTH-WIDTH" trains a network from
    scratch); `weights` a file for the encoder, `image_size` the side of the square that it takes (None: its own),
    `feature_scaling` what becomes of its features before the head. `train_on` says which examples are the private set
    ("half-1" and "half-2" are disjoint halves, fixed before anyone speaks of neighbours of one; "synthetic" the public
    images), `public` where `k_diff` images come from ("synthetic-half": at most as many of the synthetic ones as a half
    has), `pretrain_epochs` how long plain SGD runs on the synthetic images first (Table 6).
    `validation` is the share of the private set kept out of training, for choosing a learning rate.

    Privacy: `epsilon` (None: no noise, no guarantee), `delta`, `accountant`; adjacency is add/remove of one example.
    `population` is the N of q = batch_size / N and T = round(epochs * N / batch_size); by default the number of private
    examples less the validation share, which then counts as public knowledge.

    Training: `recipe` of views, drawn anew at every step or, with `redraw=False`, once an example; `clip_norm` C,
    `learning_rate` eta of Algorithm 1, expected `batch_size` B, `epochs`, `momentum`, `seed`. None draws the seed: it is
    kept in the local store only, and no other run can be released. No text of a spec shows a seed.
    Networks only: `weight_decay`, `ema_decay`, and `microbatch` size with `microbatch_mix` (Eq. (2)).
    """

    recipe: views.Recipe
    epsilon: float | None
    learning_rate: float
    dataset: str = "digits"
    model: str = "tiny-convnext"
    weights: str | None = None
    image_size: int | None = None
    feature_scaling: str = "none"
    redraw: bool = True
    train_on: str = "all"
    public: str = "synthetic"
    pretrain_epochs: float = 0.0
    validation: float = 0.2
    delta: float = 1e-5
    accountant: str = "rdp"
    population: int | None = None
    clip_norm: float = 1.0
    batch_size: int = 128
    epochs: float = 10.0
    seed: int | None = field(default=0, repr=False)
    momentum: float = 0.0
    weight_decay: float = 0.0
    ema_decay: float | None = None
    microbatch: int = 1
    microbatch_mix: str = "none"

    def __post_init__(self) -> None:
        for name in ("dataset", "model"):
            checks.require(isinstance(getattr(self, name), str), name, getattr(self, name), "must be a name")
        by_name = "must be a views.Recipe; the one of a method is views.METHODS[NAME]"
        checks.require(isinstance(self.recipe, views.Recipe), "recipe", self.recipe, by_name)
        if self.epsilon is not None:
            checks.positive("epsilon", self.epsilon, "; for example epsilon=2.0")
        good = isinstance(self.delta, float) and 0 < self.delta < 1
        checks.require(good, "delta", self.delta, "must lie strictly between 0 and 1, well below 1/N")
        for name in ("learning_rate", "clip_norm", "epochs"):
            checks.positive(name, getattr(self, name))
        checks.whole("batch_size", self.batch_size, 1)
        checks.whole("microbatch", self.microbatch, 1)
        checks.floats(self, "epsilon", "learning_rate", "clip_norm", "epochs", "validation", "pretrain_epochs", "momentum",
                      "weight_decay", "ema_decay")  # fmt: skip
        if self.population is not None:
            checks.whole("population", self.population, 1)
        if self.seed is not None:
            checks.whole("seed", self.seed)
        if self.image_size is not None:
            checks.whole("image_size", self.image_size, 1)
        checks.require(isinstance(self.redraw, bool), "redraw", self.redraw, "must be True or False")
        for name, options in (("accountant", accounting.ACCOUNTANTS), ("train_on", TRAIN_ON), ("public", PUBLIC),
                              ("feature_scaling", FEATURE_SCALING)):  # fmt: skip
            checks.one_of(name, getattr(self, name), options)
        said = "would mix private images in unprotected; it goes with train_on='half-1' only (Table 10)"
        checks.require(self.public != "half-2" or self.train_on == "half-1", "public", self.public, said)
        checks.require(0 <= self.validation < 1, "validation", self.validation, "must be a share in [0, 1)")
        checks.require(self.pretrain_epochs >= 0, "pretrain_epochs", self.pretrain_epochs, "must not be negative")
        checks.require(0 <= self.momentum < 1, "momentum", self.momentum, "must lie in [0, 1)")
        checks.require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "must not be negative")
        if self.ema_decay is not None:
            checks.require(0 < self.ema_decay < 1, "ema_decay", self.ema_decay, "must lie in (0, 1), or be None")
        if not self.dataset.startswith("folder:"):
            checks.one_of("dataset", self.dataset, data.NAMES)
        if not (self.from_scratch or self.model.startswith(("open_clip:", "timm:"))):
            checks.one_of("model", self.model, (*encoders.ENCODERS, "timm:NAME", "wrn-16-4"))
        if self.from_scratch:
            depth, width = map(int, self.model.split("-")[1:])
            said = "must be wrn-DEPTH-WIDTH with a depth of 6 n + 4 (10, 16, 22, ...) and a width of at least 1"
            checks.require(depth >= 10 and depth % 6 == 4 and width >= 1, "model", self.model, said)
        microbatch.check_mix(self.microbatch, self.microbatch_mix)
        said = "the partition is one of the whole training set; take train_on='all'"
        halved = self.train_on.startswith("half")
        checks.require(self.microbatch == 1 or not halved, "microbatch", self.microbatch, said)
        # What the other kind of run would leave unread is refused.
        unread = ("pretrain_epochs", "weights", "redraw", "feature_scaling") if self.from_scratch else (
            "weight_decay", "ema_decay", "microbatch", "microbatch_mix")  # fmt: skip
        kind = "a network from scratch" if self.from_scratch else "a linear head on a frozen encoder"
        for f in fields(self):
            if f.name in unread:
                value = getattr(self, f.name)
                checks.require(
                    value == f.default, f.name, value, f"means nothing for {kind}, {self.model!r}; leave it out"
                )

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "RunSpec":
        """The spec that `dataclasses.asdict` took apart."""
        return cls(**{**content, "recipe": views.Recipe(**content["recipe"])})

    @property
    def from_scratch(self) -> bool:
        """Whether every weight of a network is trained, rather than a linear head on a frozen encoder."""
        return re.fullmatch(r"wrn-\d+-\d+", self.model) is not None

    @property
    def uses_synthetic(self) -> bool:
        """Whether the synthetic images have a part in it."""
        mixed = self.recipe.k_diff > 0 and self.public.startswith("synthetic")
        return mixed or self.train_on == "synthetic" or self.pretrain_epochs > 0


@dataclass(frozen=True, kw_only=True)
class ComputeFlags:
    """All that may not change a result beyond floating-point rounding: where and how it is computed.

    `dtype` of encoders, and of a network's forward and backward; "auto" is bfloat16 on a GPU and float32 on a CPU. Norms,
    sums and noise are float32 in any case. `workers` passes run at a time, in processes of their own; by default as many
    as there are cores, and one on a GPU.
    """

    device: str = "auto"
    physical_batch: int | None = None
    dtype: str = "auto"
    engine: str = "auto"
    root: str = str(data.ROOT)
    cache: str = str(data.CACHE)
    checkpoint_seconds: float = 30.0
    progress: bool = True
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.workers is not None:
            checks.whole("workers", self.workers, 1)
        checks.one_of("dtype", self.dtype, ("auto", "float32", "bfloat16"))
        checks.one_of("engine", self.engine, ENGINES)
        said = "must not be negative"
        checks.require(self.checkpoint_seconds >= 0, "checkpoint_seconds", self.checkpoint_seconds, said)
        checks.require(
            re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is not None,
            "device",
            self.device,
            "must be 'auto', 'cpu' or 'cuda'",
        )
        if self.physical_batch is not None:
            checks.whole("physical_batch", self.physical_batch, 1)

    def where(self) -> torch.device:
        """The device: the first GPU if there is one (under torchrun, the process's own), unless named."""
        return device_of(("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device)

    def precision(self) -> torch.dtype:
        """`dtype` on this device."""
        fast = self.dtype == "bfloat16" or (self.dtype == "auto" and self.where().type == "cuda")
        return torch.bfloat16 if fast else torch.float32


@dataclass(frozen=True, kw_only=True)
class NonPrivateDiagnostics:
    """What was computed from private data without noise. For choosing and debugging; never part of a release."""

    validation_accuracy: float | None
    dropped_gradients: int
    train_examples: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run. `test_accuracy` (0..1) is that of the last step. `epsilon` holds each accountant's bound at spec.delta."""

    spec: RunSpec
    key: str
    test_accuracy: float
    epsilon: dict[str, float | None]
    noise_multiplier: float
    sample_rate: float
    steps: int
    divisor: float
    population: int
    diagnostics: NonPrivateDiagnostics
    timing: dict[str, Any]
    provenance: dict[str, Any]

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict) -> "Result":
        known = {f.name for f in fields(cls)}
        rest = {k: v for k, v in content.items() if k in known}
        return cls(
            **{
                **rest,
                "spec": RunSpec.from_json(content["spec"]),
                "diagnostics": NonPrivateDiagnostics(**content["diagnostics"]),
            }
        )


class Mechanism(NamedTuple):
    """What the accountant is asked about: derived from a spec and the public size N of the training set."""

    population: int
    sample_rate: float
    steps: int
    noise_multiplier: float


def mechanism(spec: RunSpec, n: int) -> Mechanism:
    """q, T and sigma of a run on `n` private examples, validation included. ValueError if B > N or epsilon is out of reach.

    A microbatch changes its clipped average by up to 2C when one example joins or leaves, so its noise is doubled
    (Section 2.1 of the paper); q and T then count microbatches.
    """
    population = round((1 - spec.validation) * n) if spec.population is None else spec.population
    allowed = f"must be at most the {population} training examples"
    checks.require(spec.batch_size <= population, "batch_size", spec.batch_size, allowed)
    if spec.epsilon is not None and spec.delta >= 1 / population:
        warnings.warn(f"delta={spec.delta}: is not below 1/N = {1 / population:.1e}; such a guarantee allows to publish "
                      "one example outright", stacklevel=2)  # fmt: skip
    steps = accounting.steps_for(n=population, batch_size=spec.batch_size, epochs=spec.epochs)
    q = spec.batch_size / population
    if spec.epsilon is None:
        return Mechanism(population, q, steps, 0.0)
    sigma = accounting.noise_multiplier(
        epsilon=float(spec.epsilon), delta=spec.delta, sample_rate=q, steps=steps, accountant=spec.accountant
    )
    return Mechanism(population, q, steps, sigma)


@functools.cache
def code_digest() -> str:
    """sha256 over the source of every room that can change a result, and over the public stand-ins."""
    here = Path(__file__).parents[1]
    rooms = [p for room in ("core", "images", "models", "runs") for p in sorted((here / room).glob("*.py"))]
    shipped = sorted(data.PUBLIC.glob("*.json"))
    return files.digest(*(p.name + hashlib.sha256(p.read_bytes()).hexdigest() for p in [*rooms, *shipped]))


def files_of(dataset: str, root: Path | str, synthetic: bool) -> str:
    """A digest over names, sizes and times of the files that may change behind a data set: the images of a folder, and
    with `synthetic` the synthetic ones of any data set but the digits, whose own are fixed. "" where there are none.

    It tells whether a stored result still is one of these files. It is no part of any name: names are public.
    """
    base = data.synthetic_folder(dataset, root)
    places = [base.parent / part for part in ("train", "test")] if dataset.startswith("folder:") else []
    places += [base] if synthetic and dataset != "digits" else []
    found = [p for place in places for p in sorted(place.rglob("*")) if p.is_file()]
    states = ((p, p.stat()) for p in found)
    parts = [f"{p.relative_to(base.parent).as_posix()} {s.st_size} {s.st_mtime_ns}" for p, s in states]
    return files.digest(*parts) if parts else ""


def key(spec: RunSpec) -> str:
    """The name of a result in the store: it covers the spec, the code and the content of the file that `weights` names.

    Pretrained weights of open_clip and timm are taken for what their name says (`models.encoder` compares a FILE.sha256).
    """
    weights = spec.weights or ""
    if weights not in ("", "random"):
        if not Path(weights).is_file():
            raise FileNotFoundError(
                f"weights={weights!r}: no such file; give a .safetensors file or a torch.save of tensors"
            )
        state = Path(weights).stat()
        weights = _content(weights, state.st_size, state.st_mtime_ns)
    return files.digest(json.dumps(asdict(spec), sort_keys=True), code_digest(), weights)[:32]


@functools.cache
def _content(path: str, size: int, changed: int) -> str:
    """sha256 of a file, read once for as long as its size and time stay."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
