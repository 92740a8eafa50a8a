"""Image files, decoded once into a memory-mapped uint8 cache.

An entry is `KEY.u8` (the pixels, `[n, C, H, W]`, nothing else) and `KEY.json` (shape and checksums). KEY is a hash of what
the data set is called, of the wanted shape and of the versions of torchvision and Pillow: public facts, so that names do not
tell who is in the data set. The record holds a hash of the names, sizes and times (of modification and of change) of the
files; where they differ, the entry is made anew. Delete the folder whenever you like.

Faults. The pixels are written to a temporary name, flushed and then renamed, the record after them: an entry without its
record does not count, so nothing half-written is ever read, whenever the process dies. The whole entry is compared with
its sha256 the first time that a process uses it (1 to 2 GB/s), which finds a truncated file and any flipped byte; a
damaged entry is named and decoded again. Processes that want to decode into the same folder take turns."""

import errno
import hashlib
import itertools
import json
import mmap
import os
import platform
import sys
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import PIL
import torch
from jaxtyping import UInt8
from joblib import cpu_count
from torch import Tensor
from tqdm import tqdm

from dpmix.core import files as whole_files
from dpmix.core.checks import counted, require
from dpmix.images import decoding

DEFAULT_SIZE = 224
FORMAT = 5  # of the decoding: another one makes other pixels of the same files
_RARE = 0.1  # images of another size or colour than this share of all are oddities, of which the owner is told
# Without it, Linux refuses a private map larger than the memory. Python names it from 3.13 on.
_KNOWN = 0x4000 if sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64") else 0
_NORESERVE = getattr(mmap, "MAP_NORESERVE", _KNOWN)
_VERIFIED: set[tuple[str, int, int]] = set()
_MAPS: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()  # by where they begin


Size = int | tuple[int, int] | None  # the side of a square, or (height, width)
Odd = dict[str, list[int]]  # places of images, by what is out of the ordinary with them


class Copies(NamedTuple):
    """Exact copies as pairs (copy, original) of places: training images like an earlier one, test images like a training one."""

    train: list[tuple[int, int]]
    test: list[tuple[int, int]]


class Decoded(NamedTuple):
    """Pixels of the files in their order, a sha256 over the files' bytes, what `duplicates` found, and the places of what
    is out of the ordinary: "turned", "transparent", "frames" (`decoding.pixels`), and where the files decide size and
    channels, "other size" and "not grey"."""

    images: UInt8[Tensor, "n C H W"]
    content: str
    copies: Copies
    odd: Odd


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
    require(not strays, "dataset", str(base), f"paths that leave it: {len(strays)}, such as {strays[:1]}; remove them")


def printable(name: str | Path) -> str:
    """A name that can be printed anywhere, in one line: bytes that are no UTF-8, and what is not to be seen, as \\x.."""
    text = os.fsencode(str(name)).decode("utf-8", "backslashreplace")
    unseen = ("Cc", "Cf", "Cs", "Cn", "Zl", "Zp")
    hidden = (c not in "\u200c\u200d" and unicodedata.category(c) in unseen for c in text)  # joiners belong to words
    return "".join(f"\\x{ord(c):02x}" if h else c for c, h in zip(text, hidden, strict=True))


def pixel_hash(image: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=12).hexdigest()


