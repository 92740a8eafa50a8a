"""The public stand-ins of the demo scale, made from nothing: two encoders, a generator, synthetic digits.

All of them know rendered characters (`dpmix.demo.glyphs`) and nothing private: the paper's arrangement in miniature. Each
file in data/public has a JSON beside it that says how it was made. `probe` alone looks at handwritten digits, to describe
an encoder after it was made; it gives no privacy and takes no part in any experiment."""

import datetime
import hashlib
import importlib.metadata
import io
import json
import platform
import time
from pathlib import Path
from typing import Any

import diffusers
import matplotlib
import numpy as np
import safetensors.torch
import sklearn
import torch
from jaxtyping import Int64, UInt8
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from torch import Tensor

from dpmix import models
from dpmix.core import files
from dpmix.core.checks import counted, require, whole
from dpmix.demo import generator, glyphs, pretraining
from dpmix.images.data import PUBLIC, ImageSet, Splits, public_file
from dpmix.models.encoders import TINY, Encoder

SEED = 0
ENCODER_STEPS, GENERATOR_STEPS, CHARACTERS, PER_DIGIT = 3000, 1500, 36_000, 150
NAMES = (*(f"{name}.safetensors" for name in TINY), "generator.safetensors", "synthetic_digits.npz")


def rebuild(
    folder: str | Path = PUBLIC,
    *,
    seed: int = SEED,
    encoder_steps: int = ENCODER_STEPS,
    generator_steps: int = GENERATOR_STEPS,
    characters: int = CHARACTERS,
    per_digit: int = PER_DIGIT,
    probe_on: Splits | None = None,
    progress: bool = True,
) -> dict[str, dict]:
    """Make every stand-in anew and write it with its JSON into `folder`; returns the JSON contents by file name.

    Args:
        characters: how many rendered characters the encoders see; the generator sees as many, digits only.
        per_digit: synthetic images per class, in the order 0, 1, ..., 9, 0, 1, ...
        probe_on: private digits on which finished encoders are described (`probe`); training never sees them."""
    sizes = {"encoder_steps": encoder_steps, "generator_steps": generator_steps, "per_digit": per_digit}
    for name, value in (sizes | {"characters": characters}).items():
        whole(name, value, 1)
    folder, public = Path(folder), glyphs.corpus(characters, seed)
    about: dict[str, Any] = dict(seed=seed, steps=encoder_steps, probe_on=probe_on, progress=progress)
    made = {f"{name}.safetensors": make_encoder(name, public, folder, **about) for name in TINY}
    digits = glyphs.corpus(characters, seed + 1, glyphs.DIGITS)
    made |= make_digits(digits, folder, seed=seed, steps=generator_steps, per_digit=per_digit, progress=progress)
    return made


def make_encoder(
    name: str, public: ImageSet, folder: Path, *, seed: int, steps: int, probe_on: Splits | None, progress: bool
) -> dict:
    """Pretrain one small encoder and write it."""
    start = _clock()
    state, losses = pretraining.pretrain(name, public.images, public.labels, seed=seed, steps=steps, progress=progress)
    path = folder / f"{name}.safetensors"
    about = _about("dpmix.demo.pretraining.pretrain", seed, steps, public, losses, start)
    _write(path, safetensors.torch.save(state), about)
    if probe_on is not None:
        about["probe"] = probe(models.encoder(name, path), probe_on)
        _write(path, path.read_bytes(), about)
    return about


