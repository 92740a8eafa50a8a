"""Floor 1: public synthetic images, made from public knowledge alone. No private image is read here.

`generate` asks a text-to-image pipeline of diffusers for pictures of class names (the paper's way, Section 4).
`train_generator` and `sample_generator` are the same idea at demo scale: a class-conditional diffusion model of 8x8
characters.
"""

import hashlib
import importlib.metadata
import io
import json
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, UNet2DModel
from jaxtyping import Int64, UInt8
from torch import Tensor
from tqdm import tqdm

from dpmix import files
from dpmix.checks import positive, require, whole
from dpmix.data import ImageSet, folder_name
from dpmix.rng import generator
from dpmix.tiny_encoders import initialise

SAMPLE_STEPS = 50
_NOISING = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}


def _unet(classes: int) -> Any:
    """0.7 million parameters: 8x8 with 32 channels, 4x4 with 64 and attention."""
    with torch.device("meta"):  # no draw from torch's global generator
        network: Any = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=16,
            norm_num_groups=8,
            num_class_embeds=classes,
        )
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
    """Train the small diffusion model; returns its weights (a running average) and the loss of every step.

    DDPM (Ho et al., 2020) with velocity targets and a cosine noise schedule. Draws are keyed by `(seed, "diffusion",
    step)`.
    """
    whole("steps", steps, 1)
    whole("batch_size", batch_size, 1)
    positive("learning_rate", learning_rate)
    network = initialise(_unet(int(labels.max()) + 1), generator(seed, "initial", "generator")).train()
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
    """One image for each label by DDIM (Song et al., 2021). Image i starts from the noise of `(seed, "sample", i)`."""
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
        x = torch.stack(
            [torch.from_numpy(generator(seed, "sample", i).standard_normal((1, 8, 8))) for i in ids]
        ).float()
        for t in denoising.timesteps:
            x = denoising.step(network(x, t, labels[first : first + len(x)]).sample, t, x).prev_sample
        images.append(((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))
    return torch.cat(images)


def words(class_name: str) -> str:
    """A class name as words: "034.bicycle" -> "bicycle", "AnnualCrop" -> "annual crop", "faces-easy-101" -> "faces easy"."""
    text = re.sub(r"^\d+[._\- ]+|[._\- ]\d{3}$", "", class_name)
    text = re.sub(r"(?<=[a-z])(?=[A-Z])|[._/\\\-\s]+", " ", text).strip().lower()
    return text or class_name


def generate(
    pipeline: Any,
    class_names: Sequence[str],
    n_per_class: int | None,
    folder: str | Path,
    *,
    seed: int,
    like: ImageSet | None = None,
    prompt: str = "a photo of a {}",
    guidance_scale: float = 1.0,
    steps: int = 50,
    batch_size: int = 8,
    height: int | None = None,
    width: int | None = None,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Path:
    """Pictures of class names by a text-to-image pipeline, as an image folder: `folder`/CLASS/00000.png, ...

    Args:
        pipeline: a pipeline of diffusers, or the name or folder of one on disk (nothing is downloaded; `revision` picks
            one of several). The pipeline must be public: never fine-tuned on the private images.
        n_per_class: None makes as many images as the training set `like` has, as the paper does, rounded up per class.
            Only its size counts: following the private images of each class instead would spend privacy.
        prompt: text with one {} for the class name as words (`words`).
        guidance_scale: 1 is without guidance, as in the paper.
        steps: denoising steps.
        height, width: pixels; the pipeline's own by default.
        dtype: what to compute in, such as torch.bfloat16; as it is by default.

    Image i of a class starts from the noise of `(seed, "image", class name, i)`. `manifest.json` says how all were made.
    A call that was cut short goes on where it stopped, with the very images that it would have made: batches lie at
    fixed places and a batch with an image missing is made again. Returns `folder`.

    Raises ValueError if `folder` holds images of another run (naming what differs) or of none; FileNotFoundError if
    there is no such pipeline on disk. Warns about images that the pipeline's safety checker has blackened.
    """
    class_names = tuple(class_names)
    require(len(class_names) > 0, "class_names", class_names, "must name at least one class")
    places = [folder_name(name) for name in class_names]
    require(len(set(places)) == len(places), "class_names", class_names, "must differ, also as names of folders")
    require(prompt.count("{}") == 1, "prompt", prompt, "must hold one {} for the class name")
    if n_per_class is None:
        if like is None:
            raise ValueError(
                "n_per_class=None: give a number, or like=splits.train for as many as the training set has"
            )
        n_per_class = -(-len(like) // len(class_names))
    for name, value in dict(n_per_class=n_per_class, steps=steps, batch_size=batch_size).items():
        whole(name, value, 1)
    positive("guidance_scale", guidance_scale, "; 1 is without guidance")
    folder = Path(folder)
    pipe = _pipeline(pipeline, revision).to(device)
    pipe = pipe if dtype is None else pipe.to(dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    size = {k: v for k, v in dict(height=height, width=width).items() if v is not None}
    manifest: dict[str, Any] = {
        "pipeline": pipeline if isinstance(pipeline, str) else type(pipe).__name__,
        "weights": _fingerprint(pipe),
        "revision": revision,
        "scheduler": {"name": type(pipe.scheduler).__name__, **_plain(pipe.scheduler.config)},
        "prompt": prompt,
        "prompts": {name: prompt.format(words(name)) for name in class_names},
        "n_per_class": n_per_class,
        "seed": seed,
        "seeds": {
            n: [int(generator(seed, "image", n, i).integers(2**63)) for i in range(n_per_class)] for n in class_names
        },
        "guidance_scale": guidance_scale,
        "steps": steps,
        "batch_size": batch_size,
        "size": size,
        "dtype": str(pipe.dtype),
        "device": torch.device(device).type,
        "versions": {
            name: importlib.metadata.version(name) for name in ("dpmix", "torch", "diffusers", "transformers")
        },
    }
    _claim(folder, manifest)
    wanted = [(c, i) for c in range(len(class_names)) for i in range(n_per_class)]
    for first in tqdm(range(0, len(wanted), batch_size), desc="generate", unit="batch", disable=not progress):
        batch = wanted[first : first + batch_size]
        targets = [folder / places[c] / f"{i:05d}.png" for c, i in batch]
        if all(target.is_file() for target in targets):
            continue
        made = pipe(
            [manifest["prompts"][class_names[c]] for c, _ in batch],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator("cpu").manual_seed(manifest["seeds"][class_names[c]][i]) for c, i in batch],
            **size,
        )
        flagged = [
            t for t, bad in zip(targets, getattr(made, "nsfw_content_detected", None) or [], strict=False) if bad
        ]
        if flagged:
            warnings.warn(f"{len(flagged)} images blackened by the safety checker, such as {flagged[0]}", stacklevel=2)
        for target, image in zip(targets, made.images, strict=True):
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "PNG")
            files.write(target, buffer.getvalue())
    return folder


def _pipeline(pipeline: Any, revision: str | None) -> Any:
    if not isinstance(pipeline, (str, Path)):
        require(callable(pipeline), "pipeline", type(pipeline).__name__, "must be a pipeline of diffusers, or its name")
        return pipeline
    try:
        return DiffusionPipeline.from_pretrained(
            str(pipeline), revision=revision, use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"pipeline={str(pipeline)!r}: no text-to-image pipeline with safetensors weights on disk under that name; "
            f"fetch it (`hf download {pipeline}`) or give the folder of one"
        ) from error


def _fingerprint(pipe: Any) -> str:
    """Twelve hexadecimal digits that tell apart pipelines with other weights: names, shapes and sums of all tensors."""
    parts = []
    for name, part in sorted(pipe.components.items()):
        if isinstance(part, torch.nn.Module):
            parts += [f"{name}.{k} {list(v.shape)} {v.double().sum().item():.6e}" for k, v in part.state_dict().items()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _plain(config: Any) -> dict:
    return {k: v for k, v in sorted(dict(config).items()) if isinstance(v, (str, int, float, bool)) and k[0] != "_"}


def _claim(folder: Path, manifest: dict) -> None:
    """Write the manifest into a fresh folder; in a used one, refuse a run that is not the same (but for the path)."""
    path = folder / "manifest.json"
    if path.is_file():
        try:
            found = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            said = "its manifest.json is damaged, so how its images were made is not known; choose another folder"
            raise ValueError(f"folder={str(folder)!r}: {said}") from error
        other = [k for k in manifest if k != "pipeline" and json.loads(json.dumps(manifest[k])) != found.get(k)]
        said = "; ".join(f"{k} {str(found.get(k))[:60]!r}, not {str(manifest[k])[:60]!r}" for k in other[:3])
        require(not other, "folder", str(folder), f"holds images of another run ({said}); choose another folder")
        return
    strangers = sorted(p.name for p in folder.iterdir() if not p.name.endswith(".tmp")) if folder.is_dir() else []
    require(
        not strangers, "folder", str(folder), f"must be empty or hold a manifest.json, has {', '.join(strangers[:3])}"
    )
    files.write(path, (json.dumps(manifest, indent=1) + "\n").encode())
