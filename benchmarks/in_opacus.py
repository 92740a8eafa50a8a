"""The time of one step with K views an example: Opacus with `average_views`, its alternatives, and our own engines.

    python benchmarks/in_opacus.py                       # eight convolutions, 32 x 32 pixels, 16 examples x 8 views, some minutes

Every row takes the same views through the same network and makes one step. Every round visits all rows in an order of its
own, so that a change in the machine's load hits all; a ratio is the median over rounds of (time of the row / time of
`average_views` in that round). `rows_mib` is what the per-example gradients of a step take when the backward pass is over.
"""

import argparse
import json
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F
from opacus.grad_sample import prepare_module
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from dpmix.core import rng, views
from dpmix.core.clipping_network import Clipper
from dpmix.peers.opacus import average_views

Row = Callable[[Tensor, Tensor], float]


def network() -> nn.Module:
    """Eight convolutions in four widths, as in Opacus' CIFAR-10 example, with GroupNorm."""
    torch.manual_seed(0)
    layers, before = list[nn.Module](), 3
    for width in (16, 32, 64, 128):
        for _ in range(2):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.GroupNorm(8, width), nn.ReLU()]
            before = width
        layers.append(nn.AvgPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * before, 10))


def held(model: nn.Module) -> float:
    return sum(p.grad_sample.numel() * p.grad_sample.element_size() for p in model.parameters()) / 2**20


def opacus(k: int, way: str, mode: str = "hooks") -> Row:
    """One step of Opacus: `average`, `repeat` (K rows as K examples: not private at the stated epsilon) or `loop`."""
    model = network()
    hooked = prepare_module(model, grad_sample_mode=mode)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=1e-6), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=16
    )
    optimizer = average_views(hooked, optimizer, k) if way == "average" else optimizer

    def run(images: Tensor, targets: Tensor) -> float:
        optimizer.zero_grad()
        if way == "loop":
            loss = sum(F.cross_entropy(hooked(images[:, i]), targets[:, i]) for i in range(k)) / k
        else:
            logits = hooked(images if way == "average" else images.flatten(0, 1))
            loss = F.cross_entropy(logits, targets.flatten(0, 1))
        loss.backward()
        rows = held(model)
        optimizer.step()
        return rows

    return run


def ours(engine: str) -> Row:
    model = network()
    clipper, noise = Clipper(model, 1.0, engine), torch.Generator().manual_seed(0)

    def run(images: Tensor, targets: Tensor) -> float:
        clipper.reset()
        clipper.add(images, targets)
        with torch.no_grad():
            for p, g in zip(clipper.parameters.values(), clipper.grads().values(), strict=True):
                p.sub_(g + torch.randn(g.shape, generator=noise), alpha=1e-6 / 16)
        return 0.0

    return run


def plain() -> Row:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def run(images: Tensor, targets: Tensor) -> float:
        optimizer.zero_grad()
        F.cross_entropy(model(images.flatten(0, 1)), targets.flatten(0, 1)).backward()
        optimizer.step()
        return 0.0

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "in_opacus.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message="(Full|Non-full) backward hook", category=UserWarning)
    b, k = options.batch, options.views
    draw = rng.generator(0, "benchmark")
    images = torch.from_numpy(draw.integers(0, 256, (b, 3, 32, 32), dtype="uint8"))
    labels, ids = torch.from_numpy(draw.integers(0, 10, b)), torch.arange(b)
    made = views.make_views(images, labels, ids, views.Recipe(k_base=k), num_classes=10, seed=0, step=0)
    rows = {
        "average_views, hooks": opacus(k, "average"),
        "average_views, ew": opacus(k, "average", "ew"),
        "a loop over the views": opacus(k, "loop"),
        "K rows as K examples (not private)": opacus(k, "repeat"),
        "dpmix, grouped": ours("grouped"),
        "dpmix, loop": ours("loop"),
        "plain SGD": plain(),
    }
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    memory: dict[str, float] = {}
    for round_ in range(options.rounds + 1):  # the first one warms up
        for name in random.Random(round_).sample(list(rows), len(rows)):
            began = time.perf_counter()
            memory[name] = rows[name](*made)
            if round_:
                seconds[name].append(time.perf_counter() - began)
    first = seconds["average_views, hooks"]
    found = [
        {
            "row": name,
            "seconds": statistics.median(times),
            "times_average_views": statistics.median(t / f for t, f in zip(times, first, strict=True)),
            "rows_mib": memory[name],
            "all_seconds": times,
        }
        for name, times in seconds.items()
    ]
    about = {
        "model": "8 convolutions, GroupNorm", "parameters": sum(p.numel() for p in network().parameters()), "side": 32,
        "batch": b, "views": k, "rounds": options.rounds, "threads": options.threads, "processor": platform.machine(),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: metadata.version(name) for name in ("torch", "opacus")},
    }  # fmt: skip
    options.json.write_text(json.dumps({"about": about, "rows": found}, indent=1) + "\n")
    print(about)
    for row in found:
        print(
            f"{row['row']:<36} {row['seconds']:8.3f} s {row['times_average_views']:6.2f} x {row['rows_mib']:8.1f} MiB"
        )


if __name__ == "__main__":
    main()
