"""The same heads trained by JAX and the released `jax-privacy` package (optional extra "jax").

Clipping (`jax_privacy.clipped_grad`), noise (`noise_addition`) and the noise multiplier (`accounting`) are other people's
code; batches, views and features are those of dpmix, so a run differs from its PyTorch twin in noise and in rounding.
jax-privacy clips entries of the batch, here all K views of an example: the gradient of their mean loss (Eq. (4))."""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import numpy
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from dpmix.companion import grids
from dpmix.core import accounting, checks, files, heads, rng, sources
from dpmix.runs import passes, run
from dpmix.runs.material import prepare
from dpmix.runs.result import Result, frame, told
from dpmix.runs.spec import ComputeFlags, RunSpec, epsilons, mechanism
from dpmix.runs.store import STORE, Store

LIBRARIES = ("jax", "jax-privacy", "dp-accounting")


def _libraries() -> SimpleNamespace:
    """jax and jax-privacy, imported when they are first needed. ImportError with the command that installs them."""
    try:
        import jax
        import jax_privacy
        import optax
        from jax_privacy import accounting, noise_addition
    except ImportError as error:
        raise ImportError(f"{error.name} is not installed: run `pip install 'dpmix[jax]'`, or `make env`") from error
    own = {"clip": jax_privacy.clipped_grad, "accounting": accounting, "noise": noise_addition}
    return SimpleNamespace(jax=jax, np=jax.numpy, optax=optax, **own)


@functools.cache
def noise_multiplier(*, epsilon: float, delta: float, population: int, batch_size: int, steps: int) -> float:
    """sigma by jax-privacy's own RDP accountant: Poisson sampling, add or remove one example. Never above the budget."""
    a = _libraries().accounting
    accountant = a.DpsgdTrainingAccountant(a.RdpAccountantConfig())
    asked = dict[str, Any](target_epsilon=epsilon, target_delta=delta, batch_sizes=batch_size, num_updates=steps)
    sigma = a.calibrate_noise_multiplier(accountant=accountant, tol=1e-4, num_samples=population, **asked)
    about = dict[str, Any](num_samples=population, delta=delta, batch_size=batch_size)
    while accountant.compute_epsilon(steps, a.DpParams(noise_multipliers=sigma, **about)) > epsilon:
        sigma *= 1.0001  # the search ends on either side of the budget
    return sigma


@functools.cache  # compiled once a process and shape
def _clipped_sums() -> Callable[..., dict[str, Any]]:
    """(params [R, ...], clip norms [R], view weights [R, K], (features [b, K, D], targets), padding [b]) -> sums [R, ...]."""
    lib = _libraries()

    def one_head(params: dict, clip_norm: Any, view_weights: Any, batch: tuple, padding: Any) -> dict:
        def loss(params: dict, views: tuple) -> Any:
            features, targets = views  # of one example: [K, D] and [K, classes]
            logits = lib.np.matmul(features, params["w"].T, precision="highest") + params["b"]
            return (view_weights * lib.optax.softmax_cross_entropy(logits, targets)).sum()

        clipped = lib.clip(loss, l2_clip_norm=clip_norm, batch_argnums=1, keep_batch_dim=False)
        return clipped(params, batch, is_padding_example=padding)

    return lib.jax.jit(lib.jax.vmap(one_head, in_axes=(0, 0, 0, None, None)))


def clipped_head_sums(
    features: Float[Tensor, "b K D"],
    targets: Float[Tensor, "b K num_classes"],
    weights: Float[Tensor, "R num_classes D"],
    biases: Float[Tensor, "R num_classes"],
    clip_norms: Float[Tensor, " R"],
    view_weights: Float[Tensor, "R K"],
    present: int | None = None,
) -> list[Tensor]:
    """jax-privacy's clipped sums [R, num_classes, D] and [R, num_classes], float32. `core.clipping.clipped_head_sums` is its
    twin, `present` included: the examples that are no padding."""
    tensors = (weights, biases, clip_norms, view_weights, features, targets)
    w, b, norms, rows, z, y = (t.float().cpu().numpy() for t in tensors)
    padding = numpy.arange(len(z)) >= (len(z) if present is None else present)
    sums = _clipped_sums()({"w": w, "b": b}, norms, rows, (z, y), padding)
    return [torch.from_numpy(numpy.array(sums[name])) for name in "wb"]


