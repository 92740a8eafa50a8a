"""Train every weight of a network with DP-SGD on views (Algorithm 1), from scratch or further.

A step: a Poisson sample of ids, their views in physical batches, the clipped sum, *one* Gaussian noise, and an SGD
step on the noisy sum divided by the expected batch size. Every draw is keyed by what it is for, so weights, momentum,
EMA and a step number are all that a run needs to go on, bit for bit on a CPU (on a GPU as far as its kernels are
deterministic).

Several processes: start the same script under `torchrun`. Each takes every W-th id of the logical batch, the clipped
sums are added up over all (gloo on CPUs, NCCL on GPUs), and each adds the same keyed noise to the same sum.
"""

import hashlib
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, Num
from torch import Tensor, nn
from tqdm import tqdm

from dpmix.core import accounting, files, rng, views
from dpmix.core import microbatch as micro
from dpmix.core.checks import require
from dpmix.core.clipping_network import Clipper, unflatten
from dpmix.core.network_checks import check_arguments, check_model, check_untrained, layout
from dpmix.core.processes import add_up, agree_on_step, device_of, from_first, processes

Number = int | float
COUNTERS = ("examples", "views", "non_finite", "clipped")


@dataclass(frozen=True)
class TrainedNetwork:
    """What `train` returns. Tensors are on the CPU.

    `state`, `ema_state`: state_dicts of the last step (EMA: None without ema_decay); only these, the number of steps
    and the hyperparameters are covered by the guarantee. `engine`: the one that ran. `counters`: examples and views
    processed, examples dropped because their gradient was not finite, examples whose gradient was clipped (units that
    were clipped are microbatches where there are any). `diagnostics`: (step, value of `evaluate`). Counters and
    diagnostics come from private data without noise: not for release. `seconds`: of training, over all pieces;
    `resumed_from`: the step of the checkpoint, 0 if there was none.
    """

    state: dict[str, Tensor]
    ema_state: dict[str, Tensor] | None
    steps: int
    engine: str
    counters: dict[str, int]
    diagnostics: list[tuple[int, Any]]
    seconds: float
    resumed_from: int


@dataclass(frozen=True)
class _State:
    """All that a step changes. Replaced as one, never written to: an interrupt finds the old one or the new one."""

    step: int
    weights: Tensor
    velocity: Tensor | None
    ema: Tensor | None
    counters: dict[str, int]


