"""The same heads trained by JAX and the released `jax-privacy` package (optional extra "jax").

What decides a private run besides the data is done here by other people's code: clipping (`jax_privacy.clipped_grad`),
noise (`jax_privacy.noise_addition`) and the noise multiplier (`jax_privacy.accounting`). The batches, the views and their
features are those of dpmix, so a run differs from its PyTorch twin in its noise, and in rounding.

jax-privacy clips groups: with `keep_batch_dim=False` the loss sees one entry of the batch, here all K views of one
example, and the gradient of their mean loss is clipped. That is the average before the clip (Eq. (4)).
"""

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
from dpmix.core import accounting, clipping, files, heads, rng, sources
from dpmix.runs import passes, run
from dpmix.runs.material import prepare
from dpmix.runs.result import NonPrivateDiagnostics, Result, frame
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
    return SimpleNamespace(jax=jax, np=jax.numpy, optax=optax, clipped_grad=jax_privacy.clipped_grad,
                           accounting=accounting, noise=noise_addition)  # fmt: skip


@functools.cache
def noise_multiplier(*, epsilon: float, delta: float, population: int, batch_size: int, steps: int) -> float:
    """sigma by jax-privacy's own RDP accountant: Poisson sampling, add or remove one example. Never above the budget.

    dp_accounting warns of Rényi orders that it leaves out; a bound from fewer orders still holds.
    """
    a = _libraries().accounting
    accountant = a.DpsgdTrainingAccountant(dp_accountant_config=a.RdpAccountantConfig())
    sigma = a.calibrate_noise_multiplier(
        target_epsilon=epsilon, accountant=accountant, batch_sizes=batch_size, num_updates=steps,
        num_samples=population, target_delta=delta, tol=1e-4,
    )  # fmt: skip
    about = dict(num_samples=population, delta=delta, batch_size=batch_size)
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
            logits = lib.np.matmul(features, params["weights"].T, precision="highest") + params["biases"]
            return (view_weights * lib.optax.softmax_cross_entropy(logits, targets)).sum()

        clipped = lib.clipped_grad(loss, l2_clip_norm=clip_norm, batch_argnums=1, keep_batch_dim=False)
        return clipped(params, batch, is_padding_example=padding)

    return lib.jax.jit(lib.jax.vmap(one_head, in_axes=(0, 0, 0, None, None)))


def clipped_head_sums(
    features: Float[Tensor, "b K D"],
    targets: Float[Tensor, "b K num_classes"],
    weights: Float[Tensor, "R num_classes D"],
    biases: Float[Tensor, "R num_classes"],
    clip_norms: Float[Tensor, " R"],
    view_weights: Float[Tensor, "R K"],
) -> tuple[Float[Tensor, "R num_classes D"], Float[Tensor, "R num_classes"]]:
    """jax-privacy's clipped sum for R linear heads, float32. `core.clipping.clipped_head_sums` is its twin."""
    np = _libraries().np
    w, b, norms, rows, z, y = (
        np.asarray(t.float().numpy()) for t in (weights, biases, clip_norms, view_weights, features, targets)
    )
    sums = _clipped_sums()({"weights": w, "biases": b}, norms, rows, (z, y), np.zeros(len(z), bool))
    return _torch(sums["weights"]), _torch(sums["biases"])


def _torch(array: Any) -> Tensor:
    return torch.from_numpy(numpy.array(array))


