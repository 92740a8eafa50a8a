"""Public synthetic images, made from public knowledge alone. No private image is read here.

`generate` asks a text-to-image pipeline of diffusers for pictures of class names (the paper's way, Section 4)."""

import hashlib
import importlib.metadata
import io
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm import tqdm

from dpmix.core import files
from dpmix.core.checks import counted, positive, require, whole
from dpmix.core.rng import generator
from dpmix.images.data import ImageSet, folder_name

_ATTEMPTS = 8


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

    Image i of a class starts from the noise of `(seed, "image", class name, i)`; manifest.json says how all were made. A call
    that was cut short goes on where it stopped, with the very images that it would have made. What the pipeline's safety
    checker has blackened, or what is not finite or of one colour, is drawn again with another key (`attempt` is added to it);
    the manifest lists it, and a warning counts it. Returns `folder`.

    Args:
        pipeline: of diffusers, or the name or folder of one on disk. It must be public: never fine-tuned on private images.
        n_per_class: None makes as many as the training set `like` has, as the paper does, rounded up per class. Only its size
            counts: following the private images of each class instead would spend privacy.
        prompt: text with one {} for the class name as `words`.
        guidance_scale: 1 is without guidance, as in the paper.
        steps: of denoising.
        height, width: pixels; the pipeline's own by default.
        revision: one of several that are on disk; nothing is downloaded.
        dtype: what to compute in, such as torch.bfloat16; as it is by default.

    Raises ValueError if `folder` holds images of another run (naming what differs) or of none; FileNotFoundError if there
    is no such pipeline on disk; RuntimeError if an image fails eight times."""
    class_names = tuple(class_names)
    asked: dict[str, Any] = dict(n_per_class=n_per_class, steps=steps, batch_size=batch_size)
    asked = _checked(class_names, prompt, asked | dict(seed=seed, guidance_scale=guidance_scale), like)
    folder, pipe = Path(folder), _pipeline(pipeline, revision).to(device)
    pipe = pipe if dtype is None else pipe.to(dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    manifest: dict[str, Any] = {"pipeline": pipeline if isinstance(pipeline, str) else type(pipe).__name__}
    manifest |= {"revision": revision, "prompt": prompt}
    manifest["prompts"] = {name: prompt.format(words(name)) for name in class_names}
    manifest["size"] = {k: v for k, v in dict(height=height, width=width).items() if v is not None}
    manifest |= asked | _made_with(pipe, device)
    again = _claim(folder, manifest)
    wanted = [(c, i) for c in class_names for i in range(asked["n_per_class"])]
    for first in tqdm(range(0, len(wanted), batch_size), desc="generate", unit="batch", disable=not progress):
        _make(pipe, wanted[first : first + batch_size], folder, manifest, again)
    if again:
        told = f"drawn again with another key: {counted(len(again), 'image')} blackened by the safety checker or not finite"
        warnings.warn(f"{told}, such as {next(iter(again))}; manifest.json lists them", stacklevel=2)
    return folder


def _checked(class_names: tuple[str, ...], prompt: str, asked: dict[str, Any], like: ImageSet | None) -> dict[str, Any]:
    """The numbers asked for, with that of images a class; ValueError for what cannot be."""
    places = [folder_name(name) for name in class_names]
    require(len(set(places)) == len(places) > 0, "class_names", class_names, "must differ, also as names of folders")
    require(prompt.count("{}") == 1, "prompt", prompt, "must hold one {} for the class name")
    if asked["n_per_class"] is None:
        said = "give a number, or like=splits.train for as many as the training set has"
        require(like is not None, "n_per_class", None, said)
        asked = asked | {"n_per_class": -(-len(like or ()) // len(class_names))}
    for name in ("n_per_class", "steps", "batch_size"):
        whole(name, asked[name], 1)
    positive("guidance_scale", asked["guidance_scale"], "; 1 is without guidance")
    return asked


def _make(pipe: Any, batch: list[tuple[str, int]], folder: Path, manifest: dict, again: dict[str, int]) -> None:
    """The images (class name, number) of one batch as files, unless all are there; `again` notes what was drawn again."""
    names = {(c, i): f"{folder_name(c)}/{i:05d}.png" for c, i in batch}
    if all((folder / name).is_file() for name in names.values()):
        return
    made: dict[tuple[str, int], Image.Image] = {}
    for attempt in range(_ATTEMPTS):
        todo = [place for place in batch if place not in made]
        made |= _draw(pipe, todo, manifest, attempt) if todo else {}
        again |= {names[place]: attempt for place in todo if attempt}
    for place in batch:
        if place not in made:
            said = f"{_ATTEMPTS} draws in a row were blackened by the safety checker or not finite"
            raise RuntimeError(f"class_names: {names[place]}: {said}; change the prompt, the class or the dtype")
    if again:
        files.write(folder / "manifest.json", _json(manifest | {"drawn_again": again}))
    for place in batch:
        buffer = io.BytesIO()
        made[place].save(buffer, "PNG")
        files.write(folder / names[place], buffer.getvalue())


def _draw(pipe: Any, places: list[tuple[str, int]], manifest: dict, attempt: int) -> dict[tuple[str, int], Image.Image]:
    """What comes of one call, without the images that are blackened, not finite or of one colour."""
    more = [attempt] if attempt else []
    seeds = [int(generator(manifest["seed"], "image", name, i, *more).integers(2**63)) for name, i in places]
    draws, prompts = [torch.Generator("cpu").manual_seed(s) for s in seeds], manifest["prompts"]
    how = dict(num_inference_steps=manifest["steps"], guidance_scale=manifest["guidance_scale"], **manifest["size"])
    made = pipe([prompts[name] for name, _ in places], generator=draws, output_type="np", **how)
    flags = getattr(made, "nsfw_content_detected", None) or [False] * len(places)
    each = zip(places, made.images, flags, strict=True)
    good = {place: x for place, x, bad in each if np.isfinite(x).all() and np.ptp(x) > 0 and not bad}
    return {place: Image.fromarray((x * 255).round().astype(np.uint8)) for place, x in good.items()}


def _json(manifest: dict) -> bytes:
    return (json.dumps(manifest, indent=1) + "\n").encode()


def _pipeline(pipeline: Any, revision: str | None) -> Any:
    if not isinstance(pipeline, (str, Path)):
        require(callable(pipeline), "pipeline", type(pipeline).__name__, "must be a pipeline of diffusers, or its name")
        return pipeline
    how: dict[str, Any] = dict(revision=revision, use_safetensors=True, local_files_only=True)
    try:
        return DiffusionPipeline.from_pretrained(str(pipeline), **how)
    except (OSError, ValueError) as error:
        said = "no text-to-image pipeline with safetensors weights on disk under that name"
        remedy = f"fetch it (`hf download {pipeline}`) or give the folder of one"
        raise FileNotFoundError(f"pipeline={str(pipeline)!r}: {said}; {remedy}") from error


def _made_with(pipe: Any, device: str | torch.device) -> dict[str, Any]:
    """`weights`: twelve hexadecimal digits that tell apart other weights, over names, shapes and sums of all tensors."""
    nets = [(name, net) for name, net in sorted(pipe.components.items()) if isinstance(net, torch.nn.Module)]
    tensors = [(f"{name}.{k}", v) for name, net in nets for k, v in net.state_dict().items()]
    sums = "\n".join(f"{k} {list(v.shape)} {v.double().sum().item():.6e}" for k, v in tensors)
    libraries, config = ("dpmix", "torch", "diffusers", "transformers"), sorted(dict(pipe.scheduler.config).items())
    plain = {k: v for k, v in config if isinstance(v, (str, int, float, bool)) and k[0] != "_"}
    weights = hashlib.sha256(sums.encode()).hexdigest()[:12]
    about = {"weights": weights, "scheduler": {"name": type(pipe.scheduler).__name__, **plain}}
    about |= {"dtype": str(pipe.dtype), "device": torch.device(device).type}
    return about | {"versions": {name: importlib.metadata.version(name) for name in libraries}}


def _claim(folder: Path, manifest: dict) -> dict[str, int]:
    """Write the manifest into a fresh folder; in a used one, refuse a run that is not the same (but for the path). Returns
    which of its images were drawn again."""
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
        return found.get("drawn_again", {})
    strangers = sorted(p.name for p in folder.iterdir() if not p.name.endswith(".tmp")) if folder.is_dir() else []
    said = f"must be empty or hold a manifest.json, has {', '.join(strangers[:3])}"
    require(not strangers, "folder", str(folder), said)
    files.write(path, _json(manifest))
    return {}
