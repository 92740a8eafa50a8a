"""Train many linear heads on one frozen encoder in one pass (DESIGN 4.3).

With a frozen encoder the views do not depend on the head. One pass makes the union of the views of all recipes, encodes
each view once and trains every head of the bank on the views that are its own. Each head is an ordinary DP-SGD run:
the same Poisson batches, its own learning rate, clip norm and noise multiplier, and noise of its own.

Noise must be independent between heads: the difference of two heads with shared noise would be free of it. It is keyed
by what the run is (head, encoder, batch size, rate, steps, `identity`), so a head has the same noise alone and in a bank.
A bank is a tuning tool: its heads share the Poisson batches, so releasing r of them costs as much as one mechanism at
rate q with the noise multiplier (sum of 1 / sigma_r^2)^(-1/2), which can exceed r times the budget of one.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor
from tqdm import tqdm

from dpmix.core import accounting, checks, clipping, files, rng, views
from dpmix.core.sources import Encoder as Encoder
from dpmix.core.sources import FreshViews, Scaling, Source, lap
from dpmix.core.sources import encode as encode


@dataclass(frozen=True, kw_only=True)
class Head:
    """One DP-SGD run on a frozen encoder. `learning_rate` is eta of Algorithm 1, applied to the mean over B. Heads that
    differ in anything, be it their `identity`, have independent noise."""

    recipe: views.Recipe
    learning_rate: float
    noise_multiplier: float
    clip_norm: float = 1.0
    momentum: float = 0.0
    identity: str = ""

    def __post_init__(self) -> None:
        checks.positive("learning_rate", self.learning_rate)
        checks.clip_norm(self.clip_norm)
        checks.floats(self, "learning_rate", "clip_norm", "noise_multiplier", "momentum")
        checks.require(0 <= self.momentum < 1, "momentum", self.momentum, "must lie in [0, 1)")
        checks.require(self.noise_multiplier >= 0, "noise_multiplier", self.noise_multiplier, "must not be negative")


@dataclass(frozen=True, kw_only=True)
class Bank:
    """R trained heads: `weights` [R, num_classes, D], `biases` [R, num_classes], and how the pass went. `seconds` holds the
    shares of encoder, views, clipping and noise. `dropped` counts the (example, head) pairs whose gradient was not finite and
    counted as zero: a diagnostic from private data, not for release."""

    weights: Float[Tensor, "R num_classes D"]
    biases: Float[Tensor, "R num_classes"]
    views: int
    seconds: dict[str, float]
    dropped: int


@dataclass(frozen=True)
class _State:
    """All that a step changes. Replaced as one: an interrupt finds the old one or the new one (the clocks aside)."""

    weights: Tensor
    biases: Tensor
    moving: tuple[Tensor, Tensor] | None = None
    step: int = 0
    views: int = 0
    dropped: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("clipping", "noise"), 0.0))


Observer = Callable[[int, Tensor, Tensor, Tensor, Tensor], None]


def train_heads(
    encoder: Encoder,
    images: views.Images,
    labels: Int64[Tensor, " n"],
    heads: Sequence[Head],
    *,
    num_classes: int,
    seed: rng.Seed,
    public: views.PublicImages | None = None,
    ids: Int64[Tensor, " n"] | None = None,
    redraw: bool = True,
    device: str | torch.device = "cpu",
    **training: Any,
) -> Bank:
    """`train` on `FreshViews` of these examples: what is not named here is an argument of `train`. With `redraw=False`
    every example has the same views at every step (`models.stored` keeps such views and encodes them once)."""
    checks.require(len(heads) > 0, "heads", len(heads), "must hold at least one head")
    recipes, seed = [head.recipe for head in heads], _seed(seed, training.get("checkpoint"))
    about: dict[str, Any] = dict(
        num_classes=num_classes, seed=seed, public=public, ids=ids, redraw=redraw, device=device
    )
    return train(FreshViews(encoder, images, labels, recipes, **about), heads, seed=seed, **training)


def train(
    source: Source,
    heads: Sequence[Head],
    *,
    expected_batch: int,
    steps: int,
    seed: rng.Seed,
    sample_rate: float | None = None,
    initial: tuple[Tensor, Tensor] | None = None,
    physical_batch: int = 32,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 30.0,
    identity: str = "",
    spec: dict[str, Any] | None = None,
    progress: bool = True,
    observe: Observer | None = None,
) -> Bank:
    """Algorithm 1 for every head at once: `steps` Poisson steps at rate q (`sample_rate`; expected_batch / n by default).

    The divisor of the noisy sum is `expected_batch`, exactly; a step with an empty batch adds noise all the same; at rate 1
    every example is in every step. Weights start at zero unless `initial` [num_classes, D], [num_classes] is given (it must
    not hold private data). `physical_batch` bounds memory: a batch is taken in parts of that many, the last padded, so that
    nobody's rounding depends on how many joined. With `checkpoint` the state is saved every `checkpoint_seconds`, at the
    end and on Ctrl-C, and a later call with the same arguments continues bit for bit; one of another run is refused, and
    `spec` (JSON-able) adds what the caller wants compared, such as a digest of the data. `identity` tells runs of one seed
    apart that the arguments do not (other data or initial weights): they must not share noise. `observe(step, features,
    targets, weights, biases)` sees each physical batch before the update: for non-private diagnostics.

    `seed=None` takes fresh entropy. The released quantity is each head's last iterate. Raises ValueError on bad input
    before any training.
    """
    sample_rate = _checked(source, heads, expected_batch, steps, physical_batch, sample_rate)
    seed = _seed(seed, checkpoint)
    device, union = source.device, source.union
    rows = {r: row for r, row in zip(union.recipes, union.weights, strict=True)}
    view_weights = torch.stack([rows[h.recipe] for h in heads]).to(device, torch.float32)
    each = [(h.clip_norm, h.learning_rate / expected_batch, h.momentum) for h in heads]
    clip_norms, rates, momenta = (torch.tensor(v, device=device) for v in zip(*each, strict=True))
    run = (source.name, source.num_classes, expected_batch, sample_rate, steps, identity)
    belongs = _belongs_to(run, heads, {"n": source.n}, seed) | (spec or {})
    streams = [files.digest(repr((run, head))) for head in heads]
    state = _start(source, heads, initial)
    if checkpoint is not None:
        state = _load(checkpoint, belongs, state)
    saved = time.monotonic()
    said = f"{checks.counted(len(heads), 'head')}, {checks.counted(union.views, 'view')}"
    bar = tqdm(total=steps, initial=state.step, desc=said, disable=not progress)
    try:
        while state.step < steps:
            chosen = accounting.poisson_batch(source.n, sample_rate, seed=seed, step=state.step)
            now, dropped = (state.weights, state.biases), 0
            gradient = torch.zeros_like(state.weights), torch.zeros_like(state.biases)
            for part in chosen.split(physical_batch) if len(chosen) else ():
                features, targets = source.batch(part, state.step)
                tick = time.perf_counter()
                if observe is not None:
                    observe(state.step, features, targets, *now)
                if len(part) < physical_batch:
                    padding = (0, 0) * 2 + (0, physical_batch - len(part))
                    features, targets = F.pad(features, padding), F.pad(targets, padding)
                sums = clipping.clipped_head_sums(features, targets, *now, clip_norms, view_weights, len(part))
                gradient[0].add_(sums.weights)
                gradient[1].add_(sums.biases)
                dropped += int((~sums.norms.isfinite()).sum())
                lap(state.seconds, "clipping", tick)
            tick = time.perf_counter()
            _add_noise(*gradient, heads, streams, seed, state.step)
            weights, biases = gradient
            if state.moving is not None:
                weights = momenta[:, None, None] * state.moving[0] + weights
                biases = momenta[:, None] * state.moving[1] + biases
            moving = None if state.moving is None else (weights, biases)
            weights, biases = now[0] - rates[:, None, None] * weights, now[1] - rates[:, None] * biases
            seen = state.step + 1, state.views + len(chosen) * union.views, state.dropped + dropped
            state = _State(weights, biases, moving, *seen, state.seconds)
            lap(state.seconds, "noise", tick)
            bar.update()
            due = state.step == steps or time.monotonic() - saved > checkpoint_seconds
            if checkpoint is not None and due:
                _save(checkpoint, belongs, state, source)
                saved = time.monotonic()
    except KeyboardInterrupt:
        if checkpoint is not None:
            _save(checkpoint, belongs, state, source)
        raise
    finally:
        bar.close()
    went: dict[str, Any] = dict(views=state.views, seconds=_clocks(state, source), dropped=state.dropped)
    return Bank(weights=state.weights.cpu(), biases=state.biases.cpu(), **went)


def _belongs_to(run: tuple, heads: Sequence[Head], more: dict[str, Any], seed: int) -> dict[str, Any]:
    """What a checkpoint is compared by."""
    names = ("encoder", "num_classes", "expected_batch", "sample_rate", "steps", "identity (digest)")
    about = dict(zip(names, (*run[:-1], files.digest(run[-1])[:16]), strict=True)) | more
    about["heads"] = f"{len(heads)} (digest {files.digest(repr(tuple(heads)))[:16]})"
    return about | {"seed (digest)": files.digest(repr(("dpmix checkpoint", seed)))[:16]}


def _start(source: Source, heads: Sequence[Head], initial: tuple[Tensor, Tensor] | None) -> _State:
    """Zeros, or `initial` in every head; momentum where a head has some."""
    weights = torch.zeros(len(heads), source.num_classes, source.dim, device=source.device)
    biases = torch.zeros(len(heads), source.num_classes, device=source.device)
    if initial is not None:
        weights, biases = weights + initial[0].to(source.device), biases + initial[1].to(source.device)
    moves = any(head.momentum for head in heads)
    return _State(weights, biases, (torch.zeros_like(weights), torch.zeros_like(biases)) if moves else None)


def _seed(seed: rng.Seed, checkpoint: Path | None) -> int:
    said = "a run with checkpoints must be given its seed, to go on with it"
    checks.require(seed is not None or checkpoint is None, "seed", None, said)
    return rng.as_seed(seed)


def _checked(
    source: Source,
    heads: Sequence[Head],
    expected_batch: int,
    steps: int,
    physical_batch: int,
    sample_rate: float | None,
) -> float:
    """The sampling rate, once all arguments are known to be good."""
    checks.require(len(heads) > 0, "heads", len(heads), "must hold at least one head")
    repeated = len(heads) - len(set(heads))
    checks.require(repeated == 0, "heads", repeated, "heads are given twice; they would share their noise")
    for head in heads:
        known = head.recipe in source.union.recipes
        checks.require(known, "heads", head.recipe, "is no recipe of the source; give it to the source too")
    for name, value in dict(physical_batch=physical_batch, expected_batch=expected_batch, steps=steps).items():
        checks.whole(name, value, 1)
    if sample_rate is None:
        allowed = f"must be at most the {checks.counted(source.n, 'training example')}"
        checks.require(expected_batch <= source.n, "expected_batch", expected_batch, allowed)
        sample_rate = expected_batch / source.n
    checks.require(0 < sample_rate <= 1, "sample_rate", sample_rate, "must lie in (0, 1]")
    return sample_rate


def _add_noise(
    weights: Tensor, biases: Tensor, heads: Sequence[Head], streams: Sequence[str], seed: int, step: int
) -> None:
    """N(0, (sigma C)^2) on every coordinate of every head's sum, in place: one independent stream a head and step."""
    _, num_classes, dim = weights.shape
    for r, (head, stream) in enumerate(zip(heads, streams, strict=True)):
        if head.noise_multiplier:
            draw = rng.standard_noise((num_classes, dim + 1), stream, seed=seed, step=step)
            noise = torch.from_numpy(draw * (head.noise_multiplier * head.clip_norm)).to(weights)
            weights[r] += noise[:, :dim]
            biases[r] += noise[:, dim]


