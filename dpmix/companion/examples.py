"""Small steps of the page about one's own images: a folder to practise on, and what is shown of it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from dpmix.companion import plots
from dpmix.images import data
from dpmix.runs.predict import Prediction


def digits_folder(folder: Path) -> Path:
    """The digits as PNG files: train/CLASS, test/CLASS and, from the embedded generator, synthetic/CLASS."""
    splits = data.load("digits")
    for part, images in (("train", splits.train), ("test", splits.test), ("synthetic", data.public_images("digits"))):
        for i, (pixels, label) in enumerate(zip(images.images, images.labels.tolist(), strict=True)):
            place = Path(folder) / part / images.class_names[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[0].numpy()).save(place / f"{i:05d}.png")
    return Path(folder)


def predicted(found: Prediction, true: Sequence[str]) -> Figure:
    """Images with what a release says of them, its probability, and the true class."""
    pictures, words = [], []
    for source, said, scores, name in zip(found.sources, found.class_names, found.probabilities, true, strict=True):
        image = np.asarray(Image.open(source).convert("RGB").resize((64, 64), Image.Resampling.NEAREST))
        pictures.append(torch.from_numpy(image.transpose(2, 0, 1) / 255))
        words.append(f"{said} ({100 * scores.max():.0f} %)\ntrue: {name}")
    return plots.picture_rows([("What the release says", pictures, words)])
