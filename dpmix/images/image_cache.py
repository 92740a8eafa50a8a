"""Image files, decoded once into a memory-mapped uint8 cache.

An entry is `KEY.u8` (the pixels, `[n, C, H, W]`, nothing else) and `KEY.json` (shape and checksums). KEY is a hash of
what the data set is called, of the wanted shape and of the versions of torchvision and Pillow: public facts, so that
names do not tell who is in the data set. The record holds a hash of the names, sizes and modification times of the
files; where they have changed, the entry is made anew. Delete the folder whenever you like.

Faults. The pixels are written to a temporary name, flushed and then renamed, the record after them: an entry without
its record does not count, so nothing half-written is ever read, whenever the process dies. The whole entry is compared
with its sha256 the first time that a process uses it (1 to 2 GB/s), which finds a truncated file and any flipped byte;
a damaged entry is named and decoded again. Processes that want to decode into the same folder take turns.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import mmap
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from dpmix.core.checks import require

DEFAULT_SIZE = 224
_FORMAT = 4
_BLOCK = 1 << 26
_GREY, _COLOUR = ("1", "L", "LA"), ("RGB", "RGBA", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB", "RGBX", "La", "RGBa")
# Without it, Linux refuses a private map larger than the memory. Python names it from 3.13 on.
_KNOWN = 0x4000 if sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64") else 0
_NORESERVE = getattr(mmap, "MAP_NORESERVE", _KNOWN)
_VERIFIED: set[tuple[str, int, int]] = set()


class Copies(NamedTuple):
    """Exact copies as pairs (copy, original) of places: training images that repeat an earlier one, and test images that
    equal a training image."""

    train: list[tuple[int, int]]
    test: list[tuple[int, int]]


class Decoded(NamedTuple):
    """Pixels of the files in their order, a sha256 over the files' bytes, and what `duplicates` found."""

    images: UInt8[Tensor, "n C H W"]
    content: str
    copies: Copies


def duplicates(hashes: Sequence[bytes | str], train: int) -> Copies:
    """Exact copies among the pixel hashes of `train` training images and the test images after them."""
    first: dict[bytes | str, int] = {}
    within: list[tuple[int, int]] = []
    across: list[tuple[int, int]] = []
    for i, h in enumerate(hashes):
        if h in first:
            (within if i < train else across).append((i, first[h]))
        elif i < train:
            first[h] = i
    return Copies(within, across)


def _inside(base: Path, files: Sequence[Path]) -> None:
    """Refuse files that lie outside `base`, by a link or by a name such as `../x`."""
    real = base.resolve()
    doubtful = [*{f.parent for f in files}, *(f for f in files if f.is_symlink())]
    strays = [str(f) for f in doubtful if not f.resolve().is_relative_to(real)]
    require(
        not strays, "dataset", str(base), f"{len(strays)} paths leave this folder, such as {strays[:1]}; remove them"
    )


def pixel_hash(image: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=12).hexdigest()


def decode(
    files: Sequence[Path],
    base: Path,
    *,
    cache: Path,
    label: str,
    train: int,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
) -> Decoded:
    """The images of `files` (refused unless inside `base`), from the cache where it has them, else decoded in parallel.

    Args:
        size: side of the square, or (height, width). None keeps the size that all files share; where sizes differ it
            means 224. An image of another size is resized (bicubic, until it covers the wanted size), then cropped at
            its centre.
        channels: 1 or 3. None means 1 if every file is greyscale, else 3. Transparency is dropped.
        train: how many of the files, the first ones, are training images (for the count of duplicates).

    Raises ValueError naming the files that cannot be decoded; then nothing is cached. EXIF rotation is ignored, as in
    torchvision.
    """
    _inside(base, files)
    names = [f.relative_to(base).as_posix() for f in files]
    stats = [f.stat() for f in files]
    facts = [_FORMAT, metadata.version("torchvision"), PIL.__version__, size, channels, label]
    entry = cache / _seal(facts)[:32]
    listing = _seal([train, [(n, s.st_size, s.st_mtime_ns) for n, s in zip(names, stats, strict=True)]])
    if (found := _read(entry, listing)) is not None:
        return found
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _turn(cache) as alone:
            if alone and (found := _read(entry, listing, warn=False)) is not None:  # another process was faster
                return found
            if alone:  # so these belong to processes that died
                for stale in (*cache.glob("*.u8.*.tmp"), *cache.glob("*.json.*.tmp")):
                    stale.unlink()
            _write(entry, listing, files, names, label, train, size, channels)
    except OSError as error:
        why = f"cannot be written ({error.strerror or error}); free space or name another folder"
        raise OSError(f"cache={str(cache)!r}: {why}") from error
    if (found := _read(entry, listing)) is None:
        raise OSError(f"cache={str(cache)!r}: what was just written there reads back differently; name another folder")
    return found


