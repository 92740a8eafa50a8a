"""Opacus as a step of `dpmix.audit`: its own sum and, with `copies`, its own noise. The tests and "From Opacus" audit it.

`average=False` is the trap: K views of an example stand in the batch as K rows, and Opacus clips each by itself.
"""

import torch
import torch.nn.functional as F
from opacus.grad_sample import prepare_module
from opacus.optimizers import DPOptimizer
from torch import nn

from dpmix import audit
from dpmix.core import views
from dpmix.peers.opacus import average_views

SHAPE, CLASSES = (1, 4, 4), 3
RECIPE = views.Recipe(k_base=3, k_self=3, transform="crop")


def opacus_step(average: bool = True, noise: float = 0.0, copies: int = 0) -> audit.Step:
    """The clipped sum [p] over records, clip norm 1; with `copies` as many noisy sums [copies, p]."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.GroupNorm(1, 2), nn.Flatten(), nn.Linear(32, CLASSES))
    model = model.double()
    with torch.no_grad():  # two classes alone are probable, so that their gradients point opposite ways
        model[3].weight.zero_()
        model[3].bias.copy_(torch.tensor([0.0, 0.0, -20.0]))
    hooked = prepare_module(model, grad_sample_mode="hooks", loss_reduction="sum")
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters()), noise_multiplier=noise, max_grad_norm=1.0, expected_batch_size=None,
        loss_reduction="sum",
    )  # fmt: skip
    optimizer = average_views(hooked, optimizer, RECIPE.views) if average else optimizer

    def step(records: audit.Records, seed: int, number: int) -> torch.Tensor:
        of = records.images, records.labels, records.ids
        x, y = views.make_views(*of, RECIPE, num_classes=CLASSES, seed=seed, step=number)
        x, y = x.double(), y.double()
        found = []
        torch.manual_seed(seed % 2**62)
        for _ in range(copies or 1):
            optimizer.zero_grad()
            F.cross_entropy(hooked(x if average else x.flatten(0, 1)), y.flatten(0, 1), reduction="sum").backward()
            assert optimizer.pre_step()
            found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        return torch.stack(found) if copies else found[0]

    return step
