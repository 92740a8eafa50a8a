"""What a run is (`RunSpec`), what it is computed with (`ComputeFlags`), and the mechanism that follows from it."""

import re
import warnings
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch

from dpmix.core import accounting, checks, microbatch, views
from dpmix.core.clipping_network import ENGINES
from dpmix.core.precision import bfloat16_is_fast
from dpmix.core.processes import device_of
from dpmix.images import data
from dpmix.models import encoders
from dpmix.models.engine import ENGINES as ENCODER_ENGINES

MEANINGFUL = 10.0  # the largest epsilon of which anybody could say what it promises
NETWORK = re.compile(r"wrn-(\d+)-(\d+)")
OPTIONS = {
    "accountant": accounting.ACCOUNTANTS,
    "train_on": ("all", "half-1", "half-2", "synthetic"),
    "public": ("synthetic", "synthetic-half", "half-2"),
    "feature_scaling": ("none", "public"),
}
SHARES = {"validation": "must be a share in [0, 1)", "momentum": "must lie in [0, 1)"}
# What a run of the other kind would leave unread.
FOR_HEADS = ("weights", "pretrain_epochs", "redraw", "feature_scaling")
FOR_NETWORKS = ("weight_decay", "ema_decay", "microbatch", "microbatch_mix")


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """All that may change the result of one private training run. Refuses bad values by name, before any work.

    Data and model: `dataset` and `model` as in `data.load` and `models.encoder` ("wrn-DEPTH-WIDTH" trains a network from
    scratch); `weights` a file for the encoder, `image_size` the side of the square that it takes (None: its own),
    `feature_scaling` what becomes of its features before the head ("public": centred and scaled by constants of the
    synthetic images). `train_on` says which examples are the private set
    ("half-1" and "half-2" are disjoint halves, fixed before anyone speaks of neighbours of one, and never released; "synthetic"
    the public images), `public` where `k_diff` images come from ("synthetic-half": at most as many of the synthetic ones
    as a half has), `pretrain_epochs` how long plain SGD runs on the synthetic images first (Table 6).
    `validation` is the share of the private set kept out of training, for choosing a learning rate.

    Privacy: `epsilon` (None: no noise, no guarantee), `delta`, `accountant`; adjacency is add/remove of one example.
    `population` is the N of q = batch_size / N and T = round(epochs * N / batch_size); by default the number of private
    examples less the validation share, which then counts as public knowledge.

    Training: `recipe` of views, drawn anew at every step or, with `redraw=False`, once an example; `clip_norm` C,
    `learning_rate` eta of Algorithm 1, expected `batch_size` B, `epochs`, `momentum`, `seed`. None draws the seed: it is
    kept in the local store only, and no other run can be released. No text of a spec shows a seed. Networks only:
    `weight_decay`, `ema_decay`, and `microbatch` size with `microbatch_mix` (Eq. (2))."""

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
        self._check_kinds()
        self._check_ranges()
        for name, options in OPTIONS.items():
            checks.one_of(name, getattr(self, name), options)
        if not self.dataset.startswith("folder:"):
            checks.one_of("dataset", self.dataset, data.NAMES)
        if self.from_scratch:
            depth, width = self.network
            allowed = "must be wrn-DEPTH-WIDTH with a depth of 6 n + 4 (10, 16, 22, ...) and a width of at least 1"
            checks.require(depth >= 10 and depth % 6 == 4 and width >= 1, "model", self.model, allowed)
        elif not self.model.startswith(("open_clip:", "timm:")):
            checks.one_of("model", self.model, (*encoders.ENCODERS, "timm:NAME", "wrn-16-4"))
        self._check_combinations()

    def _check_kinds(self) -> None:
        for name in ("dataset", "model"):
            checks.require(isinstance(getattr(self, name), str), name, getattr(self, name), "must be a name")
        by_name = "must be a views.Recipe; the one of a method is views.METHODS[NAME]"
        checks.require(isinstance(self.recipe, views.Recipe), "recipe", self.recipe, by_name)
        checks.require(isinstance(self.redraw, bool), "redraw", self.redraw, "must be True or False")
        may_be_absent = ("population", "image_size", "seed")
        for name in ("batch_size", "microbatch", *may_be_absent):
            value = getattr(self, name)
            if value is not None or name not in may_be_absent:
                checks.whole(name, value, 0 if name == "seed" else 1)
                object.__setattr__(self, name, int(value))  # NumPy's are numbers too

    def _check_ranges(self) -> None:
        if self.epsilon is not None:
            checks.positive("epsilon", self.epsilon, "; for example epsilon=2.0")
        checks.floats(self, "delta")
        checks.require(0 < self.delta < 1, "delta", self.delta, "must lie strictly between 0 and 1, well below 1/N")
        numbers = ("learning_rate", "clip_norm", "epochs")
        for name in numbers:
            checks.positive(name, getattr(self, name))
            checks.single(name, getattr(self, name))
        checks.clip_norm(self.clip_norm)
        checks.floats(self, "epsilon", *numbers, *SHARES, "pretrain_epochs", "weight_decay", "ema_decay")
        for name, allowed in SHARES.items():
            checks.require(0 <= getattr(self, name) < 1, name, getattr(self, name), allowed)
        for name in ("pretrain_epochs", "weight_decay"):
            checks.require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        decay = self.ema_decay
        checks.require(decay is None or 0 < decay < 1, "ema_decay", decay, "must lie in (0, 1), or be None")

    def _check_combinations(self) -> None:
        why = "would mix private images in unprotected; it goes with train_on='half-1' only (Table 10)"
        checks.require(self.public != "half-2" or self.train_on == "half-1", "public", self.public, why)
        microbatch.check_mix(self.microbatch, self.microbatch_mix)
        why = "does not go with microbatches, whose fixed partition has a place for each private example; leave it out"
        checks.require(self.microbatch == 1 or self.population is None, "population", self.population, why)
        why = "the partition is one of the whole training set; take train_on='all'"
        checks.require(self.microbatch == 1 or self.train_on[:4] != "half", "microbatch", self.microbatch, why)
        unread = FOR_HEADS if self.from_scratch else FOR_NETWORKS
        kind = "a network from scratch" if self.from_scratch else "a linear head on a frozen encoder"
        for f in fields(self):
            value, why = getattr(self, f.name), f"means nothing for {kind}, {self.model!r}; leave it out"
            checks.require(f.name not in unread or value == f.default, f.name, value, why)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "RunSpec":
        """The spec that `dataclasses.asdict` took apart."""
        return cls(**{**content, "recipe": views.Recipe(**content["recipe"])})

    @property
    def from_scratch(self) -> bool:
        """Whether every weight of a network is trained, rather than a linear head on a frozen encoder."""
        return NETWORK.fullmatch(self.model) is not None

    @property
    def network(self) -> tuple[int, int]:
        """Depth and width of a network from scratch."""
        found = NETWORK.fullmatch(self.model)
        assert found is not None
        return int(found[1]), int(found[2])

    @property
    def uses_synthetic(self) -> bool:
        """Whether the synthetic images have a part in it."""
        mixed = self.recipe.k_diff > 0 and self.public.startswith("synthetic")
        return mixed or self.train_on == "synthetic" or self.pretrain_epochs > 0 or self.feature_scaling == "public"


