"""The refusal of models in which one example's output depends on another's: no clipping would bound that."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


def check_no_mixing(model: nn.Module, probe: Float[Tensor, "n ..."] | None = None) -> None:
    """Refuse a model in which one example's output depends on another's: clipping would bound nothing.

    By name: BatchNorm of every kind (also frozen: its statistics came from somewhere) and normalisation that keeps
    running statistics. With `probe`, at least two inputs that are not private, also by behaviour: the output for the
    first must not change when the others are left out.
    Raises ValueError naming the layer and the remedy.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, _NormBase) and (layer.track_running_stats or "BatchNorm" in type(layer).__name__):
            raise ValueError(
                f"model: layer {name or 'model'!r} is {type(layer).__name__}, which mixes the examples of a batch, so "
                "clipping bounds nobody's influence; replace it with nn.GroupNorm (as wide_resnet does) or nn.LayerNorm"
            )
    if probe is not None:
        with torch.no_grad():
            together, alone = model(probe)[:1].double(), model(probe[:1]).double()
        scale = float(alone.abs().max()) + 1e-6
        if not float((together - alone).abs().max()) <= 1e-2 * scale:
            raise ValueError(
                "model: the output for an image changes when other images are left out of the batch, so clipping "
                "bounds nobody's influence; remove what mixes the batch (and any dropout)"
            )
