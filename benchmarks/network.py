"""Speed and memory of clipped gradients of a network: plain SGD, peers and every engine, on the same views, side by side.

    python benchmarks/network.py --repeats 9 --others-every 3               # CPU: WRN-16-4, 8 examples x 16 views
    python benchmarks/network.py --device cuda --autocast --batch 16 64 256 # GPU: one table over the physical batches

"plain" is ordinary SGD on the same images, the limit: one gradient for the whole batch and one step. Every row does the
same work otherwise: the clipped sum and one step. Every round visits all rows, in an order of its own, so that a change in
the machine's load hits all. On a CPU each row has a process of its own, as in training, where nobody finds memory in the
state in which a peer has left it. A ratio is the median over rounds of (time of the row / time of plain SGD in that
round), where plain SGD is the memory layout that was faster in the median. On two busy cores a pass takes a quarter more
or less from one round to the next: many rounds tell ratios apart that three do not, and `--others-every 3` spares the slow
rows most of them.

Peers: Opacus' GradSampleModule on all views (hooks; layers that Opacus has no rule for fall back to functorch, as for any
user), its functorch mode, and `vmap(grad)` over examples, which is our own `vmap` engine.
"""

import argparse
import json
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from opacus import GradSampleModule
from opacus.grad_sample.group_norm import compute_group_norm_grad_sample
from opacus.grad_sample.utils import register_grad_sampler
from torch import Tensor, nn
from tqdm import tqdm

from dpmix.core import views
from dpmix.core.clipping_network import Clipper, _loss
from dpmix.models.wide_resnet import Norm, wide_resnet

BOTH_LAYOUTS = ("plain SGD", "ours: loop")  # on a CPU; the others are measured in the contiguous layout
register_grad_sampler(Norm)(compute_group_norm_grad_sample)  # it is a GroupNorm; without this Opacus would be slower


def step(parameters: list[nn.Parameter], grads: list[Tensor]) -> None:
    with torch.no_grad():
        torch._foreach_add_([p.data for p in parameters], [g.view_as(p) for g, p in zip(grads, parameters, strict=True)],
                            alpha=-1e-6)  # fmt: skip


class Methods:
    """The rows. A method is prepared for one model and returns a function of the views."""

    def __init__(self, options: argparse.Namespace, channels_last: bool) -> None:
        self.autocast = torch.bfloat16 if options.autocast else None
        self.channels_last, self.device = channels_last, options.device
        self.format = torch.channels_last if channels_last else torch.contiguous_format

    def precision(self):
        return torch.autocast(self.device, self.autocast, enabled=self.autocast is not None)

    def weights(self, x: Tensor, parts: float) -> Tensor:
        return torch.full((len(x),), 1.0 / parts, device=x.device)

    def plain(self, model: nn.Module) -> Callable[[Tensor, Tensor], None]:
        parameters = list(model.parameters())

        def run(images: Tensor, targets: Tensor) -> None:
            x = images.flatten(0, 1).contiguous(memory_format=self.format)
            with self.precision():
                logits = model(x)
            loss = _loss(logits, targets.flatten(0, 1), self.weights(x, len(x)))
            step(parameters, list(torch.autograd.grad(loss, parameters)))

        return run

    def ours(self, model: nn.Module, engine: str) -> Callable[[Tensor, Tensor], None]:
        clipper = Clipper(model, 1.0, engine, autocast=self.autocast, channels_last=self.channels_last)
        parameters = list(clipper.parameters.values())

        def run(images: Tensor, targets: Tensor) -> None:
            clipper.reset()
            clipper.add(images, targets)
            step(parameters, list(clipper.grads().values()))

        return run

    def opacus(self, model: nn.Module, functorch: bool) -> Callable[[Tensor, Tensor], None]:
        wrapped = GradSampleModule(model, loss_reduction="sum", force_functorch=functorch)
        parameters = list(wrapped.parameters())

        def run(images: Tensor, targets: Tensor) -> None:
            b, k = images.shape[:2]
            wrapped.zero_grad()
            x = images.flatten(0, 1).contiguous(memory_format=self.format)
            with self.precision():
                logits = wrapped(x)
            _loss(logits, targets.flatten(0, 1), self.weights(x, 1.0)).backward()
            each = [p.grad_sample.float().unflatten(0, (b, k)).mean(1).flatten(1) for p in parameters]
            for p in parameters:
                p.grad_sample = p.grad = None
            norms = torch.stack([g.norm(dim=1) for g in each]).norm(dim=0)
            scale = (1.0 / norms).clamp(max=1.0)
            step(parameters, [scale @ g for g in each])

        return run

    def rows(self) -> dict[str, Callable[[nn.Module], Callable[[Tensor, Tensor], None]]]:
        return {
            "plain SGD": self.plain,
            "ours: loop": lambda m: self.ours(m, "loop"),
            "ours: grouped": lambda m: self.ours(m, "grouped"),
            "vmap(grad) (ours: vmap)": lambda m: self.ours(m, "vmap"),
            "Opacus hooks": lambda m: self.opacus(m, False),
            "Opacus functorch": lambda m: self.opacus(m, True),
        }


