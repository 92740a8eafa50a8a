"""The public corpus of the demo scale, characters rendered from the fonts that matplotlib carries.

Each image is made the way scikit-learn's digits were: a black-and-white bitmap of 32x32 that the character's bounding box
fills in height, counted in blocks of 4x4 (0 to 16 dots), here scaled to 0..255. The character is warped (rotation, shear,
proportions, a smooth elastic field) and its stroke made thinner or thicker, which is simple on a signed distance field:
the warped field is thresholded at another level. Nothing here reads a private image."""

from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from dpmix.core.checks import require, whole
from dpmix.core.rng import generator
from dpmix.images.data import ImageSet

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = CHARACTERS[:10]
FONTS = (
    *(f"DejaVu{f}{look}" for f in ("Sans", "SansMono") for look in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{look}" for look in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{look}" for look in ("", "Bol", "Italic", "BolIta")),
    *(f"cm{face}10" for face in ("b", "r", "ss", "ti", "tt")),
)

_CANVAS, _GLYPH = 96, 64  # a field of 96x96 dots in which the longer side of the character is 64
_BITMAP, _BLOCK = 32, 4  # the bitmap of scikit-learn's digits and the blocks in which it is counted


def corpus(n: int, seed: int, characters: str = CHARACTERS) -> ImageSet:
    """`n` rendered characters [n, 1, 8, 8], equally many of each; character i has label i modulo the number of characters.
    Image i depends on `(seed, i)` and `characters` only, so a smaller corpus is the beginning of a larger one. About 2,000
    images a second on one core."""
    whole("n", n, 1)
    known = len(characters) > 0 and len(set(characters)) == len(characters) and set(characters) <= set(CHARACTERS)
    require(known, "characters", characters, f"must be different characters out of {CHARACTERS}")
    parts = [_render(range(i, min(i + 512, n)), seed, characters) for i in range(0, n, 512)]
    return ImageSet(torch.cat(parts), torch.arange(n) % len(characters), tuple(characters), flip=False)


def _render(ids: range, seed: int, characters: str) -> UInt8[Tensor, "n 1 8 8"]:
    fields, warps, bumps, strokes, aspects = [], [], [], [], []
    for i in ids:
        rng = generator(seed, "glyph", i)
        font = FONTS[rng.integers(len(FONTS))]
        rotation, shear, stretch, stroke, aspect = rng.uniform(-1, 1, 5)
        field = _distance_field(font, characters[i % len(characters)])
        angle = np.deg2rad(12 * rotation)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        warps.append(turn @ np.array([[np.exp(0.25 * stretch), 0.25 * shear], [0, 1]]))
        bumps.append(rng.normal(0, 0.06, (2, 4, 4)))
        fields.append(field)
        # half a stroke of 3 to 7 dots whatever the font (the mean depth is half of it), but hairlines are not cut
        half = 2 * float(field[field > 0].mean())
        strokes.append(np.clip(5 + 2 * stroke - half, -2, 5))
        aspects.append(np.exp(0.2 * aspect))
    field_t = torch.from_numpy(np.stack(fields))[:, None]
    warp = torch.from_numpy(np.stack(warps)).float()
    bump = torch.from_numpy(np.stack(bumps)).float()
    level = torch.tensor(strokes, dtype=torch.float32)[:, None, None, None]

    def look(points: Float[Tensor, "n h w 2"]) -> Float[Tensor, "n 1 h w"]:
        """The warped field at `points` (x, y in -1..1), above zero on the stroke."""
        shift = F.grid_sample(bump, points, mode="bicubic", padding_mode="border", align_corners=True)
        bent = (points.flatten(1, 2) @ warp.mT).view_as(points) + shift.permute(0, 2, 3, 1)
        return F.grid_sample(field_t, bent, padding_mode="border", align_corners=True) + level

    n, axis = len(ids), torch.linspace(-1.2, 1.2, 48)
    wide = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).expand(n, -1, -1, -1)
    ink = look(wide)[:, 0] > 0
    # the bounding box, then a frame around it: filled in height; in width, the character's own proportions
    low_x, high_x = _extent(ink.any(1), axis)
    low_y, high_y = _extent(ink.any(2), axis)
    height = high_y - low_y
    width = torch.maximum(high_x - low_x, height * torch.tensor(aspects, dtype=torch.float32))
    unit = (torch.arange(_BITMAP) + 0.5) / _BITMAP - 0.5
    x = ((low_x + high_x) / 2)[:, None] + width[:, None] * unit
    y = ((low_y + high_y) / 2)[:, None] + height[:, None] * unit
    frame = torch.stack([x[:, None, :].expand(-1, _BITMAP, -1), y[:, :, None].expand(-1, -1, _BITMAP)], -1)
    counts = F.avg_pool2d((look(frame) > 0).float(), _BLOCK)
    return (counts * 255).round().to(torch.uint8)


def _extent(marks: Tensor, axis: Tensor) -> tuple[Tensor, Tensor]:
    """First and last marked place along each row of `marks`, as coordinates, half a step wider on each side."""
    first = marks.float().argmax(1)
    last = len(axis) - 1 - marks.flip(1).float().argmax(1)
    half = (axis[1] - axis[0]) / 2
    return axis[first] - half, axis[last] + half


@cache
def _distance_field(font: str, character: str) -> np.ndarray:
    """Distance to the outline of the character in dots, positive inside, float32 [96, 96]; rendered at twice that."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    face = ImageFont.truetype(str(path), 4 * _GLYPH)
    left, top, right, bottom = face.getbbox(character)
    big = Image.new("L", (int(right - left), int(bottom - top)))
    ImageDraw.Draw(big).text((-left, -top), character, fill=255, font=face)
    scale = 2 * _GLYPH / max(big.size)
    size = (max(1, round(big.width * scale)), max(1, round(big.height * scale)))
    canvas = Image.new("L", (2 * _CANVAS, 2 * _CANVAS))
    canvas.paste(big.resize(size, Image.Resampling.BILINEAR), (_CANVAS - size[0] // 2, _CANVAS - size[1] // 2))
    ink = np.asarray(canvas) > 127
    field = (distance_transform_edt(ink) - distance_transform_edt(~ink)) / 2
    return field.reshape(_CANVAS, 2, _CANVAS, 2).mean((1, 3)).astype(np.float32)
