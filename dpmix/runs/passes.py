"""One pass, from runs that share it to results: training, evaluation, provenance."""

import contextlib
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpmix.core import accounting, files, heads, network, rng, views
from dpmix.core.checks import counted
from dpmix.core.sources import FreshViews, Scaling, Source, public_scaling
from dpmix.models import encoders
from dpmix.models.stored import StoredViews
from dpmix.models.wide_resnet import wide_resnet
from dpmix.runs.identity import Identity, code_digest
from dpmix.runs.material import Material, Part
from dpmix.runs.result import NonPrivateDiagnostics, Result
from dpmix.runs.spec import ComputeFlags, Mechanism, RunSpec

LIBRARIES = ["torch", "torchvision", "timm", "open_clip_torch", "Pillow", "opacus", "dp-accounting"]
LIBRARIES += ["numpy", "scipy", "scikit-learn"]
UNCHANGED = views.Recipe(k_base=1, transform="none")  # images as they are
# The seed of the stored views of runs whose own was drawn. It is no secret, since the guarantee holds for any views that are
# an example's own: such views are keyed by its content, not by a place that one image more would move.
DRAWN_ONCE = 0

Results = Iterator[tuple[Result, dict[str, Tensor]]]  # with the trained weights of each


class Task(NamedTuple):
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


def compute_heads(group: Sequence[Task], material: Material, compute: ComputeFlags, checkpoint: Path) -> Results:
    """All runs of a frozen encoder in one pass."""
    start, specs = time.perf_counter(), [task.spec for task in group]
    spec, m, public, scaling = specs[0], group[0].mechanism, material.synthetic, None
    if spec.feature_scaling == "public":  # constants of 5,000 of them at most, evenly spread
        assert public is not None
        some = torch.linspace(0, len(public) - 1, min(len(public), 5000)).long()
        scaling = public_scaling(features_of(spec, Part(public, some), torch.arange(len(some)), material, compute))
    bank, seed = heads_of(group, material), training_seed(spec)
    # Views follow a seed that was given, so that seeds differ in all; those of a drawn one are found again by the next run.
    once = None if group[0].seed_drawn else seed
    source = source_of(spec, [head.recipe for head in bank], material, compute, scaling, once)
    how: dict[str, Any] = dict(expected_batch=spec.batch_size, steps=m.steps, sample_rate=m.sample_rate, seed=seed)
    how |= dict(progress=compute.progress, checkpoint_seconds=compute.checkpoint_seconds, checkpoint=checkpoint)
    initial = _pretrained(spec, material, compute, scaling) if spec.pretrain_epochs else None
    trained = heads.train(source, bank, initial=initial, physical_batch=physical_batch(compute, specs), **how)
    trained = trained if scaling is None else heads.unscaled(trained, scaling)
    return evaluated(group, trained, material, compute, time.perf_counter() - start)