def views_of(batch: int, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """K augmented views of random images: what is in the pictures does not change the time."""
    draws = np.random.default_rng(0)
    images = torch.from_numpy(draws.integers(0, 256, (batch, 3, options.side, options.side), dtype=np.uint8))
    labels, ids = torch.from_numpy(draws.integers(0, 10, batch)), torch.arange(batch)
    made = views.make_views(images, labels, ids, views.Recipe(k_base=options.views), num_classes=10, seed=0, step=0)
    return made.images.to(options.device), made.targets.to(options.device)


def one_pass(name: str, channels_last: bool, batch: int, standardised: bool, options: argparse.Namespace) -> tuple:
    """Seconds of a pass (the fastest of `inner`) and the most memory that it took, in GiB (0 on a CPU)."""
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message="(Full|Non-full) backward hook", category=UserWarning)
    images, targets = views_of(batch, options)
    cuda = options.device == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    model = wide_resnet(options.depth, options.width, 10, weight_standardisation=standardised).to(options.device)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    run = Methods(options, channels_last).rows()[name](model)
    run(images[:1], targets[:1])  # choices of the libraries, allocations of the model
    wait()
    seconds = []
    for _ in range(options.inner):
        began = time.perf_counter()
        run(images, targets)
        wait()
        seconds.append(time.perf_counter() - began)
    return min(seconds), torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0


