"""One pass, from specs that share it to results: data, encoder, training, evaluation, provenance."""

import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from dpmix import models
from dpmix.core import accounting, checks, heads, network, rng, views
from dpmix.images import data
from dpmix.images.overlap import refuse_overlap
from dpmix.models.wide_resnet import wide_resnet
from dpmix.runs.spec import (
    ComputeFlags,
    Mechanism,
    NonPrivateDiagnostics,
    Result,
    RunSpec,
    code_digest,
    files_of,
    key,
    mechanism,
)

LIBRARIES = ("torch", "torchvision", "opacus", "dp-accounting", "numpy", "scipy", "scikit-learn")
SCALED = ("caltech256", "sun397", "pets")  # files of many sizes: decoded at the encoder's size

Done = tuple[Result, dict[str, Tensor]]


@dataclass(frozen=True)
class Material:
    """What the runs of a pass share. `n` counts the private examples, validation included; `ids` are the places of those
    that are trained on. `digest` is that of the splits, `files` that of `spec.files_of`, without and
    with the synthetic images."""

    n: int
    train: data.ImageSet
    ids: Int64[Tensor, " n"]
    validation: data.ImageSet
    test: data.ImageSet
    public: data.ImageSet | None
    synthetic: data.ImageSet | None
    encoder: models.Encoder | None
    digest: str
    files: dict[bool, str]

    def origin(self, group: Sequence[RunSpec]) -> dict[str, str]:
        """What a checkpoint of these runs must agree with to go on."""
        return {"data": self.digest, "files": self.files[any(s.uses_synthetic for s in group)]}


def pass_of(spec: RunSpec) -> RunSpec:
    """The spec with all that may differ between heads of one pass blanked: equal for runs that can share a pass."""
    if spec.from_scratch:
        return spec
    blank = views.Recipe(k_base=1)
    return replace(spec, recipe=blank, epsilon=None, learning_rate=1.0, clip_norm=1.0, accountant="rdp", delta=1e-5)


def validation_split(n: int, share: float, seed: int) -> tuple[Int64[Tensor, " t"], Int64[Tensor, " v"]]:
    """Places of training and validation examples: each is held out by a keyed coin of its own, with probability `share`.

    Coins do not look at each other, so removing an example removes it from its part and moves nobody else: the training
    parts of neighbouring data sets are neighbours.
    """
    held_out = rng.generator(seed, "validation").random(n) < share
    return torch.from_numpy(np.flatnonzero(~held_out)), torch.from_numpy(np.flatnonzero(held_out))


@lru_cache(
    maxsize=2
)  # the passes of a table differ in seed and encoder: they share the data, which are never written to
def _load(dataset: str, root: str, image_size: int | None, cached: str, state: str) -> data.Splits:
    """`state`, of `files_of`, keeps the images before a change of their files apart from those after it."""
    return data.load(dataset, root, image_size=image_size, cache=cached)


@lru_cache(maxsize=2)
def _load_public(
    dataset: str, root: str, image_size: int | None, cached: str, state: str, with_synthetic: str
) -> data.ImageSet:
    """The synthetic images, once it is known that none is a copy of a private one. The last two are of `files_of`."""
    splits = _load(dataset, root, image_size, cached, state)
    public = data.public_images(dataset, root, like=splits.train, cache=cached)
    refuse_overlap(splits, public)
    return public