def make_digits(
    digits: ImageSet, folder: Path, *, seed: int, steps: int, per_digit: int, progress: bool
) -> dict[str, dict]:
    """Train the small diffusion model on rendered digits, sample from it, write both."""
    start = _clock()
    state, losses = generator.train_generator(digits.images, digits.labels, seed=seed, steps=steps, progress=progress)
    about = _about("dpmix.demo.generator.train_generator", seed, steps, digits, losses, start)
    state = {k: v.half() for k, v in state.items()}  # half the size; the shipped digits come from what is shipped
    _write(folder / "generator.safetensors", safetensors.torch.save(state), about)
    start = _clock()
    labels = torch.arange(10 * per_digit) % 10
    images = generator.sample_generator(state, labels, seed=seed, progress=progress)
    drawn = _about("dpmix.demo.generator.sample_generator", seed, generator.SAMPLE_STEPS, digits, [], start)
    drawn |= {"images": len(images), "class_names": list(digits.class_names), "generator_sha256": about["sha256"]}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=images.numpy(), labels=labels.numpy())
    _write(folder / "synthetic_digits.npz", buffer.getvalue(), drawn)
    return {"generator.safetensors": about, "synthetic_digits.npz": drawn}


def probe(encoder: Encoder, splits: Splits) -> dict[str, float]:
    """Non-private accuracies of linear rules on frozen features, in 0..1: what an encoder could give without noise.

    `test`: logistic regression fitted on the training set, scored on the test set. `cross_validated`: the same inside the
    training set, five folds. `nearest_mean`: the class whose mean training feature is closest, on the test set."""
    z, y = encoder.features(splits.train.images.float() / 255).numpy(), splits.train.labels.numpy()
    z_test, y_test = encoder.features(splits.test.images.float() / 255).numpy(), splits.test.labels.numpy()
    rule = LogisticRegression(C=100, max_iter=5000)
    means = np.stack([z[y == c].mean(0) for c in range(splits.train.num_classes)])
    closest = ((z_test[:, None] - means) ** 2).sum(2).argmin(1)
    return {
        "test": float(rule.fit(z, y).score(z_test, y_test)),
        "cross_validated": float(cross_val_score(rule, z, y, cv=5).mean()),
        "nearest_mean": float((closest == y_test).mean()),
    }


def load_digits(folder: Path = PUBLIC) -> tuple[UInt8[Tensor, "n 1 8 8"], Int64[Tensor, " n"]]:
    """Synthetic digits and their labels, after their checksum was compared."""
    with np.load(public_file("synthetic_digits.npz", folder), allow_pickle=False) as arrays:
        return torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])


def record(name: str, folder: Path = PUBLIC) -> dict:
    """What the JSON beside a file says, after its checksum was compared."""
    require(name in NAMES, "name", name, f"must be one of {', '.join(NAMES)}")
    return json.loads(public_file(name, folder).with_suffix(".json").read_text())


def _about(
    function: str, seed: int, steps: int, corpus: ImageSet, losses: list[float], start: dict[str, float]
) -> dict[str, Any]:
    every = max(1, len(losses) // 100)
    curve = [[i, round(float(np.mean(losses[i : i + every])), 4)] for i in range(0, len(losses), every)]
    what = f"{counted(len(corpus), 'character')} of {''.join(corpus.class_names)} rendered by dpmix.demo.glyphs from "
    what += f"{counted(len(glyphs.FONTS), 'font')} of matplotlib; no private image"
    about = {"function": function, "seed": seed, "steps": steps, "corpus": what, "loss": curve}
    spent = {name: round(now - start[name], 1) for name, now in _clock().items()}
    made = {"threads": torch.get_num_threads(), "date": datetime.datetime.now(datetime.UTC).date().isoformat()}
    versions = {module.__name__: module.__version__ for module in (torch, np, diffusers, matplotlib, sklearn)}
    versions = {"dpmix": importlib.metadata.version("dpmix"), "python": platform.python_version(), **versions}
    return about | spent | made | {"versions": versions}


def _clock() -> dict[str, float]:
    return {"seconds": time.perf_counter(), "cpu_seconds": time.process_time()}


def _write(path: Path, data: bytes, about: dict) -> None:
    about |= {"file": path.name, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    files.write(path, data)
    files.write(path.with_suffix(".json"), (json.dumps(about, indent=1) + "\n").encode())