def train(
    source: sources.Source,
    bank: Sequence[heads.Head],
    *,
    expected_batch: int,
    sample_rate: float,
    steps: int,
    seed: int,
    physical_batch: int = 64,
    progress: bool = True,
) -> heads.Bank:
    """Algorithm 1 for every head, as `core.heads.train`: the same batches, views and features, clipped and noised in JAX."""
    lib = _libraries()
    view_weights = dict(zip(source.union.recipes, source.union.weights.float(), strict=True))
    rows, norms = torch.stack([view_weights[h.recipe] for h in bank]), torch.tensor([h.clip_norm for h in bank])
    shapes = (source.num_classes, source.dim), (source.num_classes,)
    parameters = [torch.zeros(len(bank), *shape) for shape in shapes]
    own = files.digest(repr((source.name, sample_rate, steps, expected_batch)))
    updates, states = [], []
    for h in bank:
        drawn = rng.generator(seed, "noise-jax", own, files.digest(repr(h))).integers(2**32, size=2, dtype="uint32")
        key = lib.jax.random.wrap_key_data(lib.np.array(drawn))
        made = lib.noise.gaussian_privatizer(stddev=h.noise_multiplier * h.clip_norm, prng_key=key)
        updates.append(lib.jax.jit(made.update))
        states.append(made.init([lib.np.zeros(shape) for shape in shapes]))
    views, start = 0, time.perf_counter()
    for step in tqdm(range(steps), desc=f"JAX, {checks.counted(len(bank), 'head')}", disable=not progress):
        chosen = accounting.poisson_batch(source.n, sample_rate, seed=seed, step=step)
        sums = [torch.zeros_like(p) for p in parameters]
        for part in chosen.split(physical_batch) if len(chosen) else ():
            padding = (0, 0) * 2 + (0, physical_batch - len(part))
            z, y = (functional.pad(t, padding) for t in source.batch(part, step))
            added = clipped_head_sums(z, y, parameters[0], parameters[1], norms, rows, len(part))
            sums = [total + a for total, a in zip(sums, added, strict=True)]
        for r, h in enumerate(bank):
            if h.noise_multiplier:
                noisy, states[r] = updates[r]([total[r].numpy() for total in sums], states[r])
                for total, value in zip(sums, noisy, strict=True):
                    total[r] = torch.from_numpy(numpy.array(value))
            for p, total in zip(parameters, sums, strict=True):
                p[r] -= h.learning_rate / expected_batch * total[r]
        views += len(chosen) * source.union.views
    seconds = source.seconds | {"clipping": time.perf_counter() - start - sum(source.seconds.values())}
    return heads.Bank(weights=parameters[0], biases=parameters[1], views=views, seconds=seconds, dropped=0)


def run_all(
    specs: Sequence[RunSpec], *, compute: ComputeFlags | None = None, store: Store | None = None
) -> list[Result]:
    """`runs.run_all` with JAX in place of PyTorch, with a store of its own. Linear heads only; every spec has a seed.

    `Result.noise_multiplier` is jax-privacy's; `Result.epsilon` holds what dpmix's three accountants say about it."""
    _libraries()
    compute, store = compute or ComputeFlags(), store or Store(STORE / "jax")
    for spec in specs:
        plain = replace(spec, pretrain_epochs=0.0, momentum=0.0, redraw=True, feature_scaling="none") == spec
        good = plain and spec.seed is not None and not spec.from_scratch
        said = "trained are seeded heads on frozen encoders, without pretraining, momentum, stored or scaled features"
        checks.require(good, "specs", spec.model, f"{said}; take runs.run_all")
    asked = run.ask(specs, compute, store)
    for group in run.missing(asked, store):
        with store.lock(store.name("pass", group[0].identity.shared.run)):
            left = [one for one in group if store.get(one.name) is None]
            for result, tensors in _compute(left, compute) if left else ():
                versions = result.provenance["versions"] | {name: metadata.version(name) for name in LIBRARIES}
                store.put(replace(result, provenance=result.provenance | {"versions": versions}), tensors)
    found = [store.get(one.name) for one in asked]
    return [r for r in found if r is not None]


def _compute(group: Sequence[run.Asked], compute: ComputeFlags) -> passes.Results:
    material, tasks, start = prepare([one.identity for one in group], compute), [], time.perf_counter()
    for one in group:
        spec = one.identity.spec
        m = mechanism(replace(spec, epsilon=None), len(material.pool))
        if spec.epsilon is not None:
            asked = dict[str, Any](epsilon=spec.epsilon, delta=spec.delta, batch_size=spec.batch_size)
            m = m._replace(noise_multiplier=noise_multiplier(population=m.population, steps=m.steps, **asked))
        tasks.append(passes.Task(*one, m, epsilons(spec, m)))
    bank, seed = passes.heads_of(tasks, material), passes.training_seed(spec)
    source = passes.source_of(spec, [head.recipe for head in bank], material, compute)
    how = dict[str, Any](expected_batch=spec.batch_size, sample_rate=m.sample_rate, steps=m.steps, seed=seed)
    how |= {"physical_batch": passes.physical_batch(compute), "progress": compute.progress}
    trained = train(source, bank, **how)
    return passes.evaluated(tasks, trained, material, compute, time.perf_counter() - start)


def run_cells(cells: Sequence[grids.Cell], *, compute: ComputeFlags | None = None) -> pd.DataFrame:
    """`grids.run_cells` in JAX: one row a cell, with its labels; `versions` names those of JAX too."""
    results = run_all([c.spec for c in cells], compute=compute)
    versions = [told(r.provenance, "opacus", *LIBRARIES[:2])["versions"] for r in results]
    return grids.labelled(cells, frame(results).assign(versions=versions))