def prepare(shared: RunSpec, group: Sequence[RunSpec], compute: ComputeFlags) -> Material:
    """Load and check everything that the pass needs, before any training. Errors name what is missing and the remedy."""
    encoder = None
    image_size = shared.image_size
    if not shared.from_scratch:
        encoder = models.encoder(shared.model, shared.weights, image_size=shared.image_size).to(
            compute.where(), compute.precision()
        )
        # Of a folder too: a size that one image can change would be a constant taken from private data.
        scaled = shared.dataset in SCALED or shared.dataset.startswith("folder:")
        image_size = encoder.image_size if scaled else None
        for name, wired in (("momentum", 0.0), ("redraw", True), ("feature_scaling", "none")):
            said = "is not wired up for heads yet"
            checks.require(getattr(shared, name) == wired, name, getattr(shared, name), said)
    needs = any(s.uses_synthetic for s in group)
    if needs:
        data.find_public(
            shared.dataset, compute.root
        )  # before the private images are decoded, which takes hours for some
    state = {synthetic: files_of(shared.dataset, compute.root, synthetic) for synthetic in {False, needs}}
    source = shared.dataset, compute.root, image_size, compute.cache, state[False]
    splits = _load(*source)
    whole = splits.train
    if encoder is not None:
        channels = int(whole.images.shape[1])
        takes = " or ".join(map(str, encoder.channels))
        fits = f"{shared.model} takes images of {takes} channel(s) and {shared.dataset} has {channels}; choose another model"
        checks.require(channels in encoder.channels, "model", shared.model, fits)
    halves = rng.generator(shared.seed or 0, "halves").permutation(len(whole))
    half = {"half-1": torch.from_numpy(np.sort(halves[0::2])), "half-2": torch.from_numpy(np.sort(halves[1::2]))}
    synthetic = _load_public(*source, state[True]) if needs else None
    if shared.train_on == "synthetic":
        assert synthetic is not None
        pool, ids = synthetic, torch.arange(len(synthetic))
    elif shared.train_on == "all":
        pool, ids = whole, torch.arange(len(whole))
    else:
        pool, ids = whole, half[shared.train_on]
    kept, held_out = validation_split(len(ids), shared.validation, shared.seed or 0)
    public = whole.subset(half["half-2"]) if shared.public == "half-2" else synthetic
    if public is not None and shared.public == "synthetic-half":  # Table 10: D as large as S1
        order = rng.generator(shared.seed or 0, "public").permutation(len(public))
        public = public.subset(torch.from_numpy(np.sort(order[: len(half["half-1"])])))
    train = pool.subset(ids[kept])
    checks.require(len(train) > 0, "dataset", shared.dataset, "has no training examples after the validation split")
    validation = pool.subset(ids[held_out])
    held = train, ids[kept], validation, splits.test, public, synthetic
    return Material(len(ids), *held, encoder, splits.digest, state)


def compute_heads(
    group: Sequence[RunSpec], material: Material, compute: ComputeFlags, checkpoint: Path
) -> Iterator[Done]:
    """All specs of a frozen encoder in one pass."""
    shared, encoder = group[0], material.encoder
    assert encoder is not None and shared.seed is not None
    device = compute.where()
    train = material.train
    mechanisms = [mechanism(spec, material.n) for spec in group]
    bank_heads = heads_of(group, mechanisms, material)
    start = time.perf_counter()
    physical = compute.physical_batch or 128
    common: dict[str, Any] = dict(num_classes=train.num_classes, physical_batch=physical, device=device,
                                  progress=compute.progress, checkpoint_seconds=compute.checkpoint_seconds)  # fmt: skip
    initial = _pretrain(shared, material, common) if shared.pretrain_epochs else None
    # Two specs may come to the same head (an epsilon given as 1 and as 1.0, say): it is trained once.
    unique = list(dict.fromkeys(bank_heads))
    bank = heads.train_heads(
        encoder, train.images, train.labels, unique, expected_batch=shared.batch_size, steps=mechanisms[0].steps,
        sample_rate=mechanisms[0].sample_rate, seed=training_seed(shared), public=material.public, initial=initial,
        ids=material.ids, checkpoint=checkpoint, identity=stream(shared), spec=material.origin(group), **common,
    )  # fmt: skip
    scores: dict[str, list] = {}
    for name, images in (("validation", material.validation), ("test", material.test)):
        features = heads.encode(encoder, images.images, device)
        scores[name] = heads.accuracy(bank, features, images.labels).tolist() if len(images) else [None] * len(unique)
    seconds = time.perf_counter() - start
    timing = {"seconds": seconds, "shares": bank.seconds, "views": bank.views, "heads": len(unique),
              "views_per_second": bank.views / max(sum(bank.seconds.values()), 1e-9), "physical_batch": physical,
              "dtype": str(compute.precision())}  # fmt: skip
    for spec, head, m in zip(group, bank_heads, mechanisms, strict=True):
        r = unique.index(head)
        diagnostics = NonPrivateDiagnostics(
            validation_accuracy=scores["validation"][r], dropped_gradients=bank.dropped, train_examples=len(train)
        )
        tensors = {"weight": bank.weights[r], "bias": bank.biases[r]}
        yield result(spec, m, scores["test"][r], diagnostics, timing, material, device), tensors


