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
from tqdm import tqdm

from dpmix.companion import grids
from dpmix.core import accounting, clipping, files, heads, rng, views
from dpmix.runs import experiments, passes
from dpmix.runs.spec import ComputeFlags, Mechanism, Result, RunSpec, key, mechanism

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
    """(params [R, ...], clip norms [R], (features [b, K, D], targets [b, K, classes]), padding [b]) -> sums [R, ...]."""
    lib = _libraries()

    def loss(params: dict, views: tuple) -> Any:
        features, targets = views  # of one example: [K, D] and [K, classes]
        logits = lib.np.matmul(features, params["weights"].T, precision="highest") + params["biases"]
        return lib.optax.softmax_cross_entropy(logits, targets).mean()

    def one_head(params: dict, clip_norm: Any, batch: tuple, padding: Any) -> dict:
        clipped = lib.clipped_grad(loss, l2_clip_norm=clip_norm, batch_argnums=1, keep_batch_dim=False)
        return clipped(params, batch, is_padding_example=padding)

    return lib.jax.jit(lib.jax.vmap(one_head, in_axes=(0, 0, None, None)))


def clipped_head_sums(
    features: Float[Tensor, "b K D"],
    targets: Float[Tensor, "b K num_classes"],
    weights: Float[Tensor, "R num_classes D"],
    biases: Float[Tensor, "R num_classes"],
    clip_norms: Float[Tensor, " R"],
) -> tuple[Float[Tensor, "R num_classes D"], Float[Tensor, "R num_classes"]]:
    """jax-privacy's clipped sum for R heads that average all K views; float32. `clipping.clipped_head_sums` is its twin."""
    np = _libraries().np
    arrays = [np.asarray(t.float().numpy()) for t in (weights, biases, clip_norms, features, targets)]
    params = {"weights": arrays[0], "biases": arrays[1]}
    sums = _clipped_sums()(params, arrays[2], (arrays[3], arrays[4]), np.zeros(len(features), bool))
    return _torch(sums["weights"]), _torch(sums["biases"])


def _torch(array: Any) -> Tensor:
    return torch.from_numpy(numpy.array(array))


def train_heads(
    material: passes.Material, bank: Sequence[heads.Head], m: Mechanism, *, batch_size: int, seed: int,
    compute: ComputeFlags, stream: str = "",
) -> heads.Bank:  # fmt: skip
    """Algorithm 1 for every head, as `heads.train_heads`: the same batches, views and features, clipped and noised in JAX.

    `m` gives q and T; sigma is each head's. Batches are padded to a fixed size; jax-privacy makes padding count as zero.
    """
    lib = _libraries()
    jax, np = lib.jax, lib.np
    train, encoder, device = material.train, material.encoder, compute.where()
    assert encoder is not None
    physical = compute.physical_batch or 64
    union = views.make_union(list(dict.fromkeys(h.recipe for h in bank)))
    columns = {r: row.nonzero()[:, 0] for r, row in zip(union.recipes, union.weights, strict=True)}
    groups = {r: np.array([i for i, h in enumerate(bank) if h.recipe == r]) for r in union.recipes}
    clip_norms = np.array([h.clip_norm for h in bank])
    rates = np.array([h.learning_rate / batch_size for h in bank])
    stddevs = np.array([h.noise_multiplier * h.clip_norm for h in bank])
    params = {
        "weights": np.zeros((len(bank), train.num_classes, encoder.dim)),
        "biases": np.zeros((len(bank), train.num_classes)),
    }
    # Scaled below, since the heads differ in sigma and C. Its own key is not used: each head has one, in its state.
    privatizer = lib.noise.gaussian_privatizer(stddev=1.0, prng_key=0)
    own = files.digest(repr((stream, encoder.name, m, batch_size)))
    words = [
        rng.generator(seed, "noise-jax", own, files.digest(repr(h))).integers(2**32, size=2, dtype="uint32")
        for h in bank
    ]
    keys = jax.random.wrap_key_data(np.array(words))
    fresh = jax.vmap(lambda key, p: (key, privatizer.init(p)[1]))(keys, params)

    @jax.jit
    def update(params: dict, sums: dict, state: Any) -> tuple[dict, Any]:
        def one_head(p: dict, total: dict, std: Any, rate: Any, state: Any) -> tuple[dict, Any]:
            safe = np.where(std > 0, std, 1.0)
            noisy, state = privatizer.update(jax.tree.map(lambda x: x / safe, total), state)
            noisy = jax.tree.map(lambda n, x: np.where(std > 0, n * safe, x), noisy, total)
            return jax.tree.map(lambda w, g: w - rate * g, p, noisy), state

        return jax.vmap(one_head)(params, sums, stddevs, rates, state)

    clipped, state = _clipped_sums(), fresh
    seconds = dict.fromkeys(("views", "encoder", "clipping", "noise"), 0.0)
    made = 0
    for step in tqdm(range(m.steps), desc=f"JAX, {len(bank)} heads", disable=not compute.progress):
        chosen = accounting.poisson_batch(len(train), m.sample_rate, seed=seed, step=step)
        sums = jax.tree.map(np.zeros_like, params)
        for part in chosen.split(physical):
            tick = time.perf_counter()
            x, y = union.make(train.images[part].to(device), train.labels[part].to(device), material.ids[part],
                              num_classes=train.num_classes, seed=seed, step=step, public=material.public)  # fmt: skip
            seconds["views"] += (tock := time.perf_counter()) - tick
            z = encoder.features(x.flatten(0, 1)).reshape(len(part), union.views, encoder.dim).float().cpu()
            seconds["encoder"] += (tick := time.perf_counter()) - tock
            short = physical - len(part)
            z, y = (torch.nn.functional.pad(t, (0, 0, 0, 0, 0, short)) for t in (z, y.float().cpu()))
            padding = np.arange(physical) >= len(part)
            for recipe, own in groups.items():
                batch = tuple(np.asarray(t[:, columns[recipe]].numpy()) for t in (z, y))
                added = clipped(jax.tree.map(lambda p, own=own: p[own], params), clip_norms[own], batch, padding)
                sums = jax.tree.map(lambda total, a, own=own: total.at[own].add(a), sums, added)
            jax.block_until_ready(sums)
            seconds["clipping"] += time.perf_counter() - tick
            made += len(part) * union.views
        tick = time.perf_counter()
        params, state = jax.block_until_ready(update(params, sums, state))
        seconds["noise"] += time.perf_counter() - tick
    return heads.Bank(weights=_torch(params["weights"]), biases=_torch(params["biases"]), views=made, seconds=seconds,
                      dropped=0)  # fmt: skip


