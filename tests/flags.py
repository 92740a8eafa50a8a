"""Every switch of PyTorch by which float32 products lose bits, as contexts that put back what was there."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch

from dpmix.core import precision

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KEYS = [("generic", "all")] + [(kind, op) for kind in ("cuda", "mkldnn") for op in ("all", "matmul", "conv")]


def state() -> dict[tuple[str, str], str]:
    return {key: torch._C._get_fp32_precision_getter(*key) for key in KEYS}


@contextmanager
def flag(switch: Callable[[], None]) -> Iterator[None]:
    before = state()
    try:
        switch()
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        for key, value in before.items():
            torch._C._set_fp32_precision_setter(*key, value)


def backend(kind: str, op: str, value: str) -> Callable[[], None]:
    return partial(torch._C._set_fp32_precision_setter, kind, op, value)


def allow_tf32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.mkldnn.allow_tf32 = True


@contextmanager
def reduced_reduction() -> Iterator[None]:
    """Sums of half precision products in half precision, and autocast so that there are such products."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = True
    try:
        with torch.autocast(DEVICE.type, torch.float16):
            yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction = before


FLAGS: dict[str, Callable[[], AbstractContextManager]] = {
    "none": lambda: flag(lambda: None),
    "matmul precision high": lambda: flag(partial(torch.set_float32_matmul_precision, "high")),
    "matmul precision medium": lambda: flag(partial(torch.set_float32_matmul_precision, "medium")),
    "allow_tf32": lambda: flag(allow_tf32),
    "every backend bf16": lambda: flag(backend("generic", "all", "bf16")),
    "mkldnn bf16": lambda: flag(backend("mkldnn", "all", "bf16")),
    "mkldnn.matmul bf16": lambda: flag(backend("mkldnn", "matmul", "bf16")),
    "cuda tf32": lambda: flag(backend("cuda", "all", "tf32")),
    "autocast bfloat16": lambda: torch.autocast(DEVICE.type, torch.bfloat16),
    "autocast float16": lambda: torch.autocast(DEVICE.type, torch.float16),
    "reduced-precision reduction": reduced_reduction,
}
ROUNDS = ["autocast bfloat16", "autocast float16"]  # on every machine; what the others do depends on it


def unguarded(monkeypatch):
    """No flag is switched off, and no autocast that is around."""
    real = torch.autocast
    kept = lambda kind, *dtype, enabled=True: real(kind, *dtype) if enabled else nullcontext()  # noqa: E731
    monkeypatch.setattr(precision, "full", lambda device: nullcontext())
    monkeypatch.setattr(torch, "autocast", kept)