def train(
    source: sources.Source, bank: Sequence[heads.Head], *, expected_batch: int, sample_rate: float, steps: int, seed: int,
    identity: str = "", physical_batch: int = 64, progress: bool = True,
) -> heads.Bank:  # fmt: skip
    """Algorithm 1 for every head, as `core.heads.train`: the same batches, views and features, clipped and noised in JAX.

    Batches are padded to a fixed size; jax-privacy makes padding count as zero. Each head has a noise of its own.
    """
    lib = _libraries()
    jax, np = lib.jax, lib.np
    rows = dict(zip(source.union.recipes, source.union.weights.float().numpy(), strict=True))
    view_weights, clip_norms = np.array([rows[h.recipe] for h in bank]), np.array([h.clip_norm for h in bank])
    rates = np.array([h.learning_rate / expected_batch for h in bank])
    shapes = {"weights": (source.num_classes, source.dim), "biases": (source.num_classes,)}
    params = {name: np.zeros((len(bank), *shape)) for name, shape in shapes.items()}
    own = files.digest(repr((identity, source.name, sample_rate, steps, expected_batch)))
    privatizers, states = [], []
    for head in bank:
        drawn = rng.generator(seed, "noise-jax", own, files.digest(repr(head))).integers(2**32, size=2, dtype="uint32")
        key = jax.random.wrap_key_data(np.array(drawn))
        made = lib.noise.gaussian_privatizer(stddev=head.noise_multiplier * head.clip_norm, prng_key=key)
        privatizers.append(jax.jit(made.update))
        states.append(made.init({name: np.zeros(shape) for name, shape in shapes.items()}))
    seconds, views = {"clipping": 0.0, "noise": 0.0}, 0
    for step in tqdm(range(steps), desc=f"JAX, {len(bank)} heads", disable=not progress):
        chosen = accounting.poisson_batch(source.n, sample_rate, seed=seed, step=step)
        sums = jax.tree.map(np.zeros_like, params)
        for part in chosen.split(physical_batch) if len(chosen) else ():
            padding = (0, 0) * 2 + (0, physical_batch - len(part))
            batch = tuple(
                np.asarray(functional.pad(t.float().cpu(), padding).numpy()) for t in source.batch(part, step)
            )
            tick = time.perf_counter()
            added = _clipped_sums()(params, clip_norms, view_weights, batch, np.arange(physical_batch) >= len(part))
            sums = jax.block_until_ready(jax.tree.map(np.add, sums, added))
            sources.lap(seconds, "clipping", tick)
        tick = time.perf_counter()
        for r, head in enumerate(bank):
            gradient = {name: total[r] for name, total in sums.items()}
            if head.noise_multiplier:
                gradient, states[r] = privatizers[r](gradient, states[r])
            params = {name: w.at[r].add(-rates[r] * gradient[name]) for name, w in params.items()}
        jax.block_until_ready(params)
        sources.lap(seconds, "noise", tick)
        views += len(chosen) * source.union.views
    return heads.Bank(weights=_torch(params["weights"]), biases=_torch(params["biases"]), views=views,
                      seconds=source.seconds | seconds, dropped=0)  # fmt: skip


def run_all(
    specs: Sequence[RunSpec], *, compute: ComputeFlags | None = None, store: Store | None = None
) -> list[Result]:
    """`runs.run_all` with JAX in place of PyTorch, with a store of its own. Linear heads only; every spec has a seed.

    `Result.noise_multiplier` is jax-privacy's; `Result.epsilon` holds what dpmix's three accountants say about it.
    """
    _libraries()
    compute, store = compute or ComputeFlags(), store or Store(STORE / "jax")
    for spec in specs:
        if spec.from_scratch or spec.pretrain_epochs or spec.seed is None:
            about = f"{spec.model!r}, pretrain_epochs={spec.pretrain_epochs}, {'no' if spec.seed is None else 'a'} seed"
            raise ValueError(f"specs: {about}: trained are seeded heads on a frozen encoder; take runs.run_all")
    asked = run.ask(specs, compute, store)
    for group in run.missing(asked, store):
        with store.lock(store.name("pass", group[0].identity.shared.run)):
            left = [one for one in group if store.get(one.name) is None]
            for result, tensors in _compute(left, compute) if left else ():
                store.put(result, tensors)
    found = [store.get(one.name) for one in asked]
    return [r for r in found if r is not None]