def run_all(
    specs: Sequence[RunSpec], *, compute: ComputeFlags | None = None, store: experiments.Store | None = None
) -> list[Result]:
    """`experiments.run_all` with JAX in place of PyTorch, with a store of its own. Linear heads only; every spec has a seed.

    `Result.noise_multiplier` is jax-privacy's; `Result.epsilon` holds what dpmix's three accountants say about it.
    """
    _libraries()
    compute, store = compute or ComputeFlags(), store or experiments.Store(experiments.STORE / "jax")
    for spec in specs:
        if spec.from_scratch or spec.pretrain_epochs or spec.seed is None:
            about = f"{spec.model!r}, pretrain_epochs={spec.pretrain_epochs}, seed={spec.seed}"
            raise ValueError(f"specs: {about}: trained are seeded heads on a frozen encoder; take experiments.run_all")
    groups: dict[RunSpec, list[RunSpec]] = {}

    def stored(spec: RunSpec) -> Result | None:
        return store.get(key(spec), experiments.files_of(spec.dataset, compute.root, spec.uses_synthetic))

    for spec in dict.fromkeys(specs):
        if stored(spec) is None:
            groups.setdefault(passes.pass_of(spec), []).append(spec)
    for shared, group in groups.items():
        with files.lock(store.folder / "locks" / key(shared)):
            group = [s for s in group if stored(s) is None]
            for result, tensors in _compute(group, passes.prepare(shared, group, compute), compute) if group else ():
                store.put(result, tensors)
    found = [stored(s) for s in specs]
    return [r for r in found if r is not None]


def _compute(
    group: Sequence[RunSpec], material: passes.Material, compute: ComputeFlags
) -> list[tuple[Result, dict[str, Tensor]]]:
    encoder, train = material.encoder, material.train
    assert encoder is not None and group[0].seed is not None
    mechanisms, sigmas = [], dict[tuple, float]()
    for spec in group:
        m = mechanism(replace(spec, epsilon=None), material.n)
        if spec.epsilon is not None:
            asked = (spec.epsilon, spec.delta)
            if asked not in sigmas:
                sigmas[asked] = noise_multiplier(epsilon=spec.epsilon, delta=spec.delta, population=m.population,
                                                 batch_size=spec.batch_size, steps=m.steps)  # fmt: skip
            m = m._replace(noise_multiplier=sigmas[asked])
        mechanisms.append(m)
    start = time.perf_counter()
    bank = train_heads(
        material,
        passes.heads_of(group, mechanisms, material),
        mechanisms[0],
        batch_size=group[0].batch_size,
        seed=passes.training_seed(group[0]),
        compute=compute,
        stream=passes.stream(group[0]),
    )
    test, validation = (
        heads.accuracy(bank, heads.encode(encoder, s.images, compute.where()), s.labels).tolist() if len(s) else None
        for s in (material.test, material.validation)
    )
    timing = {"seconds": time.perf_counter() - start, "shares": bank.seconds, "views": bank.views, "heads": len(group),
              "views_per_second": bank.views / max(sum(bank.seconds.values()), 1e-9)}  # fmt: skip
    done = []
    for r, (spec, m) in enumerate(zip(group, mechanisms, strict=True)):
        diagnostics = experiments.NonPrivateDiagnostics(
            validation_accuracy=validation[r] if validation else None, dropped_gradients=0, train_examples=len(train)
        )
        assert test is not None
        result = passes.result(spec, m, test[r], diagnostics, timing, material, compute.where())
        origin = result.provenance
        origin = origin | {"versions": origin["versions"] | {name: metadata.version(name) for name in LIBRARIES}}
        done.append((replace(result, provenance=origin), {"weight": bank.weights[r], "bias": bank.biases[r]}))
    return done


def run_cells(cells: Sequence[grids.Cell], *, compute: ComputeFlags | None = None) -> pd.DataFrame:
    """`grids.run_cells` in JAX: one row a cell, with its labels; `versions` names those of JAX too."""
    results = run_all([c.spec for c in cells], compute=compute)
    runs = experiments.frame(results)
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
    norms = torch.tensor([clip_norm])
    ours = clipping.clipped_head_sums(z, y, w, bias, norms, torch.full((1, k), 1 / k))
    theirs = clipped_head_sums(z, y, w, bias, norms)
    flat = clipped_head_sums(z.reshape(b * k, 1, dim), y.reshape(b * k, 1, classes), w, bias, norms)
    rows = {"views averaged, then clipped": theirs, "views one by one": (flat[0] / k, flat[1] / k)}
    table = {
        name: [
            f"{float((got - want).abs().max() / want.abs().max()):.0e}" for got, want in zip(found, ours, strict=False)
        ]
        for name, found in rows.items()
    }
    return pd.DataFrame.from_dict(table, orient="index", columns=["weights", "biases"])