def train(
    model: nn.Module,
    images: Num[Tensor, "n C H W"],
    labels: Int64[Tensor, " labels"],
    *,
    recipe: views.Recipe,
    num_classes: int,
    clip_norm: Number,
    noise_multiplier: Number,
    learning_rate: Number,
    expected_batch: Number,
    sample_rate: Number,
    steps: int,
    seed: rng.Seed,
    public: views.PublicImages | None = None,
    momentum: Number = 0.0,
    weight_decay: Number = 0.0,
    ema_decay: Number | None = None,
    ids: Int64[Tensor, " n"] | None = None,
    places: int | None = None,
    microbatch: int = 1,
    microbatch_mix: str = "none",
    physical_batch: int = 64,
    engine: str = "auto",
    autocast: torch.dtype | None = None,
    channels_last: bool = False,
    device: str | torch.device = "cpu",
    delta: Number | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    resume: bool = True,
    identity: str = "",
    spec: dict[str, Any] | None = None,
    progress: bool = True,
    evaluate: Callable[[nn.Module, int], Any] | None = None,
    evaluate_every: int = 0,
) -> TrainedNetwork:
    """DP-SGD on the views of `recipe`, for the parameters of `model` with requires_grad, in place.

    The mechanism: images uint8 (or float 0..1) and their labels; each example joins a step with probability
    `sample_rate`; noise of standard deviation noise_multiplier * clip_norm; divisor `expected_batch` (never the
    realised batch; a step with nobody in it still adds noise and counts). SGD at a constant rate, v = momentum v + g,
    w -= lr v; then w *= 1 - lr weight_decay (decoupled, of noisy weights only); EMA of the weights with De et al.'s
    warm-up, min(ema_decay, (1 + t) / (10 + t)). No schedule.
    `microbatch` b > 1 is Eq. (2): a fixed keyed partition, Poisson sampling and `expected_batch` count *microbatches*,
    and the noise is scaled for 2 C (`microbatch`); `microbatch_mix`: "none", "add" or "replace".

    `ids` names the examples for the keyed randomness and the partition (their rows, by default), below `places`, the public
    number of places (by default, as many as there are examples); a place that is not among them is vacant. `identity`
    tells runs of one seed apart that the arguments do not, such as runs on other data: they must not share noise.

    What does not change the result beyond rounding: `physical_batch` (examples at a time), `engine`, `autocast`,
    `channels_last`, `device`, number of processes.

    `checkpoint`: a file, written every `checkpoint_every` steps and on Ctrl-C; `resume=True` goes on from it if it is
    there. A checkpoint of another run is refused, naming the difference; `spec` (JSON-able) adds what the caller wants
    compared, such as a digest of the data. A checkpoint is for going on, not for release: it holds a digest of the
    seed and the counters. `delta`: for the progress bar, which then shows the epsilon spent so far.
    `evaluate(model, step)` is called every `evaluate_every` steps and at the end, on the first process.
    seed=None takes fresh entropy; a published seed voids the guarantee (`rng`).

    Raises ValueError on bad input before any work, MemoryError naming a physical batch to try.
    """
    check_arguments(locals())
    rank, world = processes(device)
    device = device_of(device)
    if seed is None:
        require(checkpoint is None, "seed", None, "a run with checkpoints must be given its seed, to go on with it")
        seed = from_first(rng.fresh_seed(), world)
    seed = rng.as_seed(seed)
    model.to(device)
    check_model(model, images, num_classes)
    clipper = Clipper(model, clip_norm, engine, autocast=autocast, channels_last=channels_last)
    parameters, n = clipper.parameters, len(images)
    names = torch.arange(n) if ids is None else ids
    if microbatch > 1:
        table = micro.microbatch_partition(n if places is None else places, microbatch, seed=seed, ids=names)
    else:
        table = torch.arange(n)[:, None]
    others = {name: t.clone() for name, t in model.state_dict().items() if name not in parameters}
    deviation = noise_multiplier * clip_norm * micro.sensitivity(microbatch)
    told = {
        "recipe": asdict(recipe), "n": n, "image shape": list(images.shape[1:]), "num_classes": num_classes,
        "clip_norm": clip_norm, "noise_multiplier": noise_multiplier, "learning_rate": learning_rate,
        "expected_batch": expected_batch, "sample_rate": sample_rate, "steps": steps, "momentum": momentum,
        "weight_decay": weight_decay, "ema_decay": ema_decay,
        "microbatch": microbatch, "microbatch_mix": microbatch_mix, "places": places, "identity": identity,
        "public images": 0 if public is None else len(public.labels), "model": layout(model), **(spec or {}),
        "seed (digest)": hashlib.sha256(repr(("dpmix checkpoint", seed)).encode()).hexdigest()[:16],
    }  # fmt: skip
    apart = ("n", "image shape", "public images", "model", "seed (digest)", *(spec or {}))
    own = json.dumps({k: v for k, v in told.items() if k not in apart}, sort_keys=True)
    compute = {"engine": clipper.engine, "autocast": str(autocast), "device": device.type, "processes": world,
               "physical_batch": physical_batch, "channels_last": channels_last}  # fmt: skip
    flat = torch.cat([p.detach().reshape(-1).to(clipper.total.dtype) for p in parameters.values()])
    # Processes that started from other weights would train other models.
    flat = from_first(flat.cpu(), world).to(device)
    state = _State(0, flat, torch.zeros_like(flat) if momentum else None, None if ema_decay is None else flat,
                   dict.fromkeys(COUNTERS, 0))  # fmt: skip
    diagnostics: list[tuple[int, Any]] = []
    path, seconds = None if checkpoint is None else Path(checkpoint), 0.0
    found = files.load_tensors(path, told) if path is not None and resume else None
    if found is not None:
        state, seconds, diagnostics = _restore(*found, compute, device)
    agree_on_step(state.step, world, device)
    start, began = state.step, time.monotonic()

    def keep() -> None:
        if path is not None and rank == 0:
            tensors = {"weights": state.weights, "velocity": state.velocity, "ema": state.ema}
            meta = {"compute": compute, "step": state.step, "counters": state.counters,
                    "seconds": seconds + time.monotonic() - began, "diagnostics": diagnostics}  # fmt: skip
            files.save_tensors(path, {k: t for k, t in tensors.items() if t is not None}, told, meta, keep=True)

    def clipped_sum(step: int) -> dict[str, int]:
        clipper.reset()
        rows = accounting.poisson_batch(len(table), sample_rate, seed=seed, step=step)[rank::world]
        seen = dict.fromkeys(COUNTERS, 0)
        for part in rows.split(max(1, physical_batch // microbatch)):
            if not len(part):
                continue
            present = table[part] >= 0
            taken = table[part][present]
            made = views.make_views(
                images[taken].to(device), labels[taken].to(device), names[taken], recipe,
                num_classes=num_classes, seed=seed, step=step, public=public,
            )  # fmt: skip
            if microbatch == 1:
                norms = clipper.add(made.images, made.targets)
            else:
                lam = micro.mixing_weights(part, recipe.views, alpha=recipe.alpha, seed=seed, step=step)
                x, y = (t.new_zeros(*present.shape, *t.shape[1:]) for t in made)
                there = present.to(device)
                x[there], y[there] = made.images, made.targets
                norms = clipper.add(*micro.microbatch_views(x, y, there, microbatch_mix, lam))
            seen["examples"] += int(present.sum())
            seen["views"] += int(present.sum()) * recipe.views
            seen["clipped"] += int((norms > clip_norm).sum())
        seen["non_finite"] = int(clipper.non_finite)
        return add_up(clipper.total, seen, world)

    def updated(seen: dict[str, int]) -> _State:
        noise = noise_of(parameters, deviation, seed=seed, step=state.step, identity=own).to(clipper.total)
        gradient = (clipper.total + noise) / expected_batch
        velocity = None if state.velocity is None else state.velocity * momentum + gradient
        weights = state.weights - learning_rate * (gradient if velocity is None else velocity)
        if weight_decay:
            weights *= 1 - learning_rate * weight_decay
        ema = state.ema
        if ema is not None and ema_decay is not None:
            decay = min(ema_decay, (1 + state.step) / (10 + state.step))
            ema = decay * ema + (1 - decay) * weights
        counters = {name: state.counters[name] + seen[name] for name in COUNTERS}
        return _State(state.step + 1, weights, velocity, ema, counters)

    _fill(parameters, state.weights)
    bar = tqdm(total=steps, initial=start, desc="DP-SGD", unit="step", disable=not progress or rank > 0)
    try:
        while state.step < steps:
            state = updated(clipped_sum(state.step))
            _fill(parameters, state.weights)
            bar.update()
            done = state.step == steps
            if state.step == start + 1 or done:
                check_untrained(model, others)
            if delta is not None and not bar.disable and (done or state.step % max(1, steps // 20) == 0):
                spent = accounting.epsilon_spent(
                    noise_multiplier=noise_multiplier, delta=delta, sample_rate=sample_rate, steps=state.step
                )
                bar.set_postfix_str(f"ε = {spent:.2f} of δ = {delta:g}")
            if evaluate is not None and rank == 0 and (done or (evaluate_every and state.step % evaluate_every == 0)):
                diagnostics.append((state.step, evaluate(model, state.step)))
            if done or state.step % checkpoint_every == 0:
                keep()
    except KeyboardInterrupt:
        keep()
        raise
    except (MemoryError, RuntimeError) as error:
        full = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
        if not full:
            raise
        keep()
        said = f"try physical_batch={physical_batch // 2}; the result does not depend on it"
        if physical_batch // 2 < microbatch:
            said = "the views of one example alone do not fit: take fewer views, a smaller network or another engine"
        raise MemoryError(f"physical_batch={physical_batch}: out of memory on {device}; {said}") from None
    finally:
        bar.close()
        _fill(parameters, state.weights)
    if evaluate is not None and rank == 0 and steps and (not diagnostics or diagnostics[-1][0] != steps):
        diagnostics.append((steps, evaluate(model, steps)))  # the last piece was interrupted before it
    agree_on_step(state.step, world, device)  # nobody returns before the last checkpoint is on the disk
    last = {name: t.detach().cpu().clone() for name, t in model.state_dict().items()}
    averaged = None
    if state.ema is not None:
        parts = unflatten(state.ema, parameters)
        averaged = {name: parts[name].to(t).cpu() if name in parts else t for name, t in last.items()}
    took = seconds + time.monotonic() - began
    return TrainedNetwork(last, averaged, steps, clipper.engine, state.counters, diagnostics, took, start)


def noise_of(
    parameters: dict[str, nn.Parameter], deviation: Number, *, seed: int, step: int, identity: str = ""
) -> Float[Tensor, " size"]:
    """The noise of a step, flat, float64: N(0, deviation^2), from the stream (seed, "noise", step, identity, name).

    `identity` tells runs apart: two runs with one seed and other hyperparameters must not share noise, or the difference
    of their weights would be free of it.
    """
    draws = [rng.standard_noise((p.numel(),), identity, name, seed=seed, step=step) for name, p in parameters.items()]
    return torch.from_numpy(np.concatenate(draws)) * deviation


@torch.no_grad()
def accuracy(
    model: nn.Module, images: Num[Tensor, "n C H W"], labels: Int64[Tensor, " n"], *, physical_batch: int = 256
) -> float:
    """The fraction of images whose largest logit is their label's, without augmentation. On private images this is a
    diagnostic, not for release. No images: nan."""
    device, hits = next(model.parameters()).device, 0
    for x, y in zip(images.split(physical_batch), labels.split(physical_batch), strict=True):
        pixels = views.transforms.as_float(x.to(device))
        hits += int((model(pixels).argmax(1) == y.to(device)).sum())
    return hits / len(labels) if len(labels) else float("nan")


def _restore(
    tensors: dict[str, Tensor], meta: dict[str, Any], compute: dict[str, Any], device: torch.device
) -> tuple[_State, float, list[tuple[int, Any]]]:
    otherwise = files.differences(meta["compute"], compute)
    if otherwise:
        warnings.warn(f"resuming with other compute settings ({otherwise}): equal to rounding only", stacklevel=3)
    moved = {name: t.to(device) for name, t in tensors.items()}
    state = _State(meta["step"], moved["weights"], moved.get("velocity"), moved.get("ema"), meta["counters"])
    return state, meta["seconds"], [(step, value) for step, value in meta["diagnostics"]]


def _fill(parameters: dict[str, nn.Parameter], flat: Tensor) -> None:
    with torch.no_grad():
        for name, part in unflatten(flat, parameters).items():
            parameters[name].copy_(part)
