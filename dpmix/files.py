"""Floor 0: files that are whole or absent. Everything dpmix writes goes through here; nothing is ever unpickled.

A file is written under a temporary name beside its target, flushed to disk, and renamed. What is read back carries a
checksum. A crash at any moment leaves the old file or the new one.
"""

import contextlib
import errno
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
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
            temporary.chmod(0o644)
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


def _previous(path: Path) -> Path:
    return path.with_name(path.name + ".previous")


def _checksum(tensors: dict[str, Tensor], about: str) -> str:
    return digest(about, *(safetensors.torch.save({k: v}) for k, v in sorted(tensors.items())))


def save_tensors(path: Path, tensors: dict[str, Tensor], identity: str, meta: dict | None = None) -> None:
    """A checkpoint: tensors, what they belong to (`identity`) and `meta` (JSON). The file before it is kept as `.previous`."""
    path = Path(path)
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    about = json.dumps({"identity": identity, "meta": meta or {}}, sort_keys=True)
    data = safetensors.torch.save(tensors, {"about": about, "sha256": _checksum(tensors, about)})
    write(path, data, previous=_previous(path))


def load_tensors(path: Path, identity: str) -> tuple[dict[str, Tensor], dict] | None:
    """Tensors and meta of a checkpoint, or None if there is none.

    A damaged file is named in a warning and the previous one is used. A checkpoint of another run raises ValueError.
    """
    for candidate in (Path(path), _previous(Path(path))):
        try:
            data = candidate.read_bytes()
            length = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + length])["__metadata__"]
            tensors = safetensors.torch.load(data)
            if header["sha256"] != _checksum(tensors, header["about"]):
                raise ValueError("checksum")
            about = json.loads(header["about"])
        except FileNotFoundError:
            continue
        except (SafetensorError, ValueError, KeyError, TypeError) as err:
            warnings.warn(
                f"{candidate}: damaged ({type(err).__name__}); the checkpoint before it is used", stacklevel=2
            )
            continue
        if about["identity"] != identity:
            raise ValueError(
                f"checkpoint={str(candidate)!r}: belongs to another run ({about['identity'][:60]} instead of "
                f"{identity[:60]}); give another path or remove it"
            )
        return tensors, about["meta"]
    return None


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint and the one before it."""
    Path(path).unlink(missing_ok=True)
    _previous(Path(path)).unlink(missing_ok=True)


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
