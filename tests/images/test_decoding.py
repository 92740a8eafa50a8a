"""What torchvision and Pillow pass over in silence: turned, transparent, deep, huge and long images; levels and suffixes."""

import os
import shutil
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import make_folder, picture, save
from torchvision.transforms import functional as F

from dpmix.images import data, decoding, layouts


@pytest.fixture
def load(tmp_path):
    return lambda name, **more: data.load(name, cache=tmp_path / "cache", **more)


@pytest.fixture
def base(tmp_path):
    return make_folder(tmp_path / "set")


@pytest.fixture
def quiet(recwarn):
    """What was warned of so far; afterwards forgotten."""

    def told() -> str:
        said = " | ".join(str(w.message) for w in recwarn.list)
        recwarn.clear()
        return said

    return told


# -------------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("name", [".ipynb_checkpoints", "@eaDir", "__MACOSX", ".thumbnails"])
def test_hidden_folders_and_files_are_left_out_at_every_level(load, base, quiet, name):
    digest = load(f"folder:{base}").digest
    quiet()
    for place in (base, base / "train", base / "test", base / "train" / "cat"):
        save(place / name / "x-checkpoint.png", 900)
    save(base / "train" / "cat" / "._000.png", 901)
    (base / "train" / "dog" / "Thumbs.db").write_bytes(b"thumbnails")
    splits = load(f"folder:{base}")
    assert splits.train.class_names == ("cat", "dog") and splits.digest == digest and quiet() == ""
    save(base / "train" / "owl" / "x.png", 902)  # the control: an ordinary folder is a class
    with pytest.raises(ValueError, match="test/ lacks the class folders owl"):
        load(f"folder:{base}")


def test_other_suffixes_are_counted_in_one_warning(load, base, quiet):
    load(f"folder:{base}")
    assert quiet() == ""
    for file in sorted((base / "train" / "cat").iterdir())[:3]:
        file.rename(file.with_suffix(".heic"))
    (base / "test" / "dog" / "000.png").rename(base / "test" / "dog" / "000")
    save(base / "train" / "beside.png", 7)
    splits = load(f"folder:{base}")
    assert (len(splits.train), len(splits.test)) == (5, 3)
    said = quiet()
    assert "files left out: 3 .heic, 1 " in said and "1 without suffix" in said and "1 in no class folder" in said
    assert "taken are .jpg .jpeg .png" in said and "|" not in said


def test_every_suffix_that_is_promised_is_taken(load, base):
    for i, suffix in enumerate(layouts.SUFFIXES):
        save(base / "train" / "cat" / f"promised{suffix.upper() if i % 2 else suffix}", 500 + i)
    assert len(load(f"folder:{base}").train) == 8 + len(layouts.SUFFIXES)


def test_a_folder_level_too_many_is_asked_about(load, tmp_path):
    base = make_folder(tmp_path / "set")
    for part in ("train", "test"):
        (base / part).rename(tmp_path / part)
        shutil.move(tmp_path / part, base / part / "photos")
    with pytest.raises(ValueError, match=r"one class alone, \['photos'\]; are the classes its folders \(cat, dog\)\?"):
        load(f"folder:{base}")
    for part in ("train", "test"):
        shutil.copytree(base / part / "photos", base / part / "more")
    with pytest.raises(
        ValueError, match=r"every class folder \(more, photos\) holds the same folders; are the classes"
    ):
        load(f"folder:{base}")
    flat = tmp_path / "flat"
    save(flat / "train" / "cat" / "0.png", 1)
    save(flat / "test" / "cat" / "0.png", 2)
    with pytest.raises(ValueError, match=r"one class alone, \['cat'\]; a classifier needs two"):
        load(f"folder:{flat}")
    save(flat / "train" / "dog" / "patient 1" / "0.png", 3)  # other folders inside a class are fine, as in torchvision
    save(flat / "test" / "dog" / "patient 2" / "0.png", 4)
    assert len(load(f"folder:{flat}").train) == 2


