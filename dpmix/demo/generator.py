"""Synthetic images at demo scale: a class-conditional diffusion model of 8x8 characters, trained and sampled."""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from jaxtyping import Int64, UInt8
from torch import Tensor
from tqdm import tqdm

from dpmix.core.checks import positive, require, whole
from dpmix.core.rng import generator
from dpmix.models.tiny import initialise

SAMPLE_STEPS = 50
_NOISING = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}


def _unet(classes: int) -> Any:
    """0.7 million parameters: 8x8 with 32 channels, 4x4 with 64 and attention."""
    shape: dict[str, Any] = dict(sample_size=8, in_channels=1, out_channels=1, num_class_embeds=classes)
    blocks: dict[str, Any] = dict(layers_per_block=1, block_out_channels=(32, 64), attention_head_dim=16)
    blocks |= dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))
    with torch.device("meta"):  # no draw from torch's global generator
        network: Any = UNet2DModel(norm_num_groups=8, **shape, **blocks)
    return network.to_empty(device="cpu")


def train_generator(
    images: UInt8[Tensor, "n 1 8 8"],
    labels: Int64[Tensor, " n"],
    *,
    seed: int,
    steps: int,
    batch_size: int = 128,
    learning_rate: float = 2e-3,
    progress: bool = True,
) -> tuple[dict[str, Tensor], list[float]]:
    """Train the small diffusion model; returns its weights (a running average) and the loss of every step. DDPM (Ho et al.,
    2020) with velocity targets and a cosine noise schedule. Draws are keyed by `(seed, "diffusion", step)`."""
    whole("steps", steps, 1)
    whole("batch_size", batch_size, 1)
    positive("learning_rate", learning_rate)
    network = initialise(_unet(int(labels.max()) + 1), seed, "generator").train()
    average = {k: v.clone() for k, v in network.state_dict().items()}
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    noising: Any = DDPMScheduler(**_NOISING)
    losses = []
    for step in tqdm(range(steps), desc="train generator", disable=not progress, mininterval=1):
        rng = generator(seed, "diffusion", step)
        ids = torch.from_numpy(rng.integers(len(images), size=batch_size))
        x = images[ids].float() / 127.5 - 1
        noise = torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32))
        times = torch.from_numpy(rng.integers(noising.config.num_train_timesteps, size=batch_size))
        noised = noising.add_noise(x, noise, times)
        loss = F.mse_loss(network(noised, times, labels[ids]).sample, noising.get_velocity(x, noise, times))
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / min(100, steps))
            group["lr"] = learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        keep = min(0.995, (1 + step) / (10 + step))
        for name, value in network.state_dict().items():
            average[name].lerp_(value, 1 - keep)
        losses.append(loss.item())
    return {k: v.contiguous() for k, v in average.items()}, losses


@torch.no_grad()
def sample_generator(
    state: dict[str, Tensor],
    labels: Int64[Tensor, " n"],
    *,
    seed: int,
    steps: int = SAMPLE_STEPS,
    batch_size: int = 250,
    progress: bool = True,
) -> UInt8[Tensor, "n 1 8 8"]:
    """One image for each label by DDIM (Song et al., 2021). Image i starts from the noise of `(seed, "synthetic digit", i)`."""
    whole("steps", steps, 1)
    whole("batch_size", batch_size, 1)
    classes = state["class_embedding.weight"].shape[0]
    inside = len(labels) == 0 or (int(labels.min()) >= 0 and int(labels.max()) < classes)
    require(inside, "labels", labels.unique().tolist(), f"must lie in 0..{classes - 1}")
    network = _unet(classes).eval()
    network.load_state_dict({k: v.float() for k, v in state.items()})
    denoising: Any = DDIMScheduler(**_NOISING)
    denoising.set_timesteps(steps)
    images = [torch.empty(0, 1, 8, 8, dtype=torch.uint8)]
    for first in tqdm(range(0, len(labels), batch_size), desc="sample", disable=not progress, mininterval=1):
        ids = range(first, min(first + batch_size, len(labels)))
        noise = [generator(seed, "synthetic digit", i).standard_normal((1, 8, 8)) for i in ids]
        x = torch.from_numpy(np.stack(noise)).float()
        for t in denoising.timesteps:
            x = denoising.step(network(x, t, labels[first : first + len(x)]).sample, t, x).prev_sample
        images.append(((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))
    return torch.cat(images)
