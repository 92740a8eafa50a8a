"""The six data sets in their official layouts (small copies), image folders, the cache and its faults, overlaps."""

import dataclasses
import errno
import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import datasets, transforms

from dpmix.images import data, image_cache, layouts
from dpmix.images.data import ImageSet, Splits
from dpmix.images.overlap import overlap, refuse_overlap

PROJECT = Path(__file__).resolve().parents[2]


def picture(seed: int, height: int = 12, width: int = 12, mode: str = "RGB") -> Image.Image:
    """A smooth random image, unlike any other."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).convert(mode).resize((width, height), Image.Resampling.BICUBIC)


def save(path: Path, seed: int, **shape) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, **shape).save(path)
    return path


def make_folder(base: Path, train: int = 4, test: int = 2, suffix: str = "png", **shape) -> Path:
    for part, count in (("train", train), ("test", test)):
        for c, name in enumerate(("cat", "dog")):
            for i in range(count):
                save(base / part / name / f"{i:03d}.{suffix}", 1000 * c + i + 100 * (part == "test"), **shape)
    return base


@pytest.fixture
def load(tmp_path):
    """`data.load` with the cache in the test's own folder."""
    return lambda name, *args, **more: data.load(name, *args, cache=tmp_path / "cache", **more)


@pytest.fixture
def no_decoding(monkeypatch):
    """From the moment that this is called, decoding an image fails the test."""

    def refuse(*_):
        raise AssertionError("decoded")

    return lambda: monkeypatch.setattr(image_cache, "_write", refuse)


# ---------------------------------------------------------------------------------------------------- digits, the types


def test_digits_are_split_once_and_for_all():
    first, second = data.load("digits"), data.load("digits")
    assert (len(first.train), len(first.test)) == (1437, 360)
    assert first.train.images.dtype == torch.uint8 and first.train.images.shape[1:] == (1, 8, 8)
    assert first.train.images.max() == 255 and not first.train.flip
    assert torch.equal(first.train.images, second.train.images)
    assert first.digest == second.digest == "d4d5ff5807f44740a8fd954c15de21bc4bd3fc2164de3144462eed3273515396"
    shares = first.test.labels.bincount() / (first.test.labels.bincount() + first.train.labels.bincount())
    assert (shares - 0.2).abs().max() < 0.01  # an unstratified split strays by 0.05
    everything = torch.cat([first.train.images, first.test.images]).flatten(1)
    assert len(everything.unique(dim=0)) == 1797


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=300))
def test_a_stratified_split_is_a_split_in_proportion(labels):
    labels = np.array(labels)
    train, test = data.stratified_split(labels, "any")
    assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(len(labels)))
    assert len(train) == 4 * len(labels) // 5
    counts, taken = np.bincount(labels, minlength=5), np.bincount(labels[test], minlength=5)
    assert (np.abs(taken - counts * len(test) / len(labels)) < 1).all()


def test_splits_of_published_sizes():
    train, test = data.stratified_split(np.arange(27_000) % 10, "eurosat")
    assert (len(train), len(test)) == (21_600, 5_400)
    other, _ = data.stratified_split(np.arange(27_000) % 10, "another")
    assert not np.array_equal(train, other)


GOOD = dict(images=torch.zeros(2, 1, 4, 4, dtype=torch.uint8), labels=torch.tensor([0, 1]), class_names=("a", "b"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(images=torch.zeros(2, 1, 4, 4)), "images='torch.float32 .2, 1, 4, 4.': must be torch.uint8"),
        (dict(images=torch.zeros(2, 4, 4, dtype=torch.uint8)), "images=.*must be torch.uint8 with 4 dimensions"),
        (dict(images=torch.zeros(2, 1, 0, 4, dtype=torch.uint8)), "images=.*at least one pixel"),
        (dict(labels=torch.tensor([0, 1], dtype=torch.int32)), "labels='torch.int32.*must be torch.int64"),
        (dict(labels=torch.tensor([0, 1, 1])), "labels=3: must be as many as images: 2"),
        (dict(labels=torch.tensor([0, 2])), r"labels='0\.\.2': must lie in 0\.\.1"),
        (dict(labels=torch.tensor([-1, 1])), r"labels='-1\.\.1': must lie in 0\.\.1"),
        (dict(class_names=("a", "a")), "class_names=.*must differ"),
    ],
)
def test_an_image_set_refuses_what_does_not_fit(change, said):
    assert len(ImageSet(**GOOD)) == 2
    with pytest.raises(ValueError, match=said) as caught:
        ImageSet(**GOOD | change)
    assert "\n" not in str(caught.value)


def test_subsets_and_splits():
    whole = ImageSet(**GOOD, flip=False)
    part = whole.subset([1])
    assert part.labels.tolist() == [1] and not part.flip and part.num_classes == 2
    assert len(whole.subset(np.array([], dtype=np.int64))) == 0
    assert whole.subset(slice(1)).images.data_ptr() == whole.images.data_ptr()  # no copy
    with pytest.raises(ValueError, match=r"test\.class_names=.*must equal train\.class_names"):
        Splits(whole, dataclasses.replace(whole, class_names=("a", "c")), "")
    with pytest.raises(ValueError, match=r"test\.images=\[1, 5, 4\]: must have the shape of train"):
        Splits(whole, dataclasses.replace(whole, images=torch.zeros(2, 1, 5, 4, dtype=torch.uint8)), "")


def test_unknown_and_absent_data_sets(load, tmp_path):
    with pytest.raises(ValueError, match="dataset='cifar1O': unknown; did you mean 'cifar10'"):
        load("cifar1O")
    for name, known in data.KNOWN.items():
        with pytest.raises(FileNotFoundError) as caught:
            load(name, tmp_path)
        line = str(caught.value)
        assert "\n" not in line and known.page in line and str(tmp_path / known.folder) in line
        assert "papermill notebooks/table3.ipynb -p dataset digits" in line
    assert list(tmp_path.iterdir()) == []  # torchvision would leave an empty folder
    with pytest.raises(ValueError, match="image_size=224: digits is 8 pixels wide"):
        load("digits", image_size=224)