def test_class_folders_alone_are_split(load, tmp_path):
    for c in range(2):
        for i in range(10):
            save(tmp_path / "set" / "ab"[c] / f"{i}.png", 100 * c + i)
    save(tmp_path / "set" / "synthetic" / "a" / "0.png", 1000)
    splits = load(f"folder:{tmp_path / 'set'}")
    assert splits.train.labels.bincount().tolist() == [7, 9] and splits.test.labels.bincount().tolist() == [3, 1]
    assert load(f"folder:{tmp_path / 'set'}").digest == splits.digest
    shutil.move(tmp_path / "set" / "b", tmp_path / "set" / "val")
    with pytest.raises(FileNotFoundError, match=r"no folder .*train; wanted are train/CLASS/IMAGE"):
        load(f"folder:{tmp_path / 'set'}")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load(f"folder:{tmp_path / 'nowhere'}")


def test_names_that_are_no_utf8(load, base):
    cat, dog = base / "train" / "cat", base / "train" / "dog"
    latin, broken = Path(os.fsdecode(b"caf\xe9.png")), Path(os.fsdecode(b"na\xefve.png"))
    (cat / "000.png").rename(cat / latin)
    load(f"folder:{base}").digest.encode()
    (dog / broken).write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"na\\\\xefve\.png' \(not an image\)") as caught:
        load(f"folder:{base}")
    str(caught.value).encode()
    (dog / broken).unlink()
    cat.rename(base / "train" / os.fsdecode(b"caf\xe9"))
    with pytest.raises(
        ValueError, match=r"caf\\\\xe9': is no UTF-8 or has control characters, so it cannot name a class"
    ):
        load(f"folder:{base}")


# --------------------------------------------------------------------------------------------------------------- pixels


def pixels(path, size: int, channels: int = 3):
    return decoding.pixels(path.read_bytes(), size, size, channels)


@pytest.mark.parametrize("mark", range(1, 9))
def test_photographs_are_turned_upright(load, tmp_path, mark):
    upright = picture(3, 10, 16)
    undo = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM}
    undo |= {5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE}
    undo |= {8: Image.Transpose.ROTATE_270}
    stored = upright if mark == 1 else upright.transpose(undo[mark])
    exif = Image.Exif()
    exif[0x0112] = mark
    base = make_folder(tmp_path / "set", height=10, width=16)
    stored.save(base / "train" / "cat" / "000.png", exif=exif.tobytes())
    splits = load(f"folder:{base}")  # all have one size once they are upright
    assert np.array_equal(splits.train.images[0].permute(1, 2, 0), np.asarray(upright))


def test_what_was_erased_is_white(load, base, quiet):
    erased = picture(5).convert("RGBA")
    alpha = Image.new("L", (12, 12), 255)
    alpha.paste(0, (0, 0, 6, 12))
    alpha.paste(128, (6, 0, 7, 12))
    erased.putalpha(alpha)
    erased.save(base / "train" / "cat" / "000.png")
    opaque = picture(6).convert("RGBA")
    opaque.save(base / "train" / "cat" / "001.png")
    image, other = load(f"folder:{base}").train.images[:2]
    assert (image[:, :, :6] == 255).all()
    kept = np.asarray(picture(5)).transpose(2, 0, 1)
    assert np.array_equal(image[:, :, 7:], kept[:, :, 7:])
    assert np.abs(image[:, :, 6].numpy().astype(float) - (kept[:, :, 6] * 128.0 + 255 * 127) / 255).max() <= 1
    assert np.array_equal(other, np.asarray(picture(6)).transpose(2, 0, 1))
    said = quiet()
    assert "1 image (train/cat/000.png) transparent in places, which are white now" in said
    grey = Image.new("LA", (4, 4), (40, 0))
    grey.save(base / "x.png")
    assert pixels(base / "x.png", 4, 1)[0].min() == 255
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30])
    palette.save(base / "x.png", transparency=0)
    assert pixels(base / "x.png", 4)[0].min() == 255