def _clocks(state: _State, source: Source) -> dict[str, float]:
    """What all calls of a run spent, the source's work of this one included."""
    return {k: state.seconds.get(k, 0.0) + source.seconds.get(k, 0.0) for k in {**source.seconds, **state.seconds}}


def _save(path: Path, belongs: dict[str, Any], state: _State, source: Source) -> None:
    meta = {"step": state.step, "views": state.views, "dropped": state.dropped, "seconds": _clocks(state, source)}
    moving = dict(zip(("moving weights", "moving biases"), state.moving or (), strict=False))
    files.save_tensors(path, {"weights": state.weights, "biases": state.biases, **moving}, belongs, meta, private=True)


def _load(path: Path, belongs: dict[str, Any], fresh: _State) -> _State:
    found = files.load_tensors(path, belongs)
    if found is None:
        return fresh
    tensors, meta = {name: t.to(fresh.weights.device) for name, t in found[0].items()}, found[1]
    moving = None if fresh.moving is None else (tensors["moving weights"], tensors["moving biases"])
    return _State(tensors["weights"], tensors["biases"], moving, **meta)


def unscaled(bank: Bank, scaling: Scaling) -> Bank:
    """The heads that give the same logits on features as they are as `bank` does on scaled ones."""
    mean, scale = scaling
    weights = bank.weights / scale
    return replace(bank, weights=weights, biases=bank.biases - weights @ mean)


def accuracy(bank: Bank, features: Float[Tensor, "n D"], labels: Int64[Tensor, " n"]) -> Float[Tensor, " R"]:
    """Share of examples that each head gets right, 0..1; nan for an empty set."""
    heads, num_classes, dim = bank.weights.shape
    hits = torch.zeros(heads, dtype=torch.float64)
    for x, y in zip(features.split(1024), labels.split(1024), strict=True):
        logits = torch.addmm(bank.biases.reshape(-1), x, bank.weights.reshape(-1, dim).T).view(-1, heads, num_classes)
        hits += logits.argmax(dim=2).eq(y[:, None]).sum(dim=0)
    return hits / (len(labels) or torch.nan)