# ------------------------------------------------------------------------------------------- the six data sets in small


def make_cifar(root: Path, kind: type, monkeypatch, classes: int, key: str) -> list[np.ndarray]:
    """Python batches as published, pickled dicts with `data` [n, 3072]; torchvision's lists get their checksums."""
    rng, folder, images = np.random.default_rng(0), root / kind.base_folder, []
    folder.mkdir(parents=True)

    def write(name: str, content: dict) -> str:
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    for listed in ("train_list", "test_list"):
        entries = []
        for name, _ in getattr(kind, listed):
            images.append(rng.integers(0, 256, (classes, 3072), dtype=np.uint8))
            entries.append([name, write(name, {"data": images[-1], key: list(range(classes))[::-1]})])
        monkeypatch.setattr(kind, listed, entries)
    names = {kind.meta["key"]: [f"class {i}" for i in range(classes)]}
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": write(kind.meta["filename"], names)})
    return images


@pytest.mark.parametrize(
    ("name", "kind", "classes", "key", "batches"),
    [("cifar10", datasets.CIFAR10, 10, "labels", 5), ("cifar100", datasets.CIFAR100, 100, "fine_labels", 1)],
)
def test_cifar(load, tmp_path, monkeypatch, name, kind, classes, key, batches):
    images = make_cifar(tmp_path, kind, monkeypatch, classes, key)
    splits = load(name, tmp_path)
    assert (len(splits.train), len(splits.test)) == (batches * classes, classes)
    assert np.array_equal(splits.train.images.numpy(), np.concatenate(images[:-1]).reshape(-1, 3, 32, 32))
    assert splits.test.labels.tolist() == list(range(classes))[::-1]
    assert splits.train.class_names == tuple(f"class {i}" for i in range(classes)) and splits.train.flip
    assert load(name, tmp_path).digest == splits.digest


def test_a_cifar_batch_that_is_not_the_published_one_is_never_unpickled(load, tmp_path, monkeypatch):
    make_cifar(tmp_path, datasets.CIFAR10, monkeypatch, 10, "labels")

    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))

    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=r"dataset='cifar10'.*incomplete or damaged.*kriz/cifar"):
        load("cifar10", tmp_path)
    assert not (tmp_path / "sprung").exists()
    pickle.loads(pickle.dumps(Trap()))  # the trap itself works
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar_in_class_folders(load, tmp_path, name, classes):
    names = [f"{c:03d}" for c in range(classes)]
    wanted = {}
    for part, count in (("train", 2), ("test", 1)):
        for c in reversed(range(classes)):
            for i in range(count):
                seed = 10 * c + i + 5 * (part == "test")
                path = save(tmp_path / name / part / names[c] / f"{i}.png", seed, height=32, width=32)
                wanted[part, c, i] = np.asarray(Image.open(path)).transpose(2, 0, 1)
    with pytest.warns(UserWarning, match="images where CIFAR-.* has 60,000"):
        splits = load(name, tmp_path)
    assert splits.train.class_names == tuple(names) and splits.train.flip
    assert splits.train.labels.tolist() == [c for c in range(classes) for _ in range(2)]
    assert splits.test.labels.tolist() == list(range(classes))
    assert np.array_equal(splits.train.images[3], wanted["train", 1, 1])
    assert np.array_equal(splits.test.images[7], wanted["test", 7, 0])
    shutil.rmtree(tmp_path / name / "train" / names[3])
    with pytest.raises(ValueError, match=f"dataset='{name}': .*{name} is incomplete or damaged .*the classes of train"):
        load(name, tmp_path)
    shutil.rmtree(tmp_path / name / "test" / names[3])
    with pytest.raises(ValueError, match=f"classes={classes - 1}: must be {classes}"):
        load(name, tmp_path)
    shutil.rmtree(tmp_path / name / "test")
    with pytest.raises(ValueError, match=r"no folder .*test"):
        load(name, tmp_path)


def test_official_cifar_batches_come_before_class_folders(load, tmp_path, monkeypatch):
    images = make_cifar(tmp_path, datasets.CIFAR10, monkeypatch, 10, "labels")
    (tmp_path / "cifar10" / "train").mkdir(parents=True)
    assert np.array_equal(load("cifar10", tmp_path).test.images.numpy(), images[-1].reshape(-1, 3, 32, 32))


def make_eurosat(root: Path) -> None:
    for c, name in enumerate(("AnnualCrop", "Forest", "SeaLake")):
        for i in range(10):
            save(root / "eurosat" / "2750" / name / f"{name}_{i + 1}.jpg", 100 * c + i, height=64, width=64)


def make_caltech256(root: Path) -> None:
    for c, name in enumerate(("001.ak47", "002.american-flag", "003.clutter")):
        for i in range(5):
            mode = "L" if (c + i) % 4 == 0 else "RGB"  # the real one holds greyscale files too
            path = root / "caltech256" / "256_ObjectCategories" / name / f"{c + 1:03d}_{i + 1:04d}.jpg"
            save(path, 100 * c + i, height=20 + i, width=40 - i, mode=mode)
    (root / "caltech256" / "256_ObjectCategories" / "001.ak47" / "RENAME2").write_text(
        "a stray file, as in the real one"
    )


def make_sun397(root: Path) -> None:
    names = ("a/abbey", "a/apartment_building/outdoor", "b/beach")
    for c, name in enumerate(names):
        for i in range(5):
            save(root / "SUN397" / name / f"sun_{chr(122 - i)}{c}.jpg", 100 * c + i, height=30, width=20 + i)
    (root / "SUN397" / "ClassName.txt").write_text("".join(f"/{n}\n" for n in names))


def make_pets(root: Path) -> None:
    base = root / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    for part, shift in (("trainval", 0), ("test", 3)):
        lines = []
        for c, breed in enumerate(("Abyssinian", "american_bulldog")):
            for i in range(shift + 1, shift + 4):
                save(base / "images" / f"{breed}_{i}.jpg", 100 * c + i, height=25, width=25 + i)
                lines.append(f"{breed}_{i} {c + 1} {c + 1} 1\n")
        (base / "annotations" / f"{part}.txt").write_text("".join(lines))


