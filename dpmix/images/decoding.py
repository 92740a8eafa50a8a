"""One image file's bytes to pixels: what Pillow would pass over in silence is turned upright, laid on white, or refused."""

import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from dpmix.core.checks import require

GREY, COLOUR = ("1", "L", "LA"), ("RGB", "RGBA", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB", "RGBX", "La", "RGBa")
GROUND = (255, 255, 255, 255)
_ORIENTATION, _SIDEWAYS = 0x0112, (5, 6, 7, 8)
Pixels = UInt8[np.ndarray, "C H W"]
_STRIP = 16  # an image longer than this many times its width is cut to its middle before it is enlarged


class Header(NamedTuple):
    """Size as it will be seen, that is upright, and whether the file is greyscale."""

    width: int
    height: int
    grey: bool


def header(path: Path) -> Header | None:
    """None where decoding will find out what is wrong."""
    try:
        with Image.open(path) as image:
            size = image.size[::-1] if image.getexif().get(_ORIENTATION) in _SIDEWAYS else image.size
            return Header(*size, image.mode in GREY)
    except Exception:
        return None


@contextmanager
def bombs_refused() -> Iterator[None]:
    """Pillow only warns, without a file name, of images of more than 89 million pixels. Around threads, not inside them."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def reason(error: Exception) -> str:
    """Why a file cannot be decoded, in a few whole words."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"more than {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller"
    return textwrap.shorten(str(error) or type(error).__name__, 120, placeholder=" ...")


def pixels(data: bytes, height: int, width: int, channels: int) -> tuple[Pixels, list[str]]:
    """`of_image`, from the bytes of a file."""
    with Image.open(BytesIO(data)) as opened:
        return of_image(opened, height, width, channels)


def of_image(image: Image.Image, height: int, width: int, channels: int) -> tuple[Pixels, list[str]]:
    """Its pixels, and what was done to it: "turned" (by its EXIF mark), "transparent" (laid on white), "frames" (the first of
    several taken). An image of another size is resized (bicubic, until it covers the wanted size), then cropped at its
    centre; a strip is cut to its middle before that, so that memory stays bounded. Raises ValueError for more than 8 bits a
    channel, and whatever Pillow raises."""
    done = []
    deep = any(bits in str(tile) for tile in getattr(image, "tile", ()) for bits in (";16", ";12"))
    require(image.mode in GREY + COLOUR and not deep, "mode", image.mode, "not 8 bits a channel")  # cut to a byte else
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:  # a telephone's MPO holds previews
        done.append("frames")
    if image.getexif().get(_ORIENTATION, 1) in (2, 3, 4, *_SIDEWAYS):
        image = ImageOps.exif_transpose(image)
        done.append("turned")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if np.asarray(image.getchannel("A")).min() < 255:
            image = Image.alpha_composite(Image.new("RGBA", image.size, GROUND), image)
            done.append("transparent")
    return fit(image, height, width, channels), done


def fit(image: Image.Image, height: int, width: int, channels: int) -> Pixels:
    """What torchvision's Resize and CenterCrop give, for the images that a camera makes; unchanged at the right size."""
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        longest = _STRIP * min(image.size)
        w, h = min(image.width, longest), min(image.height, longest)
        if image.size != (w, h):
            left, top = (image.width - w) // 2, (image.height - h) // 2
            image = image.crop((left, top, left + w, top + h))
        cover = (int(w * height / h), height) if height * w >= width * h else (width, int(h * width / w))
        left, top = round((cover[0] - width) / 2), round((cover[1] - height) / 2)
        image = image.resize(cover, Image.Resampling.BICUBIC).crop((left, top, left + width, top + height))
    return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)