def _header(path: Path) -> tuple[int, int, str] | None:
    """(width, height, mode), None where the decoding pass will find out what is wrong."""
    try:
        with Image.open(path) as image:
            return *image.size, image.mode
    except Exception:
        return None


def _pixels(data: bytes, height: int, width: int, channels: int) -> np.ndarray:
    """One file's bytes as uint8 `[channels, height, width]`."""
    with Image.open(BytesIO(data)) as opened:
        require(opened.mode in _GREY + _COLOUR, "mode", opened.mode, "not 8 bits a channel")
        image = opened.convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        from torchvision.transforms import InterpolationMode  # two seconds, and not everyone needs it
        from torchvision.transforms import functional as F

        w, h = image.size
        cover = (height, int(height * w / h)) if height * w >= width * h else (int(width * h / w), width)
        image = F.center_crop(F.resize(image, list(cover), InterpolationMode.BICUBIC), [height, width])
    return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)


def _write(
    entry: Path,
    listing: str,
    files: Sequence[Path],
    names: Sequence[str],
    label: str,
    train: int,
    size: int | tuple[int, int] | None,
    channels: int | None,
) -> None:
    """Decode everything into `entry`. Holds one image a thread in memory."""
    partial = entry.with_name(f"{entry.name}.u8.{os.getpid()}.tmp")
    try:
        # The pool is left before the file: no thread may write to a file that is closed.
        with partial.open("wb") as out, _pool() as pool:
            if size is None or channels is None:
                headers = [h for h in _each(pool, lambda i: _header(files[i]), len(files)) if h]
                sizes = {(h, w) for w, h, _ in headers}
                size = size or (sizes.pop() if len(sizes) == 1 else DEFAULT_SIZE)
                channels = channels or (1 if headers and all(mode in _GREY for *_, mode in headers) else 3)
            height, width = size if isinstance(size, tuple) else (size, size)
            shape = (len(files), channels, height, width)
            each = channels * height * width

            def one(i: int) -> tuple[str, str, str]:
                """Write image i. Returns its file's hash, its pixels' hash, what went wrong."""
                try:
                    data = files[i].read_bytes()
                    pixels = np.ascontiguousarray(_pixels(data, height, width, channels))
                except UnidentifiedImageError:
                    return "", "", "not an image"
                except Exception as error:  # Pillow raises many kinds; all of them are reported below
                    return "", "", str(error) or type(error).__name__
                # Not through a map: there a full disk kills the process.
                if os.pwrite(out.fileno(), pixels.data, i * each) != each:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return hashlib.sha256(data).hexdigest(), pixel_hash(pixels), ""

            decoded = _each(pool, one, len(files))
            # Shares and times only: how many private images there are is nobody's business.
            bar = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"
            done = list(tqdm(decoded, f"decoding {label}", len(files), delay=1, mininterval=0.5, bar_format=bar))
            bad = [f"{name!r} ({why[:80]})" for name, (*_, why) in zip(names, done, strict=True) if why]
            listed = ", ".join(bad[:5]) + (", ..." if len(bad) > 5 else "")
            many = f"{len(bad)} of {len(files)} images cannot be decoded: {listed}; repair or remove them"
            require(not bad, "dataset", label, many)
            out.flush()
            os.fsync(out.fileno())
        entry.with_suffix(".json").unlink(missing_ok=True)  # it may belong to the files before they changed
        partial.replace(entry.with_suffix(".u8"))
    finally:
        partial.unlink(missing_ok=True)
    body = {
        "listing": listing,
        "shape": shape,
        "pixels": _checksum(_map(entry.with_suffix(".u8"), shape)),
        "content": hashlib.sha256("".join(h for h, *_ in done).encode()).hexdigest(),
        "copies": duplicates([h for _, h, _ in done], train),
    }
    record = entry.with_name(f"{entry.name}.json.{os.getpid()}.tmp")
    record.write_text(json.dumps({"body": body, "sha256": _seal(body)}))
    record.replace(entry.with_suffix(".json"))


