"""Images and their labels. `load` gives the private data, `public_images` the synthetic images beside it.

Everything is uint8 `[n, C, H, W]` in 0..255, in a fixed order, with a fixed split: the same call gives the same arrays."""

import hashlib
import json
import tarfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dpmix.core.checks import counted, one_of, require, whole
from dpmix.images.image_cache import FORMAT, Copies, Decoded, decode, duplicates, pixel_hash, printable, sha256
from dpmix.images.layouts import KNOWN, Listing, list_folder, list_known, scan, stratified_split, where

_HERE = Path(__file__).resolve().parents[2]
PROJECT = _HERE if (_HERE / "data" / "public").is_dir() else Path.cwd()  # the clone; else where Python was started
ROOT = PROJECT / "data" / "datasets"
CACHE = PROJECT / "data" / "cache"
PUBLIC = PROJECT / "data" / "public"
RESULTS = PROJECT / "data" / "results"
PathLike = str | Path


@dataclass(frozen=True)
class ImageSet:
    """Labelled images. `images` may lie over a memory map: index it, do not copy it needlessly. `class_names[labels[i]]`
    names the class of image i. `flip` says whether a mirrored image keeps its label (false for digits). Raises ValueError for
    any other dtype or shape, for labels that do not fit and for repeated class names."""

    images: Tensor  # uint8 [n, C, H, W]
    labels: Tensor  # int64 [n]
    class_names: tuple[str, ...]
    flip: bool = True

    def __post_init__(self) -> None:
        for name, dtype, dims in (("images", torch.uint8, 4), ("labels", torch.int64, 1)):
            array = getattr(self, name)
            good = array.dtype == dtype and array.ndim == dims
            require(good, name, f"{array.dtype} {list(array.shape)}", f"must be {dtype} with {dims} dimensions")
        n, shape = len(self.images), list(self.images.shape)
        require(min(shape[1:]) > 0, "images", shape, "must hold at least one pixel each")
        require(n == len(self.labels), "labels", len(self.labels), f"must be as many as images: {n}")
        require(len(set(self.class_names)) == len(self.class_names) > 0, "class_names", self.class_names, "must differ")
        if len(self.labels):
            low, high, last = int(self.labels.min()), int(self.labels.max()), len(self.class_names) - 1
            require(low >= 0 and high <= last, "labels", f"{low}..{high}", f"must lie in 0..{last}, one per class name")

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:  # no pixels and no labels, wherever it is printed
        shape = " × ".join(map(str, self.images.shape[1:]))
        return f"ImageSet({counted(len(self), 'image')}, {shape}, {counted(self.num_classes, 'class')})"

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def subset(self, ids: Tensor | np.ndarray | Sequence[int] | slice) -> "ImageSet":
        """The images `ids`, in that order (a slice is a view, anything else a copy)."""
        ids = ids if isinstance(ids, slice) else torch.as_tensor(ids, dtype=torch.int64)
        return ImageSet(self.images[ids], self.labels[ids], self.class_names, self.flip)


@dataclass(frozen=True)
class Splits:
    """Training and test set. `digest` (sha256, hex) tells apart any two splits, file lists, labels or contents."""

    train: ImageSet
    test: ImageSet
    digest: str

    def __post_init__(self) -> None:
        for field in ("class_names", "flip"):
            ours, theirs = getattr(self.train, field), getattr(self.test, field)
            require(ours == theirs, f"test.{field}", theirs, f"must equal train.{field}={ours!r}")
        ours, theirs = self.train.images.shape[1:], self.test.images.shape[1:]
        require(ours == theirs, "test.images", list(theirs), f"must have the shape of train.images, {list(ours)}")


def _digest(**parts: object) -> str:
    """sha256 over named parts: arrays by content, everything else as JSON."""
    total = hashlib.sha256()
    for key, value in sorted(parts.items()):
        if isinstance(value, np.ndarray):
            value = [str(value.dtype), value.shape, hashlib.sha256(np.ascontiguousarray(value).data).hexdigest()]
        total.update(json.dumps([key, value]).encode())
    return total.hexdigest()