def heads_of(specs: Sequence[RunSpec], mechanisms: Sequence[Mechanism], material: Material) -> list[heads.Head]:
    """The head of each spec, with the noise of its mechanism."""
    flip = material.train.flip
    return [
        heads.Head(recipe=s.recipe.for_data(flip), learning_rate=s.learning_rate, clip_norm=s.clip_norm,
                   noise_multiplier=m.noise_multiplier)
        for s, m in zip(specs, mechanisms, strict=True)
    ]  # fmt: skip


def _public_seed(seed: int) -> int:
    """The seed of training on public images without noise. Its coins must not be those of the private steps: weights that
    tell which places joined a public batch would tell who joins the private one, and Poisson sampling would hide nobody."""
    return int(rng.generator(seed, "public training").integers(2**63))


def training_seed(spec: RunSpec) -> int:
    """The seed of a spec's own steps, be its training set private or synthetic."""
    assert spec.seed is not None
    return _public_seed(spec.seed) if spec.train_on == "synthetic" else spec.seed


def stream(spec: RunSpec) -> str:
    """What keeps the noise of runs with one seed apart, beyond the arguments of training: the part of the spec that says
    what is trained on which data, by name. Never the data themselves: neighbours must have the same noise."""
    names = ("dataset", "model", "weights", "train_on", "public", "pretrain_epochs", "validation", "population")
    return repr([(name, getattr(spec, name)) for name in names])