def deep_png(path, channels: int) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    values = np.random.default_rng(0).integers(0, 2048, (12, 12, channels)).astype(">u2")  # 11 bits, as cameras give
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", 12, 12, 16, kind, 0, 0, 0))]
    parts.append(chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in values))))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b""))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bits_a_channel_are_refused_by_name(load, base, channels):
    deep_png(base / "train" / "cat" / "000.png", channels)
    with pytest.raises(ValueError, match=r"1 of 12 images cannot be decoded: 'train/cat/000\.png' \(.*not 8 bits"):
        load(f"folder:{base}")


def test_a_long_strip_takes_little_memory(tmp_path):
    path = tmp_path / "strip.png"
    strip = np.zeros((1, 20_000, 3), np.uint8)
    strip[:, 9_990:10_010] = 200
    Image.fromarray(strip).save(path)
    tracemalloc.start()
    image, _ = pixels(path, 224)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    assert image.shape == (3, 224, 224) and image.min() == 200  # its middle
    Image.fromarray(strip.transpose(1, 0, 2)).save(path)
    assert pixels(path, 224)[0].min() == 200


@pytest.mark.parametrize(("width", "height"), [(40, 23), (23, 40), (7, 50), (224, 10), (300, 299)])
def test_other_sizes_are_fitted_as_torchvision_does(tmp_path, width, height):
    path = save(tmp_path / "x.png", 1, height=height, width=width)
    resized = F.resize(Image.open(path), [24], F.InterpolationMode.BICUBIC)
    wanted = np.asarray(F.center_crop(resized, [24, 24])).transpose(2, 0, 1)
    found, _ = pixels(path, 24)
    if max(width, height) <= 16 * min(width, height):
        assert np.array_equal(found, wanted)
    else:
        assert found.shape == wanted.shape


def test_too_many_pixels_are_refused_with_the_name(load, base, monkeypatch):
    save(base / "train" / "cat" / "large.png", 1, height=40, width=40)
    for limit, good in (
        (1600, True),
        (1599, False),
        (700, False),
    ):  # Pillow warns above the limit, raises above twice it
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        if good:
            assert len(load(f"folder:{base}", image_size=12).train) == 9
            (base / "train" / "cat" / "large.png").touch()
            continue
        said = rf"'train/cat/large\.png' \(more than {limit:,} pixels; make it smaller\)"
        with pytest.raises(ValueError, match=said):
            load(f"folder:{base}", image_size=12)


def test_reasons_are_not_cut_in_mid_word():
    words = "one reason that is far too long for a single line " * 10
    told = decoding.reason(ValueError(words))
    assert len(told) <= 120 and told.endswith(" ...") and words.startswith(told[:-4] + " ")


def test_one_odd_image_that_decides_for_all_is_named(load, tmp_path, quiet):
    base = make_folder(tmp_path / "set", train=10, mode="L", height=9, width=7)
    assert load(f"folder:{base}").train.images.shape == (20, 1, 9, 7) and quiet() == ""
    save(base / "train" / "cat" / "colour.png", 77, height=9, width=7)
    assert load(f"folder:{base}").train.images.shape == (21, 3, 9, 7)
    assert "1 image (train/cat/colour.png) in colour among grey ones" in quiet()
    save(base / "train" / "cat" / "colour.png", 77, height=30, width=7, mode="L")
    assert load(f"folder:{base}").train.images.shape == (21, 1, 224, 224)
    assert "1 image (train/cat/colour.png) of another size than the rest" in quiet()
    load(f"folder:{base}", image_size=8)
    assert quiet() == ""
    for i in range(8):  # photographs of many sizes are ordinary
        save(base / "train" / "cat" / f"{i:03d}.png", i, height=20 + i, width=30, mode="L")
    load(f"folder:{base}")
    assert quiet() == ""


def test_no_text_of_a_data_set_shows_pixels(load, base):
    splits = load(f"folder:{base}")
    splits.train.images[:] = 173
    assert repr(splits.train) == "ImageSet(8 images, 3 × 12 × 12, 2 classes)"
    for text in (repr(splits), str(splits), f"{splits.test}"):
        assert (
            "173" not in text.replace(splits.digest, "") and "tensor" not in text and "set" not in text.lower().split()
        )
    assert "173" in repr(torch.full((2,), 173)), "the control: a tensor's own text shows them"
