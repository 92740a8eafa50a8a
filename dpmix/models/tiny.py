"""The small embedded encoders; `dpmix.demo.pretraining` made them out of rendered characters.

Both take one channel of 16x16 and give 64 features of unit norm. ReLU and few tokens, for speed on two cores."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dpmix.core import rng

NAMES = ("tiny-vit", "tiny-convnext")


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


def build(name: str) -> nn.Module:
    """The network `name`, its parameters not yet filled."""
    with torch.device("meta"):  # no draw from torch's global generator
        network = TinyViT() if name == "tiny-vit" else TinyConvNeXt()
    return network.to_empty(device="cpu")


def initialise(network: nn.Module, seed: int, name: str) -> nn.Module:
    """Fill every parameter, keyed by the network's name. Matrices and kernels are normal with variance 1/fan-in, gains one,
    the rest zero."""
    stream = rng.generator(seed, "initial", name)
    with torch.no_grad():
        for parameter, value in network.named_parameters():
            if value.ndim >= 2:
                draw = stream.normal(0, 1 / math.sqrt(value[0].numel()), value.shape)
                value.copy_(torch.from_numpy(draw))
            else:
                value.fill_(float(parameter.endswith("weight")))
    return network
