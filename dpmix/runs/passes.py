"""One pass, from runs that share it to results: training, evaluation, provenance."""

import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpmix.core import accounting, heads, network, rng, views
from dpmix.core.sources import FreshViews, Scaling, Source, public_scaling
from dpmix.images import data
from dpmix.models import encoders
from dpmix.models.stored import StoredViews
from dpmix.models.wide_resnet import wide_resnet
from dpmix.runs.identity import Identity, code_digest
from dpmix.runs.material import Material, Part
from dpmix.runs.result import NonPrivateDiagnostics, Result
from dpmix.runs.spec import ComputeFlags, Mechanism, RunSpec

LIBRARIES = (
    "torch", "torchvision", "timm", "open_clip_torch", "Pillow", "opacus", "dp-accounting", "numpy", "scipy", "scikit-learn",
)  # fmt: skip

AS_IT_IS = views.Recipe(k_base=1, transform="none")
DRAWN_ONCE = 0  # the seed of stored views; no secret, since the guarantee holds for any views of an example's own

Done = tuple[Result, dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A run that is to be computed. `name` is its result's in the store, `seed_drawn` whether the software drew its seed;
    `mechanism` and `epsilon` are what the accountants said beforehand."""

    identity: Identity
    name: str
    seed_drawn: bool
    mechanism: Mechanism
    epsilon: dict[str, float | None]

    @property
    def spec(self) -> RunSpec:
        return self.identity.spec


def compute_heads(group: Sequence[Task], material: Material, compute: ComputeFlags, checkpoint: Path) -> Iterator[Done]:
    """All runs of a frozen encoder in one pass."""
    spec, start = group[0].spec, time.perf_counter()
    common: dict[str, Any] = dict(progress=compute.progress, checkpoint_seconds=compute.checkpoint_seconds)
    scaling = _scaling(spec, material, compute) if spec.feature_scaling == "public" else None
    of = heads_of(group, material)
    # Views follow a seed that was given, so that seeds differ in all; those of a drawn one are found again by the next run.
    once = DRAWN_ONCE if group[0].seed_drawn else training_seed(spec)
    source = source_of(spec, [head.recipe for head in of], material, compute, scaling, once)
    initial = _pretrain(spec, material, compute, scaling, common) if spec.pretrain_epochs else None
    _, sample_rate, steps, _ = group[0].mechanism
    bank = heads.train(
        source, of, expected_batch=spec.batch_size, steps=steps, sample_rate=sample_rate, seed=training_seed(spec),
        initial=initial, checkpoint=checkpoint, physical_batch=physical_batch(compute, [t.spec for t in group]), **common,
    )  # fmt: skip
    bank = bank if scaling is None else heads.unscaled(bank, scaling)
    return told(group, bank, material, compute, time.perf_counter() - start)


def physical_batch(compute: ComputeFlags, specs: Sequence[RunSpec] = ()) -> int:
    """How many examples' views are in memory at a time. Where no image is (stored views), small parts would cost more than
    their sums: more of them, as far as their padding stays a small share of a batch."""
    usual = 128 if compute.where().type == "cuda" else 32
    stored = [min(16 * usual // s.recipe.views, s.batch_size // 16) for s in specs if not s.redraw]
    return compute.physical_batch or max(usual, min(stored, default=0))


def told(
    group: Sequence[Task], bank: heads.Bank, material: Material, compute: ComputeFlags, seconds: float
) -> Iterator[Done]:
    """The results of a pass, once its heads are trained: evaluates them."""
    spec, device, scores, began = group[0].spec, compute.where(), dict[str, list](), time.perf_counter()
    for name, part, rows in (
        ("validation", material.pool, material.held_out), ("test", material.test, torch.arange(len(material.test)))
    ):  # fmt: skip
        features = features_of(spec, part, rows, material, compute)
        scores[name] = heads.accuracy(bank, features, part.labels[rows]).tolist() if len(rows) else [None] * len(group)
    timing = {"seconds": seconds + time.perf_counter() - began, "shares": bank.seconds, "views": bank.views,
              "heads": len(group), "views_per_second": bank.views / max(sum(bank.seconds.values()), 1e-9),
              "physical_batch": physical_batch(compute, [t.spec for t in group]), "dtype": str(compute.precision())}  # fmt: skip
    for r, task in enumerate(group):
        seen = NonPrivateDiagnostics(
            validation_accuracy=scores["validation"][r], dropped_gradients=bank.dropped,
            train_examples=len(material.train),
        )  # fmt: skip
        tensors = {"weight": bank.weights[r], "bias": bank.biases[r]}
        yield result(task, scores["test"][r], seen, timing, material, device), tensors


def heads_of(group: Sequence[Task], material: Material) -> list[heads.Head]:
    """The head of each run, with the noise of its mechanism, which is its own: keyed by its identity."""
    return [
        heads.Head(
            recipe=t.spec.recipe.for_data(material.train.flip), learning_rate=t.spec.learning_rate,
            clip_norm=t.spec.clip_norm, noise_multiplier=t.mechanism.noise_multiplier, momentum=t.spec.momentum,
            identity=t.identity.run,
        )
        for t in group
    ]  # fmt: skip


def source_of(
    spec: RunSpec,
    recipes: Sequence[views.Recipe],
    material: Material,
    compute: ComputeFlags,
    scaling: Scaling | None = None,
    once: int = DRAWN_ONCE,
) -> Source:
    """The encoded views of the training set: made at every step or, with `redraw=False`, read from the store in the cache.

    Stored views are those of all the private examples, drawn by the seed `once`: one store serves every budget, rate, batch
    size and number of epochs.
    """
    assert material.encoder is not None
    about: dict[str, Any] = dict(num_classes=material.train.num_classes, public=material.public, scaling=scaling,
                                 device=compute.where())  # fmt: skip
    if spec.redraw:
        train = material.train
        return FreshViews(
            material.encoder, train.images, train.labels, recipes, seed=training_seed(spec), ids=material.ids, **about
        )
    pool = material.pool
    store = StoredViews(material.encoder, pool.images, pool.labels, recipes, seed=once, ids=pool.rows,
                        folder=_folder(compute), progress=compute.progress, **about)  # fmt: skip
    return store.subset(material.kept)


def features_of(
    spec: RunSpec, part: data.ImageSet | Part, rows: Tensor, material: Material, compute: ComputeFlags
) -> Tensor:
    """Features [rows, D] of images as they are, for evaluation; with `redraw=False` from the store, for all of `part`."""
    assert material.encoder is not None
    if spec.redraw or len(rows) == 0:
        return heads.encode(material.encoder, Part(part.whole, part.rows[rows]).images if isinstance(part, Part) else
                            part.images[rows], compute.where())  # fmt: skip
    ids = part.rows if isinstance(part, Part) else None
    store = StoredViews(material.encoder, part.images, part.labels, [AS_IT_IS], num_classes=part.num_classes, seed=DRAWN_ONCE,
                        ids=ids, folder=_folder(compute), device=compute.where(), progress=compute.progress)  # fmt: skip
    return torch.cat([store.batch(some, 0)[0][:, 0].cpu() for some in rows.split(1024)])


def _folder(compute: ComputeFlags) -> Path:
    folder = Path(compute.cache).expanduser() / "views"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # the names below follow from the images
    return folder


def _scaling(spec: RunSpec, material: Material, compute: ComputeFlags) -> Scaling:
    """Constants of the synthetic images, of 5,000 at most, evenly spread."""
    public = material.synthetic
    assert public is not None
    some = torch.linspace(0, len(public) - 1, min(len(public), 5000)).long()
    return public_scaling(features_of(spec, Part(public, some), torch.arange(len(some)), material, compute))


def _public_seed(seed: int) -> int:
    """The seed of training on public images without noise. Its coins must not be those of the private steps: weights that
    tell which places joined a public batch would tell who joins the private one, and Poisson sampling would hide nobody."""
    return int(rng.generator(seed, "public training").integers(2**63))


def training_seed(spec: RunSpec) -> int:
    """The seed of a spec's own steps, be its training set private or synthetic."""
    assert spec.seed is not None
    return _public_seed(spec.seed) if spec.train_on == "synthetic" else spec.seed


def _pretrain(
    spec: RunSpec, material: Material, compute: ComputeFlags, scaling: Scaling | None, common: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """A head trained on the synthetic images by plain SGD (Table 6): no private image, no noise, no clipping."""
    public, encoder = material.synthetic, material.encoder
    assert public is not None and encoder is not None and spec.seed is not None
    batch = min(spec.batch_size, len(public))
    steps = accounting.steps_for(n=len(public), batch_size=batch, epochs=spec.pretrain_epochs)
    recipe = views.METHODS["self-aug"].for_data(public.flip)
    plain = heads.Head(recipe=replace(recipe, k_base=1), learning_rate=1.0, noise_multiplier=0.0, clip_norm=1e9)
    seed = _public_seed(spec.seed)
    source = FreshViews(encoder, public.images, public.labels, [plain.recipe], num_classes=public.num_classes, seed=seed,
                        scaling=scaling, device=compute.where())  # fmt: skip
    bank = heads.train(
        source, [plain], expected_batch=batch, steps=steps, sample_rate=batch / len(public), seed=seed,
        physical_batch=physical_batch(compute), **common,
    )  # fmt: skip
    return bank.weights[0], bank.biases[0]


def compute_network(
    group: Sequence[Task], material: Material, compute: ComputeFlags, checkpoint: Path
) -> Iterator[Done]:
    """A network from scratch: one training run, with checkpoints; under torchrun, on all processes together."""
    (task,) = group
    spec, m, device, train = task.spec, task.mechanism, compute.where(), material.train
    assert spec.seed is not None
    on_gpu, precision = device.type == "cuda", compute.precision()
    channels = int(train.images.shape[1])
    model = wide_resnet(*spec.network, train.num_classes, channels=channels, seed=spec.seed)
    physical = compute.physical_batch or (64 if on_gpu else 8)
    trained = network.train(
        model, train.images, train.labels, recipe=spec.recipe.for_data(train.flip), num_classes=train.num_classes,
        clip_norm=spec.clip_norm, noise_multiplier=m.noise_multiplier, learning_rate=spec.learning_rate,
        expected_batch=spec.batch_size / spec.microbatch, sample_rate=m.sample_rate, steps=m.steps, seed=spec.seed,
        ids=material.ids, places=material.n, identity=task.identity.run, public=material.public,
        momentum=spec.momentum, weight_decay=spec.weight_decay, ema_decay=spec.ema_decay,
        microbatch=spec.microbatch, microbatch_mix=spec.microbatch_mix, physical_batch=physical, engine=compute.engine,
        autocast=None if precision == torch.float32 else precision, channels_last=on_gpu,
        device=device, delta=spec.delta if m.noise_multiplier else None, checkpoint=checkpoint,
        checkpoint_every=max(1, min(50, m.steps // 10)), progress=compute.progress, spec={"network": spec.model},
    )  # fmt: skip
    model.load_state_dict(trained.state if trained.ema_state is None else trained.ema_state)
    test, held_out = (_accuracy(model, part) for part in (material.test, material.validation))
    assert test is not None
    seen = NonPrivateDiagnostics(
        validation_accuracy=held_out, dropped_gradients=trained.counters["non_finite"], train_examples=len(train)
    )
    timing = {"seconds": trained.seconds, "views": trained.counters["views"], "engine": trained.engine, "heads": 1,
              "views_per_second": trained.counters["views"] / max(trained.seconds, 1e-9), "physical_batch": physical,
              "dtype": str(precision), "channels_last": on_gpu}  # fmt: skip
    tensors = {name: t.float() for name, t in model.state_dict().items()}
    yield result(task, test, seen, timing, material, device), tensors


def _accuracy(model: torch.nn.Module, part: data.ImageSet | Part) -> float | None:
    return network.accuracy(model, part.images, part.labels) if len(part) else None


def result(
    task: Task, test_accuracy: float, seen: NonPrivateDiagnostics, timing: dict[str, Any], material: Material,
    device: torch.device,
) -> Result:  # fmt: skip
    """The record of a finished run, with where it came from."""
    spec, m, identity, encoder = task.spec, task.mechanism, task.identity, material.encoder
    made_of = {"private": identity.private, "public": identity.public, "encoder": identity.encoder}
    return Result(
        spec=spec, key=task.name, seed_drawn=task.seed_drawn, test_accuracy=test_accuracy, epsilon=task.epsilon,
        noise_multiplier=m.noise_multiplier, sample_rate=m.sample_rate, steps=m.steps,
        divisor=spec.batch_size / spec.microbatch, population=m.population, diagnostics=seen, timing=timing,
        provenance=provenance(device, material.digest) | {
            "contents": made_of, "classes": list(material.test.class_names),
            "images": list(material.test.images.shape[1:]),
            "encoder": None if encoder is None else encoder_of(identity, encoder.image_size),
        },
    )  # fmt: skip


def encoder_of(identity: Identity, image_size: int) -> dict[str, Any]:
    """Which encoder made the features, for strangers: without the folder where its file lies."""
    spec = identity.spec
    path = encoders.weights_of(spec.model, spec.weights)
    file = {"file": path, "sha256": None} if isinstance(path, str) else {"file": path.name, "sha256": identity.encoder}
    name = encoders.public_name(spec.model)
    return {"name": name, "image_size": image_size, **file, "package": encoders.package_of(spec.model)}


def provenance(device: torch.device, split_digest: str) -> dict[str, Any]:
    """Device, versions, commit and date of a computation."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"device": name, "date": date, "splits": split_digest, "code": code_digest(), **environment()}


@cache
def environment() -> dict[str, Any]:
    """Python, platform, versions of the libraries, and the commit."""
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