def decode(
    files: Sequence[Path],
    base: Path,
    *,
    cache: Path,
    label: str,
    train: int,
    size: Size = None,
    channels: int | None = None,
) -> Decoded:
    """The images of `files` (refused unless inside `base`), from the cache where it has them, else decoded in parallel.

    Args:
        size: side of the square, or (height, width). None keeps the size that all files share; where sizes differ it
            means 224. How an image of another size is fitted: `decoding.pixels`.
        channels: 1 or 3. None means 1 if every file is greyscale, else 3.
        train: how many of the files, the first ones, are training images (for the count of duplicates).

    Raises ValueError naming the files that cannot be decoded; then nothing is cached."""
    _inside(base, files)
    names, stats = [f.relative_to(base) for f in files], (f.stat() for f in files)
    states = [(f.as_posix(), s.st_size, s.st_mtime_ns, s.st_ctime_ns) for f, s in zip(names, stats, strict=True)]
    facts = [FORMAT, metadata.version("torchvision"), PIL.__version__, size, channels, label]
    entry = cache / _seal(facts)[:32]
    listing = _seal([train, states])
    if (found := _read(entry, listing)) is not None:
        return found
    try:
        with whole_files.lock(cache / ".lock"):
            if (found := _read(entry, listing, warn=False)) is not None:  # another process was faster
                return found
            for stale in (*cache.glob("*.u8.*.tmp"), *cache.glob(".*.json.*.tmp")):  # of processes that died
                stale.unlink()
            shape, odd = _chosen(files, size, channels)
            told = _write(entry, files, names, label, shape)
            for i, (_, _, done, _) in enumerate(told):
                for what in done:
                    odd.setdefault(what, []).append(i)
            record = {"listing": listing, "shape": (len(files), *shape), "odd": odd}
            record["copies"] = duplicates([pixels for _, pixels, *_ in told], train)
            record["pixels"] = sha256(entry.with_suffix(".u8"))
            record["content"] = hashlib.sha256("".join(content for content, *_ in told).encode()).hexdigest()
            whole_files.write_json(entry.with_suffix(".json"), record, private=True)
    except OSError as error:
        why = f"cannot be written ({error.strerror or error}); free space or name another folder"
        raise OSError(f"cache={str(cache)!r}: {why}") from error
    if (found := _read(entry, listing)) is None:
        raise OSError(f"cache={str(cache)!r}: what was just written there reads back differently; name another folder")
    return found


def _chosen(files: Sequence[Path], size: Size, channels: int | None) -> tuple[tuple[int, int, int], Odd]:
    """Channels, height and width, by the files where nothing else was asked for; and the places of the few that decided for
    all."""
    odd: Odd = {}
    looked_at = files if size is None or channels is None else []
    with decoding.bombs_refused(), ThreadPoolExecutor(cpu_count()) as pool:
        known = [(i, h) for i, h in enumerate(_each(pool, decoding.header, looked_at)) if h]
    if size is None:
        sizes = Counter((h.height, h.width) for _, h in known)
        size, most = sizes.most_common(1)[0] if sizes else (DEFAULT_SIZE, 0)
        if len(sizes) > 1 and most >= (1 - _RARE) * len(known):
            odd["other size"] = [i for i, h in known if (h.height, h.width) != size]
        size = size if len(sizes) == 1 else DEFAULT_SIZE
    if channels is None:
        coloured = [i for i, h in known if not h.grey]
        channels = 3 if coloured or not known else 1
        if 0 < len(coloured) <= _RARE * len(known):
            odd["not grey"] = coloured
    return (channels, *(size if isinstance(size, tuple) else (size, size))), odd


