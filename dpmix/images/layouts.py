"""Where image files lie on disk, and which are for training. `data.load` lists them here and decodes them after.

A data set of the paper has torchvision's layout and the published split, or one of ours, `stratified_split`. A folder of
one's own is split file by file, each by its name alone, since a split that looked at the others would let one image more
move many between training and test."""

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dpmix.core.checks import require
from dpmix.core.rng import generator
from dpmix.images.image_cache import printable

SPLIT_SEED = 0  # of every split that the authors of a data set did not fix; part of the data, not of a run
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_NO_PHOTOS = ("@eadir", "__macosx", "thumbs.db", "desktop.ini", "#recycle", "lost+found")
_PARTS = ("train", "test", "val", "valid", "validation", "training", "testing")


def stratified_split(labels: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids of training and test set, ascending: n_train = floor(0.8·n), each class in proportion. Keyed by
    `(SPLIT_SEED, "split", name, class)`. What rounding leaves goes to the classes with the largest remainder."""
    counts = np.bincount(labels)
    test_total = len(labels) - 4 * len(labels) // 5
    quota = counts * test_total / len(labels)
    take = np.floor(quota).astype(int)
    take[np.argsort(take - quota, kind="stable")[: test_total - take.sum()]] += 1
    draws = [generator(SPLIT_SEED, "split", name, c) for c in range(len(counts))]
    test = [draw.permutation(np.flatnonzero(labels == c))[: take[c]] for c, draw in enumerate(draws)]
    chosen = np.sort(np.concatenate(test))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


class Known(NamedTuple):
    """A data set: title, its project's page, its folder below `root`, how many images are published, a second layout
    (`train/CLASS/IMAGE` and `test/CLASS/IMAGE` in that folder) and how many classes that has."""

    title: str
    page: str
    folder: str
    images: int
    plain: str = ""
    classes: int = 0


_CIFAR = "www.cs.toronto.edu/~kriz/cifar.html"
KNOWN = {
    "cifar10": Known("CIFAR-10", _CIFAR, "cifar-10-batches-py", 60_000, "cifar10", 10),
    "cifar100": Known("CIFAR-100", _CIFAR, "cifar-100-python", 60_000, "cifar100", 100),
    "eurosat": Known("EuroSAT (RGB)", "github.com/phelber/EuroSAT", "eurosat/2750", 27_000),
    "caltech101": Known("Caltech-101", "data.caltech.edu/records/20086", "caltech101/101_ObjectCategories", 8_677),
    "caltech256": Known("Caltech-256", "data.caltech.edu/records/20087", "caltech256/256_ObjectCategories", 30_607),
    "sun397": Known("SUN397", "vision.princeton.edu/projects/2010/SUN", "SUN397", 108_754),
    "pets": Known("Oxford-IIIT Pet", "www.robots.ox.ac.uk/~vgg/data/pets", "oxford-iiit-pet", 7_349),
}


class Listing(NamedTuple):
    """Image files inside `base`: the first `train` of them are for training. `left_out` counts, by suffix, what is not taken."""

    base: Path
    files: list[Path]
    labels: np.ndarray
    train: int
    class_names: tuple[str, ...]
    left_out: Counter[str]


class Found(NamedTuple):
    """The class folders of one folder, in alphabetical order, their images (sorted, folder by folder), and what was left
    out: files by suffix, `inner` the names of the folders inside each class folder."""

    classes: list[str]
    files: list[Path]
    labels: list[int]
    left_out: Counter[str]
    inner: list[set[str]]


def hidden(name: str) -> bool:
    """Files and folders that no photographer made: dot files, thumbnails and the leavings of other systems."""
    return name.startswith((".", "~$")) or name.lower() in _NO_PHOTOS


def scan(base: Path, *, but: tuple[str, ...] = ()) -> Found:
    """`base/CLASS/**/IMAGE`, without what is `hidden`, at every level, and without the class folders `but`. Raises ValueError
    for links to folders (they lead out of `base` or round in circles) and for the name of a class that is no UTF-8."""
    found = Found([], [], [], Counter(), [])
    with os.scandir(base) as entries:
        top = sorted((e.name, e.is_dir()) for e in entries if not hidden(e.name) and e.name not in but)
    for name, is_folder in top:
        if not is_folder:
            found.left_out["in no class folder"] += 1
            continue
        said = "is no UTF-8 or has control characters, so it cannot name a class in a file of results; rename it"
        require(printable(name) == name, "dataset", printable(base / name), said)
        found.inner.append(set())
        for parent, folders, names in sorted(_walk(base / name)):
            if parent == str(base / name):
                found.inner[-1].update(folders)
            for file in sorted(names):
                suffix = Path(file).suffix.lower()
                if suffix in SUFFIXES:
                    found.files.append(Path(parent, file))
                    found.labels.append(len(found.classes))
                else:
                    found.left_out[suffix or "without suffix"] += 1
        found.classes.append(name)
    return found


def _walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` without what is hidden; ValueError for a link to a folder, OSError for one that cannot be read."""
    said = "is a link to a folder; put the folder itself there"

    def refuse(error: OSError) -> None:
        raise OSError(f"dataset={printable(error.filename)!r}: cannot be read ({error.strerror}); make it readable")

    require(not folder.is_symlink(), "dataset", printable(folder), said)
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(f for f in folders if not hidden(f))
        for inner in (Path(parent, f) for f in folders):
            require(not inner.is_symlink(), "dataset", printable(inner), said)
        yield parent, folders, [n for n in names if not hidden(n)]


def list_folder(base: Path) -> Listing:
    """`base/train/CLASS/IMAGE` and `base/test/CLASS/IMAGE` with the same classes in both; or `base/CLASS/IMAGE`, where a
    fifth of the files, by a coin that each file's name decides, become the test set: one image more or less leaves all others
    where they are. Raises ValueError where classes differ or are empty, or where the folders are one level too deep;
    FileNotFoundError where a part is absent. Warns of files that are left out."""
    name = f"folder:{base}"
    if not base.is_dir():
        raise FileNotFoundError(f"dataset={name!r}: no such folder; wanted are train/CLASS/IMAGE and test/CLASS/IMAGE")
    if not any(p.name.lower() in _PARTS for p in base.iterdir() if p.is_dir()):
        whole = scan(base, but=("synthetic",))
        _levels(base, name, whole)
        _left_out(name, whole.left_out)
        return _split_by_name(base, whole, name)
    for part in ("train", "test"):
        if not (base / part).is_dir():
            raise FileNotFoundError(f"dataset={name!r}: no folder {base / part}; wanted are {part}/CLASS/IMAGE")
    train, test = scan(base / "train"), scan(base / "test")
    _levels(base / "train", name, train)
    for part, ours, theirs in (("train", train, test), ("test", test, train)):
        lost = sorted(set(theirs.classes) - set(ours.classes))
        require(not lost, "dataset", name, f"{part}/ lacks the class folders {', '.join(lost)}")
    _none_empty(name, train, "train/")
    _none_empty(name, test, "test/")
    beside = {f for f in base.iterdir() if not hidden(f.name) and f.name not in ("train", "test", "synthetic")}
    train.left_out.update(f"beside train and test, {printable(f.name)}" for f in sorted(beside))
    _left_out(name, train.left_out + test.left_out)
    return _joined(base, train, test)


def _joined(base: Path, train: Found, test: Found) -> Listing:
    files, labels = train.files + test.files, np.array(train.labels + test.labels, dtype=np.int64)
    return Listing(base, files, labels, len(train.files), tuple(train.classes), train.left_out + test.left_out)


def _split(base: Path, found: Found, train: np.ndarray, test: np.ndarray) -> Listing:
    """The files at these places, for training and for testing."""
    labels, order = np.array(found.labels, dtype=np.int64), np.concatenate([train, test])
    files = [found.files[i] for i in order]
    return Listing(base, files, labels[order], len(train), tuple(found.classes), found.left_out)


def _split_by_name(base: Path, found: Found, name: str) -> Listing:
    """80/20 on average: whether a file is for testing follows from its path below `base` and from nothing else."""
    _none_empty(name, found)
    paths = (os.fsencode(f.relative_to(base)).hex() for f in found.files)
    tested = np.array([generator(SPLIT_SEED, "split by name", path).random() < 0.2 for path in paths])
    kept = {c for c, test in zip(found.labels, tested, strict=True) if not test}
    lacking = [c for i, c in enumerate(found.classes) if i not in kept]
    remedy = "more images, or folders train/ and test/ of your own, mend it"
    all_tested = f"a fifth is kept for testing, and of {', '.join(lacking)} that is all; {remedy}"
    require(not lacking, "dataset", name, all_tested)
    require(bool(tested.any()), "dataset", name, f"so few images that none of them is kept for testing; {remedy}")
    return _split(base, found, np.flatnonzero(~tested), np.flatnonzero(tested))


def _none_empty(name: str, found: Found, part: str = "") -> None:
    empty = [part + c for i, c in enumerate(found.classes) if i not in set(found.labels)]
    require(not empty, "dataset", name, f"no images in {', '.join(empty)} (taken are {' '.join(SUFFIXES)})")


def _levels(base: Path, name: str, found: Found) -> None:
    """Refuse no class, one class, and folders inside class folders that look like the classes."""
    said = f"no class folders in {base}; put the images of each class into a folder of its own, CLASS/IMAGE"
    require(bool(found.classes), "dataset", name, said)
    shared = sorted(set.intersection(*found.inner)) if found.inner else []
    deeper = f"are the classes its folders ({', '.join(shared[:3])})? Put them directly into {base}"
    only = f"one class alone, {found.classes[:1]}; {deeper if shared else 'a classifier needs two'}"
    require(len(found.classes) != 1, "dataset", name, only)
    some, deeper = ", ".join(found.classes[:3]), deeper.replace("its", "those")
    require(len(shared) < 2, "dataset", name, f"every class folder ({some}) holds the same folders; {deeper}")


def _left_out(name: str, left_out: Counter[str]) -> None:
    if left_out:
        told = ", ".join(f"{n:,} {suffix}" for suffix, n in left_out.most_common())
        warnings.warn(f"dataset={name!r}: files left out: {told}; taken are {' '.join(SUFFIXES)}", stacklevel=4)


def where(name: str, root: Path) -> Path:
    """The folder below `root` in which a data set of `KNOWN` lies, or would."""
    known = KNOWN[name]
    plain = root / known.plain
    return plain if known.plain and not (root / known.folder).is_dir() and plain.is_dir() else root / known.folder


def list_known(name: str, root: Path, download: bool) -> Listing:
    """The files of a data set of `KNOWN`; torchvision's class fetches it and, for Pets and SUN397, knows its lists."""
    from torchvision import datasets  # two seconds, and not everyone needs it

    known, base = KNOWN[name], where(name, root)
    if name == "pets":
        parts = [datasets.OxfordIIITPet(root, split, download=download) for split in ("trainval", "test")]
        files, labels = [f for p in parts for f in p._images], np.array([c for p in parts for c in p._labels])
        return Listing(base, files, labels, len(parts[0]), tuple(parts[0].classes), Counter())
    if name == "sun397":
        found = datasets.SUN397(root, download=download)
        pairs = sorted(zip(found._image_files, found._labels, strict=True), key=lambda p: (p[1], p[0].as_posix()))
        both = Found(found.classes, [f for f, _ in pairs], [c for _, c in pairs], Counter(), [])
    elif name.startswith("cifar"):
        for part in ("train", "test"):
            if not (base / part).is_dir():
                raise FileNotFoundError(f"no folder {base / part}")
        train, test = scan(base / "train"), scan(base / "test")
        require(train.classes == test.classes, "test", test.classes[:3], "must have the classes of train")
        require(len(train.classes) == known.classes, "classes", len(train.classes), f"must be {known.classes}")
        return _joined(base, train, test)
    else:
        if download:
            kinds = dict(eurosat=datasets.EuroSAT, caltech101=datasets.Caltech101, caltech256=datasets.Caltech256)
            kinds[name](str(root), download=True)
        both = scan(base, but=("BACKGROUND_Google",))
    _none_empty(name, both)
    return _split(base, both, *stratified_split(np.array(both.labels, dtype=np.int64), name))
