"""Files that are whole or absent. Everything dpmix writes goes through here; nothing is ever unpickled.

A file is written under a temporary name beside its target, flushed to disk, and renamed. What is read back carries a
checksum. A crash at any moment leaves the old file or the new one, a checkpoint too.
"""

import contextlib
import errno
import hashlib
import hmac
import json
import os
import secrets
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor


def digest(*parts: str | bytes) -> str:
    """sha256, in hexadecimal, over the parts; their boundaries count. A file name may hold bytes that are no UTF-8."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()


_ELSEWHERE = "; choose a folder that can be written: of a release by `out`, of results by the variable DPMIX_STORE"
_REASONS = {
    errno.ENOSPC: "the disk is full; free some space and run again, what is stored is intact",
    errno.EDQUOT: "the disk quota is used up; free some space and run again, what is stored is intact",
    errno.EFBIG: "the file would be larger than is allowed; raise the limit and run again, what is stored is intact",
    errno.EROFS: "the file system is read-only" + _ELSEWHERE,
    errno.ENOENT: "there can be no such folder" + _ELSEWHERE,
    errno.EACCES: "no permission to write there" + _ELSEWHERE,
    errno.ENOLCK: "the file system has no locks" + _ELSEWHERE,
    errno.EPERM: "no permission to write there" + _ELSEWHERE,
}


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
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


UMASK = _umask()


def write(path: Path, data: bytes, *, private: bool = False) -> None:
    """Write `data` to `path`, atomically. `private`: only its owner reads it, and a folder that is made for it. OSError with
    one clear line if the disk is full or the folder cannot be written; what was there is then untouched."""
    path = Path(path)
    temporary = None
    try:
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700 if private else 0o777)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")  # 0600
            temporary = Path(name)
            with os.fdopen(handle, "wb") as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
            if not private:
                temporary.chmod(0o666 & ~UMASK)
            temporary.replace(path)
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def secret(folder: Path) -> bytes:
    """The key of a private folder, made once: names that others may see follow from it, and so tell nothing (`keyed`)."""
    path = Path(folder) / "key"
    if not path.exists():
        with lock(path.parent / "locks" / "key"):
            if not path.exists():
                write(path, secrets.token_bytes(32), private=True)
    return path.read_bytes()


def keyed(key: bytes, *parts: str) -> str:
    """The name of what these parts identify: 32 hexadecimal digits, HMAC-SHA256 under a folder's key."""
    return hmac.new(key, digest(*parts).encode(), "sha256").hexdigest()[:32]


def write_json(path: Path, content: dict, *, private: bool = False) -> None:
    """A JSON object with the checksum of its content beside it."""
    body = json.dumps(content, sort_keys=True, indent=1)
    whole = json.dumps({"sha256": digest(body), "content": content}, sort_keys=True, indent=1)
    write(path, whole.encode(), private=private)


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
    private: bool = False,
) -> None:
    """One safetensors file: tensors, what they belong to (`spec`), `meta`, and a sha256 over all of it. `spec` and `meta` are
    JSON-able. A checkpoint is `private`."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    about = json.dumps({"spec": spec, "meta": meta or {}}, sort_keys=True)
    data = safetensors.torch.save(tensors, {"about": about, "sha256": _checksum(tensors, about)})
    write(path, data, private=private)


def load_tensors(
    path: Path, spec: dict[str, Any] | None = None, *, name: str = "checkpoint"
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and meta of a file, or None if there is none. Nothing is unpickled. Raises `Damaged` (a ValueError) where it is
    not whole, ValueError naming the differences where it belongs to another `spec`. `name` is the argument that errors speak
    of."""
    said = f"{name}={str(path)!r}"
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        return None
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])["__metadata__"]
        tensors, about = safetensors.torch.load(data), json.loads(header["about"])
        wrong = "" if header["sha256"] == _checksum(tensors, header["about"]) else "its checksum does not match"
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        wrong = f"it cannot be read, {type(error).__name__}"
    if wrong:
        raise Damaged(f"{said}: damaged ({wrong}); remove it to start afresh, or fetch it again")
    differs = "" if spec is None else differences(about["spec"], json.loads(json.dumps(spec)))
    if differs:
        raise ValueError(f"{said}: belongs to another run ({differs}); give another path or remove it")
    return tensors, about["meta"]


def differences(made: dict[str, Any], wanted: dict[str, Any]) -> str:
    """`"clip_norm: 1.0 there, 0.5 here; ..."`, empty where the two agree."""
    keys = [k for k in sorted(made.keys() | wanted.keys()) if made.get(k) != wanted.get(k)]
    return "; ".join(f"{k}: {made.get(k)!r} there, {wanted.get(k)!r} here" for k in keys)


@contextlib.contextmanager
def lock(path: Path, busy: str = "") -> Iterator[None]:
    """Hold `path` as a lock between processes: a second holder waits or, with `busy`, is refused in these words (ValueError).
    Released by the system if the process dies."""
    path = Path(path)
    taken = filelock.FileLock(path, mode=0o600)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            taken.acquire(timeout=0 if busy else -1)
        except filelock.Timeout:
            raise ValueError(busy) from None
    try:
        yield
    finally:
        taken.release()
