"""The guarantee on a GPU, or on the CPU where there is none: what one example can contribute, and what depends on its company.

    python benchmarks/gpu_checks.py [--smoke] [--json FILE]

1. The largest contribution in clip norms, heads and every engine of networks, under every switch by which PyTorch's
   products lose bits; WRN-16-4 too, in float32 and bfloat16. Allowed: 1 + 1e-5. "unguarded" is the control: the same
   products with the guard taken off.
2. One more example moves the sum of a padded batch by at most C: everybody's rounding is in it.
3. The padded last batch: the others' norms keep their bits however many examples there are. "run twice" is the same batch
   again, "without padding" what a kernel does to a batch of another size: these may change, and are no fault.
4. Features of an image keep their bits whatever stands beside it.
"""

import argparse
import json
import sys
import time
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HERE), str(HERE / "tests"), str(HERE / "tests" / "core")]

from flags import DEVICE, FLAGS  # noqa: E402
from test_precision import BOUND, largest_of_heads, largest_of_networks  # noqa: E402

from dpmix import models  # noqa: E402
from dpmix.core import precision  # noqa: E402
from dpmix.core.clipping import clipped_head_sums  # noqa: E402
from dpmix.core.clipping_network import Clipper  # noqa: E402
from dpmix.models.wide_resnet import wide_resnet  # noqa: E402
from dpmix.runs.passes import provenance  # noqa: E402

ENGINES = ("loop", "grouped", "vmap")
ENCODERS = {
    "tiny-vit": None,
    "tiny-convnext": None,
    "timm:tf_efficientnet_lite0": "random",
    "timm:vit_tiny_patch16_224": "random",
}
PER_FLAG = "contribution / C"


