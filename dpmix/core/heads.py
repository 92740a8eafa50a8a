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
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from tqdm import tqdm

from dpmix.core import accounting, checks, clipping, files, rng, views
from dpmix.core.transforms import as_float


@runtime_checkable
class Encoder(Protocol):
    """What training needs of a frozen encoder: `models.Encoder` has it.

    `features`: images float [n, C, H, W] in 0..1 -> float [n, `dim`], row i a function of image i alone.
    """

    @property
    def features(self) -> Callable[[Tensor], Tensor]: ...

    @property
    def dim(self) -> int: ...

    @property
    def channels(self) -> tuple[int, ...]: ...

    @property
    def name(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Head:
    """One DP-SGD run on a frozen encoder. `learning_rate` is eta of Algorithm 1, applied to the mean over B."""

    recipe: views.Recipe
    learning_rate: float
    noise_multiplier: float
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        checks.positive("learning_rate", self.learning_rate)
        checks.positive("clip_norm", self.clip_norm)
        checks.floats(self, "learning_rate", "clip_norm", "noise_multiplier")
        checks.require(self.noise_multiplier >= 0, "noise_multiplier", self.noise_multiplier, "must not be negative")


@dataclass(frozen=True, kw_only=True)
class Bank:
    """R trained heads: `weights` [R, num_classes, D], `biases` [R, num_classes], and how the pass went.

    `seconds` holds the shares of encoder, views, clipping and noise. `dropped` counts the (example, head) pairs whose
    gradient was not finite and counted as zero: a diagnostic from private data, not for release.
    """

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
    step: int = 0
    views: int = 0
    dropped: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("views", "encoder", "clipping", "noise"), 0.0)
    )


Observer = Callable[[int, Tensor, Tensor, Tensor, Tensor], None]