def _compute(group: Sequence[run.Asked], compute: ComputeFlags) -> list[tuple[Result, dict[str, Tensor]]]:
    material = prepare([one.identity for one in group], compute)
    encoder, train_set = material.encoder, material.train
    assert encoder is not None
    tasks, sigmas = [], dict[tuple, float]()
    for one in group:
        spec = one.identity.spec
        m = mechanism(replace(spec, epsilon=None), material.n)
        if spec.epsilon is not None:
            asked = (spec.epsilon, spec.delta)
            if asked not in sigmas:
                sigmas[asked] = noise_multiplier(epsilon=spec.epsilon, delta=spec.delta, population=m.population,
                                                 batch_size=spec.batch_size, steps=m.steps)  # fmt: skip
            m = m._replace(noise_multiplier=sigmas[asked])
        tasks.append(passes.Task(**one._asdict(), mechanism=m, epsilon=epsilons(spec, m)))
    shared, m = tasks[0].spec, tasks[0].mechanism
    start = time.perf_counter()
    of, seed = passes.heads_of(tasks, material), passes.training_seed(shared)
    source = sources.FreshViews(
        encoder, train_set.images, train_set.labels, [h.recipe for h in of], num_classes=train_set.num_classes, seed=seed,
        public=material.public, ids=material.ids, device=compute.where(),
    )  # fmt: skip
    bank = train(
        source, of, expected_batch=shared.batch_size, sample_rate=m.sample_rate, steps=m.steps, seed=seed,
        physical_batch=compute.physical_batch or 64, progress=compute.progress,
    )  # fmt: skip
    test, validation = (
        heads.accuracy(bank, heads.encode(encoder, s.images, compute.where()), s.labels).tolist() if len(s) else None
        for s in (material.test, material.validation)
    )
    timing = {"seconds": time.perf_counter() - start, "shares": bank.seconds, "views": bank.views, "heads": len(group),
              "views_per_second": bank.views / max(sum(bank.seconds.values()), 1e-9)}  # fmt: skip
    done = []
    for r, task in enumerate(tasks):
        seen = NonPrivateDiagnostics(
            validation_accuracy=validation[r] if validation else None,
            dropped_gradients=0,
            train_examples=len(train_set),
        )
        assert test is not None
        result = passes.result(task, test[r], seen, timing, material, compute.where())
        origin = result.provenance
        origin = origin | {"versions": origin["versions"] | {name: metadata.version(name) for name in LIBRARIES}}
        done.append((replace(result, provenance=origin), {"weight": bank.weights[r], "bias": bank.biases[r]}))
    return done


def run_cells(cells: Sequence[grids.Cell], *, compute: ComputeFlags | None = None) -> pd.DataFrame:
    """`grids.run_cells` in JAX: one row a cell, with its labels; `versions` names those of JAX too."""
    results = run_all([c.spec for c in cells], compute=compute)
    runs = frame(results)
    runs["versions"] += [", " + ", ".join(f"{n} {r.provenance['versions'][n]}" for n in LIBRARIES[:2]) for r in results]
    return runs.assign(**{name: [c.labels[name] for c in cells] for name in cells[0].labels})


def compare_sums(seed: int = 0, *, clip_norm: float = 0.5) -> pd.DataFrame:
    """Clipped sums of PyTorch and JAX on random features [32, 4, 64] of ten classes: the largest relative differences.

    The second row is a negative control: JAX clips every view by itself and averages afterwards.
    """
    b, k, dim, classes = 32, 4, 64, 10
    draw = rng.generator(seed, "compare")
    normal = lambda *shape: torch.from_numpy(draw.standard_normal(shape)).float()  # noqa: E731
    z, y, w, bias = normal(b, k, dim), normal(b, k, classes).softmax(-1), normal(1, classes, dim), normal(1, classes)
    norms, mean, one = torch.tensor([clip_norm]), torch.full((1, k), 1 / k), torch.ones(1, 1)
    ours = clipping.clipped_head_sums(z, y, w, bias, norms, mean)
    each = clipped_head_sums(z.reshape(b * k, 1, dim), y.reshape(b * k, 1, classes), w, bias, norms, one)
    rows = {
        "views averaged, then clipped": clipped_head_sums(z, y, w, bias, norms, mean),
        "views one by one": (each[0] / k, each[1] / k),
    }
    table = {
        name: [f"{float((g - w).abs().max() / w.abs().max()):.0e}" for g, w in zip(found, ours, strict=False)]
        for name, found in rows.items()
    }
    return pd.DataFrame.from_dict(table, orient="index", columns=["weights", "biases"])
