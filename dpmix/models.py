"""Floor 0: frozen encoders, from pixels in 0..1 to features. Nothing here is trained on a private image.

`encoder` takes the small embedded ones (`tiny-vit`, `tiny-convnext`; `pretrain` made them out of public characters),
those of open_clip and timm, and any module of yours with a file of weights.
"""

import copy
import hashlib
import json
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from dpmix.checks import one_of, positive, require, whole
from dpmix.rng import generator
from dpmix.wide_resnet import wide_resnet as wide_resnet

_HERE = Path(__file__).resolve().parents[1]
PROJECT = _HERE if (_HERE / "data" / "public").is_dir() else Path.cwd()
PUBLIC = PROJECT / "data" / "public"
WEIGHTS = PROJECT / "data" / "weights"  # ignored by git; where large weights are looked for
TINY = ("tiny-vit", "tiny-convnext")
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
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def train(self, mode: bool = True) -> "Frozen":
        return super().train(False)  # statistics of a batch would couple private examples

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "n C H W"]) -> Float[Tensor, "n D"]:
        takes = " or ".join(map(str, self.channels))
        require(images.shape[1] in self.channels, "channels", images.shape[1], f"encoder {self.name!r} takes {takes}")
        # some 64k pixels at a time stay in a core's cache; a device wants more, and memory stays bounded on both
        budget = 2**16 if self.mean.device.type == "cpu" else 2**25
        return torch.cat([self._chunk(part) for part in images.split(max(32, budget // self.size**2))])

    def _chunk(self, images: Tensor) -> Tensor:
        mean, std = self.mean, self.std
        images = images.to(mean.device, torch.promote_types(mean.dtype, torch.float32))  # resize in float32 at least
        size = (self.size, self.size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode=self.mode, antialias=True).clamp(0, 1)
        images = (images - mean) / std  # a grey image becomes as many channels as the mean has
        features = self.network(images.to(mean.dtype))
        return features.float() if features.dtype in (torch.bfloat16, torch.float16) else features


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
    - "open_clip:ARCH/PRETRAINED": projected image features, the model's own size, mean and deviation. PRETRAINED is one of
      open_clip's tags (file in data/weights/ or in the Hugging Face cache), a local file, or "random".
    - "timm:NAME": pooled features, its own data configuration, without the central crop (views are crops already).
    - a module, with `image_size`, `channels`, `mean` and `std`; and `weights` unless it holds them already.

    `weights` names a local file for any of these (safetensors, or torch.save of tensors only), or is "random" for
    open_clip and timm (a fixed initialisation, for tests). Nothing is downloaded. Raises ValueError for an unknown name
    (with near matches) or weights that do not fit, FileNotFoundError for absent weights: what to fetch and where to put it.
    """
    if isinstance(name, nn.Module):
        require(image_size is not None, "image_size", image_size, "must be given with a module, in pixels")
        require(channels is not None, "channels", channels, "must be given with a module")
        whole("image_size", image_size, 1)
        whole("channels", channels, 1)
        positive("std", std)
        network = name if weights is None else _filled(copy.deepcopy(name), Path(weights))
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
        network = _filled(_tiny(name), path)
        return _wrap(network, name, 16, (1,), [0.5], [0.5], "bilinear")
    if family == "open_clip" and rest:
        return _open_clip(name, rest, weights)
    if family == "timm" and rest:
        return _timm(name, rest, weights)
    one_of("encoder", name, ENCODERS)
    raise AssertionError("unreachable")


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
    shape = frozen(torch.zeros(1, channels[0], size, size)).shape
    require(len(shape) == 2, "encoder", name, f"must give one feature vector an image, not {list(shape[1:])}")
    return Encoder(frozen, size, shape[1], channels, name)


def _open_clip(name: str, rest: str, weights: str | Path | None) -> Encoder:
    import open_clip

    arch, _, tag = rest.partition("/")
    one_of("open_clip architecture", arch, open_clip.list_models())
    cfg: Mapping = {}
    if weights is None and tag not in ("", "random") and not Path(tag).is_file():
        one_of(f"pretrained weights of {arch}", tag, open_clip.list_pretrained_tags_by_model(arch))
    cfg = open_clip.get_pretrained_cfg(arch, tag) or {}
    if weights is None:
        weights = (
            "random" if tag in ("", "random") else tag if Path(tag).is_file() else _local(name, f"{arch}-{tag}", cfg)
        )
    whole_model = _quiet(lambda: open_clip.create_model(arch, load_weights=False, pretrained_text=False))
    if weights != "random":
        _filled(whole_model, Path(weights))
    own = open_clip.get_model_preprocess_cfg(whole_model)
    size = own["size"] if isinstance(own["size"], int) else own["size"][0]
    network = whole_model.visual  # what encode_image calls, projection included
    return _wrap(network, name, size, (1, 3), cfg.get("mean", own["mean"]), cfg.get("std", own["std"]))


def _timm(name: str, rest: str, weights: str | Path | None) -> Encoder:
    import timm

    one_of("timm model", rest.partition(".")[0], timm.list_models())
    network = _quiet(lambda: timm.create_model(rest, pretrained=False, num_classes=0))
    cfg = timm.data.resolve_model_data_config(network)
    if weights is None:
        weights = _local(name, rest, {"hf_hub": network.pretrained_cfg.get("hf_hub_id") or f"timm/{rest}"})
    if weights != "random":
        _filled(network, Path(weights), ignore=network.pretrained_cfg.get("classifier"))
    mode = "bilinear" if cfg["interpolation"] == "bilinear" else "bicubic"
    return _wrap(network, name, cfg["input_size"][-1], (1, 3), cfg["mean"], cfg["std"], mode)


def _quiet(make: Callable[[], nn.Module]) -> nn.Module:
    """Build a third party's network with a fixed initialisation; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        return make()


def _local(name: str, stem: str, cfg: Mapping) -> Path:
    """Weights in data/weights/ or in the Hugging Face cache; else the error that says what to fetch."""
    from huggingface_hub import try_to_load_from_cache

    hub, _, file = cfg.get("hf_hub", "").rstrip("/").partition(":")
    for suffix in (".safetensors", ".bin", ".pt"):
        if (path := WEIGHTS / f"{stem}{suffix}").is_file():
            return path
    files = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin")
    for file in files if hub.count("/") == 1 else ():
        if isinstance(found := try_to_load_from_cache(hub, file), str):
            return Path(found)
    source = f"https://huggingface.co/{hub}" if hub else cfg.get("url") or "its project page"
    raise FileNotFoundError(
        f"encoder={name!r}: weights not on disk; fetch the .safetensors (or .bin) file from {source} and put it at "
        f"data/weights/{stem}.safetensors (or .bin); 'tiny-vit' works now"
    )


def _filled(network: nn.Module, path: Path, ignore: str | Sequence[str] | None = None) -> nn.Module:
    """Load a file of tensors into `network`, exactly; `ignore` names heads that the network has dropped."""
    if not path.is_file():
        raise FileNotFoundError(
            f"weights={str(path)!r}: no such file; give a .safetensors file or a torch.save of tensors"
        )
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = "refused, it holds more than tensors and could run code; save the state_dict as safetensors"
        raise ValueError(f"weights={str(path)!r}: {refused}") from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"weights={str(path)!r}: not a readable file of tensors; fetch or save it again") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    good = isinstance(state, dict) and len(state) > 0 and all(isinstance(v, Tensor) for v in state.values())
    require(good, "weights", str(path), "must hold a state_dict: names and tensors")
    heads = tuple(f"{head}." for head in ([ignore] if isinstance(ignore, str) else ignore or ()))
    state = {k: v for k, v in state.items() if not (heads and k.startswith(heads))}
    wanted = network.state_dict()
    wrong = [k for k in {**wanted, **state} if k not in wanted or k not in state or wanted[k].shape != state[k].shape]
    if wrong:
        raise ValueError(
            f"weights={str(path)!r}: do not fit {type(network).__name__}, {len(wrong)} tensors are missing, extra or "
            f"of another shape, such as {', '.join(sorted(wrong)[:3])}; give the weights of this architecture"
        )
    network.load_state_dict(state)
    return network


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


# The small embedded encoders: one channel, 16x16, 64 features of unit norm. ReLU and few tokens, for speed on two cores.


class _Unit(nn.Module):
    """Project, centre and scale to unit norm: a clip norm means the same for every encoder."""

    def __init__(self, width: int, dim: int = 64) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, dim)

    def forward(self, x: Float[Tensor, "n width"]) -> Float[Tensor, "n D"]:
        x = self.linear(self.norm(x))
        return F.layer_norm(x, x.shape[-1:]) / math.sqrt(x.shape[-1])


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Float[Tensor, "n tokens width"]) -> Float[Tensor, "n tokens width"]:
        n, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width))
        return x + self.down(F.relu(self.up(self.norm2(x))))