def physical_batch(compute: ComputeFlags, specs: Sequence[RunSpec] = ()) -> int:
    """How many examples' views are in memory at a time. Where no image is (stored views), small parts would cost more than
    their sums: more of them, as far as their padding stays a small share of a batch."""
    usual = 128 if compute.where().type == "cuda" else 32
    stored = [min(16 * usual // s.recipe.views, s.batch_size // 16) for s in specs if not s.redraw]
    return compute.physical_batch or max(usual, min(stored, default=0))


def evaluated(
    group: Sequence[Task], bank: heads.Bank, material: Material, compute: ComputeFlags, seconds: float
) -> Results:
    """The results of a pass, once its heads are trained in so many seconds: evaluates them."""
    began, scores = time.perf_counter(), []
    for part, rows in ((material.pool, material.held_out), (material.test, torch.arange(len(material.test)))):
        features = features_of(group[0].spec, part, rows, material, compute)
        right = heads.accuracy(bank, features, part.labels[rows]).tolist() if len(rows) else [None] * len(group)
        scores.append(right)
    timing = {"seconds": seconds + time.perf_counter() - began, "shares": bank.seconds, "views": bank.views}
    timing |= {"heads": len(group), "physical_batch": physical_batch(compute, [task.spec for task in group])}
    for r, (task, *accuracies) in enumerate(zip(group, *scores, strict=True)):
        about = result(task, accuracies, bank.dropped, timing, material, compute)
        yield about, {"weight": bank.weights[r], "bias": bank.biases[r]}


def heads_of(group: Sequence[Task], material: Material) -> list[heads.Head]:
    """The head of each run, with the noise of its mechanism, which is its own: keyed by its identity."""
    bank = []
    for task in group:
        about = {name: getattr(task.spec, name) for name in ("learning_rate", "clip_norm", "momentum")}
        about |= dict(recipe=task.spec.recipe.for_data(material.train.whole.flip), identity=task.identity.run)
        bank.append(heads.Head(noise_multiplier=task.mechanism.noise_multiplier, **about))
    return bank


def source_of(
    spec: RunSpec,
    recipes: list[views.Recipe],
    material: Material,
    compute: ComputeFlags,
    scaling: Scaling | None = None,
    once: int | None = None,
) -> Source:
    """The encoded views of the training set: made at every step or, with `redraw=False`, read from the store in the cache: those
    of all the private examples, drawn by the seed `once` and an example's place or, where it is None, by what no other
    example decides; it serves every budget, rate, batch size and number of epochs."""
    train, encoder = material.train, material.encoder
    assert encoder is not None
    about: dict[str, Any] = dict(public=material.public, scaling=scaling)
    if not spec.redraw:
        about |= dict(seed=DRAWN_ONCE) if once is None else dict(seed=once, ids=material.pool.rows)
        return _stored(encoder, material.pool, recipes, compute, **about).subset(material.kept)
    about |= dict(num_classes=train.whole.num_classes, ids=train.rows, device=compute.where(), seed=training_seed(spec))
    return FreshViews(encoder, train.images, train.labels, recipes, **about)


def _stored(
    encoder: encoders.Encoder, part: Part, recipes: list[views.Recipe], compute: ComputeFlags, **about: Any
) -> StoredViews:
    folder = Path(compute.cache).expanduser() / "views"
    with files.explained(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    about |= dict(num_classes=part.whole.num_classes, device=compute.where(), progress=compute.progress)
    return StoredViews(encoder, part.images, part.labels, recipes, folder=folder, **about)


def features_of(spec: RunSpec, part: Part, places: Tensor, material: Material, compute: ComputeFlags) -> Tensor:
    """Features [places, D] of images as they are, for evaluation; with `redraw=False` from the store, for all of `part`."""
    assert material.encoder is not None
    if spec.redraw or len(places) == 0:
        return heads.encode(material.encoder, part.at(places).images, compute.where())
    store = _stored(material.encoder, part, [UNCHANGED], compute)
    return torch.cat([store.batch(some, 0)[0][:, 0].cpu() for some in places.split(1024)])


def training_seed(spec: RunSpec) -> int:
    """The seed of a spec's steps. On public images its coins must not be those of the private steps: weights that tell which
    places joined a public batch would tell who joins the private one, and Poisson sampling would hide nobody."""
    assert spec.seed is not None
    on_public = spec.train_on == "synthetic"
    return int(rng.generator(spec.seed, "public training").integers(2**63)) if on_public else spec.seed


def _pretrained(
    spec: RunSpec, material: Material, compute: ComputeFlags, scaling: Scaling | None
) -> tuple[Tensor, Tensor]:
    """A head trained on the synthetic images by plain SGD (Table 6): no private image, no noise, no clipping."""
    public = material.synthetic
    assert public is not None
    there = replace(spec, train_on="synthetic", public="synthetic", redraw=True)
    alone = replace(material, train=Part(public, torch.arange(len(public))))
    batch, seed = min(spec.batch_size, len(public)), training_seed(there)
    steps = accounting.steps_for(n=len(public), batch_size=batch, epochs=spec.pretrain_epochs)
    recipe = replace(views.METHODS["self-aug"].for_data(public.flip), k_base=1)
    plain = heads.Head(recipe=recipe, learning_rate=1.0, noise_multiplier=0.0, clip_norm=1e9)
    source = source_of(there, [recipe], alone, compute, scaling)
    how: dict[str, Any] = dict(expected_batch=batch, steps=steps, sample_rate=batch / len(public), seed=seed)
    bank = heads.train(source, [plain], physical_batch=physical_batch(compute), progress=compute.progress, **how)
    return bank.weights[0], bank.biases[0]


def compute_network(group: Sequence[Task], material: Material, compute: ComputeFlags, checkpoint: Path) -> Results:
    """A network from scratch: one training run, with checkpoints; under torchrun, on all processes together."""
    (task,) = group
    spec, m, device, train = task.spec, task.mechanism, compute.where(), material.train
    assert spec.seed is not None
    on_gpu, precision, many = device.type == "cuda", compute.precision(), train.whole.num_classes
    model = wide_resnet(*spec.network, many, channels=train.images.shape[1], seed=spec.seed)
    physical = compute.physical_batch or (64 if on_gpu else 8)
    same = ("clip_norm", "learning_rate", "momentum", "weight_decay", "ema_decay", "microbatch", "microbatch_mix")
    mechanism: dict[str, Any] = {name: getattr(spec, name) for name in same} | dict(seed=spec.seed)
    mechanism |= dict(sample_rate=m.sample_rate, steps=m.steps, noise_multiplier=m.noise_multiplier)
    mechanism |= dict(recipe=spec.recipe.for_data(train.whole.flip), expected_batch=spec.batch_size / spec.microbatch)
    mechanism |= dict(num_classes=many, places=len(material.pool), identity=task.identity.run)
    flags: dict[str, Any] = dict(device=device, physical_batch=physical, engine=compute.engine, channels_last=on_gpu)
    flags |= dict(autocast=None if precision == torch.float32 else precision, progress=compute.progress)
    flags |= dict(delta=spec.delta if m.noise_multiplier else None, spec={"network": spec.model})
    flags |= dict(checkpoint=checkpoint, checkpoint_every=max(1, min(50, m.steps // 10)))
    images: dict[str, Any] = dict(images=train.images, labels=train.labels, ids=train.rows, public=material.public)
    trained = network.train(model, **images, **mechanism, **flags)
    model.load_state_dict(trained.state if trained.ema_state is None else trained.ema_state)
    parts = material.pool.at(material.held_out), material.test
    accuracies = [network.accuracy(model, part.images, part.labels) if len(part) else None for part in parts]
    timing = {"seconds": trained.seconds, "engine": trained.engine, "channels_last": on_gpu, "heads": 1}
    timing |= {"views": trained.counters["views"], "physical_batch": physical}
    tensors = {name: t.float() for name, t in model.state_dict().items()}
    yield result(task, accuracies, trained.counters["non_finite"], timing, material, compute), tensors


def result(
    task: Task, scores: Sequence[Any], dropped: int, timing: dict[str, Any], material: Material, compute: ComputeFlags
) -> Result:
    """The record of a finished run with these accuracies, of validation (or None) and test, and where it came from."""
    spec, identity, (validation, test) = task.spec, task.identity, scores
    encoder: dict[str, Any] | None = None
    if material.encoder is not None:  # for strangers: without the folder where its file lies
        path = encoders.weights_of(spec.model, spec.weights)
        file, digest = (path, None) if isinstance(path, str) else (path.name, identity.encoder)
        encoder = {"file": file, "sha256": digest, "image_size": material.encoder.image_size}
        encoder |= {"name": encoders.public_name(spec.model), "package": encoders.package_of(spec.model)}
    seen: dict[str, Any] = dict(validation_accuracy=validation, dropped_gradients=dropped)
    busy = sum(timing["shares"].values()) if "shares" in timing else timing["seconds"]
    rate = timing["views"] / max(busy, 1e-9)
    where = provenance(compute.where(), material.digest) | {
        "contents": {name: getattr(identity, name) for name in ("private", "public", "encoder")},
        "classes": list(material.test.whole.class_names),
        "images": list(material.test.images.shape[1:]),
        "encoder": encoder,
        "views_keyed_by": "image" if task.seed_drawn and not spec.redraw else "place",  # `release` asks
    }
    return Result(
        spec=spec,
        key=task.name,
        seed_drawn=task.seed_drawn,
        test_accuracy=test,
        epsilon=task.epsilon,
        **task.mechanism._asdict(),
        divisor=spec.batch_size / spec.microbatch,
        diagnostics=NonPrivateDiagnostics(train_examples=len(material.train), **seen),
        timing=timing | {"views_per_second": rate, "dtype": str(compute.precision())},
        provenance=where,
    )


def provenance(device: torch.device, split_digest: str) -> dict[str, Any]:
    """Device, versions, commit and date of a computation."""
    threads = counted(torch.get_num_threads(), "thread")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {threads}"
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"device": name, "date": date, "splits": split_digest, "code": code_digest(), **environment()}


@cache
def environment() -> dict[str, Any]:
    """Python, platform, versions of the libraries, and the commit."""
    words = ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty"]
    how: dict[str, Any] = dict(cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20, check=True)
    about: dict[str, Any] = {"commit": None, "dirty": None}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run(words, **how).stdout.strip()
        about = {"commit": said.removesuffix("-dirty"), "dirty": said.endswith("-dirty")}
    versions = {name: metadata.version(name) for name in ("dpmix", *LIBRARIES)}
    system = f"{platform.system()} {platform.machine()}"
    return {"python": platform.python_version(), "platform": system, "versions": versions, **about}
