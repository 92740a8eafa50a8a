"""Train every weight of a network with DP-SGD on views (Algorithm 1), from scratch or further.

A step: a Poisson sample of ids, their views in physical batches, the clipped sum, *one* Gaussian noise, and an SGD
step on the noisy sum divided by the expected batch size. Every draw is keyed by what it is for, so weights, momentum,
EMA and a step number are all that a run needs to go on, bit for bit on a CPU (on a GPU as far as its kernels are
deterministic).

Several processes: start the same script under `torchrun`. Each takes every W-th id of the logical batch, the clipped
sums are added up over all (gloo on CPUs, NCCL on GPUs), and each adds the same keyed noise to the same sum.
"""

import json
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from tqdm import tqdm

from dpmix.core import accounting, files, rng, views
from dpmix.core import microbatch as micro
from dpmix.core.checks import require
from dpmix.core.clipping_network import Clipper, unflatten
from dpmix.core.network_checks import (
    Mechanism,
    check_arguments,
    check_model,
    check_untrained,
    layout,
    trained_names,
    untrained,
)
from dpmix.core.processes import add_up, agree, device_of, from_first, processes

Number = int | float
EXAMPLES = "labels and ids (digest)"
COUNTERS = ("examples", "views", "non_finite", "clipped")
TENSORS = ("weights", "velocity", "ema")