def make_caltech101(root: Path) -> None:
    for c, name in enumerate(("Faces", "BACKGROUND_Google", "accordion")):
        for i in range(5):
            path = root / "caltech101" / "101_ObjectCategories" / name / f"image_{i + 1:04d}.jpg"
            save(path, 100 * c + i, height=20 + i, width=40 - i)


MAKERS = dict(
    eurosat=make_eurosat,
    caltech101=make_caltech101,
    caltech256=make_caltech256,
    sun397=make_sun397,
    pets=make_pets,
)


@pytest.mark.parametrize(
    ("name", "train", "test", "shape", "classes"),
    [
        ("eurosat", 24, 6, (3, 64, 64), ("AnnualCrop", "Forest", "SeaLake")),
        ("caltech101", 8, 2, (3, 224, 224), ("Faces", "accordion")),
        ("caltech256", 12, 3, (3, 224, 224), ("001.ak47", "002.american-flag", "003.clutter")),
        ("sun397", 12, 3, (3, 224, 224), ("abbey", "apartment_building/outdoor", "beach")),
        ("pets", 6, 6, (3, 224, 224), ("Abyssinian", "American Bulldog")),
    ],
)
def test_image_data_sets_in_their_official_layout(load, tmp_path, no_decoding, name, train, test, shape, classes):
    root = tmp_path / "here"
    MAKERS[name](root)
    with pytest.warns(UserWarning, match=rf"images where .* has {data.KNOWN[name].images:,}"):
        splits = load(name, root)
    assert (len(splits.train), len(splits.test), splits.train.class_names) == (train, test, classes)
    assert splits.train.images.shape[1:] == shape and splits.train.images.dtype == torch.uint8 and splits.train.flip
    assert (splits.test.labels.bincount() == test // len(classes)).all()
    assert (splits.train.labels.bincount() == train // len(classes)).all()

    kind = dict(
        eurosat=datasets.EuroSAT,
        caltech101=datasets.Caltech101,
        caltech256=datasets.Caltech256,
        sun397=datasets.SUN397,
    )
    sources = (
        [datasets.OxfordIIITPet(root, s) for s in ("trainval", "test")] if name == "pets" else [kind[name](str(root))]
    )
    fit = [transforms.Resize(224, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224)]
    fit = transforms.Compose([] if name == "eurosat" else fit)
    ours = {
        (y, x.numpy().tobytes())
        for s in (splits.train, splits.test)
        for x, y in zip(s.images, s.labels.tolist(), strict=True)
    }
    theirs = {
        (y, np.asarray(fit(x.convert("RGB"))).transpose(2, 0, 1).tobytes())
        for s in sources
        for x, y in (s[i] for i in range(len(s)))
    }
    assert ours == theirs and len(ours) == train + test

    moved = root.rename(tmp_path / "there")
    no_decoding()
    again = load(name, moved)  # the same files: the cache serves them wherever they lie
    assert again.digest == splits.digest and torch.equal(again.train.images, splits.train.images)


def test_the_split_does_not_depend_on_the_order_in_which_a_disk_lists_files(load, tmp_path, monkeypatch):
    class Reversed(datasets.SUN397):
        def __init__(self, *args, **more):
            super().__init__(*args, **more)
            self._image_files.reverse()
            self._labels.reverse()

    make_sun397(tmp_path)
    with pytest.warns(UserWarning, match="15 images"):
        first = load("sun397", tmp_path)
        monkeypatch.setattr(datasets, "SUN397", Reversed)
        assert load("sun397", tmp_path).digest == first.digest


def test_an_incomplete_data_set_is_named(load, tmp_path):
    make_sun397(tmp_path)
    (tmp_path / "SUN397" / "ClassName.txt").write_text("/a/abbey\n")
    with pytest.raises(
        ValueError, match=r"dataset='sun397'.*incomplete or damaged.*unpack the archive from vision\.princeton"
    ):
        load("sun397", tmp_path)
    make_pets(tmp_path)
    (tmp_path / "oxford-iiit-pet" / "annotations" / "test.txt").write_text("../../secret_1 1 1 1\n")
    save(tmp_path / "secret_1.jpg", 1)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="paths that leave it: 1"):
        load("pets", tmp_path)


@pytest.mark.parametrize("old", [False, True], ids=["", "Python 3.11.2"])
@pytest.mark.parametrize(
    ("member", "said"),
    [
        ("../stolen", "outside the destination"),
        ("{outside}/stolen", "Dataset not found"),  # absolute names are taken as relative ones
        ("SUN397/link", "outside the destination"),
    ],
)
def test_an_archive_that_leaves_its_folder_is_refused(load, tmp_path, monkeypatch, member, said, old):
    """torchvision unpacks what is there already; its md5 is made to match, so that only the names are left to refuse."""
    if old:
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    archive = root / "SUN397.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        about = tarfile.TarInfo(member.format(outside=outside))
        if member.endswith("link"):
            about.type, about.linkname = tarfile.SYMTYPE, "../../outside"
        tar.addfile(about, io.BytesIO(b""))
    monkeypatch.setattr(datasets.SUN397, "_DATASET_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    checked = rf"dataset='sun397': .*incomplete or damaged .*{said}"
    refused = r"download=True: this Python does not check names in archives; take 3\.11\.4"
    with pytest.raises(ValueError, match=checked if hasattr(tarfile, "data_filter") and not old else refused) as caught:
        load("sun397", root, download=True)
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["outside", "root"] and not list(outside.iterdir())
    assert not os.path.lexists(root / "SUN397" / "link")


def test_a_file_more_leaves_all_others_of_a_folder_where_they_are(tmp_path):
    """Neighbouring folders have neighbouring training sets, or the guarantee would be one of a group; a split in proportion
    would not have: it is looked at too."""

    def split(folder):
        found = layouts.list_folder(folder)
        names = [p.relative_to(folder).as_posix() for p in found.files]
        assert [found.class_names[c] for c in found.labels] == [n.split("/")[0] for n in names]
        return set(names[: found.train]), set(names[found.train :])

    for kind, i in [(k, i) for k in ("cat", "dog") for i in range(400)]:
        (tmp_path / kind).mkdir(exist_ok=True)
        (tmp_path / kind / f"{i:03d}.png").touch()
    train, test = split(tmp_path)
    assert len(train) + len(test) == 800 and 120 < len(test) < 200, "a fifth, up to four deviations"
    for new in ("cat/000a.png", "dog/zzz.png", "cat/2024-01-01.png"):
        (tmp_path / new).touch()
        more, others = split(tmp_path)
        assert (more - train) | (others - test) == {new} and not (train - more) | (test - others)
        (tmp_path / new).unlink()
    labels = np.array([0] * 400 + [1] * 400)
    before, after = (set(layouts.stratified_split(part, "folder")[1].tolist()) for part in (labels, labels[1:]))
    assert len(before ^ {i + 1 for i in after}) > 50, "the wrong way would be seen"


def test_what_lies_beside_the_classes_is_told(tmp_path, monkeypatch):
    for name in ("empty", "flat"):
        (tmp_path / name).mkdir()
    save(tmp_path / "flat" / "x.png", 1)
    for name in ("empty", "flat"):
        with pytest.raises(ValueError, match=r"no class folders in .*; put the images of each class into a folder"):
            layouts.list_folder(tmp_path / name)
    base = make_folder(tmp_path / "set")
    save(base / "val" / "cat" / "x.png", 1)
    with pytest.warns(UserWarning, match="files left out: 1 beside train and test, val;"):
        assert layouts.list_folder(base).train == 8
    shutil.rmtree(base / "val")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(OSError, match=r"dataset='.*dog': cannot be read \(Permission denied\)"):
        layouts.list_folder(base)


def test_a_folder_too_small_to_be_split_is_refused_in_one_line(tmp_path):
    def tested(path):
        return layouts.generator(0, "split by name", path.encode().hex()).random() < 0.2

    for kind in ("cat", "dog"):
        kept = [f"{kind}/{i}.png" for i in range(20) if not tested(f"{kind}/{i}.png")]
        save(tmp_path / "few" / kept[0], 1)
        save(tmp_path / "few" / kept[1], 2)
    with pytest.raises(
        ValueError, match=r"dataset='folder:.*so few images that none of them is kept for testing; more"
    ):
        layouts.list_folder(tmp_path / "few")
    save(tmp_path / "few" / next(f"rat/{i}.png" for i in range(99) if tested(f"rat/{i}.png")), 1)
    with pytest.raises(ValueError, match=r"a fifth is kept for testing, and of rat that is all; more images"):
        layouts.list_folder(tmp_path / "few")


@pytest.mark.parametrize("name", ["..", ".", "", "a\0b"])
def test_class_names_that_are_no_folder_are_refused(name, tmp_path):
    assert data.folder_name("../../a") == ".._.._a" and data.folder_name("a\\b") == "a_b"
    with pytest.raises(ValueError, match=r"class_names=.*cannot name a folder"):
        data.folder_name(name)
    like = ImageSet(**GOOD | dict(class_names=("a", name)))
    save(tmp_path / "synthetic" / "pets" / "a" / "0.png", 1)
    with pytest.raises(ValueError, match=r"class_names=.*cannot name a folder"):
        data.public_images("pets", tmp_path, like=like, cache=tmp_path / "cache")


# -------------------------------------------------------------------------------------------------------- image folders


def test_folders_keep_one_size_and_grey_only_if_every_file_does(load, tmp_path):
    grey = make_folder(tmp_path / "grey", mode="L", height=9, width=7)
    splits = load(f"folder:{grey}")
    assert splits.train.images.shape == (8, 1, 9, 7) and splits.test.images.shape == (4, 1, 9, 7)
    assert splits.train.class_names == ("cat", "dog") and splits.test.labels.tolist() == [0, 0, 1, 1]
    assert np.array_equal(splits.test.images[0, 0], np.asarray(Image.open(grey / "test" / "cat" / "000.png")))
    assert load(f"folder:{grey}", image_size=6).train.images.shape == (8, 1, 6, 6)

    save(grey / "train" / "cat" / "colour.png", 77, height=9, width=7)
    splits = load(f"folder:{grey}")
    assert splits.train.images.shape == (9, 3, 9, 7)
    assert torch.equal(splits.test.images[:, 0], splits.test.images[:, 2])

    save(grey / "train" / "cat" / "odd.png", 78, height=300, width=500)
    assert load(f"folder:{grey}").train.images.shape == (10, 3, 224, 224)


def test_formats_and_transparency(load, tmp_path):
    base = make_folder(tmp_path / "set")
    picture(50).convert("P").save(base / "train" / "cat" / "palette.png")
    picture(51).convert("RGBA").save(base / "train" / "cat" / "alpha.PNG")
    picture(52).convert("CMYK").save(base / "train" / "cat" / "print.jpg")
    picture(53).convert("1").save(base / "train" / "cat" / "bits.png")
    assert load(f"folder:{base}").train.images.shape == (12, 3, 12, 12)


def test_unreadable_images_are_named_counted_and_not_cached(load, tmp_path):
    base = make_folder(tmp_path / "set", suffix="jpg", height=40, width=40)
    whole = (base / "train" / "dog" / "001.jpg").read_bytes()
    (base / "train" / "dog" / "001.jpg").write_bytes(whole[: len(whole) // 2])
    (base / "test" / "cat" / "001.jpg").write_bytes(b"no image")
    Image.fromarray(np.zeros((40, 40), np.uint16)).save(base / "test" / "cat" / "deep.png")
    with pytest.raises(ValueError) as caught:
        load(f"folder:{base}")
    line = str(caught.value)
    assert "3 of 13 images cannot be decoded" in line and "\n" not in line
    for told in ("'train/dog/001.jpg' (", "'test/cat/001.jpg' (not an image)", "'test/cat/deep.png' (", "not 8 bits"):
        assert told in line
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [".lock"]
    for bad in ("train/dog/001.jpg", "test/cat/001.jpg", "test/cat/deep.png"):
        (base / bad).unlink()
    assert len(load(f"folder:{base}").train) == 7


def test_missing_and_empty_class_folders(load, tmp_path):
    base = make_folder(tmp_path / "set")
    (base / "train" / "owl").mkdir()
    with pytest.raises(ValueError, match=r"dataset='folder:.*test/ lacks the class folders owl"):
        load(f"folder:{base}")
    (base / "test" / "owl").mkdir()
    with pytest.raises(ValueError, match="no images in train/owl"):
        load(f"folder:{base}")
    save(base / "train" / "owl" / "0.png", 5)
    with pytest.raises(ValueError, match="no images in test/owl"):
        load(f"folder:{base}")
    save(base / "test" / "owl" / "0.png", 6)
    save(base / "test" / "yak" / "0.png", 7)
    with pytest.raises(ValueError, match="train/ lacks the class folders yak"):
        load(f"folder:{base}")
    shutil.rmtree(base / "test")
    with pytest.raises(FileNotFoundError, match=r"no folder .*test; wanted are test/CLASS/IMAGE"):
        load(f"folder:{base}")


def test_links_that_leave_the_folder_are_refused(load, tmp_path):
    base = make_folder(tmp_path / "set")
    inner, outer = base / "train" / "cat" / "inner.png", base / "train" / "cat" / "outer.png"
    inner.symlink_to("000.png")
    with pytest.warns(UserWarning, match="exact copies: 1 among the training images, 0 of"):
        assert len(load(f"folder:{base}").train) == 9
    outer.symlink_to(save(tmp_path / "private.png", 9))
    with pytest.raises(ValueError, match=r"paths that leave it: 1, such as .*outer\.png"):
        load(f"folder:{base}")
    outer.unlink()
    (base / "train" / "cat" / "loop").symlink_to("..")
    with pytest.raises(ValueError, match=r"loop': is a link to a folder"):
        load(f"folder:{base}")
    linked = tmp_path / "linked"
    (base / "train" / "cat" / "loop").unlink()
    linked.symlink_to(base)  # the folder itself may be a link
    with pytest.warns(UserWarning, match="exact copies: 1 among"):
        assert len(load(f"folder:{linked}").train) == 9


def test_copies_within_and_across_are_reported(load, tmp_path):
    base = make_folder(tmp_path / "set")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(f"folder:{base}")  # nothing to report
    shutil.copy(base / "train" / "cat" / "000.png", base / "train" / "dog" / "same.png")
    Image.open(base / "train" / "cat" / "001.png").save(base / "test" / "cat" / "other.bmp")  # same pixels, other file
    for _ in range(2):  # fresh and from the cache
        said = (
            "1 among the training images, 1 of a training image among the test images .train/dog/same.png equals "
            "train/cat/000.png, test/cat/other.bmp equals train/cat/001.png.; .* not for release"
        )
        with pytest.warns(UserWarning, match=said) as told:
            load(f"folder:{base}")
        assert "test accuracy is too high" in str(told[0].message)
    (base / "test" / "cat" / "other.bmp").unlink()
    with pytest.warns(UserWarning, match="1 among the training images, 0 of a training image among the test") as told:
        load(f"folder:{base}")
    assert not any("too high" in str(w.message) for w in told), "no test image is a copy"


def test_copies_in_cifar_are_reported(load, tmp_path, monkeypatch):
    make_equal_cifar(tmp_path, monkeypatch)
    said = r"exact copies: 40 .* 10 of a .*\(training image 10 equals training image 0, .*test image 0 equals training image 0"
    with pytest.warns(UserWarning, match=said):
        load("cifar10", tmp_path)


def make_equal_cifar(root: Path, monkeypatch) -> None:
    """Six batches that hold the same ten images."""
    images = np.random.default_rng(0).integers(0, 256, (10, 3072), dtype=np.uint8)
    monkeypatch.setattr(np.random, "default_rng", lambda seed: Same(images))
    make_cifar(root, datasets.CIFAR10, monkeypatch, 10, "labels")


class Same:
    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def integers(self, *args, **kwargs) -> np.ndarray:
        return self.images


def test_the_digest_follows_content_names_and_labels_but_not_the_place(load, tmp_path):
    base = make_folder(tmp_path / "set")
    digest = load(f"folder:{base}").digest
    moved = shutil.copytree(base, tmp_path / "moved", copy_function=shutil.copyfile)  # other times
    assert load(f"folder:{moved}").digest == digest
    seen = {digest}
    save(moved / "train" / "cat" / "000.png", 4321)
    seen.add(load(f"folder:{moved}").digest)
    (moved / "train" / "cat" / "000.png").rename(moved / "train" / "cat" / "renamed.png")
    seen.add(load(f"folder:{moved}").digest)
    (moved / "train" / "cat" / "renamed.png").rename(moved / "train" / "dog" / "renamed.png")
    seen.add(load(f"folder:{moved}").digest)
    seen.add(load(f"folder:{moved}", image_size=5).digest)
    assert len(seen) == 5


# ------------------------------------------------------------------------------------------------ the cache, its faults


def entry(cache: Path, suffix: str) -> Path:
    (found,) = cache.glob(f"*{suffix}")
    return found


def test_a_second_load_decodes_nothing_and_changed_files_do(load, tmp_path, no_decoding):
    base = make_folder(tmp_path / "set")
    first = load(f"folder:{base}")
    expected = first.train.images.clone()
    first.train.images[:] = 0  # reaches this process's memory, never the file
    names = sorted(p.name for p in (tmp_path / "cache").iterdir())
    modes = {p.stat().st_mode & 0o777 for p in (tmp_path / "cache").iterdir()}
    assert modes == {0o600}, "images that their owner keeps from others are kept from them here"
    save(base / "train" / "cat" / "new.png", 99)
    assert len(load(f"folder:{base}").train) == 9
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == names, "names tell nothing of the images"
    assert torch.equal(first.test.images, load(f"folder:{base}").test.images), "what was loaded before stays"
    (base / "train" / "cat" / "new.png").unlink()
    assert torch.equal(load(f"folder:{base}").train.images, expected)
    no_decoding()
    assert torch.equal(load(f"folder:{base}").train.images, expected)
    os.utime(base / "train" / "cat" / "000.png", (1, 1))
    with pytest.raises(AssertionError, match="decoded"):
        load(f"folder:{base}")


def test_an_image_of_the_same_size_with_its_time_set_back_is_decoded_again(load, tmp_path):
    """A face that was blacked out must not be trained on because a copy kept its date."""
    base = make_folder(tmp_path / "set", suffix="bmp")
    path = base / "train" / "cat" / "000.bmp"
    before, pixels = path.stat(), load(f"folder:{base}").train.images[0].clone()
    Image.new("RGB", Image.open(path).size).save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size and pixels.any()
    assert not load(f"folder:{base}").train.images[0].any()


def test_a_cache_may_be_larger_than_the_memory(tmp_path):
    size = psutil.virtual_memory().total + psutil.swap_memory().total + (1 << 30) >> 20 << 20
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", size)
    images = image_cache.mapped(tmp_path / "sparse", (size >> 20, 1, 1024, 1024))
    images[-1, 0, -1] = 7  # in memory only
    assert images[-1].sum() == 7 * 1024
    assert image_cache.mapped(tmp_path / "sparse", (size >> 20, 1, 1024, 1024))[-1].sum() == 0


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self):
        return (os.mkdir, (str(self.sprung),))


def trap(path: Path) -> None:
    path.write_bytes(pickle.dumps(Trap(path.parent / "sprung")))


def test_a_pickle_among_the_images_is_no_image(load, tmp_path):
    base = make_folder(tmp_path / "set")
    trap(base / "train" / "cat" / "000.png")
    with pytest.raises(ValueError, match=r"1 of 12 images cannot be decoded: 'train/cat/000\.png' \(not an image\)"):
        load(f"folder:{base}")
    assert not (base / "train" / "cat" / "sprung").exists()
    pickle.loads((base / "train" / "cat" / "000.png").read_bytes())
    assert (base / "train" / "cat" / "sprung").exists(), "the trap works"


@pytest.mark.parametrize(
    ("suffix", "damage", "said"),
    [
        (".u8", halve, r"\.u8: damaged cache entry \(2592 bytes instead of 5184\); decoding again"),
        (".u8", flip_byte, r"\.u8: damaged cache entry \(its sha256 differs from the record\); decoding again"),
        (".json", halve, r"\.json: it cannot be read .*; it is left out and made anew"),
        (".json", lambda path: flip_byte(path), r"\.json: its checksum does not match; it is left out and made anew"),
        (".json", lambda path: path.write_text("[]"), r"\.json: it cannot be read"),
        (".json", lambda path: trap(path), r"\.json: it cannot be read"),
        (".u8", lambda path: trap(path), r"\.u8: damaged cache entry \(.* bytes instead of 5184\)"),
    ],
)
def test_a_damaged_entry_is_named_and_rebuilt(load, tmp_path, no_decoding, suffix, damage, said):
    base = make_folder(tmp_path / "set")
    expected = load(f"folder:{base}").train.images.clone()
    damage(entry(tmp_path / "cache", suffix))
    with pytest.warns(UserWarning, match=said):
        assert torch.equal(load(f"folder:{base}").train.images, expected)
    no_decoding()
    assert torch.equal(load(f"folder:{base}").train.images, expected)
    assert not (tmp_path / "cache" / "sprung").exists()


def test_pixels_without_their_record_do_not_count(load, tmp_path):
    base = make_folder(tmp_path / "set")
    expected = load(f"folder:{base}").train.images.clone()
    entry(tmp_path / "cache", ".json").unlink()
    flip_byte(entry(tmp_path / "cache", ".u8"))
    assert torch.equal(load(f"folder:{base}").train.images, expected)


SLOW = """
import sys, time
from dpmix.images import data, decoding
base, cache, log = sys.argv[1:]
fast = decoding.pixels
def slow(*args):
    with open(log, "a") as out:
        out.write("x")
    time.sleep(0.05)
    return fast(*args)
decoding.pixels = slow
print(data.load("folder:" + base, cache=cache).digest)
"""


def start(base: Path, cache: Path, log: Path) -> subprocess.Popen:
    command = [sys.executable, "-W", "ignore", "-c", SLOW, str(base), str(cache), str(log)]
    return subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True)


def test_two_processes_at_once_decode_once(load, tmp_path):
    base, cache, log = make_folder(tmp_path / "set", train=10, test=5), tmp_path / "cache", tmp_path / "log"
    both = [start(base, cache, log) for _ in range(2)]
    digests = {process.communicate(timeout=300)[0].strip() for process in both}
    assert digests == {load(f"folder:{base}").digest}
    assert len(log.read_text()) == 30
    assert sorted(p.suffix for p in cache.iterdir()) == ["", ".json", ".u8"]


def test_a_killed_decoding_leaves_nothing_that_is_read(load, tmp_path):
    base, cache, log = make_folder(tmp_path / "set", train=80, test=40), tmp_path / "cache", tmp_path / "log"
    process = start(base, cache, log)
    deadline = time.monotonic() + 300
    while not (log.exists() and len(log.read_text()) > 20) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert sorted(p.suffix for p in cache.iterdir()) == ["", ".tmp"]  # it was killed in the middle
    splits = load(f"folder:{base}")
    fresh = data.load(f"folder:{base}", cache=tmp_path / "elsewhere")
    assert torch.equal(splits.train.images, fresh.train.images) and splits.digest == fresh.digest
    assert sorted(p.suffix for p in cache.iterdir()) == ["", ".json", ".u8"]


KILLS = """
import json, os, random, signal, sys, time
from pathlib import Path
from dpmix.images import data, decoding
base, folder, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
chance = random.Random(seed)
fast, replace = decoding.pixels, Path.replace
def slow(*args):
    time.sleep(0.002)
    return fast(*args)
decoding.pixels = slow

def child(cache, dies_at=None):
    pid = os.fork()
    if pid:
        return pid
    renames = []
    def dying(self, target):
        renames.append(target)
        if dies_at == len(renames) - 0.5: os.kill(os.getpid(), signal.SIGKILL)  # before the rename
        done = replace(self, target)
        if dies_at == len(renames): os.kill(os.getpid(), signal.SIGKILL)  # after it
        return done
    Path.replace = dying
    try:
        (folder / "digest").write_text(data.load("folder:" + base, cache=cache).digest)
        os._exit(0)
    finally:
        os._exit(1)

def end(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

began = time.monotonic()
assert end(child(folder / "calm")) == 0
took, calm, statuses = time.monotonic() - began, (folder / "digest").read_text(), []
for n, moment in enumerate(["write"] * 6 + [0.5, 1, 1.5, 2]):
    cache = folder / f"cache{n % 3 if moment == 'write' else n}"  # some meet what others have left
    pid = child(cache, None if moment == "write" else moment)
    if moment == "write":
        time.sleep(chance.uniform(0.05, 1) * took)
        os.kill(pid, signal.SIGKILL)
    statuses.append(end(pid))
for n in (0, 1, 2, 6, 7, 8, 9):
    assert end(child(folder / f"cache{n}")) == 0 and (folder / "digest").read_text() == calm
    left = sorted(p.name for p in (folder / f"cache{n}").iterdir())
    assert left == sorted(p.name for p in (folder / "calm").iterdir()), left
    for name in left:
        same = (folder / f"cache{n}" / name).read_bytes() == (folder / "calm" / name).read_bytes()
        assert same, name
print(json.dumps(statuses))
"""


def test_decoding_killed_at_random_moments_and_around_each_rename(tmp_path):
    base = make_folder(tmp_path / "set", train=40, test=20)
    command = [sys.executable, "-W", "error", "-c", KILLS, str(base), str(tmp_path), "1"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    statuses = json.loads(done.stdout)
    assert statuses[6:] == [-9] * 4 and set(statuses[:6]) <= {-9, 0}, "before and after each rename, and at any moment"


def test_a_full_disk_and_a_cache_that_cannot_be_written(load, tmp_path, monkeypatch):
    base = make_folder(tmp_path / "set")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(
            OSError, match=r"cache='.*cannot be written \(No space left on device\); free space or name"
        ):
            load(f"folder:{base}")
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [".lock"]
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cache='.*file': cannot be written"):
        data.load(f"folder:{base}", cache=tmp_path / "file")
    assert len(load(f"folder:{base}").train) == 8


# ---------------------------------------------------------------------------------------------- public images, overlaps


def test_the_shipped_synthetic_digits_overlap_nothing_private():
    public, splits = data.public_images("digits"), data.load("digits")
    assert public.images.shape[1:] == splits.train.images.shape[1:] and len(public) >= 1437
    assert public.class_names == splits.train.class_names and not public.flip
    refuse_overlap(splits, public)


@pytest.fixture
def synthetic(tmp_path, monkeypatch):
    """Writes the given arrays where the synthetic digits are expected, with a matching record."""
    monkeypatch.setattr(data, "PUBLIC", tmp_path)

    def write(**arrays):
        path = tmp_path / "synthetic_digits.npz"
        np.savez(path, **arrays)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        path.with_suffix(".json").write_text(json.dumps({"sha256": digest}))
        return path

    return write


def test_synthetic_digits_absent_altered_incomplete_or_pickled(synthetic, tmp_path):
    with pytest.raises(FileNotFoundError, match="rebuild it with notebooks/public_standins"):
        data.public_images("digits")
    images = np.zeros((20, 1, 8, 8), np.uint8)
    path = synthetic(images=images, labels=np.arange(20) % 10)
    assert len(data.public_images("digits")) == 20
    flip_byte(path)
    with pytest.raises(ValueError, match="its sha256 is not the recorded"):
        data.public_images("digits")
    synthetic(images=images, labels=np.arange(20) % 7)
    with pytest.raises(ValueError, match=r"no synthetic images in .* for 3 classes: 7, 8, 9"):
        data.public_images("digits")
    path = synthetic(images=np.array([Trap(tmp_path / "sprung")]), labels=np.arange(1))
    with pytest.raises(ValueError, match="allow_pickle"):
        data.public_images("digits")
    assert not (tmp_path / "sprung").exists()
    with np.load(path, allow_pickle=True) as arrays:
        arrays["images"]
    assert (tmp_path / "sprung").exists(), "the trap works"


def test_public_images_in_folders_take_classes_and_shape_of_the_private(load, tmp_path):
    make_sun397(tmp_path)
    public = lambda **more: data.public_images("sun397", tmp_path, cache=tmp_path / "cache", **more)  # noqa: E731
    with pytest.raises(
        FileNotFoundError, match=r"no synthetic images in .*sun397/CLASS/; make them with dpmix\.images\.synthesis"
    ):
        public()
    with pytest.warns(UserWarning):
        private = load("sun397", tmp_path, image_size=24).train
    folder = tmp_path / "synthetic" / "sun397"
    for name in ("beach", "abbey"):
        save(folder / name / "0.png", ord(name[0]), height=50, width=50)
    with pytest.raises(ValueError, match=r"no synthetic images in .* for 1 class: apartment_building/outdoor"):
        public(like=private)
    save(tmp_path / "synthetic" / "sun397" / data.folder_name("apartment_building/outdoor") / "0.png", 9)
    found = public(like=private)
    assert found.images.shape == (3, 3, 24, 24) and found.class_names == private.class_names
    assert found.labels.tolist() == [0, 1, 2]
    shutil.copy(folder / "beach" / "0.png", folder / "beach" / "1.png")
    with pytest.warns(UserWarning, match="left out as exact copies of others: 1 of 4 synthetic images"):
        assert torch.equal(public(like=private).images, found.images)
    for file in ("0.png", "1.png"):
        shutil.copy(folder / "abbey" / "0.png", folder / "beach" / file)
    with (
        pytest.warns(UserWarning, match="2 of 4 synthetic"),
        pytest.raises(ValueError, match=r"for 1 class: beach"),
    ):
        public(like=private)
    save(tmp_path / "synthetic" / "sun397" / "bich" / "0.png", 9)
    with pytest.raises(ValueError, match="holds folders of no class: bich"):
        public(like=private)


def edit(images: torch.Tensor, change) -> torch.Tensor:
    return torch.stack(
        [torch.from_numpy(np.array(change(Image.fromarray(x.permute(1, 2, 0).numpy())))) for x in images]
    ).permute(0, 3, 1, 2)


def jpeg(image: Image.Image) -> Image.Image:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=75)
    return Image.open(out)


def images_of(*pictures: Image.Image) -> ImageSet:
    images = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures])
    return ImageSet(images.contiguous(), torch.zeros(len(pictures), dtype=torch.int64), ("any",))


