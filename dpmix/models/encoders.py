"""Frozen encoders, from pixels in 0..1 to features. Nothing here is trained on a private image.

`encoder` takes the small embedded ones (`tiny-vit`, `tiny-convnext`; `pretrain` made them out of public characters),
those of open_clip and timm, and any module of yours with a file of weights.
"""

import contextlib
import copy
import hashlib
import json
import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dpmix.core import files
from dpmix.core.checks import one_of, positive, require, whole
from dpmix.core.independence import check_no_mixing
from dpmix.images.data import CACHE, PROJECT, PUBLIC
from dpmix.models.tiny import NAMES as TINY
from dpmix.models.tiny import build

WEIGHTS = PROJECT / "data" / "weights"  # ignored by git; where large weights are looked for
ENCODERS = (*TINY, "open_clip:ViT-B-16/laion2b_s34b_b88k", "open_clip:convnext_base_w/laion2b_s13b_b82k")


class Frozen(nn.Module):
    """A network with its own preprocessing, for inference only: resize (antialiased), clamp, normalise, in chunks."""

    def __init__(
        self,
        network: nn.Module,
        name: str,
        size: int,
        channels: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        mode: str = "bicubic",
    ) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.name, self.size, self.channels, self.mode = name, size, tuple(channels), mode
        self.mean, self.std = tuple(mean), tuple(std)
        self.anchor: Tensor
        self.register_buffer("anchor", torch.zeros(()), persistent=False)  # knows the device and the dtype

    def train(self, mode: bool = True) -> "Frozen":
        return super().train(False)  # statistics of a batch would couple private examples

    def forward(self, images: Float[Tensor, "n C H W"]) -> Float[Tensor, "n D"]:
        takes = " or ".join(map(str, self.channels))
        require(images.shape[1] in self.channels, "channels", images.shape[1], f"encoder {self.name!r} takes {takes}")
        if len(images) == 0:  # some networks cannot
            return self._chunk(images.new_zeros(1, *images.shape[1:]))[:0]
        # some 64k pixels at a time stay in a core's cache; a device wants more; memory stays bounded on both
        budget = 2**16 if self.anchor.device.type == "cpu" else 2**25
        return torch.cat([self._chunk(part) for part in images.split(max(32, budget // self.size**2))])

    @torch.no_grad()
    def _chunk(self, images: Tensor) -> Tensor:
        dtype = torch.promote_types(self.anchor.dtype, torch.float32)  # pixels in float32 at least
        images = images.to(self.anchor.device, dtype)
        if images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode=self.mode, antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(v, device=images.device, dtype=dtype).view(-1, 1, 1) for v in (self.mean, self.std))
        images = (images - mean) / std  # a grey image becomes as many channels as the mean has
        return self.network(images.to(self.anchor.dtype)).to(dtype)


@dataclass(frozen=True)
class Encoder:
    """A frozen feature extractor.

    `features`: images float [n, C, H, W] in 0..1, any height and width (squashed to `image_size`) -> float [n, `dim`],
    row i a function of image i alone. `channels` are the values of C that it takes; anything else is a ValueError.
    """

    features: Callable[[Tensor], Tensor]
    image_size: int
    dim: int
    channels: tuple[int, ...]
    name: str

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "Encoder":
        """A copy on `device` that computes in `dtype` (features come back as float32 at least)."""
        if not isinstance(self.features, nn.Module):
            return self
        return replace(self, features=copy.deepcopy(self.features).to(device=device, dtype=dtype))


def encoder(
    name: str | nn.Module,
    weights: str | Path | None = None,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    mean: float = 0.0,
    std: float = 1.0,
) -> Encoder:
    """The frozen encoder `name`, in eval mode, float32, on the CPU.

    - "tiny-vit", "tiny-convnext": one channel, features of unit norm; weights come with the repository.
    - "open_clip:ARCH/PRETRAINED": projected image features, the model's own size, mean and deviation. PRETRAINED is one
      of open_clip's tags (file in data/weights/ or in the Hugging Face cache), a local file, or "random".
    - "timm:NAME": pooled features, its own data configuration, without the central crop (views are crops already).
    - a module, with `image_size`, `channels`, `mean` and `std`; and `weights` unless it holds them already.

    `weights` names a local file for any of these (safetensors, or torch.save of tensors only), or is "random" for
    open_clip and timm (a fixed initialisation, for tests). A FILE.sha256 beside it is compared. Nothing is downloaded.
    Raises ValueError for an unknown name (with near matches) or weights that do not fit, FileNotFoundError for absent
    weights: what to fetch and where to put it.
    """
    if isinstance(name, nn.Module):
        if image_size is None or channels is None:
            raise ValueError(f"image_size={image_size}, channels={channels}: both must be given with a module")
        whole("image_size", image_size, 1)
        whole("channels", channels, 1)
        positive("std", std)
        network = copy.deepcopy(name)  # the caller's module stays trainable
        if weights is not None:
            _fill(network, Path(weights))
        said = type(name).__name__ if weights is None else f"{type(name).__name__}/{Path(weights).name}"
        return _wrap(network, said, image_size, (channels,), [mean] * channels, [std] * channels)
    require(
        image_size is None and channels is None,
        "image_size/channels",
        (image_size, channels),
        "are for modules only; a named encoder has its own",
    )
    family, _, rest = name.partition(":")
    if name in TINY:
        path = public_file(f"{name}.safetensors") if weights is None else Path(weights)
        return _wrap(_fill(build(name), path), name, 16, (1,), [0.5], [0.5], "bilinear")
    if family == "open_clip" and rest:
        return _open_clip(name, rest, weights)
    if family == "timm" and rest:
        return _timm(name, rest, weights)
    one_of("encoder", name, ENCODERS)
    raise AssertionError  # every name that is known was served above


def _wrap(
    network: nn.Module,
    name: str,
    size: int,
    channels: tuple[int, ...],
    mean: Sequence[float],
    std: Sequence[float],
    mode: str = "bicubic",
) -> Encoder:
    frozen = Frozen(network, name, size, channels, mean, std, mode)
    shape = frozen._chunk(torch.zeros(1, channels[0], size, size)).shape
    require(len(shape) == 2, "encoder", name, f"must give one feature vector an image, not {list(shape[1:])}")
    check_no_mixing(frozen, (channels[0], size, size), f"encoder {name!r}")
    return Encoder(frozen, size, shape[1], channels, name)


class _ImageFeatures(nn.Module):
    """`encode_image` of an open_clip model as a module."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.encode_image(images)


def _open_clip(name: str, rest: str, weights: str | Path | None) -> Encoder:
    import open_clip

    arch, _, tag = rest.partition("/")
    one_of("open_clip architecture", arch, open_clip.list_models())
    if tag in ("", "random") or Path(tag).is_file():
        weights, cfg = weights or tag or "random", {}
    else:
        one_of(f"pretrained weights of {arch}", tag, open_clip.list_pretrained_tags_by_model(arch))
        cfg = open_clip.get_pretrained_cfg(arch, tag)
        weights = weights or _on_disk(name, f"{arch}-{tag}", cfg["hf_hub"].rstrip("/"), cfg["url"])
    model: Any = _fixed(lambda: open_clip.create_model(arch, load_weights=False))
    if weights != "random":
        _fill(model, Path(weights))
    own = open_clip.get_model_preprocess_cfg(model) | {k: v for k, v in cfg.items() if k in ("mean", "std")}
    size = own["size"] if isinstance(own["size"], int) else own["size"][0]
    plain = type(model) in (open_clip.CLIP, open_clip.CustomTextCLIP)  # then encode_image is the image tower alone
    network = model.visual if plain else _ImageFeatures(model)
    return _wrap(network, name, size, (1, 3), *_preprocessing(own))


def _timm(name: str, rest: str, weights: str | Path | None) -> Encoder:
    import timm

    one_of("timm model", rest.partition(".")[0], timm.list_models())
    network: Any = _fixed(lambda: timm.create_model(rest, pretrained=False, num_classes=0))
    own = timm.data.resolve_model_data_config(network)
    published = network.pretrained_cfg
    weights = weights or _on_disk(name, rest, published.get("hf_hub_id") or "", published.get("url") or "")
    if weights != "random":
        _fill(network, Path(weights), dropped=published.get("classifier") or ())
    size = own["input_size"][-1]
    return _wrap(network, name, size, (1, 3), *_preprocessing(own))


def _preprocessing(own: dict) -> tuple[list[float], list[float], str]:
    mode = "bilinear" if own["interpolation"] == "bilinear" else "bicubic"
    return [float(v) for v in own["mean"]], [float(v) for v in own["std"]], mode


def _fixed(make: Callable[[], nn.Module]) -> nn.Module:
    """Build a third party's network with a fixed initialisation; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        return make()


def _on_disk(name: str, stem: str, hub: str, url: str) -> Path:
    """Weights in data/weights/ or in the Hugging Face cache; else the error that says what to fetch."""
    from huggingface_hub import try_to_load_from_cache

    stem = stem.replace("/", "-")
    for suffix in (".safetensors", ".bin", ".pt"):
        if (path := WEIGHTS / f"{stem}{suffix}").is_file():
            return path
    names = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin")
    for file in names if hub.count("/") == 1 else ():
        if isinstance(found := try_to_load_from_cache(hub, file), str):
            return Path(found)
    source = f"https://huggingface.co/{hub}" if hub else url or "the project's page"
    raise FileNotFoundError(
        f"encoder={name!r}: weights not on disk; fetch the .safetensors (or .bin) file from {source} and save it as "
        f"data/weights/{stem}.safetensors (or .bin); 'tiny-vit' works now"
    )


def _fill(network: nn.Module, path: Path, dropped: str | Sequence[str] = ()) -> nn.Module:
    """Load a file of tensors into `network`, every one; `dropped` names the heads that it has done without."""
    state = _read(path)
    heads = tuple(f"{head}." for head in ([dropped] if isinstance(dropped, str) else dropped))
    wanted = network.state_dict()
    # files of parallel training put "module." before each name; old transformers saved the constant position_ids
    state = {k.removeprefix("module.") if k not in wanted else k: v for k, v in state.items()}
    state = {k: v for k, v in state.items() if k in wanted or not (k.startswith(heads) or k.endswith("position_ids"))}
    wrong = [k for k in {**wanted, **state} if k not in wanted or k not in state or wanted[k].shape != state[k].shape]
    if wrong:
        raise ValueError(
            f"weights={str(path)!r}: do not fit {type(network).__name__}, {len(wrong)} tensors are missing, extra or "
            f"of another shape, such as {', '.join(sorted(wrong)[:3])}; give the weights of this architecture"
        )
    network.load_state_dict(state)
    return network


def _read(path: Path) -> dict[str, Tensor]:
    """Names and tensors of a file; nothing that could run code is unpickled."""
    said = f"weights={str(path)!r}"
    if not path.is_file():
        raise FileNotFoundError(f"{said}: no such file; give a .safetensors file or a torch.save of tensors")
    _compare(path, said)
    try:
        state: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        remedy = "save its state_dict as safetensors"
        raise ValueError(
            f"{said}: refused, damaged or holding more than tensors (it could run code); {remedy}"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{said}: not a readable file of tensors; fetch or save it again") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    good = len(state) > 0 and all(isinstance(v, Tensor) for v in state.values())
    require(good, "weights", str(path), "must hold a state_dict: names and tensors")
    return state


def _compare(path: Path, said: str) -> None:
    """Refuse a file whose sha256 is not the one that comes with it: in FILE.sha256, as `sha256sum` writes it, or as the
    name of its blob in the Hugging Face cache. Without either, not the one of its first use, if size and time are."""
    beside, blob = path.with_name(f"{path.name}.sha256"), path.resolve().name
    wanted = beside.read_text()[:64] if beside.is_file() else blob if re.fullmatch("[0-9a-f]{64}", blob) else None
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    wanted = wanted or _first_use(path, found)
    if found != wanted:
        raise ValueError(f"{said}: damaged, its sha256 is not the recorded {wanted[:12]}; fetch or save it again")


def _first_use(path: Path, sha256: str) -> str:
    """The sha256 that a file had when it was first used, by the record in the cache; from now on `sha256` for a new one."""
    record = CACHE / "weights" / f"{files.digest(str(path.resolve()))[:32]}.json"
    about = {"size": path.stat().st_size, "changed": path.stat().st_mtime_ns}
    known = files.read_json(record) or {}
    if known.items() >= about.items():
        return known["sha256"]
    with contextlib.suppress(OSError):  # a folder that cannot be written stops nobody from using a file
        files.write_json(record, {**about, "sha256": sha256})
    return sha256


def public_file(name: str, folder: Path = PUBLIC) -> Path:
    """Path of a shipped stand-in after comparing its sha256 with the one in its sidecar JSON."""
    path, sidecar = folder / name, (folder / name).with_suffix(".json")
    remedy = "restore it with `git checkout data/public` or rebuild it with notebooks/public_standins"
    for needed in (path, sidecar):
        if not needed.is_file():
            raise FileNotFoundError(f"{needed.name}: missing from {folder}; {remedy}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    require(
        digest == json.loads(sidecar.read_text())["sha256"],
        "file",
        str(path),
        f"its sha256 is not the recorded; {remedy}",
    )
    return path
