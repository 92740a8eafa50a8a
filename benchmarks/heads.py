"""Speed of the clipped head gradient and of the bank. Medians of one run, as a table and as JSON.

    python benchmarks/heads.py [--out benchmarks/results/heads.json] [--repeats 45]

1. One clipped gradient, B = 64 examples, K = 34 views, D = 512 features, 257 classes, float32: ours against a plain
   gradient of the same batch (autograd, no clipping), against per-example gradients formed by einsum, and against
   Opacus' GradSampleModule on the B * K views. Peers take turns in a random order, so that a slow moment of
   the machine, or the memory that one of them leaves behind, hits all alike.
2. A bank of 64 heads against one head, for a whole pass with `tiny-vit` on the digits.
"""

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from opacus import GradSampleModule
from torch import Tensor, nn

from dpmix import models
from dpmix.core import heads, views
from dpmix.core.checks import counted
from dpmix.core.clipping import clipped_head_sums
from dpmix.images import data

B, K, D, CLASSES = 64, 34, 512, 257


def contenders() -> dict[str, Callable[[], object]]:
    """The same averaged-then-clipped gradient four ways (plain: not clipped)."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(B, K, D, generator=g)
    y = torch.nn.functional.one_hot(torch.randint(CLASSES, (B, K), generator=g), CLASSES).float()
    W, bias = torch.randn(1, CLASSES, D, generator=g) * 0.01, torch.zeros(1, CLASSES)
    even, clip = torch.full((1, K), 1 / K), torch.ones(1)

    def ours() -> Tensor:
        return clipped_head_sums(z, y, W, bias, clip, even).weights

    weight, offset = W[0].clone().requires_grad_(), bias[0].clone().requires_grad_()

    def plain() -> tuple[Tensor, ...]:
        logits = torch.addmm(offset, z.flatten(0, 1), weight.T)
        return torch.autograd.grad(torch.nn.functional.cross_entropy(logits, y.flatten(0, 1)), (weight, offset))

    def einsum() -> Tensor:
        logits = torch.addmm(bias[0], z.flatten(0, 1), W[0].T).view(B, K, CLASSES)
        delta = (logits.softmax(-1) - y) / K
        each, each_bias = torch.einsum("bkc,bkd->bcd", delta, z), delta.sum(1)
        norms = (each.square().sum((1, 2)) + each_bias.square().sum(1)).sqrt()
        return torch.einsum("b,bcd->cd", (1 / norms).clamp(max=1), each)

    layer = nn.Linear(D, CLASSES)
    with torch.no_grad():
        layer.weight.copy_(W[0])
        layer.bias.zero_()
    wrapped = GradSampleModule(layer)

    def opacus() -> Tensor:
        wrapped.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(wrapped(z.flatten(0, 1)), y.flatten(0, 1), reduction="sum")
        loss.backward()
        each = layer.weight.grad_sample.view(B, K, CLASSES, D).mean(1)
        each_bias = layer.bias.grad_sample.view(B, K, CLASSES).mean(1)
        norms = (each.square().sum((1, 2)) + each_bias.square().sum(1)).sqrt()
        return torch.einsum("b,bcd->cd", (1 / norms).clamp(max=1), each)

    torch.testing.assert_close(ours()[0], einsum(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(ours()[0], opacus(), rtol=1e-3, atol=1e-5)
    return {"ours": ours, "plain": plain, "einsum": einsum, "opacus": opacus}


def one_gradient(repeats: int) -> dict[str, float]:
    """Median seconds of each contender; Opacus takes part in every third round, being slow."""
    calls = contenders()
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    for turn in range(repeats):
        for name in order.sample(list(calls), len(calls)):
            if name == "opacus" and turn % 3:
                continue
            start = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t[1:] or t) for name, t in times.items()}


def bank_pass(repeats: int) -> dict[str, float]:
    """Median seconds of a pass over the digits with tiny-vit, for one head and for 64 (4 noises x 16 learning rates)."""
    train = data.load("digits").train
    encoder = models.encoder("tiny-vit")
    recipe = views.METHODS["mix-self"].for_data(train.flip)
    many = [
        heads.Head(recipe=recipe, learning_rate=0.5 * 2 ** (r / 4), noise_multiplier=s)
        for r in range(16) for s in (0.8, 1.2, 2.0, 3.0)
    ]  # fmt: skip
    times: dict[int, list[float]] = {1: [], 64: []}
    for _ in range(repeats):
        for count in times:
            start = time.perf_counter()
            heads.train_heads(
                encoder, train.images, train.labels, many[:count], num_classes=10, expected_batch=128, steps=11, seed=0,
                progress=False,
            )  # fmt: skip
            times[count].append(time.perf_counter() - start)
    return {counted(count, "head"): statistics.median(t) for count, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "heads.json")
    parser.add_argument("--repeats", type=int, default=45)
    args = parser.parse_args()
    gradient, bank = one_gradient(args.repeats), bank_pass(max(3, args.repeats // 9))
    ratios = {
        "ours / plain gradient (goal: at most 1.2)": gradient["ours"] / gradient["plain"],
        "einsum / ours (goal: at least 2.5)": gradient["einsum"] / gradient["ours"],
        "Opacus / ours (goal: at least 15)": gradient["opacus"] / gradient["ours"],
        "64 heads / 1 head, whole pass (goal: at most 1.3)": bank["64 heads"] / bank["1 head"],
    }
    for name, seconds in {**gradient, **bank}.items():
        print(f"{name:<50} {1e3 * seconds:>10.2f} ms")
    for name, ratio in ratios.items():
        print(f"{name:<50} {ratio:>10.2f}")
    about = {"threads": torch.get_num_threads(), "torch": torch.__version__, "machine": platform.machine()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"seconds": {**gradient, **bank}, "ratios": ratios, **about}, indent=1) + "\n")


if __name__ == "__main__":
    main()
