"""Views that are drawn once, encoded once and kept on disk: a `Source` that a run reads instead of encoding.

A store is a folder of blocks, one for each part of a union of views (base, public, mixtures of a pool), so that a longer
list of recipes encodes only what is missing. A row of a block is an example: its views' features in float16, then their
targets, of which at most two classes are not zero. float16 has eight times the precision of bfloat16; features beyond its
range are cut to it. A chunk of rows that is whole has its checksum in the journal beside the block, so that after a crash
only what was under way is encoded again. A store comes from private data without noise: nobody else may read it."""

import copy
import hashlib
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dpmix.core import augmentations, checks, files, rng, transforms, views
from dpmix.core.sources import FreshViews, lap, scaled
from dpmix.images import image_cache
from dpmix.models import encoders, engine, tiny
from dpmix.models.encoders import Encoder

CHUNK = 64  # rows a line of a journal
AT_A_TIME = 2**25  # bytes of views, at most, that are made while the engine is at work on as many
TARGET = np.dtype([("place", np.int32, 2), ("value", np.float32, 2)])


class Block:
    """`count` views of a part: a file of n rows and its journal. `columns` are the places in the union of those that are
    wanted, `missing` the chunks to be encoded: every chunk of the journal is compared with its checksum. A warning tells of
    damaged ones, without a name below the folder of all stores: those follow from the images."""

    def __init__(self, path: Path, columns: slice, count: int, n: int, dim: int) -> None:
        self.path, self.journal, self.columns, self.count = path, path.with_suffix(".chunks"), columns, count
        self.row = np.dtype([("features", np.float16, (count, dim)), ("targets", TARGET, (count,))])
        self.size, self.missing = n * self.row.itemsize, set(range(-(-n // CHUNK)))
        self.rows: Any = None
        if path.is_file() and path.stat().st_size == self.size and self.journal.is_file():
            self.map()
            lines = re.findall(rb"^([0-9]{1,12}) ([0-9a-f]{64})$", self.journal.read_bytes(), re.MULTILINE)
            recorded = {int(chunk): wanted.decode() for chunk, wanted in lines}
            damaged = sorted(chunk for chunk, wanted in recorded.items() if self._checksum(chunk) != wanted)
            self.missing -= recorded.keys() - set(damaged)
            if damaged:
                said = f"damaged, encoded again: {checks.counted(len(damaged), 'chunk')} of {CHUNK}, the first {damaged[0]}"
                warnings.warn(f"{path.parents[1]}: {said}", stacklevel=2)

    def map(self) -> None:
        """Map the file; its rows are read where they lie."""
        self._content = image_cache.mapped(self.path, (self.size,))
        self.rows = self._content.numpy().view(self.row)

    def forget(self) -> None:
        """Give back the memory of the rows that were read."""
        image_cache.forget(self._content)

    def _checksum(self, chunk: int) -> str:
        found = hashlib.sha256(self.rows[chunk * CHUNK : (chunk + 1) * CHUNK]).hexdigest()
        self.forget()
        return found

    def allocate(self) -> None:
        """Take the room on the disk, so that it cannot run out later; nobody else may read the file."""
        with files.explained(self.path):
            for path in (self.journal, self.path):
                path.unlink(missing_ok=True)
                path.touch(0o600)
            with self.path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, self.size)


class StoredViews:
    """The views of `FreshViews(redraw=False)` of these examples (`how`: as there), read from a store in `folder`; what is not
    there is encoded first. `batch` reads the rows that it is asked for; `subset` is the same store for some of the examples.

    The store is named, through a key of `folder`, by all that decides the features: the content of encoder and images, ids,
    seed, precision, the code that makes and encodes views; a block also by its part and, where they have a part in it, by the
    public images. Raises ValueError on bad input and OSError with the numbers where the disk is too small, before anything
    is encoded."""

    def __init__(
        self,
        encoder: Encoder,
        images: Any,
        labels: Tensor,
        recipes: Sequence[views.Recipe],
        *,
        folder: Path | str,
        seed: int = 0,
        progress: bool = True,
        **how: Any,
    ) -> None:
        made = FreshViews(encoder, images, labels, recipes, redraw=False, seed=seed, **how)
        said = "has no digest of its content; take models.encoder"
        checks.require(encoder.digest != "", "encoder", encoder.name, said)
        self.n, self.dim, self.num_classes, self.union = made.n, made.dim, made.num_classes, made.union
        self.device, self.scaling, self.name, self.progress = made.device, made.scaling, made.name, progress
        self.seconds = made.seconds | {"store": 0.0}
        self.places: Tensor | None = None
        about = _about(made, encoder)
        # Errors may name a folder, and a plain digest of the images would tell whoever guesses them that they are these.
        self.folder = Path(folder) / files.keyed(files.secret(Path(folder)), repr(about))
        with files.lock(self.folder / "lock"):  # which makes the folder, for one's own eyes
            other = files.differences(files.read_json(self.folder / "store.json") or about, about)
            said = f"holds other views ({other}); remove them: rm -r {folder}"
            checks.require(not other, "store", str(folder), said)
            files.write_json(self.folder / "store.json", about, private=True)
            public = made.public
            self.blocks = list(self._find_blocks("" if public is None else _content(public.images, public.labels)))
            tick = time.perf_counter()
            if todo := sorted(set().union(*(block.missing for block in self.blocks))):
                self._make_room()
                self._encode(made, todo)
                lap(self.seconds, "encoder", tick)
                for block in self.blocks:
                    block.map()

    def _find_blocks(self, public: str) -> Iterator[Block]:
        """The blocks that hold the union: of those that are there the widest whole ones, and new ones."""
        column = 0
        for key, count in self.union.parts.items():
            mixed = key[0] == "public" or (key[0] == "mix" and key[3] > 0)
            stem, start = files.digest(repr(key), public if mixed else "")[:24], 0
            while start < count:
                ends = (p.stem.rpartition("-")[2] for p in self.folder.glob(f"{stem}-{start}-*.views"))
                there = {int(end) for end in ends if re.fullmatch("[0-9]{1,9}", end)}
                for stop in [*sorted(there, reverse=True), count]:
                    columns = slice(column + start, column + min(stop, count))
                    path = self.folder / f"{stem}-{start}-{stop}.views"
                    block = Block(path, columns, stop - start, self.n, self.dim)
                    if stop <= count or not block.missing:
                        break
                yield block
                start = stop
            column += count

    def _make_room(self) -> None:
        """Say what will be on the disk, and take it; refuse where it does not fit."""
        new = [block for block in self.blocks if block.rows is None]
        needed, free = sum(block.size for block in new), shutil.disk_usage(self.folder).free
        views = checks.counted(self.union.views, "view")
        what = f"{checks.counted(self.n, 'example')} x {views} of {checks.counted(self.dim, 'feature')}"
        if needed > free:
            sizes = f"need {needed / 1e9:.3g} GB more and {free / 1e9:.3g} GB are free"
            remedy = "free some space or choose another folder"
            raise OSError(f"cache={str(self.folder.parent)!r}: {what} {sizes}; {remedy}")
        if self.progress:
            total = sum(block.size for block in self.blocks) / 1e9
            where = self.folder.parent  # its own name is a digest of the images, and others may see a log
            tqdm.write(f"{what}: {total:.3g} GB in {where}, for your eyes only; remove with rm -r {where}")
        for block in new:
            block.allocate()

    def _encode(self, made: FreshViews, todo: list[int]) -> None:
        """Make the views of what comes next, while the engine is at work on what came before."""
        each = self.union.views * made.images[0].numel() * 4
        step = 1 << max(1, min(CHUNK, AT_A_TIME // each)).bit_length() - 1  # parts of one size
        said = f"encoding (views: {self.union.views})"
        bar = tqdm(total=len(todo) * CHUNK, desc=said, disable=not self.progress)
        with ThreadPoolExecutor(1) as engine_thread, bar:
            before: Future | None = None
            for chunk in todo:
                blocks = [(block, hashlib.sha256()) for block in self.blocks if chunk in block.missing]
                for rows in torch.arange(chunk * CHUNK, min((chunk + 1) * CHUNK, self.n)).split(step):
                    drawn = made.made(rows, 0)
                    if before is not None:
                        before.result()
                    before = engine_thread.submit(self._write, made.encoder, rows, drawn, blocks)
                    bar.update(len(rows))
            if before is not None:
                before.result()

    def _write(self, encoder: Any, rows: Tensor, made: views.Views, blocks: list[tuple[Block, Any]]) -> None:
        """Encode views of examples, and write them as rows of the blocks, each with a checksum of its chunk so far; with the
        last rows of a chunk, its line in the journals."""
        columns = torch.cat([torch.arange(self.union.views)[block.columns] for block, _ in blocks])
        images = made.images if len(columns) == self.union.views else made.images[:, columns]
        features = encoder.features(images.flatten(0, 1)).float().clamp(-65504, 65504).half()
        features = features.reshape(len(rows), -1, self.dim).split([block.count for block, _ in blocks], 1)
        targets, last = _packed(made.targets.cpu()), int(rows[-1]) + 1
        for (block, checksum), part in zip(blocks, features, strict=True):
            content = np.empty(len(rows), block.row)
            content["features"], content["targets"] = part.cpu().numpy(), targets[:, block.columns]
            checksum.update(content)
            with block.path.open("r+b") as file:
                file.seek(int(rows[0]) * block.row.itemsize)
                file.write(content.tobytes())
            if last % CHUNK == 0 or last == self.n:
                with block.journal.open("a") as journal:
                    journal.write(f"{(last - 1) // CHUNK} {checksum.hexdigest()}\n")

    def subset(self, places: Tensor) -> "StoredViews":
        """The examples at these places, in this order; nothing is copied."""
        part = copy.copy(self)
        part.places = places if self.places is None else self.places[places]
        part.n, part.seconds = len(places), dict(self.seconds)
        return part

    def batch(self, places: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """`Source.batch`, the same at every step."""
        tick = time.perf_counter()
        rows = (places if self.places is None else self.places[places]).numpy()
        features = torch.empty(len(rows), self.union.views, self.dim, device=self.device)
        targets = torch.zeros(len(rows), self.union.views, self.num_classes, device=self.device)
        together = len(rows) > 0 and (np.diff(rows) == 1).all()
        for block in self.blocks:
            picked = block.rows[rows[0] : rows[-1] + 1] if together else block.rows[rows]
            used = block.columns.stop - block.columns.start
            features[:, block.columns] = torch.from_numpy(picked["features"][:, :used]).to(self.device)
            packed = picked["targets"][:, :used]
            classes, shares = packed["place"].astype(np.int64), packed["value"].copy()
            at, values = (torch.from_numpy(a).to(self.device) for a in (classes, shares))
            targets[:, block.columns].scatter_add_(2, at, values)
            block.forget()
        lap(self.seconds, "store", tick)
        return scaled(features, self.scaling), targets


def _packed(targets: Tensor) -> np.ndarray:
    """Targets [b, k, num_classes] as the two classes of each view and their shares: `TARGET` [b, k]."""
    values, places = targets.topk(min(2, targets.shape[2]))
    packed = np.zeros(targets.shape[:2], TARGET)
    packed["value"][..., : values.shape[2]], packed["place"][..., : places.shape[2]] = values.numpy(), places.numpy()
    rest = float((targets.sum(2) - values.sum(2)).abs().max()) if targets.numel() else 0.0
    checks.require(rest < 1e-6, "targets", rest, "of a view must lie on two classes at most to be stored")
    return packed


def _content(*tensors: Any) -> str:
    """A digest of tensors, or of what gives tensors row by row."""
    total = hashlib.sha256()
    for t in tensors:
        total.update(repr(tuple(t.shape)).encode())
        for start in range(0, len(t), 1024):
            total.update(t[start : start + 1024].contiguous().cpu().numpy().data)
    return total.hexdigest()


def _about(made: FreshViews, encoder: Encoder) -> dict[str, Any]:
    """What decides the features of a store's views, but for their recipes and public images."""
    code = [Path(str(m.__file__)).read_bytes() for m in (augmentations, rng, transforms, views, encoders, engine, tiny)]
    precision = str(getattr(encoder.features, "dtype", None))
    about = {"encoder": encoder.name, "content of the encoder": encoder.digest, "precision": precision}
    about |= {"content of the examples": _content(made.images, made.labels, made.ids), "code": files.digest("1", *code)}
    about |= {"libraries": f"{encoders.package_of(encoder.name)}, torch {torch.__version__}"}
    about |= {"engine": type(encoder.features).__name__}
    return about | {"examples": made.n, "seed (digest)": files.digest(repr(("stored views", made.seed)))[:16]}
