"""Where image files lie on disk, and which are for training. `data.load` lists them here and decodes them after.

A data set of the paper has torchvision's layout and the published split, or one of ours, `stratified_split`.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpmix.core.checks import require
from dpmix.core.rng import generator
from dpmix.images.image_cache import no_linked_folders

SPLIT_SEED = 0  # of every split that the authors of a data set did not fix; part of the data, not of a run


def stratified_split(labels: np.ndarray, name: str, test_fraction: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Ids of training and test set, ascending: n_train = floor((1 - test_fraction)·n), each class in proportion.

    Keyed by `(SPLIT_SEED, "split", name, class)`. What rounding leaves goes to the classes with the largest remainder.
    """
    counts = np.bincount(labels)
    test_total = len(labels) - int(len(labels) * (1 - test_fraction) + 1e-9)
    quota = counts * test_total / len(labels)
    take = np.floor(quota).astype(int)
    take[np.argsort(take - quota, kind="stable")[: test_total - take.sum()]] += 1
    test = [
        generator(SPLIT_SEED, "split", name, c).permutation(np.flatnonzero(labels == c))[: take[c]]
        for c in range(len(counts))
    ]
    chosen = np.sort(np.concatenate(test))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


class Known(NamedTuple):
    """A data set of the paper: title, its project's page, its folder below `root`, how many images are published."""

    title: str
    page: str
    folder: str
    images: int


KNOWN = {
    "cifar10": Known("CIFAR-10", "www.cs.toronto.edu/~kriz/cifar.html", "cifar-10-batches-py", 60_000),
    "cifar100": Known("CIFAR-100", "www.cs.toronto.edu/~kriz/cifar.html", "cifar-100-python", 60_000),
    "eurosat": Known("EuroSAT (RGB)", "github.com/phelber/EuroSAT", "eurosat/2750", 27_000),
    "caltech256": Known("Caltech-256", "data.caltech.edu/records/20087", "caltech256/256_ObjectCategories", 30_607),
    "sun397": Known("SUN397", "vision.princeton.edu/projects/2010/SUN", "SUN397", 108_754),
    "pets": Known("Oxford-IIIT Pet", "www.robots.ox.ac.uk/~vgg/data/pets", "oxford-iiit-pet", 7_349),
}


class Listing(NamedTuple):
    """Image files inside `base`: the first `train` of them are for training, the others for testing."""

    base: Path
    files: list[Path]
    labels: np.ndarray
    train: int
    class_names: tuple[str, ...]


def list_folder(base: Path) -> Listing:
    """`base/train/CLASS/*` and `base/test/CLASS/*` through torchvision's ImageFolder, with the same classes in both."""
    from torchvision import datasets

    for part in ("train", "test"):
        if not (base / part).is_dir():
            raise FileNotFoundError(f"dataset='folder:{base}': no folder {base / part}; wanted are {part}/CLASS/IMAGE")
    no_linked_folders(base)
    train, test = (datasets.ImageFolder(base / part, allow_empty=True) for part in ("train", "test"))
    for part, ours, theirs in (("train", train, test), ("test", test, train)):
        lost = sorted(set(theirs.classes) - set(ours.classes))
        require(not lost, "dataset", f"folder:{base}", f"{part}/ lacks the class folders {', '.join(lost)}")
    for part, found in (("train", train), ("test", test)):
        empty = [f"{part}/{c}" for i, c in enumerate(found.classes) if i not in set(found.targets)]
        require(not empty, "dataset", f"folder:{base}", f"no images in {', '.join(empty)}")
    samples = train.samples + test.samples
    files, labels = [Path(f) for f, _ in samples], np.array([c for _, c in samples], dtype=np.int64)
    return Listing(base, files, labels, len(train), tuple(train.classes))


def list_known(name: str, root: Path, download: bool) -> Listing:
    """The files of one of the paper's data sets, found by torchvision's class for it."""
    from torchvision import datasets

    if name == "pets":
        parts = [datasets.OxfordIIITPet(root, split, download=download) for split in ("trainval", "test")]
        files, labels = [f for p in parts for f in p._images], np.array([c for p in parts for c in p._labels])
        return Listing(root / KNOWN[name].folder, files, labels, len(parts[0]), tuple(parts[0].classes))
    if name == "eurosat":
        found: Any = datasets.EuroSAT(root, download=download)
        pairs, classes = [(Path(f), c) for f, c in found.samples], found.classes
    elif name == "caltech256":
        found = datasets.Caltech256(str(root), download=download)
        numbered = zip(found.y, found.index, strict=True)
        folder, classes = root / KNOWN[name].folder, found.categories
        pairs = [(folder / classes[c] / f"{c + 1:03d}_{i:04d}.jpg", c) for c, i in numbered]
    else:
        found = datasets.SUN397(root, download=download)
        pairs, classes = list(zip(found._image_files, found._labels, strict=True)), found.classes
    pairs.sort(key=lambda pair: (pair[1], pair[0].as_posix()))
    labels = np.array([c for _, c in pairs], dtype=np.int64)
    train, test = stratified_split(labels, name)
    order = np.concatenate([train, test])
    files = [pairs[i][0] for i in order]
    return Listing(root / KNOWN[name].folder, files, labels[order], len(train), tuple(classes))
