"""Floor 0: checkpoints that survive a kill at any moment.

One safetensors file holds the tensors and, in its header, a JSON of everything else and a SHA-256 over both. A new file
is written beside the old one, flushed to the disk, and renamed; the one before is kept as NAME.previous. So at every
moment at least one whole checkpoint is on the disk, and a damaged one is recognised. Nothing is unpickled.
"""

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor


class Damaged(ValueError):
    """A checkpoint that is truncated or altered."""


def previous(path: Path) -> Path:
    """Where the checkpoint before the last one is kept."""
    return path.with_name(path.name + ".previous")


def save(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write `tensors` and the JSON-able `meta` to `path`; what was there becomes `previous(path)`."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    text = json.dumps(meta, sort_keys=True)
    header = {"meta": text, "sha256": _checksum(tensors, text)}
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".writing")
    with fresh.open("wb") as file:
        file.write(to_bytes(tensors, metadata=header))
        file.flush()
        os.fsync(file.fileno())
    if path.exists():
        path.replace(previous(path))
    fresh.replace(path)


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the meta of one file; raises `Damaged` unless the checksum holds."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise Damaged(f"checkpoint={str(path)!r}: cannot be read ({error})") from error
    if header.get("sha256") != _checksum(tensors, header.get("meta", "")):
        raise Damaged(f"checkpoint={str(path)!r}: its checksum does not hold")
    return tensors, json.loads(header["meta"])


def load_latest(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest whole checkpoint, or None where there is none.

    Warns when it had to take the previous one; raises ValueError where files exist and none of them is whole.
    """
    found = [p for p in (path, previous(path)) if p.exists()]
    reasons = []
    for candidate in found:
        try:
            loaded = load(candidate)
        except Damaged as damage:
            reasons.append(str(damage))
            continue
        if reasons:
            warnings.warn(f"{reasons[0]}; going on from the previous one", RuntimeWarning, stacklevel=2)
        return loaded
    if reasons:
        raise ValueError(f"{reasons[0]}, and there is no whole previous one; remove the file to start afresh")
    return None


def differences(made: dict[str, Any], wanted: dict[str, Any]) -> str:
    """`"clip_norm: 1.0 there, 0.5 here; ..."`, empty where the two agree."""
    keys = [k for k in sorted(made.keys() | wanted.keys()) if made.get(k) != wanted.get(k)]
    return "; ".join(f"{k}: {made.get(k)!r} there, {wanted.get(k)!r} here" for k in keys)


def _checksum(tensors: dict[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