def _pool() -> ThreadPoolExecutor:
    """Threads, as Pillow decodes and resizes outside Python's lock: nothing to start, nothing to send."""
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())


def _each(pool: ThreadPoolExecutor, work: Callable[[int], Any], n: int, step: int = 32) -> Iterator[Any]:
    """`work(0)` to `work(n - 1)`, in order, a few at a time on each thread."""
    for some in pool.map(lambda first: [work(i) for i in range(first, min(first + step, n))], range(0, n, step)):
        yield from some


def _seal(body: object) -> str:
    return hashlib.sha256(json.dumps(body).encode()).hexdigest()


def _map(path: Path, shape: Sequence[int]) -> UInt8[Tensor, "n C H W"]:
    """The file as a tensor over a private map: read on demand, and writing to it never reaches the file."""
    flags = mmap.MAP_PRIVATE | _NORESERVE
    with path.open("rb") as file:
        return torch.frombuffer(
            mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE), dtype=torch.uint8
        ).view(*shape)


def _checksum(images: Tensor) -> str:
    """sha256 over the sha256 of each block of 64 MB, so that blocks can be hashed in parallel."""
    flat = images.view(-1).numpy()
    with _pool() as pool:
        blocks = pool.map(lambda i: hashlib.sha256(flat[i : i + _BLOCK].data).hexdigest(), range(0, len(flat), _BLOCK))
        return hashlib.sha256("".join(blocks).encode()).hexdigest()


def _read(entry: Path, listing: str, warn: bool = True) -> Decoded | None:
    """The entry if it is whole; None if it is absent, of files that have changed, or damaged (then with a warning)."""
    pixels, record = entry.with_suffix(".u8"), entry.with_suffix(".json")
    if not (pixels.is_file() and record.is_file()):
        return None
    try:
        stored = json.loads(record.read_text())
        body = stored["body"]
        require(stored["sha256"] == _seal(body), "sha256", stored["sha256"], "differs")
    except (ValueError, KeyError, TypeError):
        return _damaged(record, "not a whole record", warn)
    if body["listing"] != listing:
        return None
    shape, state = body["shape"], pixels.stat()
    if state.st_size != np.prod(shape):
        return _damaged(pixels, f"{state.st_size} bytes instead of {np.prod(shape)}", warn)
    images = _map(pixels, shape)
    seen = (str(pixels.resolve()), state.st_size, state.st_mtime_ns)
    if seen not in _VERIFIED:
        if _checksum(images) != body["pixels"]:
            return _damaged(pixels, "its sha256 differs from the record", warn)
        _VERIFIED.add(seen)
    copies = Copies(*([(copy, original) for copy, original in part] for part in body["copies"]))
    return Decoded(images, body["content"], copies)


def _damaged(path: Path, why: str, warn: bool) -> Decoded | None:
    if warn:
        warnings.warn(f"{path}: damaged cache entry ({why}); decoding again", stacklevel=4)
    return None


@contextlib.contextmanager
def _turn(cache: Path) -> Iterator[bool]:
    """Wait for this process's turn to write into the folder; the system ends the turn of a process that dies.

    Yields False on file systems without locks: then two processes may decode the same images, each to its own name.
    """
    handle = os.open(cache, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        except BlockingIOError:
            warnings.warn(f"{cache}: another process is decoding images; waiting for it", stacklevel=4)
            fcntl.flock(handle, fcntl.LOCK_EX)
            alone = True
        except OSError:
            alone = False
        yield alone
    finally:
        os.close(handle)