def _load_digits() -> Splits:
    """The 1,797 handwritten digits of scikit-learn, 0..16 scaled to 0..255: 1,437 for training, 360 for testing."""
    from sklearn.datasets import load_digits  # here and below: imports that take seconds, and not everyone needs them

    raw = load_digits()
    images = np.rint(raw.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = raw.target.astype(np.int64)
    train, test = stratified_split(labels, "digits")
    whole = ImageSet(torch.from_numpy(images), torch.from_numpy(labels), DIGITS, flip=False)
    digest = _digest(name="digits", images=images, labels=labels, test=test)
    return Splits(whole.subset(train), whole.subset(test), digest)


NAMES, DIGITS = ("digits", *KNOWN, "folder:PATH"), tuple("0123456789")
_NATIVE = {"digits": 8, "cifar10": 32, "cifar100": 32}


def _load_cifar(name: str, root: Path, download: bool) -> Splits:
    """Official batches. They are pickles: torchvision opens them only after their md5 sums match the published ones."""
    from torchvision import datasets

    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    parts = [kind(root, train=train, download=download) for train in (True, False)]
    images = [np.ascontiguousarray(p.data.transpose(0, 3, 1, 2)) for p in parts]
    labels, n = [np.array(p.targets, dtype=np.int64) for p in parts], len(images[0])
    found = duplicates([pixel_hash(x) for part in images for x in part], n)
    _report(name, found, {}, lambda i: f"training image {i}" if i < n else f"test image {i - n}")
    content = dict(train=images[0], test=images[1], train_labels=labels[0], test_labels=labels[1])
    pairs = zip(map(torch.from_numpy, images), map(torch.from_numpy, labels), strict=True)
    train, test = (ImageSet(x, y, tuple(parts[0].classes)) for x, y in pairs)
    return Splits(train, test, _digest(name=name, class_names=parts[0].classes, **content))


ODDITIES = {
    "transparent": "transparent in places, which are white now",
    "frames": "with several frames, of which the first is taken",
    "other size": "of another size than the rest, so that all are fitted to one square (give image_size, or remove what differs)",
    "not grey": "in colour among grey ones, so that all get three channels (make it all grey, or remove what differs)",
}


def _report(name: str, copies: Copies, odd: dict[str, list[int]], called: Callable[[int], str]) -> None:
    """Counts and examples, for the owner of the data: computed without noise, so not for release."""
    told = []
    if copies.train or copies.test:
        some = ", ".join(f"{called(i)} equals {called(j)}" for i, j in copies.train[:2] + copies.test[:2])
        many = f"{len(copies.train)} among the training images, {len(copies.test)} of a training image among the test images"
        high = ", and test accuracy is too high" if copies.test else ""
        told += [f"exact copies: {many} ({some}); the guarantee covers each copy alone{high}; not for release"]
    for what in (what for what in ODDITIES if odd.get(what)):
        told += [f"{counted(len(odd[what]), 'image')} ({', '.join(map(called, odd[what][:3]))}) {ODDITIES[what]}"]
    for line in told:
        warnings.warn(f"dataset={name!r}: {line}", stacklevel=4)


def find(name: str, root: PathLike = ROOT, *, download: bool = False) -> Listing | Splits:
    """The files of a data set, which are on disk but have not been opened; of digits and CIFAR the images themselves. Raises
    as `load`, but for what only decoding can tell."""
    root = Path(root).expanduser()
    if name.startswith("folder:"):
        require(name != "folder:", "dataset", name, "names no folder; write folder:PATH")
        return list_folder(Path(name.removeprefix("folder:")).expanduser())
    one_of("dataset", name, NAMES)
    if name == "digits":
        return _load_digits()
    known, place = KNOWN[name], where(name, root)
    if not download and not place.is_dir():
        plain = f" (or put train/CLASS/IMAGE and test/CLASS/IMAGE into {root / known.plain})" if known.plain else ""
        get = f"get it from {known.page} and unpack it to {root / known.folder}{plain}, or pass download=True"
        works = "works now: papermill notebooks/table3.ipynb -p dataset digits"
        raise FileNotFoundError(f"dataset={name!r}: {known.title} is not on disk; {get}; {works}")
    # Older ones write wherever the names in an archive point to, and torchvision lets them.
    said = "this Python does not check names in archives; take 3.11.4 or later, or unpack the archive by hand"
    require(not download or hasattr(tarfile, "data_filter"), "download", True, said)
    batches = name.startswith("cifar") and place.name == Path(known.folder).name
    try:
        found = _load_cifar(name, root, download) if batches else list_known(name, root, download)
    except (RuntimeError, KeyError, ValueError, FileNotFoundError, tarfile.TarError) as error:
        why = f"incomplete or damaged ({error}); unpack the archive from {known.page} again"
        raise ValueError(f"dataset={name!r}: {place} is {why}") from error
    if isinstance(found, Listing) and len(found.files) != known.images:
        told = f"{counted(len(found.files), 'image')} where {known.title} has {known.images:,}"
        warnings.warn(f"dataset={name!r}: {told}; results will not compare with published ones", stacklevel=3)
    return found


def load(
    name: str, root: PathLike = ROOT, *, image_size: int | None = None, download: bool = False, cache: PathLike = CACHE
) -> Splits:
    """Training and test set of a data set: always the same images in the same order.

    Args:
        name: one of `NAMES`; for `folder:PATH`, PATH holds train/CLASS/IMAGE and test/CLASS/IMAGE, or CLASS/IMAGE
            (then a fifth of the files, each by its name alone, become the test set).
        root: where the named data sets lie, each in the layout that torchvision expects; CIFAR also as class folders.
        image_size: side of the square to which image files are resized and cropped. None: as they are if all have the
            same size, else 224. Digits and CIFAR keep their own size.
        download: let torchvision fetch what is missing (Python 3.11.4 or later).
        cache: folder for decoded images (`dpmix.images.image_cache`).

    The splits are the published ones for CIFAR and Pets, else 80/20 (`stratified_split`). `digest` covers file names or
    indices, labels, split, image shape and the bytes of the files, not where they lie.

    Raises FileNotFoundError for absent data, ValueError for data that do not fit. Warns about exact copies, files that
    are left out, transparency and the few images whose size or colour decides for all, with some of their names. Archives
    are unpacked by torchvision, which compares md5 sums and refuses members that leave `root`."""
    if image_size is not None:
        whole("image_size", image_size, 1)
    native = _NATIVE.get(name)
    fits = image_size in (None, native) or not native
    require(fits, "image_size", image_size, f"{name} is {native} pixels wide; leave it out")
    found = find(name, root, download=download)
    if isinstance(found, Splits):
        return found
    base, files, labels, n, class_names, _ = found
    images, content, copies, odd = opened(name, found, image_size=image_size, cache=cache)
    _report(name, copies, odd, lambda i: printable(files[i].relative_to(base)))
    train, test = (ImageSet(images[p], torch.from_numpy(labels[p]), class_names) for p in (slice(n), slice(n, None)))
    facts = dict(files=[f.relative_to(base).as_posix() for f in files], labels=labels, train=n, content=content)
    return Splits(train, test, _digest(class_names=class_names, decoding=FORMAT, shape=list(images.shape[1:]), **facts))


def opened(name: str, found: Listing, *, image_size: int | None = None, cache: PathLike = CACHE) -> Decoded:
    """The images of a listing, with all that `load` warns of."""
    native = _NATIVE.get(name)
    shape: dict = dict(size=native, channels=3) if native else dict(size=image_size)
    return decode(found.files, found.base, cache=Path(cache), label=name, train=found.train, **shape)


def folder_name(class_name: str) -> str:
    """The folder of a class below `synthetic/NAME/`: slashes (SUN397's "a/abbey") become underscores. ValueError for a name
    that is no folder inside another one."""
    name = class_name.replace("/", "_").replace("\\", "_")
    require(name not in ("", ".", "..") and "\0" not in name, "class_names", class_name, "cannot name a folder")
    return name


def synthetic_folder(name: str, root: PathLike = ROOT) -> Path:
    """Where the synthetic images of a data set lie, in folders of their classes: beside `train` and `test` of `folder:PATH`,
    else in `ROOT/synthetic/NAME`."""
    if name.startswith("folder:"):
        return Path(name.removeprefix("folder:")).expanduser() / "synthetic"
    return Path(root).expanduser() / "synthetic" / name


def find_public(name: str, root: PathLike = ROOT) -> Path:
    """`synthetic_folder`, once it is there. FileNotFoundError, which says how to make them, if it is not."""
    if not name.startswith("folder:"):
        one_of("dataset", name, NAMES)
    base = synthetic_folder(name, root)
    if name != "digits" and not base.is_dir():
        remedy = "make them with dpmix.images.synthesis.generate, or choose a method without them (k_diff=0)"
        raise FileNotFoundError(f"dataset={name!r}: no synthetic images in {base}/CLASS/; {remedy}")
    return base


def public_images(
    name: str, root: PathLike = ROOT, *, like: ImageSet | None = None, cache: PathLike = CACHE
) -> ImageSet:
    """The synthetic public images that go with a data set: made from public data alone, never from the private set.

    For digits the shipped `data/public/synthetic_digits.npz`, else the image files in `ROOT/synthetic/NAME/CLASS/`
    (`PATH/synthetic/CLASS/` for `folder:PATH`), where CLASS is `folder_name(class name)`.

    Args:
        like: the private images, whose classes and shape the public ones take. Without it, the classes are those of the
            folders and the images keep their size.

    Raises FileNotFoundError if there are none, ValueError that names the classes without any."""
    if name == "digits":
        path = public_file("synthetic_digits.npz", PUBLIC)
        with np.load(path, allow_pickle=False) as arrays:
            images, classes = (torch.from_numpy(arrays[part]) for part in ("images", "labels"))
        digits = ImageSet(images, classes, DIGITS, flip=False)
        _every_class(digits.labels.numpy(), DIGITS, name, str(path))
        return digits
    base = find_public(name, root)
    found = scan(base)
    class_names = like.class_names if like else tuple(found.classes)
    place = {folder_name(c): i for i, c in enumerate(class_names)}
    extra = sorted(set(found.classes) - set(place))
    require(not extra, "dataset", name, f"{base} holds folders of no class: {', '.join(extra[:5])}")
    files, labels = found.files, np.array([place[found.classes[c]] for c in found.labels], dtype=np.int64)
    _every_class(labels, class_names, name, str(base))
    shape: dict = dict(size=tuple(like.images.shape[2:]), channels=like.images.shape[1]) if like else {}
    made = decode(files, base, cache=Path(cache), label=f"synthetic {name}", train=len(files), **shape)
    public = ImageSet(made.images, torch.from_numpy(labels), class_names, like.flip if like else True)
    _report(f"synthetic {name}", Copies([], []), made.odd, lambda i: printable(files[i].relative_to(base)))
    repeats = [copy for copy, _ in made.copies.train]
    if repeats:
        told = f"left out as exact copies of others: {len(repeats):,} of {counted(len(files), 'synthetic image')}"
        warnings.warn(f"dataset={name!r}: {told}", stacklevel=2)
        public = public.subset(np.setdiff1d(np.arange(len(files)), repeats))
        _every_class(public.labels.numpy(), class_names, name, str(base))
    return public


def _every_class(labels: np.ndarray, class_names: tuple[str, ...], name: str, where: str) -> None:
    missing = [c for i, c in enumerate(class_names) if not (labels == i).any()]
    told = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
    none = f"no synthetic images in {where} for {counted(len(missing), 'class')}: {told}"
    require(not missing, "dataset", name, none)


def public_file(name: str, folder: Path = PUBLIC) -> Path:
    """Path of a shipped stand-in after comparing its sha256 with the one in its sidecar JSON."""
    path, sidecar = folder / name, (folder / name).with_suffix(".json")
    remedy = "restore it with `git checkout data/public` or rebuild it with notebooks/public_standins"
    for needed in (path, sidecar):
        if not needed.is_file():
            raise FileNotFoundError(f"{needed.name}: missing from {folder}; {remedy}")
    recorded = json.loads(sidecar.read_text())["sha256"]
    require(sha256(path) == recorded, "file", str(path), f"its sha256 is not the recorded; {remedy}")
    return path
