"""The wide residual network of De et al. (2022).

The network follows their JAX code rather than the figure in their paper: ReLU *before* GroupNorm before convolution, a
shortcut with its own ReLU, norm and 1x1 convolution in the first block of each stage, convolutions with weight
standardisation (a gain and a bias per output channel), "SAME" padding (which for a stride of two and an even size pads
the right and the bottom only), truncated normal weights of variance 1 / fan-in, biases at zero, and average pooling."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from scipy.special import ndtr, ndtri
from torch import Tensor, nn

from dpmix.core import rng
from dpmix.core.checks import require, whole

_EPSILON = 1e-4  # floor of the standardised variance, as in De et al.
_TRUNCATED = 0.87962566103423978  # standard deviation of a unit normal cut at two standard deviations


def standardise(weight: Float[Tensor, "out in kh kw"], gain: Float[Tensor, " out"]) -> Float[Tensor, "out in kh kw"]:
    """Scaled weight standardisation: each filter gets mean 0 and norm 1, times its gain."""
    centred, norm = _centred(weight)
    return (centred * (gain[:, None] / norm.clamp(min=_EPSILON**0.5))).view_as(weight)


def standardise_pullback(
    weight: Float[Tensor, "out in kh kw"], gain: Float[Tensor, " out"], grads: Float[Tensor, "b out size"]
) -> tuple[Float[Tensor, "b out size"], Float[Tensor, "b out"]]:
    """Gradients with respect to standardised filters -> gradients with respect to `weight` and `gain`, b at a time."""
    centred, norm = _centred(weight)
    inverse = 1 / norm.clamp(min=_EPSILON**0.5)
    along = torch.linalg.vecdot(grads, centred) * inverse[:, 0]
    # below the floor the scale is constant, so nothing is taken off along the filter
    curved = torch.where(norm >= _EPSILON**0.5, inverse, torch.zeros_like(inverse)) * along[..., None]
    pulled = torch.addcmul(grads - grads.mean(2, keepdim=True), centred, curved, value=-1)
    return pulled.mul_(gain[:, None] * inverse), along


def _centred(weight: Float[Tensor, "out in kh kw"]) -> tuple[Float[Tensor, "out size"], Float[Tensor, "out 1"]]:
    """Filters less their means, and their norms. Twice as fast on a CPU as `torch.var_mean`, forward and backward."""
    rows = weight.flatten(1)
    centred = rows - rows.mean(1, keepdim=True)
    return centred, torch.linalg.vector_norm(centred, dim=1, keepdim=True)


class StandardisedConv2d(nn.Conv2d):
    """A convolution whose filters are standardised at every call; parameters `weight`, `gain` and `bias`."""

    gradient_rule = nn.Conv2d  # that of the filters as they are used; `pull_back` leads on to the parameters

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(self.out_channels))

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, standardise(self.weight, self.gain), self.bias)

    def pull_back(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradients [b, numel] of the filters as they are used -> gradients of `weight` and `gain`; the bias stays."""
        per_filter = grads["weight"].unflatten(1, (self.out_channels, -1)).to(self.weight.dtype)
        weight, gain = standardise_pullback(self.weight, self.gain, per_filter)
        return {**grads, "weight": weight, "gain": gain}


class Norm(nn.GroupNorm):
    """GroupNorm in the precision of its input. Autocast would widen the activations to float32 and double the memory
    traffic; the kernel takes its statistics in float32 either way."""

    gradient_rule = nn.GroupNorm

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
        with torch.autocast(input.device.type, enabled=False):
            return F.group_norm(input, self.num_groups, weight, bias, self.eps)


