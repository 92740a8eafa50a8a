"""Files that are whole or absent. Everything dpmix writes goes through here; nothing is ever unpickled.

A file is written under a temporary name beside its target, flushed to disk, and renamed. What is read back carries a
checksum. A crash at any moment leaves the old file or the new one.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor


def digest(*parts: str | bytes) -> str:
    """sha256, in hexadecimal, over the parts; their boundaries count."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()


_ELSEWHERE = "; choose a folder that can be written, for results by the environment variable DPMIX_STORE"
_REASONS = {
    errno.ENOSPC: "the disk is full; free some space and run again, what is stored is intact",
    errno.EDQUOT: "the disk quota is used up; free some space and run again, what is stored is intact",
    errno.EFBIG: "the file would be larger than is allowed; raise the limit and run again, what is stored is intact",
    errno.EROFS: "the file system is read-only" + _ELSEWHERE,
    errno.EACCES: "no permission to write there" + _ELSEWHERE,
    errno.EPERM: "no permission to write there" + _ELSEWHERE,
}


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write into one line that says what to do."""
    try:
        yield
    except OSError as err:
        if err.errno in _REASONS:
            raise OSError(err.errno, f"cannot write {path}: {_REASONS[err.errno]}") from err
        raise


def _umask() -> int:
    mask = os.umask(0o077)  # can only be read by setting it
    os.umask(mask)
    return mask


_UMASK = _umask()  # records of runs hold seeds: who keeps others out of new files keeps them out of these


def write(path: Path, data: bytes, *, previous: Path | None = None) -> None:
    """Write `data` to `path`, atomically; what was there is kept as `previous`, if that is given.

    OSError with one clear line if the disk is full or the folder cannot be written; what was there is then untouched.
    """
    path = Path(path)
    temporary = None
    try:
        with _explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
            temporary = Path(name)
            with os.fdopen(handle, "wb") as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
            temporary.chmod(0o666 & ~_UMASK)
            if previous is not None:
                with contextlib.suppress(FileNotFoundError):  # absent, or another process has just moved it
                    path.replace(previous)
            temporary.replace(path)
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    """A JSON object with the checksum of its content beside it."""
    body = json.dumps(content, sort_keys=True, indent=1)
    write(path, json.dumps({"sha256": digest(body), "content": content}, sort_keys=True, indent=1).encode())


def read_json(path: Path) -> dict | None:
    """The content of a file of `write_json`; None if there is none, or (with a warning that names it) if it is damaged."""
    try:
        found = json.loads(Path(path).read_bytes())
        if found["sha256"] == digest(json.dumps(found["content"], sort_keys=True, indent=1)):
            return found["content"]
        reason = "its checksum does not match"
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as err:
        reason = f"it cannot be read ({type(err).__name__})"
    warnings.warn(f"{path}: {reason}; it is left out and made anew", stacklevel=2)
    return None


class Damaged(ValueError):
    """A file of tensors that is truncated, altered, or none of ours."""


def _previous(path: Path) -> Path:
    return path.with_name(path.name + ".previous")


def _checksum(tensors: dict[str, Tensor], about: str) -> str:
    parts: list[str | bytes] = [about]
    for name, t in sorted(tensors.items()):
        parts += [f"{name} {t.dtype} {tuple(t.shape)}", t.reshape(-1).view(torch.uint8).numpy().tobytes()]
    return digest(*parts)


def save_tensors(
    path: Path,
    tensors: dict[str, Tensor],
    spec: dict[str, Any],
    meta: dict[str, Any] | None = None,
    *,
    keep: bool = False,
) -> None:
    """One safetensors file: tensors, what they belong to (`spec`), `meta`, and a sha256 over all of it.

    `spec` and `meta` are JSON-able. With `keep`, as for checkpoints, the file before it stays as NAME.previous, if it is
    whole: at every moment a whole one is on the disk.
    """
    path = Path(path)
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    about = json.dumps({"spec": spec, "meta": meta or {}}, sort_keys=True)
    data = safetensors.torch.save(tensors, {"about": about, "sha256": _checksum(tensors, about)})
    if keep:
        try:
            _read(path)
        except (FileNotFoundError, Damaged):
            keep = False
    write(path, data, previous=_previous(path) if keep else None)


def load_tensors(
    path: Path, spec: dict[str, Any] | None = None, *, name: str = "checkpoint"
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and meta of the newest whole file, or None if there is none. Nothing is unpickled.

    A damaged file is named in a warning and the one before it is used. Raises `Damaged` (a ValueError) where there are
    files and none is whole, ValueError naming the differences where they belong to another `spec`. `name` is the
    argument that errors speak of.
    """
    reasons = []
    for candidate in (Path(path), _previous(Path(path))):
        try:
            tensors, about = _read(candidate)
        except FileNotFoundError:
            continue
        except Damaged as damage:
            reasons.append(f"{name}={str(candidate)!r}: damaged ({damage})")
            continue
        if reasons:
            warnings.warn(f"{reasons[0]}; going on from the one before it", stacklevel=2)
        differs = "" if spec is None else differences(about["spec"], json.loads(json.dumps(spec)))
        if differs:
            said = f"belongs to another run ({differs}); give another path or remove it"
            raise ValueError(f"{name}={str(candidate)!r}: {said}")
        return tensors, about["meta"]
    if reasons:
        raise Damaged(f"{reasons[0]}, and there is no whole one before it; remove it to start afresh")
    return None


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of one file; raises `Damaged` with the reason unless its checksum holds."""
    data = Path(path).read_bytes()
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])["__metadata__"]
        tensors, about = safetensors.torch.load(data), header["about"]
        if header["sha256"] == _checksum(tensors, about):
            return tensors, json.loads(about)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"it cannot be read, {type(error).__name__}") from error
    raise Damaged("its checksum does not match")


def differences(made: dict[str, Any], wanted: dict[str, Any]) -> str:
    """`"clip_norm: 1.0 there, 0.5 here; ..."`, empty where the two agree."""
    keys = [k for k in sorted(made.keys() | wanted.keys()) if made.get(k) != wanted.get(k)]
    return "; ".join(f"{k}: {made.get(k)!r} there, {wanted.get(k)!r} here" for k in keys)


def set_aside_checkpoint(path: Path, **wanted: Any) -> None:
    """Set a checkpoint aside, and the one before it, if one of them is of a spec that holds other values than `wanted`."""
    places = _previous(Path(path)), Path(path)
    for place in places:
        with contextlib.suppress(FileNotFoundError, Damaged):
            made = _read(place)[1]["spec"]
            if any(made.get(name) != value for name, value in wanted.items()):
                return set_aside(*places)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint and the one before it."""
    Path(path).unlink(missing_ok=True)
    _previous(Path(path)).unlink(missing_ok=True)


def set_aside(*paths: Path) -> None:
    """Rename files that belong together, STEM.* to STEM-1.* or the first number that is free. The last one counts: a
    renaming that was cut off before it goes on."""

    def place(path: Path, number: int) -> Path:
        stem, dot, rest = path.name.partition(".")
        return path.with_name(f"{stem}-{number}{dot}{rest}")

    number = next(n for n in itertools.count(1) if not place(paths[-1], n).exists())
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            path.replace(place(path, number))


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold `path` as a lock between processes: a second holder waits. Released by the system if the process dies."""
    import fcntl

    path = Path(path)
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("w")
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)