@dataclass(frozen=True, kw_only=True)
class ComputeFlags:
    """All that may not change a result beyond floating-point rounding: where and how it is computed.

    `dtype` of encoders, and of a network's forward and backward; "auto" is bfloat16 on a GPU and on a CPU with instructions
    for it (AMX, AVX512-BF16), else float32. Norms, sums and noise are float32 in any case. `encoder_engine` runs frozen
    encoders: "auto" is OpenVINO on a CPU, PyTorch elsewhere. `cache` is private: stored views (`redraw=False`) lie there too.
    `workers` passes run at a time, in processes of their own; by default as many as there are cores, and one on a GPU."""

    device: str = "auto"
    physical_batch: int | None = None
    dtype: str = "auto"
    engine: str = "auto"
    encoder_engine: str = "auto"
    root: str = str(data.ROOT)
    cache: str = str(data.CACHE)
    checkpoint_seconds: float = 30.0
    progress: bool = True
    workers: int | None = None

    def __post_init__(self) -> None:
        for name in ("workers", "physical_batch"):
            if getattr(self, name) is not None:
                checks.whole(name, getattr(self, name), 1)
        known = {"dtype": ("auto", "float32", "bfloat16"), "engine": ENGINES, "encoder_engine": ENCODER_ENGINES}
        for name, options in known.items():
            checks.one_of(name, getattr(self, name), options)
        seconds, named = self.checkpoint_seconds, re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device)
        checks.require(seconds >= 0, "checkpoint_seconds", seconds, "must not be negative")
        checks.require(named is not None, "device", self.device, "must be 'auto', 'cpu' or 'cuda'")

    def where(self) -> torch.device:
        """The device: the first GPU if there is one (under torchrun, the process's own), unless named."""
        return device_of(("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device)

    def precision(self) -> torch.dtype:
        """`dtype` on this device."""
        fast = self.dtype == "bfloat16" or (self.dtype == "auto" and bfloat16_is_fast(self.where()))
        return torch.bfloat16 if fast else torch.float32


class Mechanism(NamedTuple):
    """What the accountant is asked about: derived from a spec and the public size N of the training set."""

    population: int
    sample_rate: float
    steps: int
    noise_multiplier: float


def no_meaningful_guarantee(epsilon: float, delta: float, population: int) -> list[str]:
    """Why (epsilon, delta) would protect nobody among `population` examples, in plain words; empty where it may."""
    found = []
    if delta >= 1 / population:
        said = "such a guarantee allows to publish one example outright and is no meaningful one"
        found.append(f"delta={delta:g}: is not below 1/N = {1 / population:.1e}; {said}")
    if epsilon > MEANINGFUL:
        said = f"one example may make a model e^{epsilon:.3g} times as likely, which is no meaningful guarantee"
        found.append(f"epsilon={epsilon:.3g}: is above {MEANINGFUL:g}; {said}")
    return found


def mechanism(spec: RunSpec, n: int) -> Mechanism:
    """q, T and sigma of a run on `n` private examples, validation included. ValueError if B > N or epsilon is out of reach. A
    microbatch changes its clipped average by up to 2C when one example joins or leaves, so its noise is doubled (Section 2.1
    of the paper); q and T then count microbatches. Warns of a guarantee that would mean nothing."""
    population = round((1 - spec.validation) * n) if spec.population is None else spec.population
    allowed = f"must be at most the {checks.counted(population, 'training example')}"
    checks.require(spec.batch_size <= population, "batch_size", spec.batch_size, allowed)
    steps = accounting.steps_for(n=population, batch_size=spec.batch_size, epochs=spec.epochs)
    q = spec.batch_size / population
    if spec.epsilon is None:
        return Mechanism(population, q, steps, 0.0)
    asked: dict[str, Any] = dict(epsilon=spec.epsilon, delta=spec.delta, sample_rate=q, steps=steps)
    sigma = accounting.noise_multiplier(**asked, accountant=spec.accountant)
    for why in no_meaningful_guarantee(spec.epsilon, spec.delta, population):
        warnings.warn(why, stacklevel=2)
    return Mechanism(population, q, steps, sigma)


def epsilons(spec: RunSpec, m: Mechanism) -> dict[str, float | None]:
    """Each accountant's epsilon at `spec.delta`; None without noise, and for an accountant that cannot say (ValueError where it
    is `spec.accountant` itself). Of microbatches these bound a movement by 2C; "pair" is what the pair of neighbours spends
    that there really is, by PLD. Asked before training, so that what only a privacy card needs never costs a run."""
    asked: dict[str, Any] = dict(sample_rate=m.sample_rate, steps=m.steps, delta=spec.delta)
    asked |= dict(noise_multiplier=m.noise_multiplier)
    ways: dict[str, dict[str, Any]] = {name: {"accountant": name} for name in accounting.ACCOUNTANTS}
    if spec.microbatch > 1:
        deviation = microbatch.sensitivity(spec.microbatch) * m.noise_multiplier
        ways["pair"] = {"accountant": "pld", "neighbours": "change", "noise_multiplier": deviation}
    found: dict[str, float | None] = dict.fromkeys(ways)
    for name, how in ways.items() if m.noise_multiplier else ():
        try:
            found[name] = accounting.epsilon_spent(**asked | how)
        except (ValueError, ArithmeticError) as error:
            if name == spec.accountant:
                raise ValueError(f"accountant={name!r}: has no epsilon at delta={spec.delta:g} ({error})") from error
    return found