class _Layer(nn.Module):
    """ReLU, norm, convolution with "SAME" padding."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, groups: int, convolution: type) -> None:
        super().__init__()
        self.norm = Norm(groups, inputs)
        self.conv = convolution(inputs, outputs, kernel, stride, padding=(kernel - 1) // 2 if stride == 1 else 0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(F.relu(x))
        if self.conv.kernel_size[0] > self.conv.stride[0] > 1:  # 3 and 2: an even side is padded at its end alone
            height, width = (side % 2 for side in x.shape[-2:])
            x = F.pad(x, (width, 1, height, 1))
        return self.conv(x)


class _Block(nn.Module):
    """Two layers and a shortcut, which has a 1x1 layer where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, first: bool, groups: int, convolution: type) -> None:
        super().__init__()
        self.skip = _Layer(inputs, outputs, 1, stride, groups, convolution) if first else nn.Identity()
        self.layers = nn.Sequential(
            _Layer(inputs, outputs, 3, stride, groups, convolution),
            _Layer(outputs, outputs, 3, 1, groups, convolution),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + self.skip(x)


class WideResNet(nn.Module):
    """See `wide_resnet`."""

    def __init__(self, depth: int, width: int, num_classes: int, groups: int, channels: int, convolution: type) -> None:
        super().__init__()
        self.stem = convolution(channels, 16, 3, 1, padding=1)
        blocks, inputs = [], 16
        for stage, outputs in enumerate((16 * width, 32 * width, 64 * width)):
            for index in range((depth - 4) // 6):
                stride = 2 if stage and not index else 1
                blocks.append(_Block(inputs, outputs, stride, not index, groups, convolution))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.norm = Norm(groups, inputs)
        self.head = nn.Linear(inputs, num_classes)

    def forward(self, x: Float[Tensor, "n C H W"]) -> Float[Tensor, "n classes"]:
        x = self.norm(F.relu(self.blocks(self.stem(x))))
        pooled = x.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))
        return self.head(pooled.to(self.head.weight.dtype))


def wide_resnet(
    depth: int,
    width: int,
    num_classes: int,
    groups: int = 16,
    *,
    channels: int = 3,
    weight_standardisation: bool = True,
    seed: int = 0,
) -> WideResNet:
    """WRN-`depth`-`width` as De et al. (2022) use it; WRN-16-4 for ten classes has 2.75 M parameters.

    Images are float [n, channels, H, W] of any size; logits are [n, num_classes], each row a function of its own image.
    `depth`: 10, 16, 22, ... (6 k + 4); `width`: the stages have 16, 32 and 64 times as many channels. `groups` of GroupNorm
    must divide 16, the number of channels after the first convolution. `weight_standardisation=False` takes plain convolutions
    (with bias). `seed` keys the initial weights (`initialise`); no global random state is read or changed."""
    whole("depth", depth, 10)
    near = (depth + 2) // 6 * 6
    require(depth % 6 == 4, "depth", depth, f"must be 6 k + 4; near are {near - 2} and {near + 4}")
    for name, value in dict(width=width, num_classes=num_classes, groups=groups, channels=channels).items():
        whole(name, value, 1)
    require(16 % groups == 0, "groups", groups, "must divide 16, the channels of the first layer: 1, 2, 4, 8 or 16")
    convolution = StandardisedConv2d if weight_standardisation else nn.Conv2d
    with torch.device("meta"):  # PyTorch's own initialisation would draw from the global generator
        model = WideResNet(depth, width, num_classes, groups, channels, convolution)
    initialise(model.to_empty(device="cpu"), seed)
    return model


def initialise(model: nn.Module, seed: int) -> None:
    """Fill the parameters of `model` in place from the streams `(seed, "init", name)`. Weights of convolutions and linear
    layers: normal of variance 1 / fan-in cut at two standard deviations (Haiku's VarianceScaling(1.0); for plain convolutions
    Haiku's default, which leaves out the correction for the cut); vectors named weight or gain: one; biases: zero. The same
    on every machine to the last bit of float64."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            plain = type(model.get_submodule(name.rpartition(".")[0])) is nn.Conv2d
            uniform = rng.generator(seed, "init", name).uniform(ndtr(-2.0), ndtr(2.0), tuple(parameter.shape))
            deviation = parameter[0].numel() ** -0.5 / (1.0 if plain else _TRUNCATED)
            parameter.copy_(torch.from_numpy(ndtri(uniform) * deviation))
