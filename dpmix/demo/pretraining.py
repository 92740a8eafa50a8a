"""How the small embedded encoders were made out of rendered characters."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from tqdm import tqdm

from dpmix.core.checks import one_of, positive, whole
from dpmix.core.rng import generator
from dpmix.models.tiny import NAMES, build, initialise


def pretrain(
    name: str,
    images: UInt8[Tensor, "n 1 8 8"],
    labels: Int64[Tensor, " n"],
    *,
    seed: int,
    steps: int = 3000,
    batch_size: int = 256,
    learning_rate: float = 3e-3,
    progress: bool = True,
) -> tuple[dict[str, Tensor], list[float]]:
    """Train a tiny encoder to name public characters; returns its weights and the loss of every step.

    Cross-entropy over cosines with one direction per class, AdamW, a cosine schedule after a warm-up. Images are shifted,
    sharpened or blurred, made brighter or fainter, noised and mixed. Draws are keyed by `(seed, "pretrain", step)`: the
    same call gives the same weights on the same machine with the same number of threads."""
    one_of("name", name, NAMES)
    whole("steps", steps, 1)
    whole("batch_size", batch_size, 2)
    positive("learning_rate", learning_rate)
    network = initialise(build(name), seed, name)
    classes = int(labels.max()) + 1
    directions = nn.Parameter(torch.from_numpy(generator(seed, "directions").normal(size=(classes, 64))).float())
    matrices = [p for p in network.parameters() if p.ndim >= 2]
    vectors = [p for p in network.parameters() if p.ndim < 2] + [directions]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))
    losses = []
    network.train()
    for step in tqdm(range(steps), desc=f"pretrain {name}", disable=not progress, mininterval=1):
        rng = generator(seed, "pretrain", step)
        ids = torch.from_numpy(rng.integers(len(images), size=batch_size))
        x = _distort(images[ids].float() / 255, rng)
        y = F.one_hot(labels[ids], classes).float()
        mixed = np.where(rng.random(batch_size) < 0.5, rng.beta(0.4, 0.4, batch_size), 1.0)
        share = torch.from_numpy(mixed).float()
        x = share.view(-1, 1, 1, 1) * x + (1 - share).view(-1, 1, 1, 1) * x.flip(0)
        y = share[:, None] * y + (1 - share)[:, None] * y.flip(0)
        features = network(F.interpolate(x, (16, 16), mode="bilinear", antialias=True) * 2 - 1)
        loss = F.cross_entropy(16 * features @ F.normalize(directions).T, y, label_smoothing=0.05)
        warm = min(1.0, (step + 1) / min(100, steps))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return {k: v.detach().contiguous() for k, v in network.state_dict().items()}, losses


def _distort(x: Float[Tensor, "n 1 8 8"], rng: np.random.Generator) -> Float[Tensor, "n 1 8 8"]:
    """What handwriting, scanners and crops do to 8x8 characters, cheaply: shift, blur, gain, contrast, noise."""
    n = len(x)

    def draw(low: float, high: float) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, n)).float().view(-1, 1, 1, 1)

    shift = torch.from_numpy(rng.choice(5, p=[0.05, 0.2, 0.5, 0.2, 0.05], size=(n, 2)))
    rows, columns = (shift[:, k, None] + torch.arange(8) for k in (0, 1))
    mode = "reflect" if rng.random() < 0.5 else "constant"
    each = torch.arange(n)[:, None, None]
    x = F.pad(x, (2, 2, 2, 2), mode=mode)[each, 0, rows[:, :, None], columns[:, None, :]][:, None]
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = x + draw(-0.4, 0.6) * (blurred - x)  # below zero: sharper
    x = (x.clamp(0, 1) + 1e-6) ** torch.exp(draw(-0.5, 0.5)) * draw(0.7, 1.1)
    return (x + draw(0, 0.1) * torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32))).clamp(0, 1)