def measure(batch: int, standardised: bool, options: argparse.Namespace) -> list[dict]:
    """All rows at one physical batch; a row that runs out of memory says so."""
    cuda = options.device == "cuda"
    times: dict[tuple[str, bool], dict[int, float]] = {}  # by round
    memory: dict[tuple[str, bool], float] = {}
    failed: dict[tuple[str, bool], str] = {}
    wanted = []
    for channels_last in [True] if cuda else [False, True]:
        for name in Methods(options, channels_last).rows():
            peer = name.startswith(("Opacus", "vmap"))
            asked = not options.only or any(word in name for word in options.only)
            if (
                asked
                and not (peer and batch > options.peers_up_to)
                and (cuda or not channels_last or name in BOTH_LAYOUTS)
            ):
                wanted.append((name, channels_last))
    with ExitStack() as stack:
        # On a GPU one process: each would hold memory of its own, and PyTorch keeps account of it by itself.
        ask = {key: one_pass for key in wanted}
        if not cuda:
            alone = {key: stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"))) for key in wanted}
            ask = {key: lambda *a, own=own: own.submit(one_pass, *a).result() for key, own in alone.items()}
        turns = tqdm(range(options.repeats + 1), desc=f"batch {batch}", unit="round")
        for round_ in turns:  # the first round warms up
            for key in random.Random(round_).sample(wanted, len(wanted)):
                turns.set_postfix_str(key[0])
                sits_out = key[0] not in BOTH_LAYOUTS and round_ % options.others_every
                if sits_out or key in failed or time.monotonic() > options.deadline:
                    continue
                try:
                    seconds, memory[key] = ask[key](*key, batch, standardised, options)
                    times.setdefault(key, {})[round_] = seconds
                except (torch.OutOfMemoryError, RuntimeError) as error:
                    failed[key] = "out of memory" if "memory" in str(error) else str(error).splitlines()[0][:60]
    times = {key: {r: s for r, s in t.items() if r} for key, t in times.items() if max(t) and key not in failed}
    plain = [key for key in times if key[0].startswith("plain")]
    out = []
    for key in wanted:
        row = {"batch": batch, "views": options.views, "convolutions": "standardised" if standardised else "plain",
               "row": key[0], "channels_last": key[1]}  # fmt: skip
        if key in times and plain:
            limit = times[min(plain, key=lambda p: statistics.median(times[p].values()))]
            median = statistics.median(times[key].values())
            row |= {"seconds": median, "views_per_second": batch * options.views / median,
                    "times_plain": statistics.median(t / limit[r] for r, t in times[key].items() if r in limit),
                    "all_seconds": [*times[key].values()]}  # fmt: skip
            if cuda:
                row |= {"peak_gib": memory[key], "memory_times_plain": memory[key] / min(memory[p] for p in plain)}
        else:
            row |= {"failed": failed.get(key, "not measured")}
        out.append(row)
    return out


def table(rows: list[dict]) -> str:
    heads = f"{'batch':>5} {'convs':<12} {'row':<26} {'layout':<13} {'seconds':>9} {'x plain':>8} {'views/s':>9}"
    lines = [f"{heads} {'GiB':>7} {'x plain':>8}"]
    for r in rows:
        layout = "channels_last" if r["channels_last"] else "contiguous"
        head = f"{r['batch']:>5} {r['convolutions']:<12} {r['row']:<26} {layout:<13}"
        if "failed" in r:
            lines.append(f"{head} {r['failed']}")
            continue
        text = f"{head} {r['seconds']:>9.4f} {r['times_plain']:>8.2f} {r['views_per_second']:>9.0f}"
        lines.append(text + (f" {r['peak_gib']:>7.2f} {r['memory_times_plain']:>8.2f}" if "peak_gib" in r else ""))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--batch", type=int, nargs="+", default=[8], help="private examples at a time")
    parser.add_argument("--views", type=int, default=16)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5, help="rounds, of which medians are taken")
    parser.add_argument(
        "--others-every", type=int, default=1, help="rounds between those of all but plain SGD and loop"
    )
    parser.add_argument("--inner", type=int, default=1, help="passes a round; the fastest counts")
    parser.add_argument("--autocast", action="store_true", help="bfloat16 forward and backward")
    parser.add_argument(
        "--convolutions", nargs="+", default=["standardised", "plain"], choices=["standardised", "plain"]
    )
    parser.add_argument("--only", nargs="+", help="rows whose name contains one of these words")
    parser.add_argument("--peers-up-to", type=int, default=10**9, help="leave out peers at larger batches")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which nothing new is started")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "network.json")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("device=cuda: there is no GPU that PyTorch can use here; run with --device cpu")
    torch.set_num_threads(options.threads)
    options.deadline = time.monotonic() + options.limit
    began, rows = time.time(), []
    for convolutions in options.convolutions:
        for batch in options.batch:
            rows += measure(batch, convolutions == "standardised", options)
    about = {
        "model": f"WRN-{options.depth}-{options.width}", "side": options.side, "repeats": options.repeats,
        "others_every": options.others_every,
        "autocast": "bfloat16" if options.autocast else "none (float32)",
        "device": torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.processor() or platform.machine()}",
        "threads": options.threads, "torch": torch.__version__, "python": platform.python_version(),
        "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
        "seconds_in_all": round(time.time() - began, 1),
    }  # fmt: skip
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    print(", ".join(f"{k}: {v}" for k, v in about.items()))
    print(table(rows))


if __name__ == "__main__":
    main()