def train_heads(
    encoder: Encoder,
    images: UInt8[Tensor, "n C H W"],
    labels: Int64[Tensor, " n"],
    heads: Sequence[Head],
    *,
    num_classes: int,
    expected_batch: int,
    steps: int,
    seed: rng.Seed,
    sample_rate: float | None = None,
    public: views.PublicImages | None = None,
    initial: tuple[Tensor, Tensor] | None = None,
    ids: Int64[Tensor, " n"] | None = None,
    physical_batch: int = 64,
    device: str | torch.device = "cpu",
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 30.0,
    identity: str = "",
    spec: dict[str, Any] | None = None,
    progress: bool = True,
    observe: Observer | None = None,
) -> Bank:
    """Algorithm 1 for every head at once: `steps` Poisson steps at rate q (`sample_rate`; expected_batch / n by default).

    The divisor of the noisy sum is `expected_batch`, exactly; a step with an empty batch adds noise all the same.
    Weights start at zero unless `initial` [num_classes, D], [num_classes] is given (it must not hold private data).
    `ids` names the examples for the keyed randomness (their places, by default). `physical_batch` bounds memory and
    never changes the sum beyond rounding. With `checkpoint` the state is saved every `checkpoint_seconds`, at the end and on
    Ctrl-C, and a later call with the same arguments continues bit for bit; one of another run is refused, and `spec`
    (JSON-able) adds what the caller wants compared, such as a digest of the data. `identity` tells runs of one seed apart that
    the arguments do not (other data or initial weights): they must not share noise. `observe(step, features, targets, weights,
    biases)` sees each physical batch before the update: for non-private diagnostics.

    `seed=None` takes fresh entropy. The released quantity is each head's last iterate.

    Raises ValueError on bad input before any training.
    """
    said = "a run with checkpoints must be given its seed, to go on with it"
    checks.require(seed is not None or checkpoint is None, "seed", None, said)
    seed = rng.as_seed(seed)
    n = len(labels)
    checks.require(
        len(images) == n > 0, "images", len(images), f"must have as many examples as labels ({n}), and at least 1"
    )
    as_float(images[:0])  # refuses what is neither bytes nor floats
    checks.require(len(heads) > 0, "heads", len(heads), "must hold at least one head")
    repeated = len(heads) - len(set(heads))
    checks.require(repeated == 0, "heads", repeated, "heads are given twice; they would share their noise")
    checks.whole("physical_batch", physical_batch, 1)
    checks.whole("expected_batch", expected_batch, 1)
    checks.whole("steps", steps, 1)
    if sample_rate is None:
        allowed = f"must be at most the {n} training examples"
        checks.require(expected_batch <= n, "expected_batch", expected_batch, allowed)
        sample_rate = expected_batch / n
    checks.require(0 < sample_rate <= 1, "sample_rate", sample_rate, "must lie in (0, 1]")
    checks.require(images.shape[1] in encoder.channels, "images.shape[1]", images.shape[1],
                   f"{encoder.name} takes images of {' or '.join(map(str, encoder.channels))} channels")  # fmt: skip
    for worst in (int(labels.min()), int(labels.max())):
        checks.require(0 <= worst < num_classes, "labels", worst, f"must lie in 0..{num_classes - 1}, by num_classes")
    union = views.make_union(list(dict.fromkeys(h.recipe for h in heads)))
    if any(h.recipe.k_diff for h in heads):
        views.check_public(public, tuple(images.shape[1:]), num_classes)
    rows = {r: row for r, row in zip(union.recipes, union.weights, strict=True)}
    view_weights = torch.stack([rows[h.recipe] for h in heads]).to(device, torch.float32)
    clip_norms = torch.tensor([h.clip_norm for h in heads], device=device)
    rates = torch.tensor([h.learning_rate / expected_batch for h in heads], device=device)
    names = torch.arange(n) if ids is None else ids

    weights = torch.zeros(len(heads), num_classes, encoder.dim, device=device)
    biases = torch.zeros(len(heads), num_classes, device=device)
    if initial is not None:
        weights, biases = weights + initial[0].to(device), biases + initial[1].to(device)
    told = {
        "heads": f"{len(heads)} (digest {files.digest(repr(tuple(heads)))[:16]})", "encoder": encoder.name, "n": n,
        "num_classes": num_classes, "expected_batch": expected_batch, "sample_rate": sample_rate, "steps": steps,
        "seed (digest)": files.digest(repr(("dpmix checkpoint", seed)))[:16], "identity (digest)": files.digest(identity)[:16],
        **(spec or {}),
    }  # fmt: skip
    run = (encoder.name, num_classes, expected_batch, sample_rate, steps, identity)
    streams = [files.digest(repr((run, head))) for head in heads]
    state = _State(weights, biases)
    if checkpoint is not None:
        state = _load(checkpoint, told, state)
    saved = time.monotonic()
    bar = tqdm(total=steps, initial=state.step, desc=f"{len(heads)} heads, {union.views} views", disable=not progress)
    try:
        while state.step < steps:
            chosen = accounting.poisson_batch(n, sample_rate, seed=seed, step=state.step)
            gradient = torch.zeros_like(state.weights), torch.zeros_like(state.biases)
            dropped = 0
            for part in chosen.split(physical_batch):
                tick = time.perf_counter()
                made = union.make(images[part].to(device), labels[part].to(device), names[part],
                                  num_classes=num_classes, seed=seed, step=state.step, public=public)  # fmt: skip
                tick = _lap(state.seconds, "views", tick)
                features = (
                    encoder.features(made.images.flatten(0, 1)).reshape(len(part), union.views, encoder.dim).float()
                )
                tick = _lap(state.seconds, "encoder", tick)
                if observe is not None:
                    observe(state.step, features, made.targets, state.weights, state.biases)
                sums = clipping.clipped_head_sums(
                    features, made.targets, state.weights, state.biases, clip_norms, view_weights
                )
                gradient[0].add_(sums.weights)
                gradient[1].add_(sums.biases)
                dropped += int((~sums.norms.isfinite()).sum())
                _lap(state.seconds, "clipping", tick)
            tick = time.perf_counter()
            _add_noise(*gradient, heads, streams, seed, state.step)
            state = replace(
                state, step=state.step + 1, views=state.views + len(chosen) * union.views, dropped=state.dropped + dropped,
                weights=state.weights - rates[:, None, None] * gradient[0],
                biases=state.biases - rates[:, None] * gradient[1],
            )  # fmt: skip
            _lap(state.seconds, "noise", tick)
            bar.update()
            due = state.step == steps or time.monotonic() - saved > checkpoint_seconds
            if checkpoint is not None and due:
                _save(checkpoint, told, state)
                saved = time.monotonic()
    except KeyboardInterrupt:
        if checkpoint is not None:
            _save(checkpoint, told, state)
        raise
    finally:
        bar.close()
    return Bank(
        weights=state.weights.cpu(), biases=state.biases.cpu(), views=state.views,
        seconds=state.seconds, dropped=state.dropped,
    )  # fmt: skip


def _lap(seconds: dict[str, float], name: str, since: float) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    now = time.perf_counter()
    seconds[name] += now - since
    return now


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


def _save(path: Path, told: dict[str, Any], state: _State) -> None:
    meta = {"step": state.step, "views": state.views, "dropped": state.dropped, "seconds": state.seconds}
    files.save_tensors(path, {"weights": state.weights, "biases": state.biases}, told, meta, keep=True)


def _load(path: Path, told: dict[str, Any], fresh: _State) -> _State:
    found = files.load_tensors(path, told)
    if found is None:
        return fresh
    tensors, meta = found
    device = fresh.weights.device
    return _State(tensors["weights"].to(device), tensors["biases"].to(device), **meta)


@torch.no_grad()
def encode(
    encoder: Encoder, images: UInt8[Tensor, "n C H W"], device: str | torch.device = "cpu", batch: int = 512
) -> Float[Tensor, "n D"]:
    """Features of images as they are, no augmentation: for evaluation."""
    parts = [encoder.features(as_float(part.to(device))).float().cpu() for part in images.split(batch)]
    return torch.cat(parts) if parts else torch.zeros(0, encoder.dim)


def accuracy(bank: Bank, features: Float[Tensor, "n D"], labels: Int64[Tensor, " n"]) -> Float[Tensor, " R"]:
    """Share of examples that each head gets right, 0..1; nan for an empty set."""
    hits = [
        (features @ w.T + b).argmax(dim=1).eq(labels).double().mean()
        for w, b in zip(bank.weights, bank.biases, strict=True)
    ]
    return torch.stack(hits)