def _pretrain(shared: RunSpec, material: Material, common: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """A head trained on the synthetic images by plain SGD (Table 6): no private image, no noise, no clipping."""
    public, encoder = material.synthetic, material.encoder
    assert public is not None and encoder is not None and shared.seed is not None
    batch = min(shared.batch_size, len(public))
    steps = accounting.steps_for(n=len(public), batch_size=batch, epochs=shared.pretrain_epochs)
    recipe = views.METHODS["self-aug"].for_data(public.flip)
    plain = heads.Head(recipe=replace(recipe, k_base=1), learning_rate=1.0, noise_multiplier=0.0, clip_norm=1e9)
    bank = heads.train_heads(encoder, public.images, public.labels, [plain], expected_batch=batch, steps=steps,
                            sample_rate=batch / len(public), seed=_public_seed(shared.seed), **common)  # fmt: skip
    return bank.weights[0], bank.biases[0]


def compute_network(
    group: Sequence[RunSpec], material: Material, compute: ComputeFlags, checkpoint: Path
) -> Iterator[Done]:
    """A network from scratch: one spec, one training run, with checkpoints; under torchrun, on all processes together."""
    (spec,) = group
    assert spec.seed is not None
    train, m, device = material.train, mechanism(spec, material.n), compute.where()
    depth, width = map(int, spec.model.split("-")[1:])
    recipe = spec.recipe.for_data(train.flip)
    model = wide_resnet(depth, width, train.num_classes, channels=int(train.images.shape[1]), seed=spec.seed)
    physical = compute.physical_batch or (64 if device.type == "cuda" else 8)
    trained = network.train(
        model, train.images, train.labels, recipe=recipe, num_classes=train.num_classes, clip_norm=spec.clip_norm,
        noise_multiplier=m.noise_multiplier, learning_rate=spec.learning_rate,
        expected_batch=spec.batch_size / spec.microbatch, sample_rate=m.sample_rate, steps=m.steps, seed=spec.seed,
        ids=material.ids, places=material.n, identity=stream(spec),
        public=material.public, momentum=spec.momentum, weight_decay=spec.weight_decay, ema_decay=spec.ema_decay,
        microbatch=spec.microbatch, microbatch_mix=spec.microbatch_mix, physical_batch=physical, engine=compute.engine,
        autocast=torch.bfloat16 if compute.precision() == torch.bfloat16 else None,
        channels_last=device.type == "cuda", device=device,
        delta=spec.delta if m.noise_multiplier else None, checkpoint=checkpoint,
        checkpoint_every=max(1, min(50, m.steps // 10)), progress=compute.progress,
        spec=material.origin(group) | {"network": spec.model},
    )  # fmt: skip
    model.load_state_dict(trained.state if trained.ema_state is None else trained.ema_state)
    scores = [
        network.accuracy(model, s.images, s.labels) if len(s) else None for s in (material.test, material.validation)
    ]
    diagnostics = NonPrivateDiagnostics(
        validation_accuracy=scores[1], dropped_gradients=trained.counters["non_finite"], train_examples=len(train)
    )
    timing = {"seconds": trained.seconds, "views": trained.counters["views"], "engine": trained.engine, "heads": 1,
              "views_per_second": trained.counters["views"] / max(trained.seconds, 1e-9), "physical_batch": physical,
              "dtype": str(compute.precision()), "channels_last": device.type == "cuda"}  # fmt: skip
    assert scores[0] is not None
    tensors = {name: t.float() for name, t in model.state_dict().items()}
    yield result(spec, m, scores[0], diagnostics, timing, material, device), tensors


def result(
    spec: RunSpec, m: Mechanism, test_accuracy: float, diagnostics: NonPrivateDiagnostics, timing: dict, material: Material,
    device: torch.device,
) -> Result:  # fmt: skip
    """The record of a finished run, with epsilon by every accountant and where it came from."""
    return Result(
        spec=spec, key=key(spec), test_accuracy=test_accuracy, epsilon=_epsilons(m, spec.delta),
        noise_multiplier=m.noise_multiplier, sample_rate=m.sample_rate, steps=m.steps, divisor=spec.batch_size / spec.microbatch,
        population=m.population, diagnostics=diagnostics, timing=timing,
        provenance=provenance(device, material.digest) | {
            "classes": list(material.train.class_names), "files": material.files[spec.uses_synthetic]},
    )  # fmt: skip


def _epsilons(m: Mechanism, delta: float) -> dict[str, float | None]:
    if m.noise_multiplier == 0:
        return dict.fromkeys(accounting.ACCOUNTANTS)
    about = dict(noise_multiplier=m.noise_multiplier, delta=delta, sample_rate=m.sample_rate, steps=m.steps)
    return {a: accounting.epsilon_spent(accountant=a, **about) for a in accounting.ACCOUNTANTS}


def provenance(device: torch.device, split_digest: str) -> dict[str, Any]:
    """Device, versions, commit and date of a computation."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {
        "device": name, "date": datetime.now(UTC).isoformat(timespec="seconds"), "splits": split_digest,
        "code": code_digest(), **_environment(),
    }  # fmt: skip


@cache
def _environment() -> dict[str, Any]:
    here = Path(__file__).parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain", "--untracked-files=no")
    versions = {name: metadata.version(name) for name in ("dpmix", *LIBRARIES)}
    return {
        "python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}",
        "versions": versions, "commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status),
    }  # fmt: skip