def test_overlap_finds_copies_and_near_copies_only():
    private = images_of(*(picture(i, 32, 32) for i in range(20)))
    strangers = images_of(*(picture(i, 32, 32) for i in range(100, 120)))
    assert [len(x) for x in overlap(private, strangers)] == [0, 0]
    exact, near = overlap(private, images_of(picture(105, 32, 32), picture(3, 32, 32)))
    assert exact.tolist() == [[3, 1]] and len(near) == 0
    changes = {
        "JPEG": jpeg,
        "larger": lambda x: x.resize((48, 48), Image.Resampling.BICUBIC),
        "noise": lambda x: Image.fromarray(np.clip(np.random.default_rng(0).normal(x, 3), 0, 255).astype(np.uint8)),
    }
    for name, change in changes.items():
        exact, near = overlap(private, images_of(*(change(picture(i, 32, 32)) for i in (4, 9, 200))))
        assert len(exact) == 0 and near.tolist() == [[4, 0], [9, 1]], name
    light, hue = (torch.from_numpy(np.array(picture(i, 32, 32, "L")).astype(np.int64) // 8) for i in (300, 301))
    tint = torch.tensor([40, 100, 180])[:, None, None] + light  # same light, strong tint, other hues: not alike
    tinted = torch.stack([tint, tint + torch.stack([hue - 16, 0 * hue, 16 - hue])]).to(torch.uint8)
    tinted = ImageSet(tinted, torch.zeros(2, dtype=torch.int64), ("any",))
    assert [len(x) for x in overlap(tinted.subset([0]), tinted.subset([1]))] == [0, 0]
    blank = images_of(*[Image.new("RGB", (32, 32), (90, 90, 90 + i)) for i in range(3)])
    blank.images[:, :, 0, 0] += 1
    assert [len(x) for x in overlap(blank.subset([0, 1]), blank.subset([2]))] == [0, 0]  # nothing to see, no alarm
    assert [len(x) for x in overlap(blank.subset([]), blank)] == [0, 0]


def test_grey_and_colour_are_compared_in_grey():
    private = images_of(*(picture(i, 32, 32) for i in range(5)))
    grey = ImageSet(private.images.float().mean(1, keepdim=True).round().to(torch.uint8), private.labels, ("any",))
    assert overlap(private, grey).near.tolist() == [[i, i] for i in range(5)]


def test_different_digits_are_no_copies_and_a_slipped_in_digit_is_refused():
    splits = data.load("digits")
    assert [len(x) for x in overlap(splits.train, splits.test)] == [0, 0]
    assert [len(x) for x in overlap(splits.train, splits.train)] == [1437, 0]  # each digit copies itself, no other one
    strangers = ImageSet(
        torch.from_numpy(np.random.default_rng(0).integers(0, 256, (50, 1, 8, 8), dtype=np.uint8)),
        torch.arange(50) % 10,
        splits.train.class_names,
    )
    refuse_overlap(splits, strangers)
    strangers.images[7] = splits.test.images[11]
    with pytest.raises(ValueError, match=r"1 exact and 0 near copies of test images .public image 7 of number 11"):
        refuse_overlap(splits, strangers)
    strangers.images[7] = (splits.train.images[5].float() * 0.97).round().to(torch.uint8)
    with pytest.raises(ValueError, match=r"0 exact and 1 near copies of training images .public image 7 of number 5"):
        refuse_overlap(splits, strangers)


# ------------------------------------------------------------------------------------------------ benchmarks' unpacking


def test_packed_jpeg_files_unpack_into_the_folder_layout(load, tmp_path):
    files = []
    for i in range(12):
        out = io.BytesIO()
        picture(i, 32, 32).save(out, "JPEG", quality=95)
        files.append(out.getvalue())
    offsets = np.cumsum([0] + [len(f) for f in files])
    arrays = dict(
        labels=np.arange(12, dtype=np.uint8) % 2, is_test=np.arange(12) >= 8, classes=np.array(["cat", "dog"])
    )
    np.savez(tmp_path / "packed.npz", bytes=np.frombuffer(b"".join(files), np.uint8), offsets=offsets, **arrays)
    command = [sys.executable, "benchmarks/unpack_cifar10.py", str(tmp_path / "packed.npz"), str(tmp_path / "set")]
    subprocess.run(command, cwd=PROJECT, check=True)
    splits = load(f"folder:{tmp_path / 'set'}")
    assert (len(splits.train), len(splits.test)) == (8, 4) and splits.train.images.shape[1:] == (3, 32, 32)
    assert (tmp_path / "set" / "test" / "dog" / "00009.jpg").read_bytes() == files[9]
    assert np.array_equal(splits.test.images[0].permute(1, 2, 0), np.asarray(Image.open(io.BytesIO(files[8]))))