@dataclass(frozen=True)
class TrainedNetwork:
    """What `train` returns. Tensors are on the CPU.

    `state`, `ema_state`: state_dicts of the last step (EMA: None without ema_decay); only these, the number of steps and
    the hyperparameters are covered by the guarantee. `counters`: examples and views processed, examples dropped because
    their gradient was not finite, units (examples or microbatches) whose gradient was clipped: from private data without
    noise, not for release. `seconds`: of training, over all pieces.
    """

    state: dict[str, Tensor]
    ema_state: dict[str, Tensor] | None
    steps: int
    engine: str
    counters: dict[str, int]
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
    images: views.Images,
    labels: Int64[Tensor, " labels"],
    *,
    seed: rng.Seed,
    public: views.PublicImages | None = None,
    ids: Int64[Tensor, " n"] | None = None,
    physical_batch: int = 64,
    engine: str = "auto",
    autocast: torch.dtype | None = None,
    channels_last: bool = False,
    device: str | torch.device = "cpu",
    delta: Number | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    spec: dict[str, Any] | None = None,
    progress: bool = True,
    **mechanism: Any,
) -> TrainedNetwork:
    """DP-SGD on views, for the parameters of `model` with requires_grad, in place; `mechanism`: the fields of `Mechanism`.

    `ids` names the examples for the keyed randomness and the partition (their rows, by default). seed=None takes fresh
    entropy; a published seed voids the guarantee (`rng`). Not changing the result beyond rounding: `physical_batch` (examples
    at a time), `engine`, `autocast`, `channels_last`, `device`, number of processes.
    `checkpoint`: a file, written every `checkpoint_every` steps and on Ctrl-C; if it is there, training goes on from it, or
    refuses one of another run, naming the difference; `spec` (JSON-able) adds what the caller wants compared. It is for going
    on, not for release: it holds a digest of the seed and the counters. `delta`: for the progress bar, which then shows the
    epsilon so far. Raises ValueError on bad input before any work, MemoryError naming a physical batch to try.
    """
    m = Mechanism(**mechanism)
    if delta is not None:
        m.epsilon_spent(delta, max(m.steps, 1))  # refuses what is no delta before any step
    check_arguments(model, images, labels, m.num_classes, physical_batch, checkpoint_every)
    remedy = "a run with checkpoints must be given its seed, to go on with it"
    require(seed is not None or checkpoint is None, "seed", None, remedy)
    group = processes(device)
    device, seed = device_of(device), from_first(rng.as_seed(seed), group[1])
    model.to(device)
    check_model(model, images, m.num_classes)
    clipper = Clipper(model, m.clip_norm, engine, autocast=autocast, channels_last=channels_last)
    run = _Run(m, clipper, (images, labels, ids), public, seed, physical_batch, group, checkpoint, spec or {})
    # Before a checkpoint is read: one process that refuses it alone would leave the others waiting.
    other_labels = "labels: the processes see other examples; each process is given all of them"
    agree(int(run.belongs_to[EXAMPLES], 16), group[1], device, other_labels)
    run.load()
    other_steps = "checkpoint: the processes read different steps; they must see the same file"
    agree(run.state.step, group[1], device, other_steps)
    start = run.state.step
    kept = untrained(model)
    _fill(clipper.parameters, run.state.weights)
    bar = tqdm(total=m.steps, initial=start, desc="DP-SGD", unit="step", disable=not progress or group[0] > 0)
    try:
        with run.kept_whatever_happens():
            while run.state.step < m.steps:
                run.state = run.updated(run.clipped_sum())
                _fill(clipper.parameters, run.state.weights)
                bar.update()
                step, last = run.state.step, run.state.step == m.steps
                if step == start + 1 or last:
                    check_untrained(model, kept)
                if delta is not None and not bar.disable and (last or step % max(1, m.steps // 20) == 0):
                    bar.set_postfix_str(f"ε = {m.epsilon_spent(delta, step):.2f} of δ = {delta:g}")
                if last or step % checkpoint_every == 0:
                    run.keep()
    finally:
        bar.close()
        _fill(clipper.parameters, run.state.weights)
    agree(run.state.step, group[1], device, other_steps)  # nobody returns before the last checkpoint is on the disk
    weights = {name: t.detach().cpu().clone() for name, t in model.state_dict().items()}
    ema = None if run.state.ema is None else unflatten(run.state.ema, clipper.parameters)
    first = trained_names(model)
    averaged = None if ema is None else {n: ema[first[n]].to(t).cpu() if n in first else t for n, t in weights.items()}
    return TrainedNetwork(weights, averaged, m.steps, clipper.engine, run.state.counters, run.seconds(), start)


class _Run:
    """One process's part of a run: its data, the state that steps replace, and the checkpoint."""

    def __init__(
        self,
        m: Mechanism,
        clipper: Clipper,
        data: tuple,
        public: views.PublicImages | None,
        seed: int,
        physical_batch: int,
        group: tuple[int, int],
        checkpoint: str | Path | None,
        spec: dict[str, Any],
    ) -> None:
        self.mechanism, self.clipper, self.seed = m, clipper, seed
        self.public_things: dict[str, Any] = {"num_classes": m.num_classes, "public": public}
        self.physical_batch, (self.rank, self.world) = physical_batch, group
        self.images, self.labels, ids = data
        n = len(self.labels)
        self.ids = torch.arange(n) if ids is None else ids
        # Row r of the table: the places (rows of `images`, or -1) of unit r, which is an example or a microbatch.
        self.table = torch.arange(n)[:, None]
        if m.microbatch > 1:
            places = n if m.places is None else m.places
            self.table = micro.microbatch_partition(places, m.microbatch, seed=seed, ids=self.ids)
        # Neighbours share the noise of a step, runs with other settings never do: it is keyed by the mechanism.
        self.noise_key = json.dumps(asdict(m), sort_keys=True)
        weights = torch.cat([p.detach().reshape(-1).to(clipper.total.dtype) for p in clipper.parameters.values()])
        # Processes that started from other weights would train other models.
        weights = from_first(weights.cpu(), self.world).to(clipper.device)
        velocity = torch.zeros_like(weights) if m.momentum else None
        counters = dict.fromkeys(COUNTERS, 0)
        self.state = _State(0, weights, velocity, None if m.ema_decay is None else weights, counters)
        self.seconds_before, self.began = 0.0, time.monotonic()
        self.path = None if checkpoint is None else Path(checkpoint)
        self.belongs_to: dict[str, Any] = asdict(m) | {"n": n, "image shape": list(self.images.shape[1:])}
        self.belongs_to |= {"public images": len(public.labels) if public else 0, "model": layout(clipper.model)}
        self.belongs_to |= spec | {"seed (digest)": files.digest(repr(("dpmix checkpoint", seed)))[:16]}
        named = (t.to(torch.int64).numpy().tobytes() for t in (self.labels.cpu(), self.ids.cpu()))
        self.belongs_to[EXAMPLES] = files.digest(repr(seed), *named)[:15]
        self.compute: dict[str, Any] = {"engine": clipper.engine, "autocast": str(clipper.autocast)}
        self.compute |= {"device": clipper.device.type, "channels_last": clipper.channels_last}
        self.compute |= {"processes": self.world, "physical_batch": physical_batch}

    def clipped_sum(self) -> dict[str, int]:
        """Leaves the sum over the step's Poisson sample in `clipper.total`, of all processes; what was counted."""
        m, step, device = self.mechanism, self.state.step, self.clipper.device
        self.clipper.reset()
        rows = accounting.poisson_batch(len(self.table), m.sample_rate, seed=self.seed, step=step)
        rows = rows[self.rank :: self.world]
        seen, at_a_time = dict.fromkeys(COUNTERS, 0), max(1, self.physical_batch // m.microbatch)
        for part in rows.split(at_a_time) if len(rows) else ():
            present = self.table[part] >= 0
            taken = self.table[part][present]
            private = self.images[taken].to(device), self.labels[taken].to(device), self.ids[taken]
            of_examples = views.make_views(*private, m.recipe, seed=self.seed, step=step, **self.public_things)
            units: tuple[Tensor, ...] = of_examples
            if m.microbatch > 1:
                lam = micro.mixing_weights(part, m.recipe.views, alpha=m.recipe.alpha, seed=self.seed, step=step)
                x, y = (t.new_zeros(*present.shape, *t.shape[1:]) for t in of_examples)
                x[present.to(device)], y[present.to(device)] = of_examples
                units = micro.microbatch_views(x, y, present.to(device), m.microbatch_mix, lam)
            norms = self.clipper.add(*units[:3], pad_to=at_a_time)
            seen["examples"] += int(present.sum())
            seen["views"] += int(present.sum()) * m.recipe.views
            seen["clipped"] += int((norms > m.clip_norm).sum())
        seen["non_finite"] = int(self.clipper.non_finite)
        return add_up(self.clipper.total, seen, self.world)

    def updated(self, seen: dict[str, int]) -> _State:
        """The state after the step whose clipped sum is in `clipper.total`: noise once, then SGD."""
        m, state = self.mechanism, self.state
        deviation = m.noise_multiplier * m.clip_norm * micro.sensitivity(m.microbatch)
        noise = noise_of(self.clipper.parameters, deviation, seed=self.seed, step=state.step, identity=self.noise_key)
        gradient = (self.clipper.total + noise.to(self.clipper.total)) / m.expected_batch
        velocity = None if state.velocity is None else state.velocity * m.momentum + gradient
        weights = state.weights - m.learning_rate * (gradient if velocity is None else velocity)
        if m.weight_decay:
            weights *= 1 - m.learning_rate * m.weight_decay
        ema = state.ema
        if ema is not None and m.ema_decay is not None:
            decay = min(m.ema_decay, (1 + state.step) / (10 + state.step))
            ema = decay * ema + (1 - decay) * weights
        return _State(state.step + 1, weights, velocity, ema, {k: n + seen[k] for k, n in state.counters.items()})

    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.began

    def keep(self) -> None:
        """Write the checkpoint, where there is to be one."""
        if self.path is not None and self.rank == 0:
            tensors = {name: t for name in TENSORS if (t := getattr(self.state, name)) is not None}
            meta = {"compute": self.compute, "step": self.state.step, "counters": self.state.counters}
            files.save_tensors(self.path, tensors, self.belongs_to, meta | {"seconds": self.seconds()}, private=True)

    def load(self) -> None:
        """Go on from the checkpoint, if it is there."""
        found = None if self.path is None else files.load_tensors(self.path, self.belongs_to)
        if found is None:
            return
        tensors, meta = found
        otherwise = files.differences(meta["compute"], self.compute)
        if otherwise:
            warnings.warn(f"resuming with other compute settings ({otherwise}): equal to rounding only", stacklevel=3)
        tensors = {name: t.to(self.state.weights) for name, t in tensors.items()}
        weights, velocity, ema = tensors["weights"], tensors.get("velocity"), tensors.get("ema")
        self.state = _State(meta["step"], weights, velocity, ema, meta["counters"])
        self.seconds_before = meta["seconds"]

    @contextmanager
    def kept_whatever_happens(self) -> Iterator[None]:
        """Write the checkpoint on Ctrl-C and where memory runs out, and say what to try then."""
        try:
            yield
        except KeyboardInterrupt:
            self.keep()
            raise
        except (MemoryError, RuntimeError) as error:
            full = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
            if not full:
                raise
            self.keep()
            half = self.physical_batch // 2
            remedy = f"try physical_batch={half}; the result does not depend on it"
            if half < self.mechanism.microbatch:
                remedy = "the views of one example alone do not fit: take fewer, a smaller network or another engine"
            device = self.clipper.device
            raise MemoryError(f"physical_batch={self.physical_batch}: out of memory on {device}; {remedy}") from None


def noise_of(
    parameters: dict[str, nn.Parameter], deviation: Number, *, seed: int, step: int, identity: str = ""
) -> Float[Tensor, " size"]:
    """The noise of a step, flat, float64: N(0, deviation^2), from the stream (seed, "noise", step, identity, name).
    `identity` tells runs apart: two runs with one seed and other hyperparameters must not share noise, or the difference of
    their weights would be free of it."""
    draws = [rng.standard_noise((p.numel(),), identity, name, seed=seed, step=step) for name, p in parameters.items()]
    return torch.from_numpy(np.concatenate(draws)) * deviation


@torch.no_grad()
def accuracy(
    model: nn.Module, images: views.Images, labels: Int64[Tensor, " n"], *, physical_batch: int = 256
) -> float:
    """The fraction of images whose largest logit is their label's, without augmentation. On private images this is a
    diagnostic, not for release. No images: nan."""
    device, hits = next(model.parameters()).device, 0
    for rows in torch.arange(len(labels)).split(physical_batch) if len(labels) else ():
        pixels = views.transforms.as_float(images[rows].to(device))
        hits += int((model(pixels).argmax(1) == labels[rows].to(device)).sum())
    return hits / len(labels) if len(labels) else float("nan")


def _fill(parameters: dict[str, nn.Parameter], flat: Tensor) -> None:
    with torch.no_grad():
        for name, part in unflatten(flat, parameters).items():
            parameters[name].copy_(part)