class TinyViT(nn.Module):
    """Patches of 4x4, two blocks of attention, mean of the tokens."""

    def __init__(self, width: int = 64, depth: int = 2, heads: int = 2) -> None:
        super().__init__()
        self.patch, self.position = nn.Linear(16, width), nn.Parameter(torch.zeros(16, width))
        self.blocks, self.head = nn.Sequential(*[_Attention(width, heads) for _ in range(depth)]), _Unit(width)

    def forward(self, x: Float[Tensor, "n 1 16 16"]) -> Float[Tensor, "n D"]:
        tokens = F.pixel_unshuffle(x, 4).flatten(2).transpose(1, 2)
        return self.head(self.blocks(self.patch(tokens) + self.position).mean(1))


class _Conv(nn.Module):
    """A ConvNeXt block: depthwise convolution, then an inverted bottleneck of width 2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Float[Tensor, "n width h w"]) -> Float[Tensor, "n width h w"]:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.down(F.relu(self.up(y))).permute(0, 3, 1, 2)


class TinyConvNeXt(nn.Module):
    """A stem of two strides down to 4x4 places, two ConvNeXt blocks, mean over the places."""

    def __init__(self, stem: int = 32, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.stem, self.shrink = nn.Conv2d(1, stem, 4, stride=2, padding=1), nn.Conv2d(stem, width, 2, stride=2)
        self.blocks, self.head = nn.Sequential(*[_Conv(width) for _ in range(depth)]), _Unit(width)

    def forward(self, x: Float[Tensor, "n 1 16 16"]) -> Float[Tensor, "n D"]:
        x = F.relu(self.stem(x.contiguous(memory_format=torch.channels_last)))
        return self.head(self.blocks(self.shrink(x)).mean((2, 3)))


def _tiny(name: str) -> nn.Module:
    with torch.device("meta"):  # no draw from torch's global generator
        network = TinyViT() if name == "tiny-vit" else TinyConvNeXt()
    return network.to_empty(device="cpu")


def initialise(network: nn.Module, rng: np.random.Generator) -> nn.Module:
    """Fill every parameter from `rng`: matrices and kernels normal with variance 1/fan-in, gains one, the rest zero."""
    with torch.no_grad():
        for name, value in network.named_parameters():
            if value.ndim >= 2:
                draw = rng.normal(0, 1 / math.sqrt(value[0].numel()), value.shape)
                value.copy_(torch.from_numpy(draw))
            else:
                value.fill_(float(name.endswith("weight")))
    return network


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

    Cross-entropy over cosines with one direction per class, AdamW, a cosine schedule after a warm-up. Images are shifted, thinned
    or blurred, made brighter or fainter, noised and mixed. Draws are keyed by `(seed, "pretrain", step)`: the same call
    gives the same weights on the same machine with the same number of threads.
    """
    one_of("name", name, TINY)
    whole("steps", steps, 1)
    whole("batch_size", batch_size, 2)
    positive("learning_rate", learning_rate)
    network = initialise(_tiny(name), generator(seed, "initial", name))
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
    x = F.pad(x, (2, 2, 2, 2), mode=mode)[torch.arange(n)[:, None, None], 0, rows[:, :, None], columns[:, None, :]][
        :, None
    ]
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = x + draw(-0.4, 0.6) * (blurred - x)  # below zero: sharper
    x = (x.clamp(0, 1) + 1e-6) ** torch.exp(draw(-0.5, 0.5)) * draw(0.7, 1.1)
    return (x + draw(0, 0.1) * torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32))).clamp(0, 1)