def draws(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def images_of(count: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    targets = draws(seed + 1, count, k, 10).mul(4).softmax(-1)
    return draws(seed, count, k, 3, 32, 32).to(DEVICE), targets.to(DEVICE)


def network(smoke: bool) -> nn.Module:
    return wide_resnet(*((10, 1) if smoke else (16, 4)), 10, seed=1).to(DEVICE)


def contributions(smoke: bool) -> dict[str, dict[str, float]]:
    """Flag -> what is clipped -> its largest contribution / C."""
    found: dict[str, dict[str, float]] = {}
    model = network(smoke)
    for name, switch in FLAGS.items():
        found[name] = row = {}
        with switch():
            row["heads"] = largest_of_heads()
            for engine in ENGINES:
                for cast in (None, torch.bfloat16):
                    label = engine + (" bfloat16" if cast else "")
                    row[label] = largest_of_networks(engine, autocast=cast)
                    row[f"WRN {label}"] = of_wide_resnet(model, engine, cast)
    return found


def of_wide_resnet(model: nn.Module, engine: str, cast: torch.dtype | None, clip: float = 1e-3) -> float:
    """Three examples one by one: the norm of what each leaves in the sum."""
    worst, clipper = 0.0, Clipper(model, clip, engine, autocast=cast, channels_last=DEVICE.type == "cuda")
    for seed in range(3):
        clipper.reset()
        norm = float(clipper.add(*images_of(1, 4, 10 * seed), pad_to=4)[0])
        if not norm > clip:
            raise RuntimeError(f"norm {norm}: must be clipped to mean anything")
        worst = max(worst, float(clipper.total.double().norm()) / clip)
    return worst


def unguarded() -> dict[str, float]:
    """The control: heads with the guard off."""
    found, real = {}, torch.autocast
    kept = lambda kind, *dtype, enabled=True: real(kind, *dtype) if enabled else nullcontext()  # noqa: E731
    for name, switch in FLAGS.items():
        with (
            mock.patch.object(precision, "full", lambda device: nullcontext()),
            mock.patch.object(torch, "autocast", kept),
            switch(),
        ):
            found[name] = largest_of_heads()
    return found


def moved(smoke: bool) -> dict[str, float]:
    """How far one example's joining moves the sum of a batch, in clip norms: everybody's rounding is in it."""
    model, most, found = network(smoke), 8 if smoke else 64, {}
    x, y = images_of(most, 4)
    for engine in ENGINES:
        for cast in (None, torch.bfloat16):
            sums = []
            for b in (most // 2, most // 2 + 1, most - 1, most):
                clipper = Clipper(model, 1e-1, engine, autocast=cast, channels_last=DEVICE.type == "cuda")
                clipper.add(x[:b], y[:b], pad_to=most)
                sums.append(clipper.total.double())
            far = max(float((sums[i + 1] - sums[i]).norm()) / 1e-1 for i in (0, 2))
            found[engine + (" bfloat16" if cast else "")] = far
    return found


def bits_beside_others(smoke: bool) -> dict[str, int]:
    """Of how many examples the norm is another number when there are fewer of them: none, with the last batch padded."""
    model, most, found = network(smoke), 8 if smoke else 64, {}
    x, y = images_of(most, 4)
    sizes = [b for b in (1, 2, 5, 17, 63) if b < most]
    for engine in ENGINES:
        for cast in (None, torch.bfloat16):
            clipper = Clipper(model, 0.1, engine, autocast=cast, channels_last=DEVICE.type == "cuda")
            label = engine + (" bfloat16" if cast else "")
            whole = clipper.add(x, y, pad_to=most)
            found[f"{label} run twice"] = int((clipper.add(x, y, pad_to=most) != whole).sum())
            found[label] = sum(int((clipper.add(x[:b], y[:b], pad_to=most) != whole[:b]).sum()) for b in sizes)
            found[f"{label} without padding"] = sum(int((clipper.add(x[:b], y[:b]) != whole[:b]).sum()) for b in sizes)
    one, classes, dim, k = torch.Generator().manual_seed(3), 10, 768, 16
    z, t = torch.randn(most, k, dim, generator=one).to(DEVICE), images_of(most, k)[1]
    w, b0 = torch.randn(4, classes, dim, generator=one).to(DEVICE), torch.zeros(4, classes, device=DEVICE)
    fixed = w, b0, torch.ones(4, device=DEVICE), torch.full((4, k), 1 / k, device=DEVICE)
    whole = clipped_head_sums(z, t, *fixed).norms
    found["heads"] = found["heads without padding"] = 0
    for b in sizes:
        blank = z.clone(), t.clone()
        blank[0][b:] = blank[1][b:] = 0
        found["heads"] += int((clipped_head_sums(*blank, *fixed, present=b).norms[:b] != whole[:b]).sum())
        found["heads without padding"] += int((clipped_head_sums(z[:b], t[:b], *fixed).norms != whole[:b]).sum())
    return found


def features_beside_others(smoke: bool) -> dict[str, dict[str, float]]:
    """Per encoder and type: of how many images the features are other numbers beside others, and by how much (relative)."""
    found: dict[str, dict[str, float]] = {}
    for name, weights in list(ENCODERS.items())[: 2 if smoke else None]:
        for dtype in (torch.float32, torch.bfloat16):
            encoder = models.encoder(name, weights).to(DEVICE, dtype)
            channels, count = encoder.channels[-1], 12 if smoke else 70
            images, others = (draws(s, count, channels, 32, 32).to(DEVICE) for s in (5, 6))
            whole, changed, off = encoder.features(images), 0, 0.0
            places = range(0, count, 3)
            for i in places:
                crowd = others.clone()
                crowd[i] = images[i]
                company = [(images[i : i + 1], 0), (crowd, i), (torch.cat([others, images[i : i + 1]]), count)]
                for batch, place in company:
                    got = encoder.features(batch)[place]
                    changed += not torch.equal(got, whole[i])
                    off = max(off, float((got - whole[i]).norm() / whole[i].norm()))
            asked = 3 * len(places)
            found[f"{name} {str(dtype)[6:]}"] = {"asked": asked, "other bits": changed, "largest relative": off}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small sizes, for a CPU")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "gpu_checks.json")
    asked = parser.parse_args()
    began, faults = time.time(), []
    out: dict = {
        "about": {"smoke": asked.smoke, "date": datetime.now(UTC).isoformat(timespec="seconds")},
        "bound": BOUND,
    }
    parts = {
        PER_FLAG: lambda: contributions(asked.smoke),
        "heads unguarded / C (control)": unguarded,
        "moved by a newcomer / C": lambda: moved(asked.smoke),
        "norms with other bits": lambda: bits_beside_others(asked.smoke),
        "features with other bits": lambda: features_beside_others(asked.smoke),
    }
    for name, part in parts.items():
        start = time.time()
        try:
            out[name] = part()
        except Exception as error:  # one part costs no other
            out[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
            faults.append(f"{name}: {out[name]['failed']}")
        print(f"{name} ({time.time() - start:.0f} s)", flush=True)
        for key, value in out[name].items():
            shown = f"at most {max(value.values()):.9f}" if name == PER_FLAG and isinstance(value, dict) else value
            print(f"  {key}: {shown}", flush=True)
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        out["about"] |= {"seconds": round(time.time() - began, 1)}
        asked.json.write_text(json.dumps(out, indent=1) + "\n")
    out["about"] |= provenance(DEVICE, "")
    rows = [v for row in out[PER_FLAG].values() if isinstance(row, dict) for v in row.values()]
    if not rows or max(rows) > BOUND:
        faults.append(f"largest contribution {max(rows, default=0)!r} C")
    newcomers = out["moved by a newcomer / C"].items()
    faults += [f"newcomer, {k}: {v} C" for k, v in newcomers if not (isinstance(v, float) and v <= BOUND)]
    bits = out["norms with other bits"].items()
    faults += [
        f"{k}: {v} norms with other bits"
        for k, v in bits
        if not isinstance(v, int) or (v and not k.endswith(("without padding", "run twice")))
    ]
    faults += [
        f"{k}: {v}" for k, v in out["features with other bits"].items() if not isinstance(v, dict) or v["other bits"]
    ]
    out["faults"] = faults
    asked.json.write_text(json.dumps(out, indent=1) + "\n")
    print(f"largest contribution: {max(rows, default=0):.9f} C; {len(faults)} faults\n" + "\n".join(faults))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