def _write(
    entry: Path, files: Sequence[Path], names: Sequence[Path], label: str, shape: tuple[int, int, int]
) -> list[tuple[str, str, list[str], str]]:
    """Decode everything into `entry`, without its record. Holds one image a thread in memory. Returns of each image its file's
    hash, its pixels' hash, what was done to it, and what went wrong."""
    partial = entry.with_name(f"{entry.name}.u8.{os.getpid()}.tmp")
    try:
        partial.touch(0o600)  # images that their owner keeps from others are kept from them here
        # The pool is left before the file: no thread may write to a file that is closed.
        # Threads, as Pillow decodes and resizes outside Python's lock: nothing to start, nothing to send.
        with partial.open("wb") as out, decoding.bombs_refused(), ThreadPoolExecutor(cpu_count()) as pool:
            channels, height, width = shape
            each = channels * height * width

            def one(i: int) -> tuple[str, str, list[str], str]:
                try:
                    data = files[i].read_bytes()
                    pixels, done = decoding.pixels(data, height, width, channels)
                    pixels = np.ascontiguousarray(pixels)
                except Exception as error:  # Pillow raises many kinds; all of them are reported below
                    return "", "", [], decoding.reason(error)
                # Not through a map: there a full disk kills the process.
                if os.pwrite(out.fileno(), pixels.data, i * each) != each:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return hashlib.sha256(data).hexdigest(), pixel_hash(pixels), done, ""

            decoded = _each(pool, one, range(len(files)))
            # Shares and times only: how many private images there are is nobody's business.
            bar = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"
            told = list(tqdm(decoded, f"decoding {label}", len(files), delay=1, mininterval=0.5, bar_format=bar))
            bad = [f"{printable(name)!r} ({why})" for name, (*_, why) in zip(names, told, strict=True) if why]
            listed = ", ".join(bad[:5]) + (", ..." if len(bad) > 5 else "")
            many = f"{len(bad):,} of {counted(len(files), 'image')} cannot be decoded: {listed}; repair or remove them"
            require(not bad, "dataset", label, many)
            out.flush()
            os.fsync(out.fileno())
        entry.with_suffix(".json").unlink(missing_ok=True)  # it may belong to the files before they changed
        partial.replace(entry.with_suffix(".u8"))
        return told
    finally:
        partial.unlink(missing_ok=True)


def _each(pool: ThreadPoolExecutor, work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """`work` of each item, in order, a few at a time on each thread."""
    parts = (items[first : first + 32] for first in range(0, len(items), 32))
    return itertools.chain.from_iterable(pool.map(lambda part: [work(item) for item in part], parts))


def _seal(body: object) -> str:
    return hashlib.sha256(json.dumps(body).encode()).hexdigest()


def mapped(path: Path, shape: Sequence[int]) -> UInt8[Tensor, "n ..."]:
    """The file as a tensor over a private map: read on demand, and writing to it never reaches the file."""
    flags = mmap.MAP_PRIVATE | _NORESERVE
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    content = torch.frombuffer(pages, dtype=torch.uint8).view(*shape)
    _MAPS[content.untyped_storage().data_ptr()] = pages
    return content


def forget(content: Tensor) -> None:
    """Give back the memory of what was looked at in a mapped file; it is read again where it is asked for again. What was
    written into the map is lost. Nothing happens to a tensor that is not mapped."""
    pages = _MAPS.get(content.untyped_storage().data_ptr())
    if pages is not None:
        pages.madvise(mmap.MADV_DONTNEED)


def sha256(path: Path) -> str:
    """That of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(entry: Path, listing: str, warn: bool = True) -> Decoded | None:
    """The entry if it is whole; None if it is absent, of files that have changed, or damaged (then with a warning)."""
    pixels, record = entry.with_suffix(".u8"), entry.with_suffix(".json")
    if not (pixels.is_file() and record.is_file()):
        return None
    body = whole_files.read_json(record)
    if body is None or body["listing"] != listing:
        return None
    shape, state = body["shape"], pixels.stat()
    seen, wrong = (str(pixels.resolve()), state.st_size, state.st_mtime_ns), ""
    if state.st_size != np.prod(shape):
        wrong = f"{state.st_size} bytes instead of {np.prod(shape)}"
    elif seen not in _VERIFIED and sha256(pixels) != body["pixels"]:
        wrong = "its sha256 differs from the record"
    if wrong:
        if warn:
            warnings.warn(f"{pixels}: damaged cache entry ({wrong}); decoding again", stacklevel=3)
        return None
    _VERIFIED.add(seen)
    copies = Copies(*([(copy, original) for copy, original in part] for part in body["copies"]))
    return Decoded(mapped(pixels, shape), body["content"], copies, body["odd"])
