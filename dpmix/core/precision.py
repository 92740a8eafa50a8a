"""Products at the precision of their dtype, whatever the process was told elsewhere.

A clip decided in float32 and applied by products of eight bits is no clip: where views nearly cancel, one example then
contributes several C. PyTorch rounds float32 products when `torch.set_float32_matmul_precision`, an `allow_tf32` or
`fp32_precision` of `torch.backends` or an enclosing `torch.autocast` says so. `full` switches all of them off for the few
products that decide or apply a clip, and puts them back.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch

_MATMULS = (("cuda", "matmul"), ("mkldnn", "matmul"))
_lock, _inside, _before = threading.Lock(), 0, [""]


@contextmanager
def full(device: torch.device) -> Iterator[None]:
    """Inside, float32 products on `device` keep float32's 24 bits and float64's are float64's. Autocast is a thread's own;
    the other flags are the process's, so that threads that are inside at once share them: the first switches them off, the
    last puts them back. Costs microseconds. Raises RuntimeError where products stay rounded all the same (by an environment
    variable of a library, say)."""
    global _inside
    with _lock:
        if not _inside:
            older, *flags = _before[:] = _flags()
            _set("highest" if older else "", ["ieee" if flag in ("tf32", "bf16") else flag for flag in flags])
        _inside += 1
    try:
        with torch.autocast(device.type, enabled=False):
            _look_at_products(device)
            yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _set(_before[0], _before[1:])


def _flags() -> list[str]:
    """The older flag, empty where it is at its default or cannot be read (the newer ones disagree with it), and the newer."""
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = ""
    return [older if older != "highest" else "", *(torch._C._get_fp32_precision_getter(*key) for key in _MATMULS)]


def _set(older: str, flags: list[str]) -> None:
    if older:
        torch.set_float32_matmul_precision(older)
    for key, flag in zip(_MATMULS, flags, strict=True):
        for value in ("none", flag):  # many a flag only passes on that of its backend
            if torch._C._get_fp32_precision_getter(*key) != flag:
                torch._C._set_fp32_precision_setter(*key, value)


def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether forward and backward gain from bfloat16: on a GPU, and on a CPU with instructions for it."""
    return device.type == "cuda" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


@lru_cache
def _look_at_products(device: torch.device) -> None:
    """Once a device: 1 + 2^-12 is lost by ten bits and more coarse formats, and must not be."""
    a = torch.full((64, 64), 1 + 2.0**-12, device=device)
    for product in (a @ a, (a[None] @ a[None])[0], (a[0] @ a)[None]):
        off = float((product.double() - 64 * (1 + 2.0**-12) ** 2).abs().max())
        if off > 1e-3:
            raise RuntimeError(
                f"device={str(device)!r}: float32 products are rounded to fewer bits by something outside PyTorch's "
                "flags, and no clip norm would hold; look for variables such as ONEDNN_DEFAULT_FPMATH_MODE"
            )
